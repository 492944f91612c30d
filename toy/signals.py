"""Plain signal measures that read tempo, register and melody off a clip without anything learned.

They judge the judge: where both read the same clip, they should agree. They are honest only about clips of a melody
alone: the hits of drums drown the notes' onsets, and chords have no one pitch.
"""

from functools import partial

import numpy as np
import torch

from toy.mel import log_mel, mel_spectrogram
from toy.world import SAMPLE_RATE

NOTES_PER_SECOND = (1.5, 2.4)  # between slow, medium and fast
HERTZ = (320, 780)  # between low, mid and high
RISES = (0.2, 0.8)  # share of upward steps between falling, arpeggio and rising
TUNES_PER_SECOND, TUNES_HERTZ = (3.0, 4.7), (311, 622)  # the same between the classes of the tunes world


def onsets(wav, apart=12):
    """Where the spectrum brightens most within `apart` * 10 ms on either side, and clearly: times in seconds."""
    levels = log_mel(mel_spectrogram(torch.as_tensor(wav)[None], SAMPLE_RATE, 512, 160))[0].numpy()  # every 10 ms
    rise = np.pad((levels[:, 3:] - levels[:, :-3]).clip(min=0).mean(axis=0), (2, 1))
    energy = np.pad(np.exp(levels).sum(axis=0), 5, mode="edge")
    rise *= energy[10:] > 0.8 * energy[:-10]  # the click that ends a note is none
    near = [rise[max(0, i - apart):i + apart + 1].max() for i in range(len(rise))]
    return np.flatnonzero((rise == near) & (rise > 0.12 * rise.max())) / 100


def pitch(wav):
    """The frequency in Hz, between 120 and 2200, at whose period the waveform is most like itself."""
    n = len(wav)
    likeness = np.fft.irfft(np.abs(np.fft.rfft(wav, 4 * n)) ** 2, 8 * n)[:n // 2]  # at half-sample lags
    likeness /= np.linspace(1, 0.75, len(likeness))  # fewer samples overlap at longer lags
    lags = np.arange(round(2 * SAMPLE_RATE / 2200), round(2 * SAMPLE_RATE / 120))
    peaks = lags[(likeness[lags] > likeness[lags - 1]) & (likeness[lags] >= likeness[lags + 1])]
    if not len(peaks) or likeness[peaks].max() <= 0:
        return 0.0
    return 2 * SAMPLE_RATE / peaks[likeness[peaks] > 0.85 * likeness[peaks].max()][0]


def note_pitches(wav, start=0.06, seconds=0.15):
    """The pitch of each note, from shortly after its onset on: (notes,) in Hz."""
    starts = [round((onset + start) * SAMPLE_RATE) for onset in onsets(wav)]
    n = round(seconds * SAMPLE_RATE)
    return np.array([pitch(wav[start:start + n]) for start in starts if start + n <= len(wav)])


def melody(wav, window=640, hop=320, shortest=3):
    """The pitches that a melody alone goes through, as MIDI numbers, each different from the one before: (notes,).

    The pitch is taken every `hop` samples; a note lasts for `shortest` of them at least, or is a slip of the measure.
    """
    track = [pitch(wav[start:start + window]) for start in range(0, len(wav) - window + 1, hop)]
    track = np.round(69 + 12 * np.log2(np.maximum(track, 1) / 440)).astype(int)
    runs = np.split(track, np.flatnonzero(np.diff(track)) + 1)
    notes = np.array([run[0] for run in runs if len(run) >= shortest and run[0] > 0], dtype=int)
    return notes[np.diff(notes, prepend=-1) != 0]


def read_tempo(wav):
    gaps = np.diff(onsets(wav))
    rate = 1 / np.median(gaps) if len(gaps) else 0.0
    return ("slow", "medium", "fast")[np.searchsorted(NOTES_PER_SECOND, rate)]


def read_tunes_tempo(wav):
    """By the mean: a tune mixes long notes and short ones."""
    return ("slow", "medium", "fast")[np.searchsorted(TUNES_PER_SECOND, len(onsets(wav, 6)) / len(wav) * SAMPLE_RATE)]


def read_register(wav, limits=HERTZ):
    pitches = note_pitches(wav)
    return ("low", "mid", "high")[np.searchsorted(limits, np.median(pitches) if len(pitches) else 0.0)]


def read_melody(wav):
    steps = np.diff(12 * np.log2(note_pitches(wav).clip(min=1)))  # semitones
    if not len(steps) or np.abs(steps).max() < 0.5:
        return "repeated"
    return ("falling", "arpeggio", "rising")[np.searchsorted(RISES, (steps > 0).mean())]


READERS = {"toy": {"tempo": read_tempo, "register": read_register, "melody": read_melody},
           "tunes": {"tempo": read_tunes_tempo, "register": partial(read_register, limits=TUNES_HERTZ)}}
SOLO = {"toy": (("drums", "off"), "bell"), "tunes": (("accompaniment", "none"), "vibraphone")}  # and who is a bell
