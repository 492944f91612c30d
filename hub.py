"""Published files: fetched once into a cache folder, and read without running code in them.

Meta's and Google's weights lie on the Hugging Face hub, in repositories that are a name and a list of files. `fetch`
downloads what is missing; a file laid into its folder by hand does as well. The readers know the two formats in which
tensors are published, and as much YAML as AudioCraft's settings need. It leaves out what the tensors mean: see
`model.py`, `encodec_wrap.py` and `t5_encoder.py`. HF_ENDPOINT in the environment names a mirror of the hub.
"""

import hashlib
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

MODEL_FILES = ("state_dict.bin", "compression_state_dict.bin")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one of the two
CODEC, CODEC_FILES = "facebook/encodec_32khz", ("|".join(WEIGHTS), "config.json")
T5_FILES = ("|".join(WEIGHTS), "spiece.model")
T5_REPOSITORIES = {"t5-small": "google-t5/t5-small", "t5-base": "google-t5/t5-base"}  # short name: repository
MODELS = tuple(f"facebook/{name}" for name in (
    "magnet-small-10secs", "magnet-medium-10secs", "magnet-small-30secs", "magnet-medium-30secs",
    "audio-magnet-small", "audio-magnet-medium", "musicgen-small", "musicgen-medium"))
MUSIC_SAMPLING = {"schedule": "released"}  # what differs from `decoding.SamplingConfig` for published models
SOUND_SAMPLING = MUSIC_SAMPLING | {"temperature": 3.5, "top_p": 0.8, "guidance_start": 20.0, "guidance_end": 1.0}
CHUNK = 1 << 20


# ------------------------------------------------------------------------------------------------------------- fetching

def cache_folder(repository):
    """Where the files of a repository are kept: one folder each, in torch's hub folder."""
    return Path(torch.hub.get_dir(), "checkpoints", repository.replace("/", "--"))


def file_url(repository, file):
    """The address of a repository's file."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}/resolve/main/{file}"


def fetch(wanted):
    """Download what the cache folders lack of `wanted`: {repository: (file, ...)}; "a|b" is satisfied by either file.

    ConnectionError: something could not be fetched; one line names every missing file, its address and its folder.
    """
    def missing():
        return [(repository, files.split("|")) for repository in wanted for files in wanted[repository]
                if not any((cache_folder(repository) / file).is_file() for file in files.split("|"))]

    try:
        for repository, files in missing():
            fetch_one_of(repository, files)
    except (OSError, http.client.HTTPException) as error:
        by_hand = "; ".join(f"{' or '.join(file_url(repository, file) for file in files)} into "
                            f"{cache_folder(repository)}" for repository, files in missing())
        raise ConnectionError(f"download failed ({error}); try again, or fetch by hand {by_hand}") from error


def fetch_one_of(repository, files):
    """Download the first of `files` that the repository has."""
    for file in files:
        try:
            return download(file_url(repository, file), cache_folder(repository) / file)
        except urllib.error.HTTPError as error:
            if error.code != 404 or file == files[-1]:
                raise


class FollowRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; remembers the sha256 of the file, which the hub states when it sends one on to its storage."""

    sha256 = None

    def redirect_request(self, request, reply, code, message, headers, url):
        stated = (headers.get("X-Linked-ETag") or "").strip('"')
        self.sha256 = stated if re.fullmatch("[0-9a-f]{64}", stated) else self.sha256
        return super().redirect_request(request, reply, code, message, headers, url)


def download(url, path, sha256=None):
    """Fetch `url` into the file `path`, which appears whole or not at all; what a cut left of it is not fetched again.

    Its size, and its sha256 (or the beginning of that) where it is given or the hub states it, are checked. OSError.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    redirects = FollowRedirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=60) as reply:
            start = start if reply.status == 206 else 0  # 200: the server sends all of it again
            total = start + int(reply.headers["Content-Length"]) if "Content-Length" in reply.headers else None
            with open(part, "ab" if start else "wb") as file, tqdm(
                    desc=path.name, total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                while chunk := reply.read(CHUNK):
                    bar.update(file.write(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "nothing lies beyond these bytes": what is there is all of it, or of another file
            raise
        part.unlink()
        return download(url, path, sha256)
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{url} broke off after {part.stat().st_size} of {total} bytes; the next try goes on from there")
    sha256 = sha256 or redirects.sha256
    if sha256 and not file_sha256(part).startswith(sha256):
        part.unlink()
        raise OSError(f"{url} arrived damaged: its sha256 is not {sha256}")
    os.replace(part, path)


def file_sha256(path):
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def beside(folder, name):
    """The repository `name` where it is laid by hand: a folder of its last name in `folder` or next to it, else `name`.

    ("models/magnet", "facebook/encodec_32khz") -> "models/magnet/encodec_32khz" or "models/encodec_32khz", if there.
    """
    last = name.split("/")[-1]
    places = (Path(folder) / last, Path(folder).resolve().parent / last)
    return next((str(place) for place in places if place.is_dir()), name)


def weights_file(folder):
    """The weights in a folder of the hub's layout: model.safetensors, or else pytorch_model.bin (there or not)."""
    return next((Path(folder, file) for file in WEIGHTS if Path(folder, file).is_file()), Path(folder, WEIGHTS[-1]))


def fetch_published(name):
    """Download what is missing of a published model, of its codec and of its text encoder; gives the model's folder."""
    wanted = {name: MODEL_FILES, T5_REPOSITORIES["t5-base"]: T5_FILES}
    if not name.startswith("facebook/audio-"):  # whose codec is among the model's own files
        wanted[CODEC] = CODEC_FILES
    fetch(wanted)
    return cache_folder(name)


def published_names(text, folder):
    """What a published model asks for, by its YAML text: {"codec", "text_encoder", "sampling"}; local files first."""
    settings, codec = read_yaml(text), folder / MODEL_FILES[1]
    is_music = settings.get("sample_rate", "32000") == "32000"
    encoder = beside(folder, settings.get("conditioners.description.t5.name", "t5-base"))
    return {"codec": beside(folder, CODEC) if is_music and not codec.is_file() else str(codec),
            "text_encoder": str(folder) if (folder / T5_FILES[1]).is_file() else encoder,
            "sampling": MUSIC_SAMPLING if is_music else SOUND_SAMPLING}


# -------------------------------------------------------------------------------------------------------------- reading

def read_torch(path, mmap=True):
    """What torch.save wrote, read without running code in it; mmap: tensors stay in the file until they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))


def read_state_dict(path):
    """Tensors by name from a .safetensors or a PyTorch file. ValueError names the file if it is neither or damaged."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    try:
        state_dict = read_torch(path)
    except Exception as error:  # torch.load has no one type for "not a weight file"
        raise ValueError(f"{path} is not a file of tensors, or is damaged: delete it and fetch it again") from error
    return check_tensors(state_dict, path)


def check_tensors(state, path):
    """`state`, if it holds tensors by name; else ValueError."""
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise ValueError(f"{path}: its weights are not tensors by name")
    return state


def load_strictly(model, state, path, dtype=None, device="cpu"):
    """Fill `model` with `state`; a missing, unexpected or misshapen tensor is a ValueError naming it and the file.

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
    if dtype is not None:
        state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=dtype is not None)


def dequantized(state, scales):
    """Weights (rows, columns) stored in 8 bits, times their rows' scales (rows, 1); the others as they are."""
    return {name: tensor * scales[name] if name in scales else tensor for name, tensor in state.items()}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Tensors by name from a .safetensors file; they stay in the file until they are used. ValueError names the file.

    The format: the length of the header (8 bytes, little-endian), the header, which is JSON {name: {"dtype", "shape",
    "data_offsets": [begin, end]}}, and the tensors' bytes without a gap.
    """
    size, tensors, end = Path(path).stat().st_size, {}, 0
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, size))
        if len(text) != length:
            raise ValueError("its header is cut")
        header = json.loads(text)
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, begin = DTYPES[entry["dtype"]], entry["shape"], end
            end = begin + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or end > len(data) or min(shape, default=0) < 0:
                raise ValueError(f"tensor {name} does not lie where it should")
            tensor = data[begin:end]
            tensor = tensor if tensor.storage_offset() % dtype.itemsize == 0 else tensor.clone()
            tensors[name] = tensor.view(dtype).view(shape)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes are left over")
    except Exception as error:  # a damaged header can be anything
        raise ValueError(f"{path} is not a safetensors file, or is damaged ({error}): fetch it again") from error
    return tensors


def read_yaml(text):
    """AudioCraft's settings, flat: "seanet:\\n  lstm: 2" -> {"seanet": "", "seanet.lstm": "2"}. All values are strings.

    Plain mappings and lists (the items joined by spaces); "${encodec.causal}" is replaced by the value it points to.
    """
    settings, path, name = {}, [], None  # path: (indentation, key) of the mappings that the line is in
    for line in text.splitlines():
        content, indentation = line.strip(), len(line) - len(line.lstrip())
        if content.startswith("- ") and name:
            settings[name] += f" {content[2:]}"
        elif ":" in content and not content.startswith("#"):
            key, _, value = content.partition(":")
            path = [outer for outer in path if outer[0] < indentation] + [(indentation, key)]
            name = ".".join(key for _, key in path)
            settings[name] = value.strip().strip("'\"")
    return {name: settings.get(value[2:-1], value) if value.startswith("${") else value
            for name, value in settings.items()}
