"""Study: the paper map, your own functions under the tests, the classic mistakes, and a window into decoding."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("masking", "model", "t5_encoder", "encodec_wrap", "sample", "train")
