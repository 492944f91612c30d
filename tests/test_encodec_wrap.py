"""What the codec and the audio files promise. Without the network: the 24 kHz model gets random weights here."""

import importlib
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import encodec_wrap
from encodec_wrap import TOY_CODEC, Codec, CodecConfig, import_encodec, load_audio, load_codec, save_audio
from toy.mel import log_mel, mel_spectrogram
from toy.world import example

DATA = Path(__file__).parent / "data"
TINY = CodecConfig(ratios=(4, 2), n_codebooks=3, codebook_size=16, dimension=8, n_filters=2)


@pytest.fixture(scope="module")
def codec():
    return load_codec("toy")


@pytest.fixture(scope="module")
def clips():
    """Three toy clips, (3, 1, 64000)."""
    return torch.stack([torch.from_numpy(example(i, "valid")[0])[None] for i in range(3)])


def tone(seconds, rate, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def pitch(wav, rate):
    """The frequency of the strongest partial, in Hz."""
    wav = np.asarray(wav).reshape(-1)
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), 2**18))
    return spectrum.argmax() * rate / 2**18


# ------------------------------------------------------------------------------------------------------------ importing

@pytest.fixture
def fresh_imports(tmp_path, monkeypatch):
    """Forget encodec and torchaudio for one test; gives a function that puts source files on the import path."""
    def is_ours(name):
        return name.split(".")[0] in ("encodec", "torchaudio")

    def add_module(name, source):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)

    kept = {name: module for name, module in sys.modules.items() if is_ours(name)}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield add_module
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize("error", ["OSError('no native library')", "ImportError('no torchaudio')"])
def test_import_encodec_works_beside_a_torchaudio_that_cannot_load(fresh_imports, error):
    fresh_imports("torchaudio/part.py", "")
    fresh_imports("torchaudio/__init__.py", f"import torchaudio.part\nraise {error}")
    module = import_encodec()
    assert callable(module.EncodecModel.encodec_model_24khz)
    left = [name for name in sys.modules if name.split(".")[0] == "torchaudio"]
    assert left == [], "a stand-in or a half-done import was left behind"


def test_import_encodec_uses_a_torchaudio_that_works(fresh_imports):
    fresh_imports("torchaudio/__init__.py", "works = True")
    module = import_encodec()
    assert sys.modules["torchaudio"].works
    assert module.utils.torchaudio is sys.modules["torchaudio"]


# ------------------------------------------------------------------------------------------------------------ the codec

def test_load_codec_gives_the_toy_codec_and_its_facts(codec):
    assert (codec.sample_rate, codec.frame_rate, codec.hop_length, codec.n_codebooks) == (16_000, 50, 320, 4)
    assert codec.codebook_size >= 256


@pytest.mark.parametrize("samples", [1, 2, 319, 320, 321, 639, 640, 641, 4999, 64_000])
def test_encode_gives_one_frame_for_every_begun_hop_and_decode_whole_hops(codec, clips, samples):
    codes = codec.encode(clips[:1, :, :samples])
    frames = math.ceil(samples / codec.hop_length)
    assert codes.shape == (1, codec.n_codebooks, frames) and codes.dtype == torch.long
    assert codec.decode(codes).shape == (1, 1, frames * codec.hop_length)


def test_encode_gives_codes_of_the_codebook_and_uses_many_of_them(codec, clips):
    codes = codec.encode(clips)
    assert codes.min() >= 0 and codes.max() < codec.codebook_size
    assert all(len(codes[:, k].unique()) > 20 for k in range(codec.n_codebooks))


def test_encode_gives_the_same_codes_each_time(codec, clips):
    assert torch.equal(codec.encode(clips), codec.encode(clips))


def test_encode_and_decode_of_a_batch_are_those_of_its_clips(codec, clips):
    codes = codec.encode(clips)
    alone = torch.cat([codec.encode(clip[None]) for clip in clips])
    assert (codes == alone).float().mean() > 0.999, "but for rounding in a near tie"
    wavs = torch.cat([codec.decode(row[None]) for row in codes])
    torch.testing.assert_close(codec.decode(codes), wavs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_codec_n_codebooks_keeps_the_first_ones(codec, clips, k):
    few = load_codec("toy", k)
    assert few.n_codebooks == k
    codes = few.encode(clips)
    assert torch.equal(codes, codec.encode(clips)[:, :k])
    assert few.decode(codes).shape == clips.shape


@pytest.mark.parametrize("k", [0, -1, 5])
def test_load_codec_refuses_a_number_of_codebooks_it_has_not(k):
    with pytest.raises(ValueError, match="between 1 and 4"):
        load_codec("toy", k)


@pytest.mark.parametrize("shape", [(1, 2, 640), (640,), (1, 640), (1, 1, 0)])
def test_encode_refuses_what_is_not_a_batch_of_mono_audio(codec, shape):
    with pytest.raises(ValueError, match=r"\(B, 1, S\)"):
        codec.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 5, 10), (4, 10), (1, 4, 0)])
def test_decode_refuses_what_is_not_a_batch_of_codes(codec, shape):
    with pytest.raises(ValueError, match="decode wants codes"):
        codec.decode(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("code", [-1, 256])
def test_decode_refuses_codes_out_of_range_such_as_the_mask_token(codec, code):
    codes = torch.zeros(1, codec.n_codebooks, 10, dtype=torch.long)
    codes[0, 1, 3] = codec.codebook_size if code == 256 else code
    with pytest.raises(ValueError, match=f"below {codec.codebook_size}"):
        codec.decode(codes)


def distance(a, b):
    """Mean L1 distance between log-mel spectrograms."""
    a, b = (log_mel(mel_spectrogram(x[:, 0], 16_000)) for x in (a, b))
    return (a - b).abs().mean().item()


def test_decode_of_encode_is_closer_to_the_clip_than_silence_is(codec, clips):
    back = codec.decode(codec.encode(clips))
    assert distance(back, clips) < 0.5 * distance(torch.zeros_like(clips), clips)
    other = back.roll(1, dims=0)
    assert distance(back, clips) < 0.5 * distance(other, clips), "nor is another clip as close"


def test_decode_comes_closer_with_more_codebooks(codec, clips):
    codes = codec.encode(clips)
    one, all_four = (distance(codec.decode(codes[:, :k]), clips) for k in (1, 4))
    assert all_four < one


def test_codec_does_not_learn_while_another_network_trains(codec):
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())


def test_save_writes_a_file_that_load_codec_reads_back(tmp_path, clips):
    made = Codec.from_config(TINY).eval()
    made.save(tmp_path / "codec.pt", {"note": "whatever"})
    read = load_codec(tmp_path / "codec.pt")
    assert (read.hop_length, read.n_codebooks, read.codebook_size, read.config) == (8, 3, 16, TINY)
    for name, tensor in made.model.state_dict().items():
        torch.testing.assert_close(read.model.state_dict()[name], tensor.half().float(), atol=0, rtol=0)
    assert read.encode(clips[:1, :, :801]).shape == (1, 3, 101)


def test_save_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "codec.pt"
    path.write_text("old")

    def fail(content, file):
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(encodec_wrap.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        Codec.from_config(TINY).save(path)
    assert path.read_text() == "old"


def test_load_codec_gives_the_24khz_model_with_as_many_codebooks_as_asked(offline):
    weights = encodec_wrap.encodec.EncodecModel.encodec_model_24khz(pretrained=False).state_dict()
    offline.mkdir(parents=True)
    torch.save(weights, offline / "encodec_24khz-d7cc33bc.th")
    codec = load_codec("encodec_24khz")
    assert (codec.sample_rate, codec.frame_rate, codec.codebook_size, codec.n_codebooks) == (24_000, 75, 1024, 4)
    codes = codec.encode(torch.zeros(1, 1, 1000))
    assert codes.shape == (1, 4, 4) and codec.decode(codes).shape == (1, 1, 4 * 320)
    two = load_codec("encodec_24khz", 2)
    assert torch.equal(two.encode(torch.zeros(1, 1, 1000)), codes[:, :2])
    with pytest.raises(ValueError, match="between 1 and 32"):
        load_codec("encodec_24khz", 33)


def test_load_codec_offline_names_the_24khz_file_and_its_folder(offline, monkeypatch):
    monkeypatch.setattr(encodec_wrap.encodec.model, "ROOT_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match=f"encodec_24khz-d7cc33bc.th into {offline}"):
        load_codec("encodec_24khz")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("pickle-ran-code",)


def toy_file(**changes):
    return torch.load(TOY_CODEC, weights_only=True) | changes


BAD_CODECS = {
    "empty": b"", "text": b"hello world\n", "bytes": b"\xff" * 100, "cut": TOY_CODEC.read_bytes()[:100_000],
    "not utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "a string": b"S'\xff'\n.",
    "foreign": (DATA / "t5_tiny_forward.pt").read_bytes(), "pickled code": pickle.dumps({"codec": RunsCode()}, 2),
    "a list": [1, 2], "no weights": {"codec": {}}, "other settings": toy_file(codec={"colour": "red"}),
    "settings too small": toy_file(codec={"dimension": 32}), "weights in a list": toy_file(weights=[1.0]),
    "no numbers in it": toy_file(weights={"encoder": 1}),
}


@pytest.mark.parametrize("name", BAD_CODECS)
def test_load_codec_names_a_file_that_is_no_codec_and_runs_no_code_in_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "bad.pt", BAD_CODECS[name]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="bad.pt"):
        load_codec(path)
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_load_codec_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="no_such_codec.*toy, encodec_24khz"):
        load_codec("no_such_codec")


# ---------------------------------------------------------------------------------------------------------- audio files

def test_load_audio_mixes_stereo_to_the_mean(tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([tone(1, 16_000), np.full(16_000, 0.25)], axis=1), 16_000, subtype="FLOAT")
    wav = load_audio(path, 16_000)
    assert wav.dtype == torch.float32 and wav.shape == (1, 16_000)
    np.testing.assert_allclose(wav[0], (tone(1, 16_000) + 0.25) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 96_000])
def test_load_audio_keeps_length_pitch_and_loudness_at_another_rate(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", tone(1.5, rate), rate)
    wav = load_audio(tmp_path / "tone.wav", 16_000)
    assert abs(wav.shape[1] - 24_000) <= 1
    assert pitch(wav, 16_000) == pytest.approx(440, abs=1)
    assert wav[0, 2000:-2000].abs().max() == pytest.approx(0.5, abs=0.02)


def test_load_audio_lets_nothing_above_the_new_nyquist_frequency_fold_back(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(1, 48_000, 10_000), 48_000)
    assert load_audio(tmp_path / "tone.wav", 16_000)[0, 1000:-1000].abs().max() < 0.01


@pytest.mark.parametrize("suffix, subtype, error", [
    ("wav", "PCM_U8", 0.01), ("wav", "PCM_24", 1e-6), ("flac", "PCM_16", 1e-4), ("ogg", "VORBIS", 0.05)])
def test_load_audio_reads_common_formats(tmp_path, suffix, subtype, error):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(1, 16_000), 16_000, subtype=subtype)
    wav = load_audio(path, 16_000)
    assert wav.shape == (1, 16_000)
    np.testing.assert_allclose(wav[0], tone(1, 16_000), atol=error)


def test_load_audio_gives_silence_for_a_silent_file(tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 16_000)
    assert torch.equal(load_audio(tmp_path / "silent.wav", 16_000), torch.zeros(1, 1000))


def test_load_audio_gives_what_is_left_of_a_cut_wav(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, tone(1, 16_000), 16_000)
    path.write_bytes(path.read_bytes()[:16_044])
    wav = load_audio(path, 16_000)
    assert 0 < wav.shape[1] <= 8000
    np.testing.assert_allclose(wav[0], tone(1, 16_000)[:wav.shape[1]], atol=1e-4)


def write_bad_audio(path, kind):
    if kind == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "one sample at a high rate":
        soundfile.write(path, np.zeros(1), 96_000)
    elif kind in ("NaN", "infinity"):
        soundfile.write(path, [0.1, np.nan if kind == "NaN" else np.inf, 0.1], 16_000, subtype="FLOAT")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "cut in its header":
        soundfile.write(path, tone(1, 16_000), 16_000)
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "cut flac":
        soundfile.write(path, tone(1, 16_000), 16_000, format="FLAC")
        path.write_bytes(path.read_bytes()[:100])
    elif kind != "missing":
        path.write_bytes({"zero bytes": b"", "text": b"la la la\n", "noise": bytes(range(256))}[kind])


@pytest.mark.parametrize("kind", [
    "no samples", "one sample at a high rate", "NaN", "infinity", "a folder", "cut in its header", "cut flac",
    "missing", "zero bytes", "text", "noise"])
def test_load_audio_names_a_file_that_cannot_be_used(tmp_path, kind):
    write_bad_audio(tmp_path / "song.wav", kind)
    with pytest.raises(ValueError, match="song.wav"):
        load_audio(tmp_path / "song.wav", 16_000)


@pytest.mark.parametrize("suffix, error", [("wav", 1e-4), ("WAV", 1e-4), ("flac", 1e-4), ("ogg", 0.05)])
def test_save_audio_writes_what_load_audio_reads_back(tmp_path, suffix, error):
    path = tmp_path / "new" / "folder" / f"out.{suffix}"
    save_audio(path, torch.from_numpy(tone(1, 16_000))[None], 16_000)
    assert soundfile.info(path).samplerate == 16_000
    np.testing.assert_allclose(load_audio(path, 16_000)[0], tone(1, 16_000), atol=error)


def test_save_audio_turns_loud_audio_down_without_clipping_and_leaves_quiet_audio_alone(tmp_path):
    path = tmp_path / "out.wav"
    save_audio(path, 6 * tone(1, 16_000), 16_000)
    wav = load_audio(path, 16_000)[0].numpy()
    assert np.abs(wav).max() == pytest.approx(0.999, abs=0.01)
    np.testing.assert_allclose(wav, tone(1, 16_000) * np.abs(wav).max() / 0.5, atol=1e-3)
    save_audio(path, 0.1 * tone(1, 16_000), 16_000)
    assert load_audio(path, 16_000).abs().max() == pytest.approx(0.05, abs=1e-3)


def test_save_audio_keeps_the_old_file_and_no_other_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)  # the file is open then
    with pytest.raises(OSError, match="disk full"):
        save_audio(path, torch.zeros(1, 100), 16_000)
    assert os.listdir(tmp_path) == ["out.wav"] and path.read_text() == "old"


def test_save_audio_refuses_samples_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="out.wav.*finite"):
        save_audio(tmp_path / "out.wav", torch.tensor([[0.0, math.nan]]), 16_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "out.mp4", "out.txt", "wav"])
def test_save_audio_refuses_a_name_that_says_no_known_format(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*wav, .flac or .ogg"):
        save_audio(tmp_path / name, torch.zeros(1, 100), 16_000)
    assert os.listdir(tmp_path) == []


def test_save_audio_writes_minutes_of_ogg(tmp_path):
    """In a process of its own, since the sound library is known to crash on many samples at once."""
    code = f"""if True:
        import sys, torch
        sys.path.insert(0, {str(Path(encodec_wrap.__file__).parent)!r})
        from encodec_wrap import save_audio
        save_audio({str(tmp_path / "long.ogg")!r}, torch.zeros(1, 3_840_000), 32_000)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert soundfile.info(tmp_path / "long.ogg").duration == pytest.approx(120)
