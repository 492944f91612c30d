"""Study: the paper map, your own functions under the tests, the classic mistakes, and a window into decoding."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("masking", "model", "t5_encoder", "encodec_wrap", "sample", "train")


def is_ours(file):
    """Whether a file is of this repository; a virtual environment may lie in its folder."""
    return str(file).startswith(f"{ROOT}{os.sep}") and "site-packages" not in str(file)
