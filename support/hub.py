"""Published files: fetched into the cache that the Hugging Face libraries share, and settings read from them.

The functions here know no model: which repositories there are, and what their files mean, stand in `model.py`,
`t5_encoder.py` and `encodec_wrap.py`. The environment variables of `huggingface_hub` hold: HF_HOME (where the cache
is), HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_TOKEN.
"""

import dataclasses
import re
from pathlib import Path

import torch
import yaml

from support.files import read_checkpoint

WEIGHTS = "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json"  # one of them
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is faster, above all on hostile text


def fetch(repository, *files, repo_type=None):
    """The folder with a repository's `files`; what is missing is downloaded. "a|b" is satisfied by either file.
    repo_type: "dataset" where it is one.

    A folder of the repository's name ("facebook/encodec_32khz") in the working directory goes before the cache, if it
    holds them all. An index of weights (*.index.json) brings its weights with it. ConnectionError: one line with each
    missing file, its address, and the folder where it may be put by hand.
    """
    import huggingface_hub as hub  # here: only who fetches waits 0.15 s for it

    by_hand, paths, reason = Path(repository), {}, ""
    missing = [file for file in files if not any((by_hand / name).is_file() for name in file.split("|"))]
    if not missing:
        return by_hand
    for file in files:
        cached = (hub.try_to_load_from_cache(repository, name, repo_type=repo_type) for name in file.split("|"))
        paths[file] = next((Path(path) for path in cached if isinstance(path, str)), None)
    commit = next((path.parent.name for path in paths.values() if path), "main")  # all files of one version
    try:
        for file in files:
            for name in file.split("|") if not paths[file] else ():
                try:  # The library tries a download for 23 s; this question is asked once, and offline fails at once.
                    place = {"revision": commit, "repo_type": repo_type}
                    hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, **place))
                    paths[file] = Path(hub.hf_hub_download(repository, name, **place))
                    break
                except hub.errors.EntryNotFoundError:
                    if name == file.split("|")[-1]:
                        raise
            commit = paths[file].parent.name
    except Exception as error:  # the library's errors have no one type over its versions
        reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    if reason:
        wanted = [" or ".join(hub.hf_hub_url(repository, name, repo_type=repo_type) for name in file.split("|")
                              if "|" not in file or not name.endswith(".index.json"))  # nobody needs to hear of parts
                  for file in files if (file in missing if by_hand.is_dir() else not paths[file])]
        raise ConnectionError(f"download failed ({reason}); try again, or put {' and '.join(wanted)} into the folder "
                              f"{by_hand.absolute()}")
    for path in paths.values():
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
        raise ConnectionError(f"download failed ({error}); try again, or put {url} into the folder {path.parent}"
                              ) from error
    return path


def beside(folder, name):
    """The repository `name` where it is laid by hand: a folder of its last name in `folder` or next to it, else `name`.

    ("models/magnet", "facebook/encodec_32khz") -> "models/magnet/encodec_32khz" or "models/encodec_32khz", if there.
    """
    places = [place / name.split("/")[-1] for place in (Path(folder), Path(folder).resolve().parent)]
    return next((str(place) for place in places if place.is_dir()), name)


def read_yaml(text, path):
    """AudioCraft's settings, flat: "seanet:\\n  lstm: 2" -> {"seanet.lstm": 2}; a list is one value.

    "${encodec.causal}" is replaced by the value that it points to. ValueError names `path`, where the text came from.
    """
    settings = {}

    def flatten(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                settings[f"{prefix}{key}"] = value

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, YAML_LOADER)):
            raise ValueError("aliases are not used there")  # a few lines of them can stand for gigabytes
        flatten(yaml.load(text, YAML_LOADER), "")
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are not YAML ({' '.join(str(error).split())})") from error
    for name, value in settings.items():
        pointed = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        settings[name] = settings.get(pointed[1], value) if pointed else value
    return settings


def make_config(config_class, values, path):
    """A `Config` of the given class from a dictionary, in which other keys may stand too.

    ValueError names `path`, where the values came from, and the field that is missing or wrong.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path}: its settings are not a dictionary")
    try:
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)
                               if field.name in values or field.default is dataclasses.MISSING})
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
