"""Files that are there whole or not at all, and tensors read with every check that a file allows."""

import hashlib
import json
import os
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool)  # types of weights


class NoInit(torch.overrides.TorchFunctionMode):
    """Within this context new modules are not initialised: for those, on the device "meta", that are loaded at once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def whole_file(path):
    """A temporary path beside `path`, to write to: it takes the name `path` at the end, or goes after an error. OSError
    if it cannot be written, a full disk included. What killed processes left behind is removed an hour later."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for litter in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # another process may just have finished it
            if time.time() - litter.stat().st_mtime > 3600:
                litter.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:  # RuntimeError: as torch reports a full disk
        raise OSError(f"{path}: could not be written, what was there is kept ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_whole(content, path):
    """torch.save into `path`, whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def read_checkpoint(path, keys=()):
    """The dictionary in a file of torch.save, .safetensors or .json, or in the shards that an .index.json lists. No
    code in it is run, checksums are verified, and tensors stay in the file until they are used. ValueError names a file
    that is damaged, holds no dictionary, or lacks one of `keys`."""
    path = Path(path)
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if zipped and (damaged := zipfile.ZipFile(path).testzip()):  # torch does not look at the checksums
                raise ValueError(f"{damaged} fails its checksum")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if path.name.endswith(".index.json") and not keys:
            shards = sorted(set(content["weight_map"].values()))
            content = {k: tensor for shard in shards for k, tensor in read_checkpoint(path.with_name(shard)).items()}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except Exception as error:  # there is no one type for "not such a file"
        if isinstance(error, OSError) and error.filename is not None:
            raise
        why = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: cannot be read: it is damaged or something else ({why})") from error
    return content


def rename(name, table):
    """The published name of a tensor of ours; `table` is pairs (ours, published), replaced one after another."""
    for ours, published in table:
        name = name.replace(ours, published)
    return name


def load_strictly(model, state, path, dtype=None, device="cpu", scales=None, names=()):
    """Fill `model` with `state`. A tensor that is missing, unexpected, misshapen or not finite is a ValueError.

    The values are copied; or, where `dtype` is given, the tensors themselves become the model's, in this type and on
    `device`, so that a model made on the device "meta" is in memory only once. scales: {name: (rows, 1)} of matrices
    stored in 8 bits, whose rows are multiplied by them. names: a table for `rename`, if `state` has such names."""
    wanted, scales, ready = model.state_dict(), scales or {}, {}
    if not isinstance(state, dict) or not isinstance(scales, dict) or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) and x.layout == torch.strided and x.dtype in PLAIN
            and x.device.type == "cpu" for name, x in (*state.items(), *scales.items())):
        raise ValueError(f"{path}: its weights are not plain tensors by name")
    ours = {rename(name, names): name for name in wanted}
    state = {ours.get(name, name): tensor for name, tensor in state.items()}
    if odd := wanted.keys() ^ state.keys():
        raise ValueError(f"{path}: tensor {min(odd)} is {'missing' if min(odd) in wanted else 'unexpected'}")
    for name, tensor in state.items():
        shape, scale = wanted[name].shape, scales.get(name)
        if tensor.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, want {tuple(shape)}")
        if scale is not None and scale.shape != (len(tensor), 1):
            raise ValueError(f"{path}: the scales of tensor {name} have shape {tuple(scale.shape)}")
        tensor = tensor if scale is None else tensor * scale
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{path}: tensor {name} is of type {tensor.dtype}, want {wanted[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds numbers that are not finite")
        ready[name] = tensor if dtype is None else tensor.to(device, dtype if tensor.is_floating_point() else None)
    model.load_state_dict(ready, assign=dtype is not None)


def fingerprint(module):
    """A hash of a network's weights, and of the pieces of its tokenizer if it has one."""
    tokenizer = getattr(module, "tokenizer", None)
    digest = hashlib.sha256(tokenizer.serialized_model_proto() if tokenizer else b"")
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


PLACES = {"data", "codec", "text_encoder"}  # settings that may name a file or a folder


def portable(settings, folder):
    """Settings as a run in `folder` keeps them: files and folders that lie beside it by their place relative to it, so
    that both can be moved, others by their absolute place. What is no place (toy, t5-base) stays."""
    base = Path(folder).resolve()
    for key in PLACES & settings.keys():
        path = Path(settings[key]).absolute()
        path = path.parent.resolve() / path.name  # a link stays one: what it points to may bear another name
        if path.exists() and settings[key] not in ("toy", "tunes", "musicbench"):
            near = os.path.join(".", os.path.relpath(path, base))  # the dot tells `located` that it is a place
            settings = settings | {key: near if base.parent in path.parents else str(path)}
    return settings


def located(settings, folder):
    """The inverse of `portable`: settings with the files and folders where they are now."""
    places = {key: Path(folder, settings[key]) for key in PLACES & settings.keys() if settings[key].startswith(".")}
    return settings | {key: str(place) for key, place in places.items() if place.exists()}


@dataclass
class Companions:
    """What a model was trained with, and the sampling settings that it brings along."""

    codec: str
    text_encoder: str
    codec_id: str = ""  # a fingerprint; "": unknown
    text_encoder_id: str = ""
    sampling: dict = field(default_factory=dict)
    data_id: str = ""  # of the data set

    def check(self, codec, encoder, what="the model"):
        """ValueError if codec or text encoder have other weights than those that `what` was trained with."""
        for kind, module in (("codec", codec), ("text_encoder", encoder)):
            if (known := getattr(self, f"{kind}_id")) and known != fingerprint(module):
                raise ValueError(f"{what} was trained with the {kind} {getattr(self, kind)}, which has other weights "
                                 "than the one that is used here")
