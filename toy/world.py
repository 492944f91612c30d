"""The toy world: short synthesised pieces of music, each with a caption that says what can be heard in it.

A clip is drawn from five attributes (instrument, melody shape, tempo, register, drums), a random key and a little
humanisation (timing, loudness). Everything is numpy and a function of (seed, split, index) alone, so a data set of any
size can be made again from three numbers. It leaves out what real music has: harmony, several voices, rooms, noise.

The world is tuned to its codec. Notes begin on the codec's frames, pitches are multiples of half its frame rate, and an
instrument plays a note the same way every time, so a steady note is a steady run of codes. In a first world without
this most of a code was the phase of a wave, which no caption tells, and small models spent themselves on it.

Listen: python -m toy.world --n 8 --out runs/toy_clips      (WAV files with same-named .txt captions)
"""

import argparse
import zlib
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from support.cli import run, say

SAMPLE_RATE = 16_000
SECONDS = 4.0
FRAME_RATE = 50  # of the codec, in Hz

ATTRIBUTES = {
    "instrument": ("flute", "organ", "pluck", "bell", "lead", "chip"),
    "melody": ("rising", "falling", "arpeggio", "repeated"),
    "tempo": ("slow", "medium", "fast"),
    "register": ("low", "mid", "high"),
    "drums": ("on", "off"),
}

# The split "unseen_pairs": these instruments never play these melodies in training, so that a model which does it on
# request has composed two things it knows, not remembered one. Every single value still occurs in training.
PAIR = ("instrument", "melody")
UNSEEN_PAIRS = {("flute", "falling"), ("organ", "arpeggio"), ("bell", "rising"), ("chip", "repeated")}

STEPS = {  # semitones above the key note, played round and round, one note per beat
    "rising": (0, 2, 4, 7, 9, 12),
    "falling": (12, 9, 7, 4, 2, 0),
    "arpeggio": (0, 4, 7, 12, 7, 4),
    "repeated": (0,),
}
BEATS = {"slow": 40, "medium": 25, "fast": 16}  # frames per beat: 75, 120, 188 beats per minute
KEYS = {"low": (150, 175, 200), "mid": (350, 375, 400, 425), "high": (850, 900, 950, 1000)}  # Hz

SPLITS = ("train", "valid", "unseen")  # valid: training combinations, other clips; unseen: the held-out pairs
FRESH = {}  # what `render` is told for clips that nothing was trained on: they are all new


ROWS = [dict(zip(ATTRIBUTES, values, strict=True)) for values in product(*ATTRIBUTES.values())]
COMBINATIONS = {split: [row for row in ROWS if ((row["instrument"], row["melody"]) in UNSEEN_PAIRS)
                        == (split == "unseen")] for split in SPLITS}


def combinations(split):
    """All attribute dictionaries of a split, in a fixed order (360 for train and valid, 72 for unseen)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    return list(COMBINATIONS[split])


def example(index, split="train", seed=0, seconds=SECONDS):
    """Clip number `index` of a split: (wav (S,) float32 at 16 kHz, caption, attributes), always the same."""
    attributes, words, rng = describe(index, split, seed)
    return render(attributes, rng, seconds), words, attributes


def describe(index, split="train", seed=0):
    """What clip number `index` of a split will be, before it is played: (attributes, caption, random generator)."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    rows = COMBINATIONS[split]
    attributes = rows[rng.integers(len(rows))]
    return attributes, caption(attributes, rng), rng


# ---------------------------------------------------------------------------------------------------------- instruments
# Each takes the frequency in Hz, the time axis t in seconds (S,) from the onset on and the note's length in seconds,
# and returns a note (S,) of about unit loudness which may ring on after the note's length.

def in_tune(frequency):
    """The nearest multiple of half the frame rate, so that two frames hold a whole number of periods."""
    grid = FRAME_RATE / 2
    return grid * np.round(frequency / grid)


def gate(t, length, attack, release):
    """Envelope: linear attack, flat, linear release after `length` seconds."""
    return np.clip(t / attack, 0, 1) * np.clip(1 - (t - length) / release, 0, 1)


def harmonics(frequency, t, amplitudes):
    """Sum of sines at whole multiples of `frequency`, those above the Nyquist frequency left out."""
    audible = [(k, a) for k, a in enumerate(amplitudes, 1) if k * frequency < SAMPLE_RATE / 2 and a]
    return sum(a * np.sin(2 * np.pi * k * frequency * t) for k, a in audible)


def flute(frequency, t, length):
    tremolo = 1 - 0.25 * (1 - np.cos(2 * np.pi * 5 * t)) * np.clip(t / 0.3, 0, 1)
    return tremolo * harmonics(frequency, t, (1, 0.12, 0.05)) * gate(t, length * 0.92, 0.06, 0.06)


def organ(frequency, t, length):
    return 0.55 * harmonics(frequency, t, (1, 0.7, 0.5, 0.5, 0, 0.4, 0, 0.35)) * gate(t, length * 0.97, 0.008, 0.03)


def pluck(frequency, t, length):
    """Karplus-Strong: a burst of noise runs round a delay line one period long and is smoothed a little on each round.

    The line runs at four times the sample rate, so that a period of whole samples keeps high notes in tune.
    """
    oversampling = 4
    whole = round(oversampling * SAMPLE_RATE / frequency - 0.5)  # the smoothing delays by half a sample
    decay = 0.5 ** (1 / (frequency * 0.5))
    width = whole // 10 + 1
    noise = np.random.default_rng(whole).uniform(-1, 1, whole + width - 1)  # each string has its own sound
    burst = np.convolve(noise, np.ones(width) / width, mode="valid")  # a soft finger
    line = np.zeros(oversampling * len(t) + whole + 1)
    line[1:whole + 1] = burst - burst.mean()  # the loop would keep a constant for ever, long after the note
    for start in range(whole + 1, len(line), whole):
        stop = min(start + whole, len(line))
        line[start:stop] = decay * 0.5 * (line[start - whole:stop - whole] + line[start - whole - 1:stop - whole - 1])
    tone = line[whole + 1:].reshape(-1, oversampling).mean(axis=1)
    return 5 * tone * gate(t, length * 1.5, 0.001, 0.05)


def bell(frequency, t, length):
    index, modulator = 1.5 * np.exp(-t / 0.35), in_tune(1.41 * frequency)
    tone = np.sin(2 * np.pi * frequency * t + index * np.sin(2 * np.pi * modulator * t))
    return tone * np.exp(-t / 0.45) * gate(t, length * 2.5, 0.002, 0.1)


def lead(frequency, t, length):
    cutoff = frequency * (2 + 14 * np.exp(-t / 0.12))  # a low-pass that closes after the onset
    tone = 0.0
    for k in range(1, int(min(24, SAMPLE_RATE / 2 / (frequency * 1.01))) + 1):
        tone = tone + np.sin(2 * np.pi * k * frequency * t) / k / (1 + (k * frequency / cutoff) ** 4)
    return 1.2 * tone * gate(t, length * 0.9, 0.01, 0.05)


def chip(frequency, t, length):
    square = harmonics(frequency, t, [1 / k if k % 2 else 0 for k in range(1, 64)])
    return 0.9 * square * gate(t, length * 0.6, 0.001, 0.002)


INSTRUMENTS = {"flute": flute, "organ": organ, "pluck": pluck, "bell": bell, "lead": lead, "chip": chip}


# ---------------------------------------------------------------------------------------------------------------- music

@lru_cache
def drum_hit(kind):
    """One hit of a drum machine, the same every time: "kick", "snare" or "hat" -> (S,)."""
    t = np.arange(int(0.25 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    if kind == "kick":
        return 1.3 * np.sin(2 * np.pi * (50 * t - 6 * np.exp(-t / 0.03))) * np.exp(-t / 0.09)
    if kind == "snare":
        return (0.5 * noise + 0.5 * np.sin(2 * np.pi * 190 * t)) * np.exp(-t / 0.06)
    return 0.35 * np.diff(noise, prepend=0) * np.exp(-t / 0.02)


def render(attributes, rng, seconds=SECONDS):
    """Play a clip with these attributes: -> (S,) float32 in [-1, 1], S = seconds * 16000."""
    n, frame = round(seconds * SAMPLE_RATE), SAMPLE_RATE // FRAME_RATE
    mix = np.zeros(n)
    beat = BEATS[attributes["tempo"]]  # frames
    key = rng.choice(KEYS[attributes["register"]])  # Hz
    play, steps = INSTRUMENTS[attributes["instrument"]], STEPS[attributes["melody"]]
    length = beat / FRAME_RATE
    t = np.arange(int(2.6 * length * SAMPLE_RATE)) / SAMPLE_RATE

    def add(sound, onset, loudness):
        late = rng.random() < 0.1
        start = (onset + late) * frame
        sound = sound[:max(0, n - start)]
        mix[start:start + len(sound)] += loudness * rng.uniform(0.9, 1.1) * sound

    for i, onset in enumerate(range(0, n // frame + 1, beat)):
        add(play(in_tune(key * 2 ** (steps[i % len(steps)] / 12)), t, length), onset, 0.5)
        if attributes["drums"] == "on":
            add(drum_hit("snare" if i % 2 else "kick"), onset, 0.55)
            add(drum_hit("hat"), onset, 0.4)
            add(drum_hit("hat"), onset + beat // 2, 0.4)
    return (mix / max(1e-9, np.abs(mix).max()) * rng.uniform(0.7, 0.9)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- captions

INSTRUMENT_WORDS = {
    "flute": ("flute", "wooden flute", "breathy flute", "airy flute"),
    "organ": ("organ", "church organ", "pipe organ", "drawbar organ"),
    "pluck": ("plucked string", "guitar", "acoustic guitar", "plucked guitar"),
    "bell": ("bell", "metallic bell", "chime", "ringing bell"),
    "lead": ("synth lead", "saw lead", "sawtooth synth", "buzzing synthesizer"),
    "chip": ("chiptune square wave", "8-bit chip", "square wave", "retro game chip"),
}
MELODY_WORDS = {
    "rising": ("a rising melody", "an ascending scale", "a tune that climbs", "notes going up"),
    "falling": ("a falling melody", "a descending scale", "a tune that sinks", "notes going down"),
    "arpeggio": ("an arpeggio", "an arpeggiated chord", "a broken chord", "arpeggios up and down"),
    "repeated": ("one repeated note", "the same note over and over", "a single repeating note", "a constant note"),
}
TEMPO_WORDS = {
    "slow": ("slow", "unhurried", "slow-paced", "calm"),
    "medium": ("medium-tempo", "moderate", "mid-tempo", "walking-pace"),
    "fast": ("fast", "quick", "rapid", "up-tempo"),
}
REGISTER_WORDS = {
    "low": ("low", "deep", "low-pitched", "bass"),
    "mid": ("mid-range", "middle-register", "medium-pitched", "mid-register"),
    "high": ("high", "high-pitched", "treble", "bright high"),
}
DRUM_WORDS = {
    "on": ("with drums", "over a drum beat", "with a drum kit", "plus drums"),
    "off": ("without drums", "with no drums", "without a beat", "unaccompanied"),
}
WORDS = dict(zip(ATTRIBUTES, (INSTRUMENT_WORDS, MELODY_WORDS, TEMPO_WORDS, REGISTER_WORDS, DRUM_WORDS), strict=True))


def caption(attributes, rng):
    """Describe a clip in words. Attributes that the dictionary lacks are left unsaid; order and synonyms vary."""
    said = {name: str(rng.choice(WORDS[name][value])) for name, value in attributes.items()}
    adjectives = [said[name] for name in ("tempo", "register") if name in said]
    rng.shuffle(adjectives)
    who = " ".join(adjectives + [said.get("instrument", "instrument")])
    article = "an" if who[0] in "aeiou8" else "a"
    style = rng.integers(3)
    melody, drums = said.get("melody"), said.get("drums")
    if style == 0:  # a slow deep flute plays a rising melody, with drums
        return f"{article} {who}" + (f" plays {melody}" if melody else "") + (f", {drums}" if drums else "")
    if style == 1:  # a rising melody on a slow deep flute with drums
        return (f"{melody} on " if melody else "") + f"{article} {who}" + (f" {drums}" if drums else "")
    tags = list(said.values())  # flute, with drums, slow, a rising melody, deep
    rng.shuffle(tags)
    return ", ".join(tags)


def main():
    import soundfile
    parser = argparse.ArgumentParser(description="write toy clips and their captions into a folder")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_clips"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.n):
        wav, text, _ = example(index, args.split, args.seed)
        soundfile.write(args.out / f"{index:04d}.wav", wav, SAMPLE_RATE)
        (args.out / f"{index:04d}.txt").write_text(text + "\n")
        say(f"{args.out}/{index:04d}.wav  {text}")


if __name__ == "__main__":
    run(main)
