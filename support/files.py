"""Files that are there whole or not at all, and tensors read with every check that a file allows."""

import hashlib
import json
import os
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

STALE = 3600  # seconds without a change after which a temporary file is what a killed process left behind


@contextmanager
def whole_file(path):
    """A temporary path beside `path`, to write to: it takes the name `path` at the end, or goes after an error.

    Such files that killed processes left behind are removed on the way, an hour later.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for litter in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - litter.stat().st_mtime > STALE:
            litter.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_whole(content, path):
    """torch.save into `path`, whole or not at all. OSError if it cannot be written, a full disk included."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # as torch reports a full disk
            raise OSError(f"{path}: could not be written, what was there is kept ({error})") from error


def read_checkpoint(path, keys=()):
    """The dictionary that torch.save wrote, read without running code in it, its tensors left in the file until used.

    Checksums are verified. ValueError names a file that is damaged, is something else, or lacks one of `keys`.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        damaged = zipfile.ZipFile(path).testzip() if zipped else None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # torch.load has no one type for "not a checkpoint"
        raise ValueError(f"{path}: cannot be read as a checkpoint; it is damaged or something else") from error
    if damaged:
        raise ValueError(f"{path}: is damaged ({damaged} does not match its checksum); fetch or make it again")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path}: is not such a checkpoint (it lacks {', '.join(missing)})")
    return content


def read_tensors(path):
    """Tensors by name from a .safetensors or a PyTorch file, or from the shards that an index (.index.json) lists."""
    path = Path(path)
    if path.name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read_tensors(path.with_name(shard)).items()}
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: is not an index of weight files") from error
    if path.suffix != ".safetensors":
        return check_tensors(read_checkpoint(path), path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a safetensors file, or is damaged ({error}): fetch it again") from error


def check_tensors(state, path):
    """`state`, if it holds ordinary tensors by name; else ValueError."""
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            and not tensor.is_quantized and not tensor.is_complex() and tensor.device.type == "cpu"
            for name, tensor in state.items()):
        raise ValueError(f"{path}: its weights are not plain tensors by name")
    return state


def load_strictly(model, state, path, dtype=None, device="cpu"):
    """Fill `model` with `state`. A tensor that is missing, unexpected, misshapen or not finite is a ValueError.

    The values are copied; or, where `dtype` is given, the tensors themselves become the model's, in this type and on
    `device`, so that a model made on the device "meta" is in memory only once.
    """
    wanted, state = model.state_dict(), check_tensors(state, path)
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    for problem, names in (("is missing", missing), ("is unexpected", unexpected)):
        if names:
            raise ValueError(f"{path}: tensor {min(names)} {problem} ({len(names)} such)")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, want {tuple(wanted[name].shape)}")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{path}: tensor {name} is of type {tensor.dtype}, want {wanted[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds numbers that are not finite")
    if dtype is not None:
        state = {name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
                 for name, tensor in state.items()}
    model.load_state_dict(state, assign=dtype is not None)


def fingerprint(module, more=b""):
    """A hash of a network's weights, and of the bytes `more`."""
    digest = hashlib.sha256(more)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
