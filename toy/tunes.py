"""The tunes world: windows of real melodies on sampled instruments, each with a caption that says what can be heard.

The melodies are traditional: reels, hornpipes and jigs of Ireland and Scotland and folk songs of Germany, in ABC, from
the corpus that music21 brings along. symusic reads them, tinysoundfont plays them through the General MIDI soundfont of
pretty_midi. A clip is drawn from six attributes, a random tune of that dance and mode, a bar to begin at, a key, and a
player's timing and loudness, with a little noise of a room. Nothing is fitted to the codec. Clips are a function of
(seed, split, index) alone. It leaves out what real recordings have: singing, expression, several melodies at once.

Tunes are split by family (near-copies share a split), and some instrument-dance pairs are held out of training.

    pip install --no-deps -r requirements-tunes.txt
    python -m toy.tunes --n 8 --out runs/tunes_clips      (WAV files with same-named .txt captions)
"""

import argparse
import zlib
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from support.cli import run, say
from toy.band import accompany, beats_of, loudness, play, swing
from toy.tunebook import corpus

SAMPLE_RATE = 16_000
SECONDS = 4.0

ATTRIBUTES = {
    "instrument": ("flute", "fiddle", "harmonium", "piano", "banjo", "clarinet", "trumpet", "vibraphone"),
    "dance": ("reel", "hornpipe", "jig", "waltz", "song"),
    "mode": ("major", "minor"),
    "tempo": ("slow", "medium", "fast"),
    "register": ("low", "mid", "high"),
    "accompaniment": ("none", "drone", "chords", "percussion"),
}
PAIR = ("instrument", "dance")
UNSEEN_PAIRS = {("flute", "waltz"), ("fiddle", "song"), ("piano", "hornpipe"), ("trumpet", "jig"),
                ("clarinet", "reel")}  # these instruments never play these dances in training
SPLITS = ("train", "valid", "test", "unseen")  # unseen: the held-out pairs, on test tunes
FRESH = {"split": "test"}  # what `render` is told for clips of tunes that nothing was trained on
UNSAID = 0.1  # each attribute is left out of so many training captions

PROGRAMS = {"flute": 73, "fiddle": 40, "harmonium": 20, "piano": 0, "banjo": 105, "clarinet": 71, "trumpet": 56,
            "vibraphone": 11}  # General MIDI, from 0
RATES = {"slow": (1.6, 2.8), "medium": (3.2, 4.4), "fast": (5.0, 7.6)}  # notes of the melody per second
USUAL_RATES = {  # where within these bands a dance is played: (slow, medium, fast)
    "reel": (2.5, 4.1, 6.8), "hornpipe": (2.4, 3.9, 6.0), "jig": (2.4, 4.0, 6.3), "waltz": (2.0, 3.6, 5.4),
    "song": (2.0, 3.6, 5.4)}
PITCHES = {"low": 57, "mid": 69, "high": 81}  # mean MIDI pitch of the melody, give or take 3


@lru_cache
def tunes_of(split, dance, mode):
    """The tunes of a split (train, valid or test) with this dance and mode."""
    return [tune for tune in corpus() if (tune["split"], tune["dance"], tune["mode"]) == (split, dance, mode)]


@lru_cache
def combinations(split):
    """All attribute dictionaries of a split, in a fixed order. There are no minor hornpipes: the books hold four."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rows = [dict(zip(ATTRIBUTES, values, strict=True)) for values in product(*ATTRIBUTES.values())]
    rows = [row for row in rows if (row["dance"], row["mode"]) != ("hornpipe", "minor")]
    return [row for row in rows if (tuple(row[name] for name in PAIR) in UNSEEN_PAIRS) == (split == "unseen")]


def example(index, split="train", seed=0, seconds=SECONDS):
    """Clip number `index` of a split: (wav (S,) float32 at 16 kHz, caption, attributes), always the same."""
    attributes, words, rng = describe(index, split, seed)
    return render(attributes, rng, seconds, "test" if split == "unseen" else split), words, attributes


def describe(index, split="train", seed=0):
    """What clip number `index` of a split will be, before it is played: (attributes, caption, random generator).

    Training captions leave each attribute unsaid now and then; those of the other splits say all.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    rows = combinations(split)
    attributes = dict(rows[rng.integers(len(rows))])
    keep = rng.random(len(attributes)) >= (UNSAID if split == "train" else 0)
    said = {name: value for (name, value), kept in zip(attributes.items(), keep, strict=True) if kept}
    return attributes, caption(said or attributes, rng), rng


# ------------------------------------------------------------------------------------------------------------- playing

def choose(attributes, rng, seconds, split):
    """A window of a tune that is what the attributes say: (tune, its first tick, seconds per tick, semitones to move).

    Its melody has as many notes per second as the tempo asks for, and its key can be heard: two fifths of the time go
    to the triad of the key, with the third of its mode and hardly any of the other. ValueError if 1,000 draws fail.
    """
    tunes = tunes_of(split, attributes["dance"], attributes["mode"])
    low, high = RATES[attributes["tempo"]]
    third = 3 + (attributes["mode"] == "major")
    for _ in range(1000):
        tune = tunes[rng.integers(len(tunes))]
        onsets, lengths, pitches = tune["notes"].T
        rate = USUAL_RATES[attributes["dance"]][list(RATES).index(attributes["tempo"])] * rng.uniform(0.92, 1.08)
        tick = len(onsets) / (onsets[-1] + lengths[-1]) / rate  # seconds
        bars = np.arange(tune["first"], max(1, onsets[-1] - seconds / tick), tune["bar"])
        start = 0 if not len(bars) or rng.random() < 0.2 else int(rng.choice(bars))
        inside = (onsets >= start) & (onsets < start + seconds / tick)
        if not low <= inside.sum() / seconds <= high or onsets[-1] + lengths[-1] < start + 0.95 * seconds / tick:
            continue
        held = np.bincount((pitches[inside] - tune["tonic"]) % 12, lengths[inside] / lengths[inside].sum(), 12)
        mean = np.average(pitches[inside], weights=lengths[inside])
        moves = [move for move in range(-36, 37) if abs(mean + move - PITCHES[attributes["register"]]) < 3]
        if held[third] > max(0.06, 4 * held[7 - third]) and held[[0, third, 7]].sum() > 0.4 and held[0] > 0.08:
            return tune, start, tick, int(rng.choice(moves))
    raise ValueError(f"no window of the {split} tunes is {', '.join(attributes.values())}, {seconds:g} s long")


def render(attributes, rng, seconds=SECONDS, split="train"):
    """Play a clip with these attributes, of a tune of this split: -> (S,) float32 in [-1, 1], S = seconds * 16000."""
    n = round(seconds * SAMPLE_RATE)
    parts = score(attributes, rng, seconds, split)
    solo = play(PROGRAMS[attributes["instrument"]], parts.pop("melody"), n)
    wav = solo / loudness(solo)
    for program, notes in parts.items():
        part = play(program, notes, n)
        wav = wav + part / loudness(part) * 10 ** (rng.uniform(-9, -6) / 20)
    wav = wav / np.abs(wav).max() + rng.standard_normal(n) * 10 ** rng.uniform(-3.2, -2.4)  # the room: -64 to -48 dB
    return (wav / np.abs(wav).max() * rng.uniform(0.6, 0.9)).astype(np.float32)


def score(attributes, rng, seconds=SECONDS, split="train"):
    """The notes of a clip: {"melody" or a program: (n, 4) of onset and end in seconds, MIDI pitch and velocity}."""
    tune, start, tick, move = choose(attributes, rng, seconds, split)
    end = start + seconds / tick
    group = tune["bar"] / beats_of(tune)  # ticks per beat
    unit = group / (3 if tune["dance"] == "jig" else 2)  # ticks per running note

    def place(ticks):
        return (swing(tune["dance"], (ticks - tune["first"]) / unit) * unit + tune["first"] - start) * tick

    def perform(notes, jitter):
        onset, length, pitch, loud = notes[(notes[:, 0] >= start) & (notes[:, 0] < end)].T
        late = rng.normal(0, jitter, len(onset))
        velocity = (127 * loud + rng.normal(0, 5, len(onset))).clip(30, 127)
        first, last = (place(x) + late for x in (onset, onset + length))
        return np.stack([first.clip(min=0), first + (last - first) * 0.93, pitch, velocity], axis=1)

    onset, length, pitch = tune["notes"].T
    accent = 0.68 + 0.2 * ((onset - tune["first"]) % group == 0)
    parts = {"melody": perform(np.stack([onset, length, pitch + move, accent], axis=1), 0.008)}
    beside = accompany(attributes["accompaniment"], tune, (tune["tonic"] + move) % 12, start, end)
    return parts | {program: perform(notes, 0.005) for program, notes in beside.items()}


# ------------------------------------------------------------------------------------------------------------ captions

WORDS = {
    "instrument": {
        "flute": ("flute", "wooden flute", "transverse flute"), "fiddle": ("fiddle", "violin", "folk fiddle"),
        "harmonium": ("harmonium", "reed organ", "pump organ"), "piano": ("piano", "acoustic piano", "grand piano"),
        "banjo": ("banjo", "plucked banjo", "folk banjo"),
        "clarinet": ("clarinet", "mellow clarinet", "woody clarinet"),
        "trumpet": ("trumpet", "brass trumpet", "bright trumpet"),
        "vibraphone": ("vibraphone", "vibes", "ringing vibraphone")},
    "dance": {
        "reel": ("reel", "running reel"), "hornpipe": ("hornpipe", "dotted hornpipe"),
        "jig": ("jig", "jig in six-eight time"), "waltz": ("waltz", "tune in three-four time"),
        "song": ("folk song", "song tune")},
    "mode": {"major": ("major", "major-key"), "minor": ("minor", "minor-key")},
    "tempo": {
        "slow": ("slow", "unhurried", "slow-paced"), "medium": ("medium-tempo", "moderate", "walking-pace"),
        "fast": ("fast", "quick", "up-tempo")},
    "register": {
        "low": ("low", "deep", "low-pitched"), "mid": ("mid-range", "middle-register", "medium-pitched"),
        "high": ("high", "high-pitched", "treble")},
    "accompaniment": {
        "none": ("alone", "unaccompanied", "solo"), "drone": ("over a drone", "with a drone", "over a held bass"),
        "chords": ("with guitar chords and bass", "over chords", "with chords and bass"),
        "percussion": ("with drums", "over a drum beat", "with percussion")},
}


def caption(attributes, rng):
    """Describe a clip in words. Attributes that the dictionary lacks are left unsaid; order and synonyms vary."""
    said = {name: str(rng.choice(WORDS[name][value])) for name, value in attributes.items()}
    if rng.integers(3) == 2:  # a fast jig, flute, minor, over a drone
        tags = list(said.values())
        rng.shuffle(tags)
        return ", ".join(tags)
    tune = " ".join(said[name] for name in ("tempo", "mode") if name in said) + " " + said.get("dance", "tune")
    player = (said["register"] + " " if "register" in said else "") + said.get("instrument", "instrument")
    tune, player = (f"{'an' if words[0] in 'aeiou' else 'a'} {words}" for words in (tune.strip(), player))
    end = " " + said["accompaniment"] if "accompaniment" in said else ""
    return f"{player} plays {tune}{end}" if rng.integers(2) else f"{tune} on {player}{end}"


def main():
    import soundfile
    parser = argparse.ArgumentParser(description="write clips of tunes and their captions into a folder")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/tunes_clips"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.n):
        wav, text, _ = example(index, args.split, args.seed)
        soundfile.write(args.out / f"{index:04d}.wav", wav, SAMPLE_RATE)
        (args.out / f"{index:04d}.txt").write_text(text + "\n")
        say(f"{args.out}/{index:04d}.wav  {text}")


if __name__ == "__main__":
    run(main)
