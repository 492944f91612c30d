"""Two small worlds of music, `toy` and `tunes`, and what is trained for each: a codec, a judge, a text encoder.

A world is a module with ATTRIBUTES, PAIR and UNSEEN_PAIRS (which two attributes are never paired so in training),
SPLITS, SAMPLE_RATE, SECONDS, `combinations`, `describe`, `example`, `render` and `caption`.
"""

import importlib
from pathlib import Path

WORLDS = {"toy": "toy.world", "tunes": "toy.tunes"}


def world_of(name):
    """The module of a world, "toy" or "tunes"."""
    if name not in WORLDS:
        raise ValueError(f"--data must be {' or '.join(WORLDS)}, not {name!r}")
    return importlib.import_module(WORLDS[name])


def weights_of(name):
    """The folder in which the weights trained for a world ship."""
    folder = Path(__file__).parent / "weights"
    return folder if name == "toy" else folder / name
