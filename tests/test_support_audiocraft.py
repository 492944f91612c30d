"""Published models, from their names to sound: the claims of support/audiocraft.py, and of what reads such files.

The models are small and random, but laid out and set as the official code exports them (see `published.py`); the hub is
a server on this machine. Read in this order: every name runs; what is fetched for it; the settings it brings; what is
refused; then fine-tuning, and the way back into the published layout.
"""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import assert_one_line, losses, read_state
from published import lay_model, lay_repositories, settings_of

import sample
import train
from encodec_wrap import load_codec
from experiments import export
from model import PUBLISHED_MODELS, load_model
from sample import SamplingConfig
from support.audiocraft import FIXED, SHAPE
from support.files import fingerprint, read_checkpoint
from support.hub import read_yaml
from t5_encoder import T5Encoder


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    """A folder with all repositories that the published names need; to be read only."""
    return lay_repositories(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(local_hub, repositories):
    local_hub.folder = repositories
    return local_hub


def play(call, model, *flags):
    """What sample.py prints while it plays a quarter of a second."""
    ended = call(sample, "a flute", "--model", model, "--seconds", 0.25, "--device", "cpu", "--dtype", "fp32", *flags)
    assert ended.code == 0, ended.err
    return ended.out


LM, T5, DELAY = "transformer_lm", "conditioners.description.t5", "codebooks_pattern"
RELEASED = "schedule released"
SOUNDS = f"temperature 3.5, top-p 0.8, guidance-start 20.0, decoding-steps 20 10 10 10, {RELEASED}".split(", ")
BROUGHT = {  # the settings that each family brings, where they are not the defaults
    "magnet-small-10secs": ["decoding-steps 20 10 10 10", RELEASED],
    "magnet-small-30secs": ["decoding-steps 60 10 10 10", RELEASED], "audio-magnet-small": SOUNDS, "musicgen-small": []}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_every_published_name_is_fetched_and_plays_with_its_own_settings(name, hub, call):
    family = name.split("/")[1].replace("medium", "small").replace("large", "small")
    out = play(call, name)
    lines = [line for line in out.splitlines() if line.startswith("settings of the model: ")]
    assert [sorted(line.removeprefix("settings of the model: ").split(", ")) for line in lines] == (
        [sorted(BROUGHT[family])] if BROUGHT[family] else [])
    sounds = "audio" in name
    assert soundfile.info("out.wav").samplerate == (16_000 if sounds else 32_000)
    needed = {name, "google-t5/t5-large"} if sounds else {name, "facebook/encodec_32khz", "google-t5/t5-base"}
    assert {file.rsplit("/", 1)[0] for file in hub.served} == needed, "and nothing that is not needed"
    if "small" in name:
        hub.shutdown()
        play(call, name, "--seed", 1)  # offline, from the cache


def test_a_flag_goes_before_a_setting_that_the_model_brings(hub, call):
    out = play(call, "facebook/audio-magnet-small", "--top-p", 0.5, "--schedule", "paper")
    assert "settings of the model: decoding-steps 20 10 10 10, temperature 3.5, guidance-start 20.0\n" in out


def at(path, value):
    """A change of the setting at "a.b.c"."""
    def change(settings):
        *parents, last = path.split(".")
        for key in parents:
            settings = settings[key]
        settings[last] = value
    return change


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("delays", [[0, 1, 2, 3], None])
def test_delays_are_read_in_either_style_of_yaml_and_null_means_one_frame_each(flow, delays, tmp_path):
    model, _ = load_model(lay_model(tmp_path, "musicgen-small", at(f"{DELAY}.delay.delays", delays), flow))
    assert (model.config.objective, model.config.context, model.config.seconds) == ("ar", -1, 30)


REFUSED = [  # (model, setting, its value), each named in the message
    ("musicgen-small", "fuser.prepend", ["self_wav"]), ("musicgen-small", "interleave_stereo_codebooks.use", True),
    ("musicgen-small", f"{DELAY}.delay.delays", [0, 2, 4, 6]), ("musicgen-small", f"{DELAY}.delay.flatten_first", 1),
    ("musicgen-small", f"{DELAY}.modeling", "unroll"), *(("magnet-small-10secs", name, value) for name, value in (
        ("channels", 2), ("fuser.sum", ["description"]), ("fuser.input_interpolate", ["self_wav"]),
        ("fuser.cross_attention_pos_emb", True), ("conditioners.description.model", "clap"), (f"{T5}.finetune", True),
        (f"{T5}.normalize_text", True), (f"{LM}.positional_embedding", "rope"), (f"{LM}.norm_first", False),
        (f"{LM}.activation", "relu"), (f"{LM}.norm", "rms_norm"), (f"{LM}.layer_scale", 1e-4),
        (f"{LM}.past_context", 100), (f"{LM}.kv_repeat", 2), *((f"{LM}.{name}", True) for name in (
            "xpos", "bias_ff", "bias_attn", "bias_proj", "qk_layer_norm", "qk_layer_norm_cross"))))]
NAMED = {"fuser.prepend": "a melody-conditioned model", "interleave_stereo_codebooks.use": "a stereo model",
         f"{LM}.positional_embedding": "rotary embeddings", f"{LM}.norm_first": "a post-norm model",
         f"{DELAY}.delay.delays": "not delayed by one frame", f"{DELAY}.modeling": "not delayed by one frame"}


@pytest.mark.parametrize("name, setting, value", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_not_supported_is_refused_by_its_name_in_one_line(name, setting, value, call, tmp_path):
    folder = lay_model(tmp_path / "model", name, at(setting, value))
    words = NAMED.get(setting, setting)
    assert_one_line(call(sample, "a flute", "--model", folder), f"{folder}/state_dict.bin", words, str(value))


def test_read_settings_leaves_out_no_setting_that_the_network_varies():
    """Of a model's own section all but these are either its shape or looked at."""
    unread = {"dropout", "emb_lr", "custom", "memory_efficient", "attention_as_float32", "checkpointing", "weight_init",
              "depthwise_init", "zero_bias_init", "cross_attention", "attention_dropout", "two_step_cfg"}  # of training
    unread |= {"compression_model_framerate", "segment_duration", "span_len"}  # as the codec, dataset and masking say
    known = {name.removeprefix("transformer_lm.") for name in FIXED} | SHAPE.keys() | {"causal", "subcodes_context"}
    assert set(settings_of("magnet-small-10secs")["transformer_lm"]) - known == unread


@pytest.fixture
def tune(hub, call, tmp_path):
    """tune(out, flags) fine-tunes a published model on two clips of noise, of which it hears four seconds each."""
    few = "--steps 3 --batch-size 2 --warmup 1 --lr 0.01 --device cpu --dtype fp32 --log-every 1 --sample-every 0"
    noise = np.random.default_rng(0)
    for name, caption in (("a", "a flute"), ("b", "a bell")):
        soundfile.write(tmp_path / f"{name}.wav", noise.uniform(-0.5, 0.5, 320_000), 32_000)
        (tmp_path / f"{name}.txt").write_text(caption)

    def tune(out, flags="", model="facebook/magnet-small-10secs"):
        return call(train, "--init-from", model, "--data", tmp_path, "--out", out, *few.split(), *flags.split())
    return tune


def test_fine_tuning_takes_all_from_the_published_model_learns_and_plays_with_its_settings(tune, call, tmp_path):
    ended = tune("run", "--steps 50 --val-every 50 --save-every 50")
    assert ended.code == 0, ended.err
    state, loss = read_state(tmp_path / "run"), losses(tmp_path / "run")
    config, sampling = state["config"], state["sampling"]
    assert (config["seconds"], config["dim"], config["text_len"], config["span_len"]) == (10, 16, 0, 3)
    assert config["text_encoder"] == "t5-base" and (sampling["schedule"], sampling["top_p"]) == ("released", 0.9)
    assert sum(loss[-10:]) / 10 < sum(loss[:10]) / 10 - 0.3, "in nats"
    assert "settings of the model: decoding-steps 20 10 10 10, schedule released" in play(call, "run")
    assert tune("again", model="run").code == 0, "a tuned model can be tuned further"
    assert read_state(tmp_path / "again")["sampling"] == sampling


def test_train_blocks_trains_the_last_blocks_and_the_heads_and_checkpoint_blocks_changes_nothing(tune, tmp_path):
    before = load_model("facebook/magnet-small-10secs")[0].state_dict()
    for out, flags in (("all", ""), ("last", "--train-blocks 1"), ("again", "--train-blocks 1 --checkpoint-blocks")):
        assert tune(out, flags).code == 0
    weights = {out: read_state(tmp_path / out)["model"] for out in ("all", "last", "again")}
    changed = {out: {name.split(".")[0] for name in before if not weights[out][name].equal(before[name])}
               for out in weights}
    assert changed["all"] == {"text_proj", "emb", "blocks", "out_norm", "heads"}
    assert changed["last"] == {"blocks", "out_norm", "heads"}
    assert losses(tmp_path / "last") == losses(tmp_path / "again")
    assert all(weight.equal(weights["again"][name]) for name, weight in weights["last"].items())


@pytest.mark.parametrize("flags, words", [
    ("--dim 32", "dim 16; --dim 32"), ("--n-layers 2", "n_layers 1"), ("--n-heads 4", "n_heads 2"),
    ("--seconds 5", "seconds 10"), ("--text-encoder t5-large", "text_encoder t5-base"), ("--codec toy", "codec"),
    ("--n-codebooks 2", "n_codebooks 4"), ("--text-len 32", "text_len 0"), ("--train-blocks 2", "has only 1")])
def test_fine_tuning_refuses_flags_that_contradict_the_model(flags, words, tune, tmp_path):
    assert_one_line(tune("run", flags), words, flags.split()[0])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["magnet-small-10secs", "audio-magnet-small", "musicgen-small", "toy", "toy-ar"])
def test_an_exported_model_is_read_back_as_it_was(name, hub, call, tmp_path):
    """Weights to half precision, codec and text encoder with all their weights, settings; from files alone."""
    before, needs = load_model(name if "toy" in name else f"facebook/{name}")
    ended = call(export, name if "toy" in name else f"facebook/{name}", "out")
    assert ended.code == 0, ended.err
    after, again = load_model(tmp_path / "out")
    context = -1 if before.config.objective == "ar" else before.config.context  # which these do not use
    assert after.config == replace(before.config, context=context)
    for key, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], weight, atol=1e-3, rtol=1e-3)
    settings = read_checkpoint(tmp_path / "out" / "state_dict.bin")["xp.cfg"]
    assert isinstance(read_yaml(settings, "")["dataset.segment_duration"], int), "the official code counts frames by it"
    schedule = {"schedule": "released"} if before.config.objective == "magnet" else {}  # the only one there
    brought = SamplingConfig(**needs.sampling | schedule)
    steps = (brought.decoding_steps + brought.decoding_steps[-1:] * 4)[:4]
    assert replace(SamplingConfig(**again.sampling), decoding_steps=steps) == replace(brought, decoding_steps=steps)
    for load, ours, theirs in ((load_codec, needs.codec, again.codec),
                               (T5Encoder.from_pretrained, needs.text_encoder, again.text_encoder)):
        assert fingerprint(load(ours)) == fingerprint(load(theirs))
    play(call, "out")


def test_export_refuses_what_has_no_such_layout_and_what_is_there(call, tmp_path):
    assert_one_line(call(export, "toy-hybrid", "out"), "a hybrid cannot be exported")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state_dict.bin").touch()
    assert_one_line(call(export, "toy", "out"), "out holds a model already")
