"""Audio files in and out, through libsndfile: read in blocks whatever the header says, written whole or not at all."""

import math
import mmap
import os
import re
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from support.files import whole_file

BLOCK = 65_536  # samples that are read or written at once: libsndfile's OGG writer crashes on long arrays
UNKNOWN = 2**62  # frames; libsndfile gives 2**63 - 1 for a FLAC that was written to a pipe


@contextmanager
def open_audio(path):
    """(the open file, libsndfile's `SoundFile` of it). ValueError names what is not a regular file, or not audio."""
    if not os.path.isfile(path):  # never a device or a pipe, which may not end
        raise ValueError(f"{path}: {'is not a regular file' if os.path.exists(path) else 'no such audio file'}")
    with open(path, "rb") as raw:
        try:  # by its descriptor: the name need not be UTF-8, and the suffix says nothing
            sound = soundfile.SoundFile(raw.fileno(), closefd=False)
        except soundfile.SoundFileError as error:
            text = f"{path}: is not audio that libsndfile can read; convert it, as by ffmpeg -i OLD NEW.wav"
            raise ValueError(text) from error
        with sound:
            if not 1_000 <= sound.samplerate <= 1_000_000:  # the header is damaged
                raise ValueError(f"{path}: its sample rate is {sound.samplerate} Hz, want 1,000 to 1,000,000")
            yield raw, sound


def audio_seconds(path):
    """How long a file is by its header, in seconds; infinity if that does not say. Errors as for `open_audio`."""
    with open_audio(path) as (_, sound):
        return sound.frames / sound.samplerate if sound.frames < UNKNOWN else math.inf


def read_frames(sound, errors):
    """Yield arrays (frames, channels) float32 to the end of the sound, however many the header promised, or to the
    first of libsndfile's errors, which is added to `errors`."""
    total = 0
    while True:
        block = np.full((max(1, BLOCK // sound.channels), sound.channels), np.nan, np.float32)
        try:
            frames = len(sound.read(out=block))
        except soundfile.LibsndfileError as error:
            frames = min(int((~np.isnan(block[:, 0])).sum()), sound.frames - total)  # keep what was decoded
            if error.code != 39:  # a seek that fails behind the end of a FLAC, and says nothing
                errors.append(error)
        yield block[:frames]
        total += frames
        if frames < len(block):
            return


def early_end(raw, sound, frames, errors):
    """What is wrong with the end of a file of which `frames` could be read, with `errors`; None if nothing is."""
    unread = os.fstat(raw.fileno()).st_size - os.lseek(raw.fileno(), 0, os.SEEK_CUR)
    cut = re.search(r"(?:RIFF|FORM|riff|Data Size) +: (\d+) \(should be (\d+)", sound.extra_info)  # libsndfile's log
    if frames < sound.frames < UNKNOWN:
        return f"ends after {frames / sound.samplerate:.6g} s; its header says {sound.frames / sound.samplerate:.6g} s"
    if cut and int(cut[2]) < int(cut[1]) < 2**31 - 2**16:  # more is what is written where the length is not known
        return f"was cut: {cut[2]} bytes are left of {cut[1]}"
    several = errors or sound.format in ("MP3", "FLAC") and unread > 1024  # less is a tag, with the title
    if sound.format == "OGG":
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            several = several or data.rfind(b"OggS\0\2") > 0  # a page that begins a stream
            if not several and not data[data.rfind(b"OggS\0") + 5] & 4:
                return "was cut: its last page is missing"
    return "is damaged, or holds several recordings, of which only the first was read" if several else None


def read_blocks(path, sample_rate, tell=None, max_seconds=None):
    """Yield a file of any rate and channel count as arrays (S,) float32, mono, at `sample_rate` Hz, block by block.

    Only the first `max_seconds` are read. What is odd about the file (it ends early, its channels cancel out) goes to
    tell(text), or is a warning. ValueError names a file that cannot be read, or holds numbers that are not finite.
    """
    tell = tell or (lambda text: warnings.warn(f"{path}: {text}", stacklevel=2))
    left = UNKNOWN if max_seconds is None else max(1, round(max_seconds * sample_rate))
    frames, power, mixed_power, errors = 0, 0.0, 0.0, []
    with open_audio(path) as (raw, sound):
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, 1)
        for block in read_frames(sound, errors):
            mono = block.mean(axis=1)
            if not np.isfinite(mono).all():
                raise ValueError(f"{path}: holds samples that are not finite numbers")
            frames += len(block)
            power += np.square(block, dtype=float).sum() / sound.channels
            mixed_power += np.square(mono, dtype=float).sum()
            mono = resampler.resample_chunk(mono)[:left]
            left -= len(mono)
            yield mono
            if not left:
                break
        else:
            yield resampler.resample_chunk(np.empty(0, np.float32), last=True)[:left]
            if problem := early_end(raw, sound, frames, errors):
                tell(problem)
        if mixed_power < 1e-4 * power:
            tell("its channels are of opposite phase: mixed to mono they are silent")


def load_audio(path, sample_rate, max_seconds=None):
    """Read an audio file, or its first `max_seconds`, of any rate and channel count -> (1, S) float32 at `sample_rate`.

    A warning says where it ends early or its channels cancel out. ValueError names a file that is missing, not audio,
    empty, or holds numbers that are not finite.
    """
    wav = np.concatenate(list(read_blocks(path, sample_rate, max_seconds=max_seconds)))
    if not len(wav):
        raise ValueError(f"{path}: holds no audio samples")
    return torch.from_numpy(wav)[None]


def check_audio_path(path):
    """The format that a file name asks for ("WAV", ...), checked before there is anything to write.

    ValueError for a suffix that is not written; OSError for a folder, and where there is no permission or no room.
    """
    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac", ".ogg"):
        raise ValueError(f"{path}: the name of an audio file must end in .wav, .flac or .ogg")
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{path}: is a folder or a device; want the name of a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as trial:
            trial.write(bytes(4096))
    except OSError as error:
        raise OSError(f"{path}: cannot be written to {folder} ({error.strerror})") from error
    return path.suffix[1:].upper()


def save_audio(path, wav, sample_rate):
    """Write audio (1, S) or (S,); the suffix names the format: .wav and .flac (16-bit PCM), .ogg (Vorbis).

    Peaks beyond full scale are turned down, the whole file alike, never clipped. The file appears whole or not at all:
    it is read again before it takes its name. ValueError for samples that are not finite, OSError for a full disk.
    """
    format = check_audio_path(path)
    samples = torch.as_tensor(wav).detach().float().cpu().reshape(-1).numpy()
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: refusing to write samples that are not finite numbers")
    samples = samples / max(1.0, np.abs(samples).max(initial=0.0) / 0.999)
    try:
        with whole_file(path) as temporary:
            with open(temporary, "w+b") as raw:
                with soundfile.SoundFile(raw.fileno(), "w", sample_rate, 1, format=format, closefd=False) as sound:
                    for start in range(0, len(samples), BLOCK):
                        sound.write(samples[start:start + BLOCK])
                os.fsync(raw.fileno())
            with open_audio(temporary) as (_, sound):  # libsndfile does not say when the last page found no room
                if sum(map(len, read_frames(sound, []))) != len(samples):
                    raise OSError("not all of it was stored")
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise OSError(f"{path}: could not be written, what was there is kept ({error}; is the disk full?)") from error
