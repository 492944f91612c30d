"""What the commands share: settings that are checked, flags made from them, devices, and errors in one line.

Read in this order: `Config` (what a field may be), `add_flags` and `from_flags` (from a command line to a config),
`pick_device`, `run` and `say` (how a command ends).
"""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import typing
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Ended, assert_one_line

import sample
import train
from model import ModelConfig
from sample import SamplingConfig
from support import cli
from support.cli import Config, Parser, add_flags, from_flags, option, pick_device, pick_dtype
from support.request import Request
from train import RunConfig, TrainConfig


@dataclass
class Example(Config):
    whole: int = option(3, "a number", low=1, high=9)
    share: float = option(0.5, "100% is all", above=0, high=1)
    name: str = option("a", "a choice", ("a", "b"))
    many_steps: tuple[int, ...] = option((1, 2), "several", low=1)
    is_on: bool = option(False, "a switch")
    begin: float = option(None, "nothing or a number", low=0, flag="--from")


@pytest.mark.parametrize("field, value, wanted", [
    ("whole", 0, "whole number at least 1 and at most 9, not 0"), ("whole", 10, "at most 9"), ("whole", 2.0, "whole"),
    ("whole", True, "whole number"), ("whole", "3", "whole number"), ("whole", None, "whole number"),
    ("share", 0, "number above 0 and at most 1, not 0"), ("share", math.nan, "not nan"), ("name", "c", "a or b"),
    ("is_on", 1, "True or F"), ("many_steps", (1, 0), "whole numbers at least 1"), ("many_steps", (), "whole numbers"),
    ("many_steps", 5, "whole"), ("begin", -1, "at least 0"), ("begin", {}, "number at least 0")])
def test_config_names_the_field_that_is_wrong_and_says_what_would_be_right(field, value, wanted):
    with pytest.raises(ValueError, match=f"^{field} must be .*{wanted}"):
        Example(**{field: value})


@pytest.mark.parametrize("config_class", [TrainConfig, RunConfig, ModelConfig, SamplingConfig, Request])
def test_config_classes_explain_every_field_and_bound_every_number(config_class):
    """So that a checkpoint or a flag that asks for terabytes, or for nothing, is refused by the name of its field."""
    for field in dataclasses.fields(config_class):
        limits, many = field.metadata, typing.get_args(field.type)
        assert limits["help"], f"{field.name} is not explained"
        if field.type in (int, float) or many and many[0] in (int, float):
            assert limits["bounds"].keys() & {"at least", "above"}, f"{field.name} has no lower bound"
            with pytest.raises(ValueError, match=f"^{field.name} must be"):
                config_class(**{field.name: (math.nan,) if many else math.nan})


def parse(config, *arguments):
    parser = Parser()
    add_flags(parser, type(config))
    return from_flags(parser.parse_args(arguments), config)


def test_from_flags_reads_every_kind_of_field_and_keeps_what_is_not_given():
    arguments = "--whole 9 --share 0.25 --name b --many-steps 3 4 5 --is-on --from 2".split()
    assert parse(Example(), *arguments) == Example(9, 0.25, "b", (3, 4, 5), True, 2.0)
    assert parse(Example(is_on=True), "--no-is-on") == Example()
    assert parse(Example(), "--share", "1", "--many-steps", "1") == Example(share=1, many_steps=[1]), "the limits"
    stored = Example(whole=7, share=0.1, is_on=True)
    assert parse(stored) == stored, "nothing was given"
    assert parse(stored, "--whole", "3") == dataclasses.replace(stored, whole=3), "3 is given, though it is the default"


def test_add_flags_refuses_a_value_of_another_kind_out_of_bounds_or_none():
    for arguments in (["--whole", "x"], ["--whole", "10"], ["--whole=--"], ["--many-steps"], ["--share", "0.5\nrm"]):
        with pytest.raises(ValueError, match=arguments[0].strip("-=")):
            parse(Example(), *arguments)


@pytest.mark.parametrize("module, classes", [(sample, (Request, SamplingConfig)), (train, (RunConfig, TrainConfig))])
def test_help_explains_the_flag_of_every_field(module, classes, call):
    ended = call(module, "--help")
    for field in (field for config_class in classes for field in dataclasses.fields(config_class)):
        assert (field.metadata["flag"] or "--" + field.name.replace("_", "-")) in ended.out, field.name
        assert field.metadata["help"].split()[0] in ended.out and ended.code == 0


def test_pick_device_prefers_cuda_then_mps_then_the_cpu_and_names_what_there_is(monkeypatch):
    for n_cuda, has_mps, best in ((2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n_cuda=n_cuda: n_cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has_mps=has_mps: has_mps)
        assert str(pick_device("auto")) == best and pick_device("cpu").type == "cpu"
        if n_cuda:
            assert pick_device("cuda") == pick_device("cuda:0") and pick_device("cuda:1").index == 1
        with pytest.raises(ValueError, match=f"--device cuda:2: this machine has {best}.*cpu|has cpu"):
            pick_device("cuda:2")


def test_pick_dtype_takes_what_is_asked_and_on_a_cpu_bfloat16_only_where_it_is_fast(monkeypatch):
    cpu = torch.device("cpu")
    assert [pick_dtype(name, cpu) for name in cli.DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast, raising=False)
        assert pick_dtype("auto", cpu) == dtype


def test_run_ends_a_stop_with_the_code_of_its_signal_and_hides_no_bug(capsys):
    handler = signal.getsignal(signal.SIGTERM)
    for error, code in ((KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143), (ZeroDivisionError(), 0)):
        def main(error=error):
            raise error
        with pytest.raises((SystemExit, ZeroDivisionError)) as end:
            cli.run(main)
        assert getattr(end.value, "code", 0) == code and capsys.readouterr().err == ("stopped\n" if code else "")
    signal.signal(signal.SIGTERM, handler)


def test_run_tells_a_warning_in_one_line(call):
    ended = call(SimpleNamespace(__name__="play", main=lambda: warnings.warn("it ends\nearly", stacklevel=1)))
    assert (ended.code, ended.err) == (0, "play.py: warning: it ends early\n")


@pytest.mark.parametrize("command, words", [
    (["sample.py", "a flute", "--model", "no\nsuch_model"], ["such_model", "toy-ar"]),
    (["train.py", "--data", "no_such_folder"], ["no_such_folder", "no such data set"])])
def test_a_real_command_ends_bad_input_with_one_line_and_code_2(command, words, tmp_path):
    script, *arguments = command
    ended = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), *words)
    assert "Traceback" not in ended.stdout and os.listdir(tmp_path) == []


SAYING = """
import sys
from support.cli import run, say
def main():
    for line in range(2000):
        say(f"{line} \\u266b" * 20)
    print("done", file=sys.stderr)
run(main)
"""


@pytest.mark.parametrize("ending", [">&-", "| head -n 1 >/dev/null", ">/dev/full"])
def test_say_to_a_stdout_that_is_closed_gone_or_full_does_not_turn_success_into_failure(ending):
    """Nor does a character (a note) that the terminal cannot show."""
    script = f'set -o pipefail; "{sys.executable}" -c "$SAYING" {ending}'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                           env={**os.environ, "SAYING": SAYING, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (0, "done\n")


def test_say_speaks_in_the_first_of_several_processes_only(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        cli.say(f"of {rank}")
    assert capsys.readouterr().out == "of 0\n"
