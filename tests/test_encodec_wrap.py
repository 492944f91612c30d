"""What the codec promises. Nothing here touches the internet; the 24 kHz model gets random weights.

Read in this order: what `encode` and `decode` give; long audio piece by piece; saving and loading; published layouts;
damaged files and wrong settings; the import of the package; at the end, parity with the original libraries, whose
results for two small random codecs are in `data/encodec*`.
"""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DATA, RunsCode, lay

import encodec_wrap
from encodec_wrap import REPOSITORY, TOY_CODEC, Codec, CodecConfig, load_codec
from toy.mel import log_mel, mel_spectrogram
from toy.world import example

TINY = CodecConfig(ratios=(4, 2), n_codebooks=3, codebook_size=16, dimension=8, n_filters=2)
AUDIOCRAFT = DATA / "encodec16k_audiocraft_tiny_compression_state_dict.bin"


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def codec():
    return load_codec("toy")


@pytest.fixture(scope="module")
def clips():
    """Three toy clips of two seconds, (3, 1, 32000)."""
    return torch.stack([torch.from_numpy(example(i, "valid")[0])[None] for i in range(3)])[..., :32_000]


@pytest.fixture(scope="module")
def codes(codec, clips):
    return codec.encode(clips)


def test_encode_gives_a_frame_for_every_begun_hop_and_decode_whole_hops(codec, clips):
    for samples in (1, 319, 320, 321, 641):
        codes = codec.encode(clips[:1, :, :samples])
        frames = math.ceil(samples / codec.hop_length)
        assert codes.shape == (1, codec.n_codebooks, frames) and codes.dtype == torch.long
        assert codec.decode(codes).shape == (1, 1, frames * codec.hop_length)


def test_decode_of_encode_is_close_to_the_clip_and_closer_with_more_codebooks(codec, clips, codes):
    def distance(wav):
        """Mean L1 distance between log-mel spectrograms."""
        a, b = (log_mel(mel_spectrogram(x[:, 0], 16_000)) for x in (wav, clips))
        return (a - b).abs().mean().item()

    decoded = codec.decode(codes)
    assert distance(decoded) < 0.5 * distance(torch.zeros_like(clips)), "silence is farther"
    assert distance(decoded) < 0.5 * distance(decoded.roll(1, dims=0)), "so is another clip"
    assert distance(decoded) < distance(codec.decode(codes[:, :1])), "so is what one codebook holds"


def test_encode_and_decode_refuse_other_shapes_and_codes_out_of_range_such_as_the_mask_token(codec):
    for shape in ((1, 2, 640), (640,), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"\(B, 1, S\)"):
            codec.encode(torch.zeros(shape))
    for shape, code, words in (((1, 5, 10), 0, "decode wants codes"), ((1, 0, 10), 0, "decode wants codes"),
                               ((4, 10), 0, "decode wants codes"), ((1, 4, 0), 0, "decode wants codes"),
                               ((1, 4, 2), -1, "below 256"), ((1, 4, 2), 256, "below 256")):
        with pytest.raises(ValueError, match=words):
            codec.decode(torch.full(shape, code))


def test_encode_and_decode_work_on_the_codecs_device_wherever_their_input_is():
    codec = load_codec("toy").to("meta")
    codes, wav = codec.encode(torch.zeros(2, 1, 640)), codec.decode(torch.zeros(2, 4, 2, dtype=torch.long))
    assert codes.device == wav.device == torch.device("meta") and codes.shape == (2, 4, 2) and wav.shape == (2, 1, 640)


def random_codec(**fields):
    torch.manual_seed(0)
    codec = Codec(CodecConfig(**{"n_filters": 4, "dimension": 16} | fields)).eval()
    latents = codec.model.encoder(torch.rand(1, 1, codec.codebook_size * codec.hop_length) - 0.5).detach()[0].T
    for layer in codec.model.quantizer.vq.layers:  # new ones are all zeros
        layer._codebook.embed.copy_(latents)
        latents = latents.std(0) * torch.randn(latents.shape) / 2
    return codec


@pytest.mark.parametrize("made", [
    lambda: load_codec("toy"), lambda: load_codec(AUDIOCRAFT),
    lambda: random_codec(causal=True, true_skip=False, lstm=2)], ids=["toy", "16 kHz", "causal"])
def test_encode_and_decode_in_pieces_equal_those_of_the_whole(made, monkeypatch):
    """The last two have an LSTM, which sees all that came before."""
    codec, generator = made(), torch.Generator().manual_seed(0)
    wav = torch.rand(1, 1, 100 * codec.hop_length - 7, generator=generator) - 0.5
    codes = torch.randint(codec.codebook_size, (1, codec.n_codebooks, 100), generator=generator)
    whole = codec.encode(wav), codec.decode(codes)
    assert len(whole[0].unique()) > 50
    monkeypatch.setattr(encodec_wrap, "PIECE", 17)
    torch.testing.assert_close(codec.decode(codes), whole[1], atol=1e-4, rtol=0)
    share = (codec.encode(wav) == whole[0]).float().mean()
    assert share > 0.98, "but for rounding, where two entries of a random codebook are equally near"


def test_decode_never_works_on_more_than_a_piece_at_the_rate_of_the_audio():
    codec, longest = random_codec(**vars(TINY)), []
    codec.model.decoder.model[-1].register_forward_hook(lambda m, i, y: longest.append(y.shape[-1]))
    codec.decode(torch.zeros(1, 3, 1500, dtype=torch.long))
    assert len(longest) == 3 and max(longest) <= (512 + 2 * 16) * codec.hop_length


def test_load_codec_keeps_the_first_n_codebooks(clips, codes):
    for k in (1, 3):
        few, part = load_codec("toy", k), clips[:1, :, :6400]
        assert few.n_codebooks == k and few.encode(part)[:, :, :15].equal(codes[:1, :k, :15])
        assert few.decode(codes[:1, :k, :20]).shape == part.shape
    for wrong in (0, -1, 5):
        with pytest.raises(ValueError, match=f"n_codebooks must be 1 to 4 for this codec, not {wrong}"):
            load_codec("toy", wrong)


def test_save_writes_a_file_that_load_codec_reads_back(tmp_path):
    made = random_codec(**vars(TINY))
    made.save(tmp_path / "codec.pt", {"note": "whatever"})
    again = load_codec(tmp_path / "codec.pt")
    assert again.config == TINY and os.listdir(tmp_path) == ["codec.pt"]
    halves = {name: tensor.half().float() for name, tensor in made.state_dict().items()}
    torch.testing.assert_close(again.state_dict(), halves, atol=0, rtol=0)


def test_load_codec_gives_the_24khz_model_with_as_many_codebooks_as_asked(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(encodec_wrap.encodec.model, "ROOT_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match=f"put http.*encodec_24khz-d7cc33bc.th into the folder {tmp_path}"):
        load_codec("encodec_24khz")
    theirs = encodec_wrap.encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    torch.save(theirs.state_dict(), tmp_path / "torch" / "checkpoints" / "encodec_24khz-d7cc33bc.th")
    codec, wav = load_codec("encodec_24khz"), torch.rand(1, 1, 1000)
    assert (codec.sample_rate, codec.frame_rate, codec.codebook_size, codec.n_codebooks) == (24_000, 75, 1024, 4)
    torch.testing.assert_close(codec.model.decoder(codec.model.encoder(wav)), theirs.decoder(theirs.encoder(wav)))
    assert load_codec("encodec_24khz", 32).encode(wav).shape == (1, 32, 4)


def lay_hugging_face(folder, file="pytorch_model.bin", newer=False, **config):
    """A folder like facebook/encodec_32khz with the small codec's weights; newer: weight norm as it is spelled now."""
    tensors = {name.replace("weight_g", "parametrizations.weight.original0").replace(
        "weight_v", "parametrizations.weight.original1") if newer else name: tensor
        for name, tensor in read(DATA / "encodec32k_hf_tiny_pytorch_model.bin").items()}
    return lay(folder, tensors, read(DATA / "encodec32k_hf_tiny_forward.pt")["config"] | config, file)


def lay_audiocraft(folder, change=dict, old="", new=""):
    """compression_state_dict.bin of the small 16 kHz codec, with its tensors and its settings changed."""
    content = read(AUDIOCRAFT)
    assert old in content["xp.cfg"]
    changed = {"best_state": change(content["best_state"]), "xp.cfg": content["xp.cfg"].replace(old, new, 1)}
    torch.save(content | changed, folder / "compression_state_dict.bin")
    return folder


def assert_matches(codec, golden):
    """Codes and audio are those that the original library gave."""
    golden = read(DATA / f"{golden}_forward.pt")
    assert torch.equal(codec.encode(golden["wav"]), golden["codes"])
    torch.testing.assert_close(codec.decode(golden["codes"]), golden["audio"], atol=1e-4, rtol=0)


def test_load_codec_follows_a_pointer_to_a_folder_beside_it_or_to_the_hub(tmp_path, local_hub):
    assert_matches(load_codec(lay_audiocraft(tmp_path)), "encodec16k_audiocraft_tiny")
    lay_hugging_face(local_hub.folder / REPOSITORY, "model.safetensors")
    (tmp_path / "model").mkdir()
    torch.save({"pretrained": REPOSITORY}, tmp_path / "model" / "compression_state_dict.bin")
    for place in ("model/encodec_32khz", "encodec_32khz"):
        lay_hugging_face(tmp_path / place)
        assert_matches(load_codec(tmp_path / "model"), "encodec32k_hf_tiny")
        shutil.rmtree(tmp_path / place)
    assert local_hub.served == [], "what lies there is not fetched"
    for name in (tmp_path / "model" / "compression_state_dict.bin", REPOSITORY):
        assert_matches(load_codec(name), "encodec32k_hf_tiny")
    assert local_hub.served == [f"{REPOSITORY}/model.safetensors", f"{REPOSITORY}/config.json"]


BAD_FILES = {  # name: (content, what the message says)
    "pickled code": ({"pretrained": RunsCode()}, "cannot be read"),
    "another pointer": ({"pretrained": "facebook/encodec_24khz"}, "only facebook/encodec_32khz is known"),
    "a MAGNeT": (read(DATA / "magnet_tiny_state_dict.bin"), "not those of a codec; .* is missing"),
    "settings in a list": (read(TOY_CODEC) | {"codec": [1]}, "settings are not a dictionary"),
    "other settings": (read(TOY_CODEC) | {"codec": {"dimension": 32}}, "has shape"),
    "huge": (read(TOY_CODEC) | {"codec": {"ratios": [2] * 30}}, "n_filters 12, doubled 30 times"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_codec_says_in_one_line_what_is_wrong_with_a_file_and_runs_no_code_in_it(kind, offline):
    content, words = BAD_FILES[kind]
    torch.save(content, offline / "bad.pt")
    with pytest.raises(ValueError, match=f"^{offline}/bad.pt: .*({words})") as error:
        load_codec(offline / "bad.pt")
    assert "\n" not in str(error.value) and os.listdir(offline) == ["bad.pt"]


@pytest.mark.parametrize("layout, change, words", [
    ("A", dict(old="renormalize: false", new="renormalize: true"), "encodec.renormalize True is not supported"),
    ("A", dict(old="n_filters: 4", new="n_filters: four"), "n_filters must be whole number"),
    ("A", dict(old="bins: 2048", new="bins: 2000"), "codebook_size must be 2 or 4"),
    ("A", dict(change=lambda state: state | {"encoder.x": torch.zeros(1)}), "tensor encoder.x is unexpected"),
    ("H", dict(normalize=True), "a codec with normalize True is not supported"),
    ("H", dict(num_lstm_layers=1), "tensor .* is unexpected"), ("H", dict(sampling_rate="x"), "sample_rate must be")])
def test_load_codec_names_file_and_field_of_settings_that_are_wrong(layout, change, words, tmp_path):
    folder = {"A": lay_audiocraft, "H": lay_hugging_face}[layout](tmp_path, **change)
    with pytest.raises(ValueError, match=rf"(compression_state_dict\.bin|config\.json|pytorch_model\.bin): .*{words}"):
        load_codec(folder)


def test_import_encodec_works_beside_a_torchaudio_that_cannot_load(tmp_path):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "part.py").touch()
    (tmp_path / "torchaudio" / "__init__.py").write_text("import torchaudio.part\nraise OSError('no native library')")
    code = "import sys, encodec_wrap; print(encodec_wrap.encodec.__name__, 'torchaudio' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": f"{tmp_path}:{TOY_CODEC.parents[2]}"})
    assert ended.stdout == "encodec False\n", f"it should be imported, and nothing left behind: {ended.stderr}"


@pytest.mark.parametrize("file, newer", [("pytorch_model.bin", False), ("model.safetensors", True)])
def test_load_codec_reads_the_layout_of_hugging_face(file, newer, tmp_path):
    """Weight norm is spelled in two ways. Without their config weights are those of the 32 kHz codec."""
    lay_hugging_face(tmp_path, file, newer)
    for name in (tmp_path, tmp_path / file):
        codec = load_codec(name)
        assert (codec.sample_rate, codec.frame_rate, codec.n_codebooks, codec.codebook_size) == (32_000, 50, 4, 2048)
        assert_matches(codec, "encodec32k_hf_tiny")
        (tmp_path / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("causal", ["false", "${encodec.causal}"], ids=["value", "reference"])
def test_load_codec_reads_audiocrafts_layout(causal, tmp_path):
    old, new = (f"causal: {word}\n  n_filters" for word in ("false", causal))
    codec = load_codec(lay_audiocraft(tmp_path, old=old, new=new))
    assert (codec.sample_rate, codec.frame_rate, codec.n_codebooks, codec.codebook_size) == (16_000, 50, 4, 2048)
    assert_matches(codec, "encodec16k_audiocraft_tiny")
