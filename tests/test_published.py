"""Published weights through the entry points a user takes, from local files of the same layout.

`data/encodec*` are small random codecs, and `data/magnet_tiny*`, `data/t5_tiny*` small random networks, with what the
original libraries computed with them.
"""

import json
import os
import pickle
import shutil

import pytest
import soundfile
import torch
from conftest import DATA, assert_one_line, write_safetensors

import hub
import sample
from cli import pick_dtype
from encodec_wrap import Codec, CodecConfig, load_codec
from experiments.full_size import (
    published_state,
    write_audiocraft_codec,
    write_codec,
    write_model,
    write_text_encoder,
)
from model import MAGNeT, ModelConfig, load_model
from sample import SamplingConfig, generate
from t5_encoder import T5Config, T5Encoder

CODEC_32K, CODEC_16K = "encodec32k_hf_tiny", "encodec16k_audiocraft_tiny"
HUGGING_FACE, AUDIOCRAFT = f"{CODEC_32K}_pytorch_model.bin", f"{CODEC_16K}_compression_state_dict.bin"


def read(name):
    return torch.load(DATA / name, weights_only=True)


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def lay(name, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(DATA / name, path)


def new_spelling(tensors):
    """Weight norm as newer versions of torch name it."""
    return {name.replace("weight_g", "parametrizations.weight.original0").replace(
        "weight_v", "parametrizations.weight.original1"): tensor for name, tensor in tensors.items()}


def write_encodec_32khz(folder, layout="pytorch_model.bin", spelling=dict, config=True):
    """A folder like facebook/encodec_32khz, with the small codec's weights."""
    folder.mkdir(parents=True)
    tensors = spelling(read(HUGGING_FACE))
    torch.save(tensors, folder / layout) if layout.endswith(".bin") else write_safetensors(tensors, folder / layout)
    if config:
        small = read(f"{CODEC_32K}_forward.pt")["config"]
        (folder / "config.json").write_text(json.dumps(small | {"use_causal_conv": False, "pad_mode": "reflect"}))
    return folder


def assert_codec_matches(codec, golden):
    golden = read(f"{golden}_forward.pt")
    assert torch.equal(codec.encode(golden["wav"]), golden["codes"])
    torch.testing.assert_close(codec.decode(golden["codes"]), golden["audio"], atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------------------- codecs

@pytest.mark.parametrize("layout", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("spelling", [dict, new_spelling], ids=["weight_g", "parametrizations"])
def test_load_codec_reads_the_layout_of_hugging_face(layout, spelling, tmp_path):
    codec = load_codec(write_encodec_32khz(tmp_path / "encodec_32khz", layout, spelling))
    assert (codec.sample_rate, codec.frame_rate, codec.n_codebooks, codec.codebook_size) == (32_000, 50, 4, 2048)
    assert_codec_matches(codec, CODEC_32K)


def test_load_codec_reads_weights_without_their_config(tmp_path):
    assert_codec_matches(load_codec(DATA / HUGGING_FACE), CODEC_32K)
    assert_codec_matches(load_codec(write_encodec_32khz(tmp_path / "codec", config=False)), CODEC_32K)


def test_load_codec_reads_audiocrafts_own_layout(tmp_path):
    assert_codec_matches(load_codec(DATA / AUDIOCRAFT), CODEC_16K)
    lay(AUDIOCRAFT, tmp_path / "compression_state_dict.bin")
    codec = load_codec(tmp_path)
    assert (codec.sample_rate, codec.frame_rate, codec.n_codebooks, codec.codebook_size) == (16_000, 50, 4, 2048)
    assert_codec_matches(codec, CODEC_16K)


def test_load_codec_understands_settings_that_point_to_others(tmp_path):
    content = read(AUDIOCRAFT)
    settings = content["xp.cfg"].replace("  ratios: [8, 5, 4, 2]", "  ratios:\n  - 8\n  - 5\n  - 4\n  - 2")
    seanet = settings.index("seanet:\n")
    settings = settings[:seanet] + settings[seanet:].replace("causal: false", "causal: ${encodec.causal}", 1)
    path = save(content | {"xp.cfg": settings}, tmp_path / "compression_state_dict.bin")
    assert_codec_matches(load_codec(path), CODEC_16K)


@pytest.mark.parametrize("place", ["model/encodec_32khz", "encodec_32khz"])
def test_load_codec_follows_the_pointer_to_a_folder_beside_it(place, tmp_path):
    pointer = save({"pretrained": hub.CODEC}, tmp_path / "model" / "compression_state_dict.bin")
    write_encodec_32khz(tmp_path / place)
    assert_codec_matches(load_codec(pointer), CODEC_32K)
    assert_codec_matches(load_codec(pointer.parent), CODEC_32K)


def test_load_codec_follows_the_pointer_to_the_hub(tmp_path, local_hub):
    pointer = save({"pretrained": hub.CODEC}, tmp_path / "model" / "compression_state_dict.bin")
    write_encodec_32khz(local_hub.folder / hub.CODEC, "model.safetensors")
    for name in (pointer, hub.CODEC):
        assert_codec_matches(load_codec(name), CODEC_32K)
    assert local_hub.served == [(f"{hub.CODEC}/model.safetensors", 0), (f"{hub.CODEC}/config.json", 0)]


def test_load_codec_says_where_the_pointer_leads_when_offline(tmp_path, offline):
    pointer = save({"pretrained": hub.CODEC}, tmp_path / "model" / "compression_state_dict.bin")
    with pytest.raises(ConnectionError, match=r"32khz/resolve/main/config\.json into .*facebook--encodec_32khz"):
        load_codec(pointer)


class RunsCode:
    """Unpickled carelessly, this makes a folder: harmless proof that code was run."""

    def __reduce__(self):
        return os.mkdir, ("pickle-ran-code",)


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


def change(content, **tensors):
    """`content` with tensors changed: name with __ for dots = function of the tensor."""
    return content | {name.replace("__", "."): do(content[name.replace("__", ".")]) for name, do in tensors.items()}


def audiocraft(**changes):
    content = read(AUDIOCRAFT)
    return content | {key: do(content[key]) for key, do in changes.items()}


BAD_CODECS = {  # name: (content, what the message says)
    "another pointer": (lambda: {"pretrained": "facebook/encodec_24khz"}, "only facebook/encodec_32khz is known"),
    "no YAML": (lambda: without(read(AUDIOCRAFT), "xp.cfg"), "xp.cfg"),
    "YAML of something else": (lambda: read(AUDIOCRAFT) | {"xp.cfg": "lm: 1"}, "settings of a codec.*sample_rate"),
    "renormalized": (lambda: audiocraft(**{"xp.cfg": lambda text: text.replace("ize: false", "ize: true")}),
                     "renormalize must be false"),
    "other filters": (lambda: audiocraft(**{"xp.cfg": lambda text: text.replace("n_filters: 4", "n_filters: 8")}),
                      "tensor .* has shape"),
    "a tensor too few": (lambda: audiocraft(best_state=lambda s: without(s, "encoder.model.13.lstm.bias_ih_l0")),
                         "tensor encoder.model.13.lstm.bias_ih_l0 is missing"),
    "a tensor too many": (lambda: audiocraft(best_state=lambda s: s | {"encoder.x": torch.zeros(1)}),
                          "tensor encoder.x is unexpected"),
    "a tensor transposed": (lambda: audiocraft(
        best_state=lambda s: change(s, decoder__model__0__conv__conv__weight_v=lambda t: t.transpose(0, 1))),
        r"tensor decoder.model.0.conv.conv.weight_v has shape \(16, 64, 7\), want \(64, 16, 7\)"),
    "Hugging Face, transposed": (
        lambda: change(read(HUGGING_FACE), decoder__layers__0__conv__weight_v=lambda t: t.transpose(0, 1)),
        r"tensor decoder.model.0.conv.conv.weight_v has shape \(16, 64, 7\), want \(64, 16, 7\)"),
    "Hugging Face, one too few": (lambda: without(read(HUGGING_FACE), "decoder.layers.1.lstm.bias_hh_l1"),
                                  "tensor decoder.model.1.lstm.bias_hh_l1 is missing"),
    "a text encoder": (lambda: read("t5_tiny_pytorch_model.bin"), "settings of a codec"),
    "a MAGNeT": (lambda: read("magnet_tiny_state_dict.bin"), "settings of a codec"),
    "pickled code": (lambda: {"pretrained": RunsCode()}, "is not a codec file"),
}


@pytest.mark.parametrize("kind", BAD_CODECS)
def test_load_codec_says_in_one_line_what_is_wrong(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_CODECS[kind]
    save(make(), tmp_path / "compression_state_dict.bin")
    with pytest.raises(ValueError, match=rf"compression_state_dict\.bin.*{words}") as error:
        load_codec(tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["compression_state_dict.bin"]


@pytest.mark.parametrize("name", [AUDIOCRAFT, HUGGING_FACE])
def test_load_codec_names_a_truncated_file(name, tmp_path):
    (tmp_path / "cut.bin").write_bytes((DATA / name).read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="cut.bin is not a codec file: it is damaged"):
        load_codec(tmp_path / "cut.bin")


@pytest.mark.parametrize("text, words", [
    ("{", "settings of a codec"), ('{"normalize": true}', "normalize must be false"),
    ('{"upsampling_ratios": [8, 5, 4]}', "tensor .* is missing"), ('{"num_lstm_layers": 1}', "is unexpected")])
def test_load_codec_refuses_a_config_that_does_not_fit(text, words, tmp_path):
    folder = write_encodec_32khz(tmp_path / "codec")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.*{words}"):
        load_codec(folder)


# --------------------------------------------------------------------------------------------------------------- models

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder like a published music model with codec and text encoder laid beside it, all small and random."""
    folder = tmp_path_factory.mktemp("published") / "magnet-tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_model(MAGNeT(ModelConfig(card=64, dim=32, n_heads=2, n_layers=2, text_dim=16, seconds=1.0)), folder)
        write_codec(Codec.from_config(CodecConfig(
            sample_rate=32_000, ratios=(8, 5, 4, 4), codebook_size=64, dimension=8, n_filters=2, lstm=2)),
            folder / "encodec_32khz")
        write_text_encoder(T5Config(32_000, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4), folder / "t5-base")
    return folder


def test_load_model_reads_a_published_folder_and_gives_the_released_logits(tmp_path, golden):
    lay("magnet_tiny_state_dict.bin", tmp_path / "state_dict.bin")
    for name in (tmp_path, str(tmp_path / "state_dict.bin")):
        model, _ = load_model(name)
        with torch.inference_mode():
            for k, stage in enumerate(golden["stages"]):
                logits = model(stage["input"], k, golden["text_embeddings"], golden["text_mask"])
                torch.testing.assert_close(logits, stage["logits"], atol=1e-4, rtol=0)


def test_write_model_is_undone_by_load_model(published, make_magnet, tmp_path):
    model = make_magnet(context=7, span_len=2)
    write_model(model, tmp_path, torch.float32)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_published_names_are_those_of_the_released_files(magnet_tiny):
    theirs = read("magnet_tiny_state_dict.bin")["best_state"]
    ours = published_state(magnet_tiny, torch.float32)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_within_two_percent(dtype, tmp_path, golden):
    lay("magnet_tiny_state_dict.bin", tmp_path / "state_dict.bin")
    model, _ = load_model(tmp_path, dtype=dtype)
    assert all(weight.dtype == dtype for weight in model.parameters())
    text, mask = golden["text_embeddings"], golden["text_mask"]
    with torch.inference_mode():
        for k, stage in enumerate(golden["stages"]):
            for wanted, condition in ((stage["logits"], (text, mask)), (stage["logits_null"], ())):
                logits = model(stage["input"], k, *condition)
                assert logits.dtype == torch.float32 and logits.isfinite().all()
                assert (logits - wanted).norm() < 0.02 * wanted.norm()
    config = SamplingConfig(decoding_steps=(2, 1, 1, 1))
    codes = generate(model, text, mask, 48, config, generator=torch.Generator().manual_seed(0))
    assert codes.max() < model.mask_id


def test_weights_of_the_type_asked_for_stay_in_their_file(published):
    """One copy: the float16 tensors of the file are the model's, mapped and not read; another type is converted."""
    half, single = (load_model(published, dtype=dtype)[0] for dtype in (torch.float16, torch.float32))
    storages = {weight.untyped_storage().data_ptr() for weight in half.parameters()}
    assert half.blocks[0].cross_attn.q.weight.untyped_storage().data_ptr() == (
        half.blocks[0].cross_attn.kv.weight.untyped_storage().data_ptr()), "two parts of one published tensor"
    assert len(storages) < len(list(half.parameters()))
    for name, weight in single.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, half.state_dict()[name].float())


def test_pick_dtype_is_float32_on_a_cpu_that_multiplies_nothing_faster(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("cli.multiplies_bf16", lambda device: False)
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("bf16", cpu) == torch.bfloat16
    monkeypatch.setattr("cli.multiplies_bf16", lambda device: device.type == "cpu")
    assert pick_dtype("auto", cpu) == torch.bfloat16 and pick_dtype("fp32", cpu) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float16


def test_load_model_fetches_a_published_model_and_all_it_needs(published, local_hub):
    shutil.copytree(published, local_hub.folder / "facebook/magnet-small-10secs")
    shutil.move(local_hub.folder / "facebook/magnet-small-10secs/encodec_32khz", local_hub.folder / hub.CODEC)
    (local_hub.folder / "google-t5").mkdir()
    shutil.move(local_hub.folder / "facebook/magnet-small-10secs/t5-base", local_hub.folder / "google-t5/t5-base")
    _, names = load_model("facebook/magnet-small-10secs")
    assert {path for path, _ in local_hub.served} == {
        "facebook/magnet-small-10secs/state_dict.bin", "facebook/magnet-small-10secs/compression_state_dict.bin",
        "facebook/encodec_32khz/pytorch_model.bin", "facebook/encodec_32khz/config.json",
        "google-t5/t5-base/pytorch_model.bin", "google-t5/t5-base/spiece.model"}
    assert load_codec(names["codec"]).sample_rate == 32_000 and names["text_encoder"] == "t5-base"
    assert len(local_hub.served) == 6


@pytest.mark.parametrize("name", hub.MODELS)
def test_load_model_offline_names_everything_that_is_needed(name, offline):
    with pytest.raises(ConnectionError) as error:
        load_model(name)
    message = str(error.value)
    wanted = [f"{name}/resolve/main/state_dict.bin", f"{name}/resolve/main/compression_state_dict.bin",
              "t5-base/resolve/main/spiece.model", str(offline / name.replace("/", "--"))]
    assert all(word in message for word in wanted) and "\n" not in message
    assert ("encodec_32khz" in message) is ("audio" not in name)


def test_published_models_bring_their_own_sampling_defaults(tmp_path, make_magnet):
    def sampling(rate):
        write_model(make_magnet(), tmp_path / str(rate), sample_rate=rate)
        return SamplingConfig(**load_model(tmp_path / str(rate))[1]["sampling"])

    music, sound = sampling(32_000), sampling(16_000)
    assert music == SamplingConfig(schedule="released")
    assert sound == SamplingConfig(
        schedule="released", temperature=3.5, top_p=0.8, guidance_start=20.0, guidance_end=1.0)


def test_load_model_finds_what_lies_beside_it(published):
    _, names = load_model(published)
    assert names["codec"] == str(published / "compression_state_dict.bin")
    assert names["text_encoder"] == str(published / "t5-base")


def test_load_model_finds_a_text_encoder_laid_among_its_files(published, tmp_path):
    shutil.copy(published / "state_dict.bin", tmp_path)
    for file in ("pytorch_model.bin", "spiece.model"):
        shutil.copy(published / "t5-base" / file, tmp_path)
    _, names = load_model(tmp_path)
    assert names["text_encoder"] == str(tmp_path)
    assert T5Encoder.from_pretrained(names["text_encoder"]).tokenizer is not None


BAD_MODELS = {  # name: (content, what the message says)
    "a MusicGen without delays": (
        lambda: read("magnet_tiny_state_dict.bin") | {"xp.cfg": "transformer_lm:\n  causal: true\n  n_q: 4"},
        "not a published MAGNeT or MusicGen.*not delayed by one frame each"),
    "no YAML": (lambda: without(read("magnet_tiny_state_dict.bin"), "xp.cfg"), "lacks xp.cfg"),
    "a codec": (lambda: read(AUDIOCRAFT), "not a published MAGNeT"),
    "a text encoder": (lambda: read("t5_tiny_pytorch_model.bin"), "is not such a checkpoint"),
    "a tensor transposed": (lambda: {key: change(value, transformer__layers__1__linear1__weight=lambda t: t.T)
                                     if key == "best_state" else value
                                     for key, value in read("magnet_tiny_state_dict.bin").items()},
                            r"tensor blocks.1.linear1.weight has shape \(64, 256\), want \(256, 64\)"),
    "pickled code": (lambda: {"best_state": RunsCode(), "xp.cfg": ""}, "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_load_model_says_in_one_line_what_is_wrong(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD_MODELS[kind]
    save(make(), tmp_path / "state_dict.bin")
    with pytest.raises(ValueError, match=rf"state_dict\.bin: .*{words}") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["state_dict.bin"]


def test_load_model_refuses_a_bare_pickle_that_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state_dict.bin").write_bytes(pickle.dumps({"best_state": RunsCode()}, 2))
    with pytest.raises(ValueError, match="state_dict.bin: cannot be read as a checkpoint"):
        load_model(tmp_path)
    assert os.listdir(tmp_path) == ["state_dict.bin"]


# ----------------------------------------------------------------------------------------------------- the command line

FEW_STEPS = ["--decoding-steps", "2", "1", "1", "1"]


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_sample_plays_a_published_folder(dtype, call, published):
    ended = call(sample, "80s driving pop", "--model", published, "--dtype", dtype, *FEW_STEPS)
    assert ended.code == 0, ended.err
    info = soundfile.info("out.wav")
    assert (info.samplerate, info.frames) == (32_000, 32_000)


def test_sample_plays_a_sound_effect_model_with_its_own_codec(call, published, tmp_path):
    shutil.copytree(published, tmp_path / "model")
    tiny = MAGNeT(ModelConfig(card=64, dim=32, n_heads=2, n_layers=2, text_dim=16, seconds=1.0))
    write_model(tiny, tmp_path / "model", sample_rate=16_000)
    lay(AUDIOCRAFT, tmp_path / "model" / "compression_state_dict.bin")
    ended = call(sample, "a dog barks", "--model", "model", *FEW_STEPS)
    assert ended.code == 0, ended.err
    assert soundfile.info("out.wav").samplerate == 16_000


@pytest.mark.parametrize("flags, changed", [([], {}), (["--schedule", "paper", "--top-p", "0.7"],
                                                       {"schedule": "paper", "top_p": 0.7})])
def test_flags_go_before_a_published_models_own_defaults(flags, changed, call, published, monkeypatch):
    seen, real = [], sample.generate_windows
    monkeypatch.setattr(sample, "generate_windows", lambda *args, **more: seen.append(args[7]) or real(*args, **more))
    assert call(sample, "pop", "--model", published, *FEW_STEPS, *flags).code == 0
    assert seen == [SamplingConfig(**{"schedule": "released", "decoding_steps": (2, 1, 1, 1)} | changed)]


def test_sample_refuses_a_codec_with_fewer_codes_than_the_model_has(call, published, tmp_path):
    write_model(MAGNeT(ModelConfig(card=65, dim=32, n_heads=2, n_layers=2, text_dim=16)), tmp_path / "model")
    for folder in ("encodec_32khz", "t5-base"):
        shutil.copytree(published / folder, tmp_path / "model" / folder)
    assert_one_line(call(sample, "pop", "--model", "model"), "64 codes per codebook", "65")


def test_sample_offline_says_what_to_fetch(call, offline):
    assert_one_line(call(sample, "pop", "--model", "facebook/magnet-small-10secs"), "download failed", "state_dict.bin",
                    str(offline / "facebook--magnet-small-10secs"))


def test_one_published_model_rescores_another_of_the_same_codec(published, tmp_path, monkeypatch, capsys):
    """Each has a codec and a text encoder in a folder of its own; what counts is that their weights are the same."""
    other = tmp_path / "other"
    shutil.copytree(published, other)
    flags = ["--model", str(published), "--rescorer", str(other), "--rescorer-weight", "0.5", "--seconds", "0.4",
             "--decoding-steps", "2", "1", "1", "1", "--device", "cpu", "--out", str(tmp_path / "out.wav")]
    monkeypatch.setattr("sys.argv", ["sample.py", "a song", *flags])
    sample.main()
    assert (tmp_path / "out.wav").is_file()
    state = torch.load(other / "encodec_32khz" / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, other / "encodec_32khz" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other: has another codec"):
        sample.main()


def test_write_audiocraft_codec_is_undone_by_load_codec(tmp_path):
    codec = Codec.from_config(CodecConfig(codebook_size=16, dimension=8, n_filters=2, lstm=2)).eval()
    write_audiocraft_codec(codec, tmp_path)
    again = load_codec(str(tmp_path / "compression_state_dict.bin"))
    wav = torch.randn(1, 1, 3200)
    assert again.config == codec.config and again.encode(wav).equal(codec.encode(wav))
