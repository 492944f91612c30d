"""The band of the tunes world: how dancers want a melody timed, what may sound beside it, and the synthesizer.

tinysoundfont plays notes through the General MIDI soundfont that pretty_midi brings along.
"""

from functools import lru_cache

import numpy as np
import soxr

from toy.tunebook import folder_of

try:
    import tinysoundfont
except ImportError:  # `folder_of` says so when a clip is asked for
    tinysoundfont = None

SAMPLE_RATE = 16_000
CELLO, BASS, GUITAR, DRUMS = 42, 32, 25, -1
KICK, SNARE, HAT = 36, 38, 42  # keys of the drums


def swing(dance, units):
    """Onsets in running notes from a bar line on, as dances go: hornpipes long-short, jigs long-short-middle."""
    group, places = {"hornpipe": (2, (0, 1.28, 2)), "jig": (3, (0, 1.15, 1.9, 3))}.get(dance, (1, (0, 1)))
    return units // group * group + np.interp(units % group, np.arange(group + 1), places)


def harmony(degrees, lengths, mode):
    """The chord of the key that holds most of a bar's notes, semitones above the tonic: (root, third, fifth).

    >>> lengths = np.array([4, 4, 4])
    >>> [harmony(bar, lengths, "major") for bar in ([0, 4, 7], [5, 9, 0])], harmony([10, 2, 5], lengths, "minor")
    ([(0, 4, 7), (5, 9, 12)], (10, 14, 17))
    """
    chords = [(0, 4, 7), (5, 9, 12), (7, 11, 14)] if mode == "major" else [(0, 3, 7), (5, 8, 12), (10, 14, 17)]
    return max(chords, key=lambda chord: lengths[np.isin(degrees, np.mod(chord, 12))].sum() + (chord[0] == 0))


def beats_of(tune):
    """Beats in a bar of a tune."""
    return {"waltz": 3, "jig": 2}.get(tune["dance"], 2 if (tune["dance"], tune["bar"]) == ("song", 960) else 4)


def accompany(kind, tune, key, start, end):
    """What sounds beside the melody from tick `start` to `end`, `key` being the tonic's pitch class: {program: notes}.

    Notes are rows (n, 4) of onset and length in ticks, MIDI pitch and loudness (0 to 1). The beats of a bar go bass,
    chord (, chord), or kick, snare (, snare).
    """
    bar, beats, jig, root = tune["bar"], beats_of(tune), tune["dance"] == "jig", 36 + key
    bass, chords, drums = [], [], []
    if kind == "drone":
        return {CELLO: np.array([(start, end - start, root + 12 + step, 0.7) for step in (0, 7)])}
    onsets, lengths, pitches = tune["notes"].T
    for line in np.arange(tune["first"] - bar, end, bar):
        inside = (onsets >= line) & (onsets < line + bar)
        chord = harmony((pitches[inside] - tune["tonic"]) % 12, lengths[inside], tune["mode"])
        for beat in range(beats):
            onset, length, strong = line + beat * bar / beats, bar / beats, beat == 0 or beats == 4 and beat == 2
            drums.append((onset, length, KICK if strong else SNARE, 0.8 if strong else 0.6))
            drums += [(onset + length * i / (2 + jig), length / 3, HAT, 0.5) for i in range(2 + jig)]
            if strong or jig:
                bass.append((onset, length * 0.9, root + chord[0 if beat == 0 else 2] % 12, 0.8))
            if not strong or jig:
                late = jig * 2 * length / 3
                chords += [(onset + late, (length - late) * 0.8, root + 12 + step, 0.6) for step in chord]
    parts = {"none": {}, "chords": {BASS: bass, GUITAR: chords}, "percussion": {DRUMS: drums}}[kind]
    return {program: np.array(rows) for program, rows in parts.items()}


@lru_cache(1)
def synthesizer():
    """(tinysoundfont's synthesizer at twice our sample rate, the number of the General MIDI soundfont in it)."""
    path = folder_of("tinysoundfont") and folder_of("pretty_midi") / "TimGM6mb.sf2"
    synth = tinysoundfont.Synth(samplerate=2 * SAMPLE_RATE)
    return synth, synth.sfload(str(path))


def play(program, notes, samples):
    """Play notes (n, 4) of onset and end in seconds, MIDI pitch and velocity -> (samples,) at 16 kHz."""
    synth, font = synthesizer()
    synth.sounds_off()
    synth.generate_simple(2 * SAMPLE_RATE)  # whatever still fades away from the clip before
    synth.program_select(0, font, 128 if program == DRUMS else 0, max(program, 0), program == DRUMS)
    events = [(time, on, int(pitch), int(velocity)) for onset, end, pitch, velocity in notes
              for time, on, in ((onset, True), (end, False))]
    parts, now = [], 0
    for time, on, pitch, velocity in [*sorted(events), (samples / SAMPLE_RATE, False, 0, 0)]:
        then = min(max(now, round(time * 2 * SAMPLE_RATE)), 2 * samples)
        if then > now:
            stereo = np.frombuffer(synth.generate_simple(then - now), np.float32)
            parts.append((stereo[::2] + stereo[1::2]) / 2)
        now = then
        synth.noteon(0, pitch, velocity) if on else synth.noteoff(0, pitch)
    return soxr.resample(np.concatenate(parts), 2 * SAMPLE_RATE, SAMPLE_RATE)[:samples]


def loudness(wav):
    """Root mean square of a clip (S,), above 0."""
    return max(1e-6, float(np.sqrt(np.mean(np.square(wav)))))
