"""What the audio files promise: any that libsndfile reads, to its end; written whole or not at all.

Read in this order: `load_audio` of sound files, of long ones, of damaged ones; then `save_audio`.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import full_disk

from support.audio import load_audio, read_blocks, save_audio

RATE = 16_000
pytestmark = pytest.mark.filterwarnings("error")  # a warning that a test does not expect fails it


def tone(seconds, rate=RATE, hertz=440):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds):
    """What no format can make much smaller."""
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE))


@pytest.mark.parametrize("suffix, subtype, error", [
    ("wav", "PCM_U8", 0.01), ("wav", "PCM_24", 1e-6), ("flac", "PCM_16", 1e-4), ("ogg", "VORBIS", 0.05),
    ("aiff", "PCM_16", 1e-4), ("au", "PCM_16", 1e-4), ("w64", "PCM_16", 1e-4), ("caf", "PCM_16", 1e-4)])
def test_load_audio_reads_common_formats(tmp_path, suffix, subtype, error):
    soundfile.write(tmp_path / f"tone.{suffix}", tone(1), RATE, subtype)
    (tmp_path / f"tone.{suffix}").rename(tmp_path / "tone")  # the suffix says nothing
    wav = load_audio(tmp_path / "tone", RATE)
    assert wav.shape == (1, RATE) and wav.dtype == torch.float32
    np.testing.assert_allclose(wav[0], tone(1), atol=error)


def test_load_audio_mixes_stereo_to_the_mean(tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone(1), np.full(RATE, 0.25)], axis=1), RATE, "FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "stereo.wav", RATE)[0], (tone(1) + 0.25) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 96_000])
def test_load_audio_keeps_length_pitch_and_loudness_at_another_rate(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", tone(1.5, rate), rate)
    wav = load_audio(tmp_path / "tone.wav", RATE)[0]
    assert abs(len(wav) - 24_000) <= 1 and np.abs(np.fft.rfft(wav)).argmax() == pytest.approx(440 * 1.5, abs=2)
    assert wav[2000:-2000].abs().max() == pytest.approx(0.5, abs=0.02)
    if rate > 2 * 10_000:  # nothing above the new Nyquist frequency folds back
        soundfile.write(tmp_path / "high.wav", tone(1, rate, 10_000), rate)
        assert load_audio(tmp_path / "high.wav", RATE)[0, 1000:-1000].abs().max() < 0.01


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_read_blocks_gives_the_whole_file_piece_by_piece(tmp_path, rate):
    soundfile.write(tmp_path / "long.flac", noise(20), rate)
    blocks = list(read_blocks(tmp_path / "long.flac", RATE))
    assert max(map(len, blocks)) <= 65_536 and len(blocks) > 3
    whole = soundfile.read(tmp_path / "long.flac", dtype="float32")[0]
    np.testing.assert_allclose(np.concatenate(blocks), whole if rate == RATE else
                               soxr.resample(whole, rate, RATE), atol=1e-5)


def test_load_audio_reads_no_more_than_the_seconds_asked_for(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(20), 44_100)
    whole, content = load_audio(path, RATE), path.read_bytes()
    path.write_bytes(content[:len(content) // 2] + b"\xff" * (len(content) // 2))  # what is behind is not looked at
    assert torch.equal(load_audio(path, RATE, max_seconds=1), whole[:, :RATE])


def flac_of_length(path, frames):
    """A FLAC of 20 s whose header says that it holds `frames`; 0 is what is written to a pipe: not known."""
    soundfile.write(path, noise(20), RATE)
    content = bytearray(path.read_bytes())
    field = int.from_bytes(content[18:26], "big")  # the lower 36 bits
    content[18:26] = ((field >> 36 << 36) + frames).to_bytes(8, "big")
    path.write_bytes(content)


def test_load_audio_reads_a_flac_of_unknown_length_or_one_that_claims_days_to_its_end(tmp_path):
    flac_of_length(tmp_path / "pipe.flac", 0)
    np.testing.assert_allclose(load_audio(tmp_path / "pipe.flac", RATE)[0], noise(20), atol=1e-4)
    flac_of_length(tmp_path / "days.flac", 2**32)
    with pytest.warns(UserWarning, match="days.flac: was cut.* up to 20 s"):
        assert load_audio(tmp_path / "days.flac", RATE).shape == (1, 20 * RATE)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "ogg", "mp3"])
def test_load_audio_gives_what_is_left_of_a_cut_file_and_says_so(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, noise(20), RATE)
    whole = load_audio(path, RATE)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cut.*was cut"):
        wav = load_audio(path, RATE)
    assert 8 * RATE < wav.shape[1] < 12 * RATE
    torch.testing.assert_close(wav[:, :-2000], whole[:, :wav.shape[1] - 2000])


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_load_audio_says_that_of_several_recordings_in_a_file_it_reads_the_first(tmp_path, suffix):
    path = tmp_path / f"two.{suffix}"
    soundfile.write(path, noise(5), RATE)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.warns(UserWarning, match="two.*several recordings"):
        assert load_audio(path, RATE).shape[1] == pytest.approx(5 * RATE, abs=2000)


@pytest.mark.parametrize("make", {
    "missing": lambda path: None, "a folder": Path.mkdir, "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"), "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("la la la"), "no samples": lambda path: soundfile.write(path, [], RATE),
    "one sample at a high rate": lambda path: soundfile.write(path, np.zeros(1), 96_000),
    "a rate of 8 Hz": lambda path: soundfile.write(path, tone(1), 8),
    "not a number": lambda path: soundfile.write(path, [0.1, math.nan], RATE, "FLOAT")}.items(), ids=lambda x: x[0])
def test_load_audio_names_a_file_that_cannot_be_used(tmp_path, make):
    make[1](tmp_path / "song.wav")
    with pytest.raises(ValueError, match="song.wav: "):
        load_audio(tmp_path / "song.wav", RATE)


@pytest.mark.parametrize("suffix, error", [("wav", 1e-4), ("WAV", 1e-4), ("flac", 1e-4), ("ogg", 0.05)])
def test_save_audio_writes_minutes_that_load_audio_reads_back(tmp_path, suffix, error):
    """libsndfile is known to crash on many samples at once when it writes OGG, and a crash would end this process."""
    path = tmp_path / "new" / "folder" / f"out.{suffix}"
    save_audio(path, torch.from_numpy(tone(240))[None], RATE)
    assert soundfile.info(path).samplerate == RATE
    np.testing.assert_allclose(load_audio(path, RATE)[0], tone(240), atol=error)


def test_save_audio_turns_a_loud_file_down_as_a_whole_and_leaves_a_quiet_one_alone(tmp_path):
    loud = noise(20)  # longer than the blocks it is written in, with its peak in the last
    loud[-1] = 4
    save_audio(tmp_path / "out.wav", loud, RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "out.wav", RATE)[0], loud * 0.999 / 4, atol=1e-4)
    save_audio(tmp_path / "out.wav", 0.1 * tone(1), RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "out.wav", RATE)[0], 0.1 * tone(1), atol=1e-4)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_save_audio_on_a_full_disk_keeps_the_old_file_and_no_other(tmp_path, suffix):
    path, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    save_audio(whole, noise(20), RATE)
    path.write_text("old")
    for room in (whole.stat().st_size // 2, whole.stat().st_size - 1):  # half of it, or all but the last page
        with full_disk(room), pytest.raises(OSError, match=f"{path.name}: could not be written"):
            save_audio(path, noise(20), RATE)
        assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == sorted([path.name, whole.name])


def test_save_audio_refuses_samples_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="out.wav.*finite"):
        save_audio(tmp_path / "out.wav", torch.tensor([[0.0, math.nan]]), RATE)
    assert os.listdir(tmp_path) == []
