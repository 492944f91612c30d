"""Plain signal measures that read tempo, register and melody off a toy clip without anything learned.

They judge the judge: where both read the same clip, they should agree. They are honest only about clips without drums,
whose hits drown the notes' onsets.
"""

import numpy as np
import torch

from toy.mel import log_mel, mel_spectrogram
from toy.world import SAMPLE_RATE

NOTES_PER_SECOND = (1.5, 2.4)  # between slow, medium and fast
HERTZ = (320, 780)  # between low, mid and high
RISES = (0.2, 0.8)  # share of upward steps between falling, arpeggio and rising


def onsets(wav):
    """Where the spectrum brightens most within 120 ms on either side, and clearly: times in seconds."""
    levels = log_mel(mel_spectrogram(torch.as_tensor(wav)[None], SAMPLE_RATE, 512, 160))[0].numpy()  # every 10 ms
    rise = np.pad((levels[:, 3:] - levels[:, :-3]).clip(min=0).mean(axis=0), (2, 1))
    energy = np.pad(np.exp(levels).sum(axis=0), 5, mode="edge")
    rise *= energy[10:] > 0.8 * energy[:-10]  # the click that ends a note is none
    near = [rise[max(0, i - 12):i + 13].max() for i in range(len(rise))]
    return np.flatnonzero((rise == near) & (rise > 0.12 * rise.max())) / 100


def pitch(wav):
    """The frequency in Hz, between 120 and 2200, at whose period the waveform is most like itself."""
    n = len(wav)
    likeness = np.fft.irfft(np.abs(np.fft.rfft(wav, 4 * n)) ** 2, 8 * n)[:n // 2]  # at half-sample lags
    likeness /= np.linspace(1, 0.75, len(likeness))  # fewer samples overlap at longer lags
    lags = np.arange(round(2 * SAMPLE_RATE / 2200), round(2 * SAMPLE_RATE / 120))
    peaks = lags[(likeness[lags] > likeness[lags - 1]) & (likeness[lags] >= likeness[lags + 1])]
    if not len(peaks):
        return 0.0
    return 2 * SAMPLE_RATE / peaks[likeness[peaks] > 0.85 * likeness[peaks].max()][0]


def note_pitches(wav, start=0.06, seconds=0.15):
    """The pitch of each note, from shortly after its onset on: (notes,) in Hz."""
    starts = [round((onset + start) * SAMPLE_RATE) for onset in onsets(wav)]
    n = round(seconds * SAMPLE_RATE)
    return np.array([pitch(wav[start:start + n]) for start in starts if start + n <= len(wav)])


def read_tempo(wav):
    gaps = np.diff(onsets(wav))
    rate = 1 / np.median(gaps) if len(gaps) else 0.0
    return ("slow", "medium", "fast")[np.searchsorted(NOTES_PER_SECOND, rate)]


def read_register(wav):
    pitches = note_pitches(wav)
    return ("low", "mid", "high")[np.searchsorted(HERTZ, np.median(pitches) if len(pitches) else 0.0)]


def read_melody(wav):
    steps = np.diff(12 * np.log2(note_pitches(wav).clip(min=1)))  # semitones
    if not len(steps) or np.abs(steps).max() < 0.5:
        return "repeated"
    return ("falling", "arpeggio", "rising")[np.searchsorted(RISES, (steps > 0).mean())]


READERS = {"tempo": read_tempo, "register": read_register, "melody": read_melody}
