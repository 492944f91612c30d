"""What `python sample.py ...` promises, from its flags to its WAV files; and windows.

Read in this order: planning (clips, windows), what each setting of decoding changes (the table SAMPLING), then whole
commands: files and lengths, clips that can be made again, given audio, kinds of models, and bad input, which is one
line, exit code 2, and nothing written. The model was trained for ten steps: it makes noise.
"""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, assert_one_line, write_tone

import sample
import train
from encodec_wrap import load_codec
from sample import SamplingConfig, clip_streams, generate
from support.audio import load_audio
from support.request import Request, plan_clips, windows

FEW_STEPS = ["--decoding-steps", "3", "2", "1", "1"]


def test_plan_clips_numbers_several_files_and_every_clip_keeps_its_number(tmp_path):
    def plan(prompts, **request):
        return [(clip.number, clip.prompt, clip.path.name) for clip in plan_clips(
            Request(out=str(tmp_path / "b.c.wav"), **request), prompts)]
    assert plan(["x"]) == [(1, "x", "b.c.wav")]
    four = plan(["x", "y"], n=2)
    assert four == [(1, "x", "b.c-1.wav"), (2, "x", "b.c-2.wav"), (3, "y", "b.c-3.wav"), (4, "y", "b.c-4.wav")]
    assert plan(["x", "y"], n=2, only=(4, 1)) == [four[3], four[0]]
    assert plan(["x"], only=(3,)) == [(3, "x", "b.c-3.wav")], "clip 3 of --n 4, without saying --n 4 again"


def test_windows_fill_in_what_is_open_and_continue_what_is_there(capsys):
    for n_frames, given, expected in (
            (10, (), [0]), (4, (), [0]), (25, (), [0, 6, 12, 15]), (25, range(6), [2, 8, 14, 15]),
            (25, [*range(12), *range(16, 25)], [9]),  # a gap that fits: in the middle of its window
            (40, [*range(5), *range(25, 40)], [1, 7, 13, 19]), (10, range(10), [])):  # the last one sees both sides
        is_given = torch.zeros(n_frames, dtype=torch.bool)
        is_given[list(given)] = True
        slices = windows(is_given, 10, 4)
        assert [part.start for part in slices] == expected, f"{n_frames} frames"
        for part in slices:
            is_given[part] = True
        assert is_given.all(), "every frame is made"
    starts = [part.start for part in windows(torch.zeros(500, dtype=torch.bool), 4.0, None, 50.0)]
    assert starts == [0, 133, 266, 300], "67 of 200 frames, a third, are repeated; the last window ends with the clip"
    assert "made in 4 windows of 4 s that overlap by 1.34 s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--overlap must be less than the 4 s of a window"):
        windows(torch.zeros(500, dtype=torch.bool), 4.0, 4.0, 50.0)


SAMPLING = {  # a value of each setting that is not the default one
    "decoding_steps": (4, 1), "temperature": 0.1, "top_p": 0.2, "top_k": 1, "guidance_start": 4.0, "guidance_end": 10.0,
    "span_arrangement": "stride1", "span_scoring": "prod", "schedule": "released", "greedy": True,
    "rescorer_weight": 1.0, "ar_guidance": 1.0, "ar_top_k": 1, "ar_temperature": 0.1, "hybrid_seconds": 0.2}


def test_every_setting_of_sampling_config_changes_what_is_played(make_magnet):
    assert SAMPLING.keys() == {field.name for field in fields(SamplingConfig)}
    text, codes, rescorer = torch.ones(1, 3, 8), torch.full((1, 4, 30), 16), make_magnet(seed=1, objective="ar")
    for setting, value in SAMPLING.items():
        kind = setting.partition("_")[0]
        model = make_magnet(objective=kind if kind in ("ar", "hybrid") else "magnet")
        before, after = (
            generate(model, text, text[..., 0] > 0, codes, SamplingConfig(**{"decoding_steps": (3, 2)} | changes),
                     clip_streams(0, [1]), rescorer=rescorer if kind == "rescorer" else None)
            for changes in ({}, {setting: value}))
        assert not before.equal(after), f"{setting} makes no difference"


@pytest.fixture
def play(call, tiny_run):
    """play(flags, ...) runs sample.py with the tiny model and few steps, and it succeeds."""
    def play(*flags, model=tiny_run):
        ended = call(sample, *flags, "--model", model, "--device", "cpu", "--dtype", "fp32", *FEW_STEPS)
        assert ended.code == 0, ended.err
        return ended
    return play


def audio(name):
    return load_audio(name, 16_000)[0].numpy()


def test_sample_writes_every_clip_and_says_how_to_make_it_again(play, tmp_path):
    """Clip 3 of four comes out again by itself, and is not changed by a long prompt in its batch."""
    out = play("a flute", "a bell", "--n", 2, "--seed", 7, "--out", "new/x.wav").out
    assert sorted(os.listdir("new")) == ["x-1.wav", "x-2.wav", "x-3.wav", "x-4.wav"]
    four = [audio(f"new/x-{i}.wav") for i in range(1, 5)]
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(four) for b in four[:i]), "each is another one"
    assert "wrote new/x-3.wav  a bell  (again: --seed 7 --only 3)" in out
    elapsed, total, factor = map(float, re.search(
        r"([\d.]+) s on cpu for ([\d.]+) s of audio: real-time factor ([\d.]+)", out).groups())
    assert total == 4.0 and factor == pytest.approx(elapsed / total, abs=0.06)
    play("a flute", "a bell", "--n", 2, "--seed", 7, "--only", 3, "--out", "again.wav")
    np.testing.assert_allclose(audio("again-3.wav"), four[2], atol=1e-3)
    play("a bell", "drums and " * 200, "--seed", 7, "--only", 1, "--out", "alone.wav")
    play("a bell", "drums and " * 200, "--seed", 7, "--out", "beside.wav")
    np.testing.assert_allclose(audio("beside-1.wav"), audio("alone-1.wav"), atol=1e-3)


@pytest.mark.parametrize("seconds", [None, 0.001, 1.365, 2.5])  # of 1 s are the training clips, so windows of three
def test_sample_writes_exactly_as_many_samples_as_asked_or_a_training_clip(seconds, play):
    ended = play("", "--out", "x.flac", *(["--seconds", seconds, "--overlap", 0.25] if seconds else []))
    info = soundfile.info("x.flac")
    assert (info.format, info.samplerate, info.channels) == ("FLAC", 16_000, 1)
    assert info.frames == round((seconds or 1.0) * 16_000)
    assert ("made in 3 windows of 1 s that overlap by 0.24 s" in ended.out) == (seconds == 2.5)


def test_sample_plays_something_else_with_another_seed_or_a_negative_prompt_only(play):
    files = [play("a flute", *flags) and Path("out.wav").read_bytes() for flags in (
        [], ["--seed", 0, "--negative-prompt", ""], ["--seed", 1], ["--negative-prompt", "a bell with drums"])]
    assert files[0] == files[1] and len(set(files)) == 3


def test_sample_plays_the_toy_model_without_any_flag_to_a_stdout_that_is_closed(tmp_path):
    command = f'"{sys.executable}" "{ROOT}/sample.py" "a slow deep flute plays a rising melody, with drums" >&-'
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    wav, rate = soundfile.read(tmp_path / "out.wav")
    assert (len(wav), rate) == (64_000, 16_000) and np.abs(wav).max() > 0.05


def test_sample_continues_an_audio_prompt_and_inpaints_a_gap(play):
    write_tone(Path("song.wav"), seconds=1.25, hertz=280)
    play("a flute", "a bell", "--audio-prompt", "song.wav", "--seconds", 2)
    first, second, codec = audio("out-1.wav"), audio("out-2.wav"), load_codec("toy")
    song = codec.decode(codec.encode(load_audio("song.wav", 16_000)[None]))[0, 0, :20_000].numpy()
    assert all(np.corrcoef(song[:18_000], clip[:18_000])[0, 1] > 0.98 for clip in (first, second)), "begin with it"
    assert len(first) == 32_000 and np.abs(first[23_000:] - second[23_000:]).max() > 1e-3, "go on in their own ways"
    play("a bell", "--inpaint", "song.wav", "--from", 0.5, "--to", 0.7)
    change, reach = np.abs(audio("out.wav") - song), 3200  # how far the codec's decoder spreads a frame
    assert len(change) == 20_000 and change[8000:11_200].max() > 1e-2
    assert change[:8000 - reach].max() < 1e-3 and change[11_200 + reach:].max() < 1e-3, "the rest is codec exact"


def changed(tiny_run, path, **changes):
    """A checkpoint like the tiny model's, with changes: `a__b=x` changes entry b of the dictionary a."""
    content = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        content[outer] = content[outer] | {inner: value} if inner else value
    torch.save(content, path)
    return path


@pytest.mark.parametrize("objective, flags", [
    ("ar", "--seconds 1.5 --overlap 0.3 --ar-top-k 5"), ("hybrid", "--hybrid-seconds 0.3"),
    ("magnet", "--rescorer rescorer.pt"), ("magnet", "--rescorer missing --rescorer-weight 0")])
def test_sample_decodes_each_kind_of_model_as_it_was_trained(objective, flags, play, tiny_run, tmp_path):
    changed(tiny_run, tmp_path / "rescorer.pt", model_config__objective="ar")
    play("a flute", *flags.split(), model=changed(tiny_run, "model.pt", model_config__objective=objective))
    assert soundfile.info("out.wav").frames == (24_000 if "--seconds" in flags else 16_000)


WRONG = {  # flags: what the line names
    "--seconds inf": "seconds", "--guidance-start 1e30": "guidance_start", "--decoding-steps 5 5 1 1 1": "decoding_st",
    "--n 4294967296": "n must be", "--only 0": "only must be", "--out song": "song", "--out song.mp4": "song.mp4",
    "--out folder.wav": "folder.wav: is a folder", "--out full.wav/x.wav": "full.wav", "--device nosuch": "nosuch",
    "--dtype fp8": "--dtype", "--overlap 1": "--overlap", "--audio-prompt missing.wav": "missing.wav",
    "--audio-prompt full.wav": "shorter than the 1 s", "--audio-prompt text.wav": "text.wav",
    "--audio-prompt none.wav": "none.wav", "--inpaint full.wav": "--from", "--from 0 --to 1": "--inpaint",
    "--inpaint full.wav --from 0.6 --to 0.5": "later --to", "--inpaint full.wav --from 0 --to 9": "full.wav has 1 s",
    "--inpaint full.wav --from 0 --to 1 --seconds 2": "--seconds", "--out new/x.wav --model missing": "toy-ar",
    "--rescorer missing": "missing", "--rescorer other.pt": "codec", "--model ar.pt --rescorer ar.pt": "only parallel",
    "--model ar.pt --inpaint full.wav --from 0 --to 0.5": "fill in a gap",
}


@pytest.mark.parametrize("flags", WRONG)
def test_sample_says_in_one_line_what_is_wrong_and_writes_nothing(flags, call, tiny_run, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.wav").write_text("la la")
    (tmp_path / "out.wav").write_text("precious")
    write_tone(tmp_path / "full.wav", seconds=1)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    if ".pt" in flags:
        changed(tiny_run, tmp_path / "ar.pt", model_config__objective="ar")
        changed(tiny_run, tmp_path / "other.pt", codec_id="another")
    before = sorted(os.listdir(tmp_path))
    assert_one_line(call(sample, "a flute", "--model", tiny_run, *FEW_STEPS, *flags.split()), WRONG[flags])
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "out.wav").read_text() == "precious"


def test_sample_says_that_out_cannot_be_written_before_the_model_is_loaded(call, tmp_path, monkeypatch):
    monkeypatch.delattr(sample, "load_model")
    assert_one_line(call(sample, "a flute", "--out", "/proc/x.wav"), "/proc/x.wav: cannot be written")


def test_sample_and_resume_name_a_checkpoint_that_does_not_hold_what_it_should(call, tiny_run, train_tiny, tmp_path):
    nan = torch.full((32,), torch.nan)
    for changes, word in (({"model_config__dim": 1 << 40, "config__dim": 1 << 40}, "dim must be"),
                          ({"model_config__colour": "red", "config__colour": "red"}, "colour"),
                          ({"model_config": [1], "config": [1]}, ""), ({"ema": [1], "model": [1]}, "not plain tensors"),
                          ({"ema__out_norm.bias": nan, "model__out_norm.bias": nan}, "not finite")):
        path = changed(tiny_run, tmp_path / "checkpoint.pt", **changes)
        for ended in (call(sample, "a flute", "--model", path),
                      call(train, "--out", tmp_path, "--resume", "--cache", train_tiny.cache)):
            assert_one_line(ended, "checkpoint.pt", word)
