"""What the command lines share: flags made from a dataclass, devices, one-line errors, files written whole."""

import argparse
import dataclasses
import hashlib
import os
import sys
import typing
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as `run` prints them."""

    def error(self, message):
        raise ValueError(message)


def option(default, help, choices=None):
    """A dataclass field which is also a command-line flag: its default value, and what it means."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser, config_class):
    """Give `parser` one flag for every field of a dataclass made with `option`: top_p -> --top-p."""
    for field in dataclasses.fields(config_class):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        more = {"default": field.default, "help": f"{field.metadata['help']} (default: {field.default})"}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, type=typing.get_args(kind)[0], nargs="+", **more)
        else:
            parser.add_argument(flag, type=kind, choices=field.metadata["choices"], **more)


def from_flags(args, config_class):
    """The dataclass that parsed flags describe; its own checks (`__post_init__`) run here."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else the CPU; any other name is checked. ValueError where it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    if not have.get(name.split(":")[0], False):
        raise ValueError(f"--device {name}: this machine has {', '.join(kind for kind in have if have[kind])}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def multiplies_bf16(device):
    """Whether matrix products are faster in bfloat16 than in float32 here: on recent GPUs and x86 CPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def pick_dtype(name, device):
    """The type to run a network in: "auto" is bfloat16 where that is fast, else float16, but float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if multiplies_bf16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


def fingerprint(module, more=b""):
    """A hash of a network's weights, and of the bytes `more`."""
    digest = hashlib.sha256(more)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def identities(codec, encoder):
    """What a model is tied to: the weights of its codec and text encoder, and the tokenizer's pieces."""
    pieces = encoder.tokenizer.model.serialized_model_proto() if encoder.tokenizer else b""
    return {"codec_id": fingerprint(codec), "text_encoder_id": fingerprint(encoder, pieces)}


def check_same(names, codec, encoder):
    """ValueError if codec or text encoder have other weights than those a model was trained with (`load_model`).

    Published models do not say which weights those were: they pass.
    """
    if "codec_id" not in names:
        return
    for key, now in identities(codec, encoder).items():
        kind = key.removesuffix("_id")
        if now != names[key]:
            raise ValueError(f"{kind} {names[kind]} has other weights now than when the model was trained with it")


def save_whole(content, path):
    """torch.save to a temporary file beside `path`, then rename: a cut leaves the old file, never half a new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(main):
    """Call `main`; bad input (ValueError, OSError) ends the command with one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
