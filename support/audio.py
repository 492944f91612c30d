"""Audio files in and out, through libsndfile: read in blocks whatever the header says, written whole or not at all."""

import io
import os
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from support.files import whole_file

BLOCK = 65_536  # samples that are read or written at once: libsndfile's OGG writer crashes on long arrays


def open_audio(path):
    """libsndfile's `SoundFile` of a file. ValueError names what is not a regular file, or not audio."""
    if not os.path.isfile(path):  # never a device or a pipe, which may not end
        raise ValueError(f"{path}: {'is not a regular file' if os.path.exists(path) else 'no such audio file'}")
    try:  # by its descriptor: the name need not be UTF-8, and the suffix says nothing
        sound = soundfile.SoundFile(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))  # a flag of Windows
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: is not audio that libsndfile can read; convert it, as by ffmpeg") from error
    if not 1_000 <= sound.samplerate <= 1_000_000:  # the header is damaged
        raise ValueError(f"{path}: its sample rate is {sound.samplerate} Hz, want 1,000 to 1,000,000")
    return sound


def read_blocks(path, sample_rate):
    """Yield a file of any rate and channel count as arrays (S,) float32, mono, at `sample_rate` Hz, block by block, to
    its real end, whatever the header says. A warning says if it was cut, or holds several recordings. ValueError names
    a file that cannot be read or holds numbers that are not finite."""
    with open_audio(path) as sound:
        resampler, frames, fault = soxr.ResampleStream(sound.samplerate, sample_rate, 1), 0, False
        size = n_read = max(1, BLOCK // sound.channels)
        while n_read == size and not fault:
            block = np.full((size, sound.channels), np.nan, np.float32)
            try:
                n_read = len(sound.read(out=block))
            except soundfile.LibsndfileError as error:
                n_read = min(int((~np.isnan(block[:, 0])).sum()), sound.frames - frames)  # keep what was decoded
                fault = error.code != 39  # a seek that fails behind the end of a FLAC, and says nothing
            frames += n_read
            mono = block[:n_read].mean(axis=1)
            if not np.isfinite(mono).all():
                raise ValueError(f"{path}: holds samples that are not finite numbers")
            yield resampler.resample_chunk(mono)
        yield resampler.resample_chunk(np.empty(0, np.float32), last=True)
        log = sound.extra_info  # libsndfile's: sizes in the header and in the file; and of OGG its last page
        sizes = re.search(r"(?:RIFF|FORM|riff|Data Size) +: (\d+) \(should be (\d+)", log)
        cut = sizes and int(sizes[2]) < int(sizes[1]) < 2**31 - 2**16  # more is what is written where it is not known
        too_few = frames < sound.frames < 2**62  # 2**63 - 1 stands for a FLAC that was written to a pipe
        cut = cut or too_few or fault or "lacks an end-of-stream bit" in log
        unread = os.path.getsize(path) - os.lseek(sound.name, 0, os.SEEK_CUR)  # a tag, with the title, is short
        several = unread > 1024 and sound.format in ("MP3", "FLAC")
        if sound.format == "OGG":
            several = Path(path).read_bytes().rfind(b"OggS\0\2") > 0  # begins a stream
        if cut or several:
            warnings.warn(f"{path}: was cut, is damaged, or holds several recordings: it is read up to "
                          f"{frames / sound.samplerate:.6g} s", stacklevel=2)


def load_audio(path, sample_rate, max_seconds=86_400):
    """An audio file, or its first `max_seconds`, as (1, S) float32; otherwise as `read_blocks`. ValueError: empty."""
    blocks, wanted = [], max(1, round(max_seconds * sample_rate))
    for block in read_blocks(path, sample_rate):
        blocks.append(block)
        if sum(map(len, blocks)) >= wanted:  # what is behind is not looked at
            break
    wav = np.concatenate(blocks)[:wanted]
    if not len(wav):
        raise ValueError(f"{path}: holds no audio samples")
    return torch.from_numpy(wav)[None]


def check_audio_path(path):
    """Check a file name before there is anything to write: ValueError or OSError for a suffix that is not written, a
    folder, and where there is no permission or no room."""
    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac", ".ogg") or path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a folder, or no name of an audio file, which must end in .wav, .flac or .ogg")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as trial:
            trial.write(bytes(4096))
    except OSError as error:
        raise OSError(f"{path}: cannot be written to {folder} ({error.strerror})") from error


def save_audio(path, wav, sample_rate):
    """Write audio (1, S) or (S,); the suffix names the format: .wav and .flac (16-bit PCM), .ogg (Vorbis). Peaks beyond
    full scale are turned down, the whole file alike, never clipped. ValueError: samples are not finite; OSError."""
    check_audio_path(path)
    samples = torch.as_tensor(wav).detach().float().cpu().reshape(-1).numpy()
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: refusing to write samples that are not finite numbers")
    samples = samples / max(1.0, np.abs(samples).max(initial=0.0) / 0.999)
    file = io.BytesIO()  # libsndfile does not always say when a disk is full
    with soundfile.SoundFile(file, "w", sample_rate, 1, format=Path(path).suffix[1:].upper()) as sound:
        for start in range(0, len(samples), BLOCK):
            sound.write(samples[start:start + BLOCK])
    with whole_file(path) as temporary:
        temporary.write_bytes(file.getvalue())
