"""What the commands share: flags made from dataclasses, devices and number types, errors in one line."""

import argparse
import dataclasses
import os
import signal
import sys
import typing
import warnings
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def option(default=dataclasses.MISSING, help="", choices=None, low=None, high=None, above=None, flag=None):
    """A field of a `Config`: its default, its meaning, and what it may be: one of `choices`, or low <= x <= high, or
    x > above. In a tuple the bounds hold for each number. A default of None allows None, for "not given".
    """
    limits = {"choices": choices, "low": low, "high": high, "above": above, "flag": flag}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


class Config:
    """Base class of dataclasses whose fields are made with `option`: each new one is checked, field by field."""

    def __post_init__(self):
        """ValueError names the field and says what would be right. Numbers must be finite."""
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            many = typing.get_origin(field.type) is tuple
            kind = typing.get_args(field.type)[0] if many else field.type
            values = value if many and isinstance(value, tuple) else (value,)
            accepted = (int, float) if kind is float else kind
            right = bool(values) and many == isinstance(value, tuple) and all(
                isinstance(x, accepted) and (kind is bool or not isinstance(x, bool)) for x in values)
            if right and kind in (int, float):
                low, high, above = limits["low"], limits["high"], limits["above"]
                right = all(abs(x) <= sys.float_info.max and (low is None or x >= low) and (high is None or x <= high)
                            and (above is None or x > above) for x in values)
            if not right or limits["choices"] and value not in limits["choices"]:
                name = {int: "whole number", float: "number", str: "text", bool: "True or False"}[kind] + "s" * many
                bounds = [f"{word} {limits[limit]:,}" for limit, word in
                          (("above", "above"), ("low", "at least"), ("high", "at most")) if limits[limit] is not None]
                wanted = " or ".join(map(str, limits["choices"] or ())) or f"{name} {' and '.join(bounds)}".strip()
                raise ValueError(f"{field.name} must be {wanted}, not {repr(value)[:80] if value != () else 'empty'}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as `run` prints them."""

    def error(self, message):
        raise ValueError(message)


def add_flags(parser, *config_classes):
    """Give `parser` one flag for every field of each `Config`: top_p -> --top-p. What is not given is absent from the
    parsed arguments, so that `from_flags` can tell it from a default."""
    for field in [field for config_class in config_classes for field in dataclasses.fields(config_class)]:
        flag, kind = field.metadata["flag"] or "--" + field.name.replace("_", "-"), field.type
        default = "" if field.default is None else f" (default: {field.default})".replace("%", "%%")
        more = {"dest": field.name, "default": argparse.SUPPRESS, "help": field.metadata["help"] + default}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, type=typing.get_args(kind)[0], nargs="+", **more)
        else:
            parser.add_argument(flag, type=kind, choices=field.metadata["choices"], **more)


def from_flags(args, config):
    """`config`, with the fields that parsed flags give; its own checks run. ValueError names the field."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if field.name in args}
    return dataclasses.replace(config, **given)


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else the CPU; any other name is checked. ValueError where it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not have.get(device.type, False) or (device.index or 0) >= count:
        there = [kind if kind != "cuda" else f"cuda:0 to cuda:{count - 1}" for kind in have if have[kind]]
        raise ValueError(f"--device {name}: this machine has {', '.join(there)}")
    return device


def pick_dtype(name, device):
    """The type to run a network in: "auto" is bfloat16 where the device multiplies it fast (recent GPUs and x86 CPUs),
    else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu":
        return torch.bfloat16 if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else torch.float32
    return torch.float16


def say(text):
    """Print a line, in the first of torchrun's processes; a reader that has gone away (`| head`) stops no work."""
    try:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def run(main):
    """Call `main`; bad input (ValueError, OSError) ends the command with one line on stderr and exit code 2.

    A warning is one line there, too. Ctrl-C and SIGTERM raise KeyboardInterrupt, so that both are treated alike: exit
    code 130 or 143.
    """
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
    except (ValueError, OSError) as error:
        tell("error", error)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
