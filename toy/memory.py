"""Has a model learned its training tunes by heart? Three measures, each beside what it says of tunes never trained on.

`melodies`: how many of the runs of intervals that a clip's pitch track goes through stand in some training tune. Tunes
of one tradition share turns of phrase, so test tunes score well above zero: memorising is what a model scores more.
`embeddings` and `codes`: how near a clip comes to its nearest neighbour among clips of the training set.
"""

from functools import lru_cache

import numpy as np
import torch

from toy import signals
from toy.tunebook import corpus

LENGTH = 7  # intervals in a run: 8 notes


def runs(pitches, length=LENGTH):
    """The runs of `length` intervals in a melody, repeated notes taken as one: a list of tuples.

    >>> runs([60, 62, 62, 64, 60], length=2)
    [(2, 2), (2, -4)]
    """
    steps = np.diff(np.asarray(pitches, dtype=int))
    steps = steps[steps != 0].tolist()
    return [tuple(steps[i:i + length]) for i in range(len(steps) - length + 1)]


@lru_cache
def known_runs(split="train", length=LENGTH):
    """All runs of the tunes of a split, as they stand in the books."""
    return frozenset(run for tune in corpus() if tune["split"] == split for run in runs(tune["notes"][:, 2], length))


def found_melodies(wav, split="train", length=LENGTH):
    """Of each clip (n, S) of a melody alone: the share of its runs that stand in the tunes of a split.

    Gives (m,) float, m <= n: clips in which the pitch track finds no run have none.
    """
    known, shares = known_runs(split, length), []
    for clip in wav:
        mine = runs(signals.melody(clip.float().numpy()), length)
        if mine:
            shares.append(np.mean([run in known for run in mine]))
    return torch.tensor(shares)


def nearest_embeddings(a, bank):
    """Distance of embeddings (n, E) to the nearest of a bank (m, E): (n,)."""
    return torch.cdist(a, bank).amin(dim=1)


def nearest_codes(codes, bank):
    """The largest share of frames in which the first of codes (n, K, T) agree with any of a bank (m, K, T): (n,)."""
    return torch.stack([(row[0] == bank[:, 0]).float().mean(dim=1).amax() for row in codes])
