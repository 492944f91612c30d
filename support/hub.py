"""Published files: fetched into the cache that the Hugging Face libraries share, and settings read from them.

Which repositories there are, and what their files mean, stands in `model.py`, `t5_encoder.py` and `encodec_wrap.py`.
The environment variables of `huggingface_hub` hold: HF_HOME (where the cache is), HF_ENDPOINT, HF_HUB_OFFLINE, ...
"""

import dataclasses
import re
from functools import partial
from pathlib import Path

import torch
import yaml

from support.files import read_checkpoint

WEIGHTS = "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json"  # one of them
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is faster, above all on hostile text


def fetch(repository, *files, repo_type=None):
    """The folder with a repository's `files`; what is missing is downloaded. "a|b" is satisfied by either file, and an
    index of weights (*.index.json) brings its weights with it. repo_type: "dataset" where it is one.

    A folder of the repository's name ("facebook/encodec_32khz") in the working directory goes before the cache, if it
    holds them all. ConnectionError: one line with each file that this folder lacks, its address, and the folder.
    """
    import huggingface_hub as hub  # here: only who fetches waits 0.15 s for it

    by_hand, names, found = Path(repository), {file: file.split("|") for file in files}, {}
    missing = [file for file in files if not any((by_hand / name).is_file() for name in names[file])]
    if not missing:
        return by_hand
    for file in files:
        cached = (hub.try_to_load_from_cache(repository, name, repo_type=repo_type) for name in names[file])
        found[file] = next((Path(path) for path in cached if isinstance(path, str)), None)
    commit = next((path.parent.name for path in found.values() if path), None)  # all files of one version
    try:
        for file in [file for file in files if not found[file]]:
            place = {"repo_type": repo_type, "revision": commit}
            # The library tries a download for 23 s; this question is asked once, and offline fails at once.
            exists = partial(hub.HfApi().file_exists, repository, **place)
            name = next((name for name in names[file] if exists(name)), names[file][-1])
            found[file] = Path(hub.hf_hub_download(repository, name, **place))
            commit = found[file].parent.name
    except Exception as error:  # the library's errors have no one type over its versions
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        wanted = (" or ".join(hub.hf_hub_url(repository, name, repo_type=repo_type) for name in names[file])
                  for file in missing)
        raise ConnectionError(f"download failed ({reason}); try again, or put {' and '.join(wanted)} into the folder "
                              f"{by_hand.absolute()}") from error
    for path in found.values():
        if path.name.endswith(".index.json"):
            fetch(repository, *sorted(set(read_checkpoint(path, ["weight_map"])["weight_map"].values())))
    return path.parent


def fetch_url(url, sha256):
    """The file at an address, kept in torch's hub folder; `sha256` is the beginning of its hash. ConnectionError."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.is_file():
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        place = f"put {url} into the folder {path.parent}"
        raise ConnectionError(f"download failed ({error}); try again, or {place}") from error
    return path


def beside(folder, name):
    """The repository `name` where it is laid by hand, in `folder` or next to it; else `name`: ("models/magnet",
    "facebook/encodec_32khz") -> "models/magnet/encodec_32khz" or "models/encodec_32khz", if there."""
    places = [place / name.split("/")[-1] for place in (Path(folder), Path(folder).resolve().parent)]
    return next((str(place) for place in places if place.is_dir()), name)


def flat(values, prefix=""):
    """Yield the pairs (name, value) of nested dictionaries: {"seanet": {"lstm": 2}} -> ("seanet.lstm", 2)."""
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def read_yaml(text, path):
    """AudioCraft's settings, flat, where a list is one value. "${encodec.causal}" is replaced by the value that it
    points to. ValueError names `path`, where the text came from."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, YAML_LOADER)):
            raise ValueError("aliases are not used there")  # a few lines of them can stand for gigabytes
        settings = dict(flat(yaml.load(text, YAML_LOADER)))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are not YAML ({error})") from error
    for name, value in settings.items():
        if pointed := re.fullmatch(r"\$\{([\w.]+)\}", str(value)):
            settings[name] = settings.get(pointed[1], value)
    return settings


def make_config(config_class, values, path):
    """A `Config` of the given class from a dictionary, in which other keys may stand too. ValueError names `path`,
    where the values came from, and the field that is missing or wrong."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: its settings are not a dictionary")
    try:
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)
                               if field.name in values or field.default is dataclasses.MISSING})
    except (KeyError, ValueError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {what}") from error
