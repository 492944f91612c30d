"""Two small worlds of music, `toy` and `tunes`, and what is trained for each: a codec, a judge, a text encoder.

A world is a module with ATTRIBUTES, PAIR and UNSEEN_PAIRS (which two attributes are never paired so in training),
SPLITS, SAMPLE_RATE, SECONDS, `combinations`, `describe`, `example`, `render` and `caption`.
"""

import hashlib
import importlib
from pathlib import Path

from support.data import Entry

WORLDS = {"toy": "toy.world", "tunes": "toy.tunes"}
SOURCES = {"toy": ("world.py",), "tunes": ("tunes.py", "band.py", "tunebook.py")}  # on which the sound depends


def world_of(name):
    """The module of a world, "toy" or "tunes"."""
    if name not in WORLDS:
        raise ValueError(f"--data must be {' or '.join(WORLDS)}, not {name!r}")
    return importlib.import_module(WORLDS[name])


def entries_of(name, numbers, seconds):
    """Data set entries of a world: a list for each split in `numbers`, {split: how many}, of clips of so many seconds.

    Their keys hold a hash of the world's source, so that a changed world is encoded anew."""
    world = importlib.import_module(WORLDS[name])
    source = b"".join((Path(__file__).parent / file).read_bytes() for file in SOURCES[name])
    version = hashlib.sha256(source).hexdigest()
    return [[Entry(f"{split} {i}", f"{version}-{split}-0-{i}",
                   lambda i=i, split=split: iter([world.example(i, split, 0, seconds)[0]]),
                   world.describe(i, split, 0)[1]) for i in range(n)] for split, n in numbers.items()]


def weights_of(name):
    """The folder in which the weights trained for a world ship."""
    folder = Path(__file__).parent / "weights"
    return folder if name == "toy" else folder / name
