"""What the commands share: flags made from dataclasses, devices and number types, errors in one line."""

import argparse
import dataclasses
import operator
import os
import signal
import sys
import typing
import warnings
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {int: "whole number", float: "number", str: "text", bool: "True or False"}
BOUNDS = {"above": operator.gt, "at least": operator.ge, "at most": operator.le}


def option(default=dataclasses.MISSING, help="", choices=None, low=None, high=None, above=None, flag=None):
    """A field of a `Config`: its default, its meaning, and what it may be: one of `choices`, or low <= x <= high, or
    x > above. In a tuple the bounds hold for each number. A default of None allows None, for "not given"."""
    bounds = {word: x for word, x in (("above", above), ("at least", low), ("at most", high)) if x is not None}
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "bounds": bounds, "flag": flag})


class Config:
    """Base class of dataclasses whose fields are made with `option`: each new one is checked, field by field."""

    def __post_init__(self):
        """ValueError names the field and says what would be right. Numbers must be finite."""
        for field in dataclasses.fields(self):
            value, choices, bounds = getattr(self, field.name), field.metadata["choices"], field.metadata["bounds"]
            if value is None and field.default is None:
                continue
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            many = typing.get_origin(field.type) is tuple
            kind = typing.get_args(field.type)[0] if many else field.type
            values = value if many and isinstance(value, tuple) else (value,)
            right = bool(values) and all(
                isinstance(x, (int, float) if kind is float else kind) and isinstance(x, bool) == (kind is bool)
                and (kind is str or abs(x) <= sys.float_info.max)
                and all(BOUNDS[word](x, bound) for word, bound in bounds.items()) for x in values)
            if not right or many != isinstance(value, tuple) or choices and value not in choices:
                wanted = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items())
                wanted = " or ".join(map(str, choices or ())) or f"{KINDS[kind]}{'s' * many} {wanted}".strip()
                raise ValueError(f"{field.name} must be {wanted}, not {value!r:.80}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as `run` prints them."""

    def error(self, message):
        raise ValueError(message)


def add_flags(parser, *config_classes):
    """Give `parser` one flag for every field of each `Config`: top_p -> --top-p. What is not given is absent from the
    parsed arguments, so that `from_flags` can tell it from a default."""
    for field in [field for config_class in config_classes for field in dataclasses.fields(config_class)]:
        default = "" if field.default is None else f" (default: {field.default})".replace("%", "%%")
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(field.type) is tuple:
            kind = {"type": typing.get_args(field.type)[0], "nargs": "+"}
        parser.add_argument(field.metadata["flag"] or "--" + field.name.replace("_", "-"), dest=field.name,
                            default=argparse.SUPPRESS, help=field.metadata["help"] + default, **kind)


def from_flags(args, config):
    """`config`, with the fields that parsed flags give; its own checks run. ValueError names the field."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if field.name in args}
    return dataclasses.replace(config, **given)


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else the CPU; any other name is checked. ValueError where it is not there."""
    have = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    have += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = {"auto": have[0], "cuda": "cuda:0"}.get(name, name)
    if name not in have:
        raise ValueError(f"--device {name}: this machine has {', '.join(have)}")
    return torch.device(name)


def pick_dtype(name, device):
    """The type to run a network in: "auto" is bfloat16 where the device multiplies it fast (recent GPUs and x86 CPUs),
    else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else torch.float32
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float16


def say(text):
    """Print a line, in the first of torchrun's processes; a reader that has gone away (`| head`) stops no work."""
    try:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def run(main):
    """Call `main`; bad input (ValueError, OSError) or a missing package ends the command with one line on stderr and
    exit code 2. A warning is one line there, too. Ctrl-C and SIGTERM raise KeyboardInterrupt: exit code 130 or 143."""
    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    def tell(kind, message):
        print(f"{Path(sys.argv[0]).name}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)

    signal.signal(signal.SIGTERM, interrupt)
    warnings.showwarning = lambda message, *_: tell("warning", message)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        tell("error", error)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
