"""What the command lines promise: flags, files that appear whole, and one line about bad input.

Most commands run in this process, with a model trained for ten steps; a few are real processes.
"""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import Ended, assert_one_line

import cli
import data
import sample
import train
from cli import add_flags, from_flags, option, pick_device, save_whole
from encodec_wrap import load_audio, load_codec
from sample import SamplingConfig, output_paths
from train import TrainConfig

ROOT = Path(__file__).parent.parent
T5_FILE = ROOT / "tests" / "data" / "t5_tiny_forward.pt"
FEW_STEPS = ["--decoding-steps", "3", "2", "1", "1"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The folder of a run of ten steps on clips of one second."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    arguments = ("--toy-clips 24 --seconds 1 --steps 10 --batch-size 4 --dim 48 --n-heads 2 --n-layers 2 --device cpu "
                 f"--cache {out}-cache --out {out}").split()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return str(out)


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("command, words", [
    (["sample.py", "a flute", "--model", "no_such_model"], ["no_such_model", "toy-ar"]),
    (["train.py", "--data", "no_such_folder"], ["no_such_folder", "no such data set"])])
def test_a_command_ends_bad_input_with_one_line_and_code_2(tmp_path, command, words):
    script, *arguments = command
    ended = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), *words)
    assert "Traceback" not in ended.stdout


BAD_SAMPLING = {
    "--seconds 0": "--seconds", "--seconds -1": "--seconds", "--seconds nan": "--seconds", "--seconds inf": "--seconds",
    "--top-p 1.5": "top_p", "--top-p 0": "top_p", "--top-k -1": "top_k", "--temperature -1": "temperature",
    "--decoding-steps 5 5": "decoding_steps", "--decoding-steps 1 1 1 0": "decoding_steps", "--n 0": "--n",
    "--out song": "song", "--out song.mp4": "song.mp4", "--device nosuch": "nosuch", "--device cpu:x": "--device",
    "--audio-prompt missing.wav": "missing.wav", "--guidance-start nan": "guidance", "--dtype fp8": "--dtype",
    "--overlap 1": "--overlap", "--overlap -1": "--overlap", "--overlap nan": "--overlap", "--inpaint x.wav": "--from",
    "--from 0 --to 1": "--inpaint", "--inpaint missing.wav --from 0 --to 1": "missing.wav",
    "--inpaint x.wav --from 0 --to 1 --seconds 2": "--seconds",
}


@pytest.mark.parametrize("flags", BAD_SAMPLING)
def test_sample_says_in_one_line_which_flag_is_wrong(call, tiny_model, tmp_path, flags):
    ended = call(sample, "a flute", "--model", tiny_model, *flags.split())
    assert_one_line(ended, BAD_SAMPLING[flags])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, content", [("empty.wav", b""), ("text.wav", b"la la"), ("a.ogg", b"OggS" + b"\0" * 99)])
def test_sample_names_an_audio_prompt_that_cannot_be_read(call, tiny_model, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_one_line(call(sample, "a flute", "--model", tiny_model, "--audio-prompt", name), name)


def test_sample_names_an_audio_prompt_without_samples_or_as_long_as_the_result(call, tiny_model):
    soundfile.write("none.wav", np.zeros(0), 16_000)
    assert_one_line(call(sample, "a flute", "--model", tiny_model, "--audio-prompt", "none.wav"), "none.wav")
    soundfile.write("long.wav", np.zeros(16_000), 16_000)
    assert_one_line(call(sample, "a flute", "--model", tiny_model, "--audio-prompt", "long.wav"), "long.wav", "1 s")


def checkpoint_with(tiny_model, **changes):
    return torch.load(Path(tiny_model, "checkpoint.pt"), weights_only=True) | changes


@pytest.mark.parametrize("kind", [
    "cut", "empty", "text", "foreign", "other settings", "weights in a list", "no numbers", "no such codec"])
def test_sample_and_resume_name_a_checkpoint_that_is_damaged_or_foreign(call, tiny_model, tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    if kind in ("cut", "empty", "text"):
        whole = Path(tiny_model, "checkpoint.pt").read_bytes()
        path.write_bytes({"cut": whole[:len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    elif kind == "foreign":
        shutil.copy(T5_FILE, path)
    else:
        torch.save(checkpoint_with(tiny_model, **{
            "other settings": {"model_config": {"colour": "red"}, "config": {"colour": "red"}},
            "weights in a list": {"ema": [1.0], "model": [1.0]}, "no numbers": {"ema": {"emb": 1}, "model": {"emb": 1}},
            "no such codec": {"codec": "no_such_codec", "config": {"codec": "no_such_codec"}}}[kind]), path)
    word = "no_such_codec" if kind == "no such codec" else "checkpoint.pt"
    assert_one_line(call(sample, "a flute", "--model", path), word)
    assert_one_line(call(sample, "a flute", "--model", tmp_path), word)
    assert_one_line(call(train, "--out", tmp_path, "--resume", "--cache", f"{tiny_model}-cache"), word)


def as_objective(tiny_model, objective, path):
    """The tiny model's weights as if they had been trained for another objective: the shapes are the same."""
    content = checkpoint_with(tiny_model)
    content["model_config"]["objective"] = objective
    torch.save(content, path)
    return path


@pytest.mark.parametrize("objective, flags", [
    ("ar", "--ar-top-k 5"), ("ar", "--seconds 1.5 --overlap 0.3"), ("hybrid", "--hybrid-seconds 0.3"),
    ("hybrid", "--hybrid-seconds 0 --rescorer rescorer.pt --rescorer-weight 0.5"),
    ("magnet", "--rescorer rescorer.pt --rescorer-weight 0.5")])
def test_sample_decodes_each_kind_of_model_as_it_was_trained(call, tiny_model, tmp_path, objective, flags):
    model = as_objective(tiny_model, objective, tmp_path / "model.pt")
    as_objective(tiny_model, "ar", tmp_path / "rescorer.pt")
    ended = call(sample, "a flute", "--model", model, "--out", "a.wav", *FEW_STEPS, *flags.split())
    assert ended.code == 0, ended.err
    assert load_audio(tmp_path / "a.wav", 16_000).shape == (1, 24_000 if "--seconds" in flags else 16_000)


@pytest.mark.parametrize("objective, flags, words", [
    ("magnet", "--rescorer missing", ["missing"]), ("magnet", "--rescorer rescorer.pt --rescorer-weight 2", ["weight"]),
    ("ar", "--rescorer rescorer.pt", ["only parallel decoding"]), ("magnet", "--rescorer other.pt", ["other.pt"]),
    ("hybrid", "--hybrid-seconds -1", ["hybrid_seconds"]), ("ar", "--ar-temperature nan", ["ar_temperature"])])
def test_sample_says_in_one_line_what_this_kind_of_model_cannot(call, tiny_model, tmp_path, objective, flags, words):
    model = as_objective(tiny_model, objective, tmp_path / "model.pt")
    as_objective(tiny_model, "ar", tmp_path / "rescorer.pt")
    torch.save(checkpoint_with(tiny_model, codec_id="another"), tmp_path / "other.pt")
    ended = call(sample, "a flute", "--model", model, *FEW_STEPS, *flags.split())
    for word in words:
        assert_one_line(ended, word)
    assert not (tmp_path / "out.wav").exists()


def test_sample_hands_on_the_rescorer_with_its_weight(call, tiny_model, tmp_path, monkeypatch):
    rescorer, seen, real = as_objective(tiny_model, "ar", tmp_path / "rescorer.pt"), [], sample.generate_as_trained
    monkeypatch.setattr(sample, "generate_as_trained", lambda *args, **more: seen.append(more) or real(*args, **more))
    call(sample, "a flute", "--model", tiny_model, *FEW_STEPS, "--rescorer", rescorer, "--rescorer-weight", 0.2)
    assert seen[0]["rescorer"].config.objective == "ar" and seen[0]["rescorer_weight"] == 0.2
    assert seen[0]["frame_rate"] == 50


def test_a_rescorer_without_weight_is_not_even_loaded(call, tiny_model, tmp_path):
    flags = ["--model", tiny_model, *FEW_STEPS, "--rescorer", "missing", "--rescorer-weight", 0]
    assert call(sample, "a flute", *flags).code == 0


BAD_TRAINING = {
    "--data missing": "missing", "--data empty": "empty", "--resume": "--resume", "--device nosuch": "nosuch",
    "--codec nosuch": "nosuch", "--text-encoder nosuch": "nosuch", "--text-encoder empty": "pytorch_model.bin",
    "--n-codebooks 5": "n_codebooks",
    "--steps 0": "--steps", "--batch-size 3 --accumulate 2": "--batch-size", "--dropout 2": "--dropout",
    "--n-heads 0": "heads", "--n-heads 7": "heads", "--init-from missing": "missing", "--val-every 0": "val-every",
    "--log-every 0": "log-every", "--save-every 0": "save-every",
}


@pytest.mark.parametrize("flags", BAD_TRAINING)
def test_train_says_in_one_line_what_is_wrong(call, tiny_model, tmp_path, flags):
    (tmp_path / "empty").mkdir()
    ended = call(train, "--out", "run", "--toy-clips", 24, "--seconds", 1, "--cache", f"{tiny_model}-cache",
                 "--device", "cpu", "--steps", 2, *flags.split())
    assert_one_line(ended, BAD_TRAINING[flags])


def test_data_says_in_one_line_what_is_wrong(call):
    assert_one_line(call(data, "no_such_folder"), "no_such_folder")


def test_run_ends_ctrl_c_quietly(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_run_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------- flags

@dataclass
class Example:
    whole: int = option(3, "a number")
    name: str = option("a", "a choice", ("a", "b"))
    many_steps: tuple[int, ...] = option((1, 2), "several")
    is_on: bool = option(False, "a switch")
    share: float = option(0.5, "a share")


def parse(config_class, *arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, config_class)
    return from_flags(parser.parse_args(arguments), config_class)


def test_add_flags_and_from_flags_read_every_kind_of_field():
    assert parse(Example) == Example()
    arguments = "--whole 4 --name b --many-steps 3 4 5 --is-on --share 0.25".split()
    assert parse(Example, *arguments) == Example(4, "b", (3, 4, 5), True, 0.25)
    assert parse(Example, "--no-is-on") == Example()


@pytest.mark.parametrize("arguments", ["--whole x", "--name c", "--many-steps", "--share"])
def test_add_flags_refuses_a_value_of_another_kind_or_no_choice(arguments):
    with pytest.raises(SystemExit) as end:
        parse(Example, *arguments.split())
    assert end.value.code == 2


@pytest.mark.parametrize("module, config_class", [(sample, SamplingConfig), (train, TrainConfig)])
def test_help_explains_a_flag_for_every_field(call, module, config_class):
    ended = call(module, "--help")
    text = " ".join(ended.out.split())
    assert ended.code == 0
    for field in dataclasses.fields(config_class):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text), field.name
        assert field.metadata["help"].split()[0] in text


@pytest.mark.parametrize("module, config_class", [(sample, SamplingConfig), (train, TrainConfig)])
def test_every_field_can_be_set_by_its_flag(module, config_class, monkeypatch):
    for field in dataclasses.fields(config_class):
        value, flag = field.default, "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            wanted, arguments = not value, [flag]
        elif isinstance(value, tuple):
            wanted, arguments = (7, 8), [flag, "7", "8"]
        elif isinstance(value, str):
            wanted = (field.metadata["choices"] or ["other"])[-1]
            arguments = [flag, wanted]
        else:
            wanted = value + 1 if isinstance(value, int) else value / 2
            arguments = [flag, str(wanted)]
        monkeypatch.setattr(sys, "argv", ["x.py", *(["a flute"] if module is sample else []), *arguments])
        assert from_flags(module.parse_args(), config_class) == dataclasses.replace(
            config_class(), **{field.name: wanted})


def test_pick_device_prefers_cuda_then_mps_then_the_cpu(monkeypatch):
    have = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: have["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: have["mps"])
    assert pick_device("auto").type == "cuda" and pick_device("cpu").type == "cpu" and pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="--device cuda:2: this machine has cuda:0 to cuda:1"):
        pick_device("cuda:2")
    have["cuda"] = False
    assert pick_device("auto").type == "mps"
    have["mps"] = False
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device cuda:1: this machine has cpu"):
        pick_device("cuda:1")


def test_save_whole_keeps_the_old_file_and_no_other_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.pt"
    save_whole({"a": 1}, path)

    def fail(content, file):
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(cli.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_whole({"a": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(path.parent) == ["file.pt"]


# ------------------------------------------------------------------------------------------------------------- sampling

def test_output_paths_number_several_files_from_1():
    assert output_paths(Path("a/b.c.wav"), 1) == [Path("a/b.c.wav")]
    assert output_paths(Path("a/b.c.wav"), 2) == [Path("a/b.c-1.wav"), Path("a/b.c-2.wav")]


def test_sample_writes_a_numbered_file_for_every_prompt_and_variation(call, tiny_model, tmp_path):
    ended = call(sample, "a flute", "a bell", "--n", 2, "--model", tiny_model, "--out", "new/x.wav", *FEW_STEPS)
    assert ended.code == 0, ended.err
    assert sorted(os.listdir(tmp_path / "new")) == ["x-1.wav", "x-2.wav", "x-3.wav", "x-4.wav"]
    wrote = [line for line in ended.out.splitlines() if line.startswith("wrote ")]
    assert [line.split() for line in wrote] == [
        ["wrote", f"new/x-{i}.wav", "a", word] for i, word in enumerate(["flute", "flute", "bell", "bell"], 1)]
    files = [(tmp_path / "new" / f"x-{i}.wav").read_bytes() for i in range(1, 5)]
    assert len(set(files)) == 4, "every variation is another one"


def test_sample_says_what_it_wrote_and_how_fast_it_was(call, tiny_model):
    ended = call(sample, "a flute", "--model", tiny_model, *FEW_STEPS)
    assert ended.code == 0 and "wrote out.wav" in ended.out
    elapsed, total, factor = map(float, re.search(
        r"([\d.]+) s on cpu for ([\d.]+) s of audio: real-time factor ([\d.]+)", ended.out).groups())
    assert total == 1.0 and factor == pytest.approx(elapsed / total, abs=0.06)


def test_sample_gives_the_same_bytes_for_the_same_seed_only(call, tiny_model, tmp_path):
    files = []
    for seed in (7, 7, 8):
        assert call(sample, "a flute", "--model", tiny_model, "--seed", seed, *FEW_STEPS).code == 0
        files.append((tmp_path / "out.wav").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("seconds", [0.001, 0.5, 1.365, 1.37, 1.001, 2.0])
def test_sample_writes_exactly_as_many_samples_as_asked(call, tiny_model, seconds):
    assert call(sample, "a flute", "--model", tiny_model, "--seconds", seconds, *FEW_STEPS).code == 0
    info = soundfile.info("out.wav")
    assert (info.samplerate, info.channels, info.frames) == (16_000, 1, round(seconds * 16_000))


def test_sample_is_as_long_as_the_training_clips_where_no_length_is_asked(call, tiny_model):
    call(sample, "", "--model", tiny_model, *FEW_STEPS)
    assert soundfile.info("out.wav").frames == 16_000


def test_sample_continues_an_audio_prompt(call, tiny_model):
    rng = np.random.default_rng(0)
    soundfile.write("prompt.wav", 0.3 * np.sin(np.arange(8000) / 9) + 0.01 * rng.standard_normal(8000), 16_000)
    ended = call(sample, "a flute", "a bell", "--model", tiny_model, "--audio-prompt", "prompt.wav", *FEW_STEPS)
    assert ended.code == 0, ended.err
    codec = load_codec("toy")
    prompt = codec.decode(codec.encode(load_audio("prompt.wav", 16_000)[None]))[0, 0, :6000].numpy()
    first, second = (load_audio(f"out-{i}.wav", 16_000)[0].numpy() for i in (1, 2))
    assert len(first) == 16_000
    assert np.corrcoef(prompt, first[:6000])[0, 1] > 0.98, "both begin with the prompt"
    assert np.corrcoef(prompt, second[:6000])[0, 1] > 0.98
    assert np.abs(first[9000:] - second[9000:]).max() > 1e-3, "and go on in their own ways"


def test_sample_plays_longer_than_the_training_clips_in_windows_and_says_so(call, tiny_model):
    ended = call(sample, "a flute", "--model", tiny_model, "--seconds", 2.5, "--overlap", 0.25, *FEW_STEPS)
    assert ended.code == 0 and soundfile.info("out.wav").frames == 40_000
    assert "windows" in ended.out and "0.25 s" in ended.out
    assert f"{3 * 7}/{3 * 7}" in ended.err, "three windows of 7 steps"
    assert "windows" not in call(sample, "a flute", "--model", tiny_model, "--seconds", 1, *FEW_STEPS).out


def test_sample_inpaints_a_gap_and_keeps_the_rest_codec_exact(call, tiny_model):
    rng = np.random.default_rng(0)
    soundfile.write("song.wav", 0.3 * np.sin(np.arange(20_000) / 9) + 0.01 * rng.standard_normal(20_000), 16_000)
    gap = ["--inpaint", "song.wav", "--from", 0.5, "--to", 0.7]
    ended = call(sample, "a bell", "--model", tiny_model, *gap, *FEW_STEPS)
    assert ended.code == 0, ended.err
    codec = load_codec("toy")
    coded = codec.decode(codec.encode(load_audio("song.wav", 16_000)[None]))[0, 0, :20_000].numpy()
    out = load_audio("out.wav", 16_000)[0].numpy()
    assert len(out) == 20_000
    reach = 3200  # how far the codec's decoder spreads a frame
    assert np.abs(out - coded)[:8000 - reach].max() < 1e-3 and np.abs(out - coded)[11_200 + reach:].max() < 1e-3
    assert np.abs(out - coded)[8000:11_200].max() > 1e-2


@pytest.mark.parametrize("ends", ["0.5 --to 0.5", "0.6 --to 0.5", "-1 --to 0.5", "0 --to 9"])
def test_sample_names_a_gap_outside_of_the_file(call, tiny_model, ends):
    soundfile.write("song.wav", np.sin(np.arange(16_000) / 9), 16_000)
    ended = call(sample, "a bell", "--model", tiny_model, "--inpaint", "song.wav", "--from", *ends.split())
    assert_one_line(ended, "--from", "song.wav", "1 s")


def test_sample_with_a_negative_prompt_plays_something_else(call, tiny_model, tmp_path):
    files = []
    for flags in ([], ["--negative-prompt", ""], ["--negative-prompt", "a bell with drums"]):
        assert call(sample, "a flute", "--model", tiny_model, *FEW_STEPS, *flags).code == 0
        files.append((tmp_path / "out.wav").read_bytes())
    assert files[0] == files[1] != files[2]


def test_sample_writes_flac_too(call, tiny_model):
    assert call(sample, "a flute", "--model", tiny_model, "--out", "x.flac", *FEW_STEPS).code == 0
    assert soundfile.info("x.flac").format == "FLAC"


@pytest.mark.parametrize("flags", ["--decoding-steps 1 2", "--audio-prompt missing.wav", "--top-p 0"])
def test_sample_leaves_an_existing_file_alone_when_it_fails(call, tiny_model, tmp_path, flags):
    (tmp_path / "out.wav").write_text("precious")
    assert call(sample, "a flute", "--model", tiny_model, *flags.split()).code == 2
    assert os.listdir(tmp_path) == ["out.wav"] and (tmp_path / "out.wav").read_text() == "precious"


def test_sample_plays_the_toy_model_without_any_flag(tmp_path):
    ended = subprocess.run([sys.executable, ROOT / "sample.py", "a slow deep flute plays a rising melody, with drums"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    wav, rate = soundfile.read(tmp_path / "out.wav")
    assert (len(wav), rate) == (64_000, 16_000) and np.abs(wav).max() > 0.05
    assert "wrote out.wav" in ended.stdout and "real-time factor" in ended.stdout


# --------------------------------------------------------------------------------------------------------- the data set

def test_data_fills_the_cache_that_training_reads(call, tmp_path):
    soundfile.write("song.wav", np.sin(np.arange(40_000) / 9) / 2, 16_000)
    Path("song.txt").write_text("a flute")
    ended = call(data, ".", "--seconds", 1, "--cache", "cache")
    assert ended.code == 0 and "3 training clips and 3 validation clips of 1 s" in ended.out
    assert len(os.listdir("cache")) == 2
