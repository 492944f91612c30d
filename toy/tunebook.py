"""The book behind the tunes world: traditional melodies from music21's corpus, read, and split by family.

The tunes stand in ABC, a text notation: reels, hornpipes, jigs and airs of Ireland and Scotland (Aird's Airs, O'Neill's
1850, Ryan's Mammoth Collection) and German folk songs (Essen collection). The same tune stands in several books under
other names, in other keys and with small changes. All its copies must be in one split, or a test tune would be one that
was trained on: such families are found by the intervals that tunes share.
"""

import hashlib
import importlib.util
import inspect
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from support.cli import say

try:
    import symusic
except ImportError:  # `folder_of` says so when a tune is asked for
    symusic = None

BOOKS = ("airdsAirs", "essenFolksong", "oneills1850", "ryansMammoth")
SHARES = {"train": 80, "valid": 5, "test": 15}  # of the families, in percent


def folder_of(package):
    """The folder of an installed package; ModuleNotFoundError in one line where the tunes' packages are missing."""
    found = importlib.util.find_spec(package)
    if found is None or symusic is None:
        raise ModuleNotFoundError("the tunes need more packages: pip install --no-deps -r requirements-tunes.txt")
    return Path(found.submodule_search_locations[0])


def read_tune(abc):
    """One tune in ABC -> a dictionary of its dance, mode, tonic (pitch class), bar and first bar line (in ticks), and
    its notes (n, 3) int32: onset and length in ticks, 480 per quarter note, and MIDI pitch. None if it is of no use.
    """
    field = {name: value.split("%")[0].strip() for name, value in re.findall(r"^([A-Z]):(.*)$", abc, re.M)[::-1]}
    metre, key = field.get("M", ""), re.match(r"([A-G])([#b]?)", field.get("K", ""))
    kind = f"{field.get('R', '')} {field.get('T', '')}".lower()
    german = "Deutschland" in field.get("O", "")
    dance = "waltz" if metre in ("3/4", "3/8") else "jig" if metre == "6/8" and not german else None
    if metre in ("C", "C|", "2/4", "4/4"):
        dance = next((name for name in ("hornpipe", "reel") if name in kind), "song" if german else None)
    if not dance or not key:
        return None
    head, _, music = abc.partition(re.search(r"^K:.*$", abc, re.M).group() + "\n")
    head = "\n".join(f"{name}:{field[name]}" for name in "XMLK" if name in field)
    lines = [line for line in music.splitlines() if not re.match(r"[A-Za-z]:|%", line)]
    music = re.sub(r'"[^"]*"|\{[^}]*\}|![^!]*!|%.*|[uvTH~.`]', "", "\n".join(lines))  # no signs, no grace notes
    top, bottom = map(int, {"C": "4/4", "C|": "4/4"}.get(metre, metre).split("/"))
    bar = 480 * 4 * top // bottom
    notes, pickup = (notes_of(f"{head}\n{part}\n") for part in (music, re.split(r"[|:]", music.lstrip("|:[ \n"))[0]))
    if len(notes) < 24:
        return None
    tonic = ("C D EF G A B".index(key[1]) + {"#": 1, "b": -1, "": 0}[key[2]]) % 12
    held = np.bincount((notes[:, 2] - tonic) % 12, notes[:, 1], minlength=12)  # ticks per degree
    if max(held[3], held[4]) < 3 * min(held[3], held[4]) or held[0] < 0.1 * held.sum() or max(held[3:5]) == 0:
        return None
    return {"dance": dance, "mode": "minor" if held[3] > held[4] else "major", "tonic": tonic, "bar": bar,
            "first": int(pickup[-1, :2].sum()) % bar if len(pickup) else 0, "notes": notes}


def notes_of(abc):
    """The notes of a tune, repeats unrolled: (n, 3) int32 of onset and length in ticks and MIDI pitch, by onset."""
    score = symusic.Score.from_abc(abc)
    columns = score.tracks[0].notes.numpy() if score.tracks else {"time": [], "duration": [], "pitch": []}
    notes = np.stack([np.asarray(columns[name], np.int32) for name in ("time", "duration", "pitch")], axis=1)
    notes[:, 0] = np.round(notes[:, 0] / 20) * 20  # the reader is off by a tick
    notes[:, 1] = np.round(notes[:, 1] / 20) * 20
    return notes[np.lexsort((-notes[:, 2], notes[:, 0]))]


def families(tunes, length=10, alike=0.25):
    """The number of each tune's family: tunes belong together where they share a quarter of the shorter one's distinct
    runs of `length` intervals (repeated notes taken as one), in any key, directly or through others.
    """
    grams, shared, parent = [], Counter(), list(range(len(tunes)))
    for tune in tunes:
        steps = np.diff(tune["notes"][:, 2])
        steps = steps[steps != 0].tolist()
        grams.append({tuple(steps[i:i + length]) for i in range(len(steps) - length + 1)})
    places = defaultdict(list)
    for i, row in enumerate(grams):
        for gram in row:
            places[gram].append(i)
    for rows in places.values():
        shared.update((a, b) for i, a in enumerate(rows) for b in rows[i + 1:])

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i
    for (a, b), n in shared.items():
        if n >= alike * min(len(grams[a]), len(grams[b])):
            a, b = sorted((root(a), root(b)))
            parent[b] = a
    return [root(i) for i in range(len(tunes))]


@contextmanager
def quiet():
    """Nothing is printed meanwhile, not by C++ either: the reader of ABC has a word for every odd sign in the books."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@lru_cache(1)
def corpus():
    """All tunes of use, each with its `split`, from its family: read in half a minute once, then from a file."""
    books = folder_of("music21") / "corpus"
    source = "".join(map(inspect.getsource, (read_tune, notes_of, families)))
    source += f"{symusic.__version__} {version('music21')} {BOOKS}"
    path = Path.home() / ".cache" / "magnet-tunes" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.npz"
    names = ("dance", "mode", "tonic", "bar", "first", "family")
    if not path.is_file():
        pages = [page.read_text("utf-8", "replace") for book in BOOKS for page in sorted((books / book).glob("*.abc"))]
        parts = [part for page in pages for part in re.split(r"^(?=X:)", page, flags=re.M)]
        say("reading the tunes; this is done once")
        with quiet():
            tunes = [tune for tune in map(read_tune, parts) if tune]
        for tune, family in zip(tunes, families(tunes), strict=True):
            tune["family"] = family
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{os.getpid()}.npz")
        np.savez(temporary, notes=np.concatenate([tune["notes"] for tune in tunes]),
                 ends=np.cumsum([len(tune["notes"]) for tune in tunes]),
                 **{name: [tune[name] for tune in tunes] for name in names})
        os.replace(temporary, path)
    with np.load(path) as file:
        table = {name: file[name].tolist() for name in names} | {"notes": np.split(file["notes"], file["ends"][:-1])}
    tunes = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    ladder = np.cumsum(list(SHARES.values()))
    for tune in tunes:
        draw = zlib.crc32(str(tune["family"]).encode()) % 100
        tune["split"] = list(SHARES)[int(np.searchsorted(ladder, draw, side="right"))]
    return tunes
