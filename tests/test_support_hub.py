"""What fetching and reading published files promise. The hub is a server on this machine (see `conftest.py`).

Read in this order: what `fetch` downloads and what it does not; what it says when it cannot; files laid by hand; then
the readers of settings.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from support.cli import Config, option
from support.files import read_checkpoint
from support.hub import WEIGHTS, fetch, fetch_url, make_config, read_yaml

NAME = "google-t5/some-model"


def put(folder, **files):
    """Write files into a folder: put(folder, config__json=b"{}")."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def test_fetch_downloads_each_file_once_into_one_folder_and_of_alternatives_the_first_that_is_there(local_hub):
    put(local_hub.folder / NAME, config__json=b"{}", pytorch_model__bin=bytes(range(256)) * 2000)
    for _ in range(2):
        folder = fetch(NAME, "config.json", WEIGHTS)
        assert (folder / "pytorch_model.bin").read_bytes() == bytes(range(256)) * 2000
    assert local_hub.served == [f"{NAME}/config.json", f"{NAME}/pytorch_model.bin"]
    put(local_hub.folder / NAME, model__safetensors=b"other")
    assert fetch(NAME, "config.json", WEIGHTS) == folder and len(local_hub.served) == 2
    local_hub.shutdown()
    assert fetch(NAME, "config.json", WEIGHTS) == folder, "needs no network any more"


def test_fetch_brings_the_parts_that_an_index_lists(local_hub):
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    parts = {name: f"model-{name}.safetensors" for name in tensors}
    put(local_hub.folder / NAME, model__safetensors__index__json=json.dumps({"weight_map": parts}).encode())
    for name, tensor in tensors.items():
        save_file({name: tensor}, local_hub.folder / NAME / parts[name])
    assert read_checkpoint(fetch(NAME, WEIGHTS) / "model.safetensors.index.json") == tensors


def test_fetch_completes_a_folder_with_files_of_the_same_version(local_hub):
    put(local_hub.folder / NAME, config__json=b"{}", spiece__model=b"")
    first = fetch(NAME, "config.json")
    local_hub.commit = "d" * 40
    assert fetch(NAME, "spiece.model", "config.json") == first
    assert {path.name for path in first.iterdir()} == {"config.json", "spiece.model"}


def test_fetch_says_in_one_line_what_is_missing_and_uses_what_was_put_there_by_hand(offline):
    def message():
        with pytest.raises(ConnectionError) as error:
            fetch(NAME, "config.json", "a.bin|b.bin")
        return str(error.value)

    address = f"http://127.0.0.1:9/{NAME}/resolve/main/"
    assert f"{address}config.json and {address}a.bin or {address}b.bin into the folder {offline / NAME}" in message()
    assert "refused" in message() and "\n" not in message()
    put(offline / NAME, config__json=b"{}")
    assert "config.json" not in message(), "it is there"
    put(offline / NAME, b__bin=b"")
    assert fetch(NAME, "config.json", "a.bin|b.bin").resolve() == offline / NAME


def test_fetch_names_a_file_and_a_repository_that_the_hub_has_not_and_asks_no_one_offline(local_hub, monkeypatch):
    put(local_hub.folder / NAME, config__json=b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            fetch(NAME, "config.json")
        assert local_hub.served == []
    with pytest.raises(ConnectionError, match="404.*nothing.bin"):
        fetch(NAME, "config.json", "nothing.bin")
    with pytest.raises(ConnectionError, match="RepositoryNotFound.*no/such/resolve/main/config.json"):
        fetch("no/such", "config.json")


def test_fetch_url_checks_the_hash_and_keeps_the_file(local_hub):
    put(local_hub.folder / NAME, a__th=b"hello")
    url = f"{local_hub.url}/{NAME}/resolve/main/a.th"
    with pytest.raises(ConnectionError, match=f"hash.*put {url} into the folder"):
        fetch_url(url, "12345678")
    for _ in range(2):
        assert fetch_url(url, "2cf24dba").read_bytes() == b"hello"
    assert len(local_hub.served) == 2


YAML = """\
dim: 1
lm: {dim: 64, inner: {rate: 1.5}, name: 't: x'}
other:
  ratios: [4, 2]
  causal: ${lm.dim}
  user: /home/${oc.env:USER}
"""


def test_read_yaml_gives_flat_names_plain_types_and_follows_references():
    assert read_yaml(YAML, "x") == {
        "dim": 1, "lm.dim": 64, "lm.inner.rate": 1.5, "lm.name": "t: x", "other.ratios": [4, 2], "other.causal": 64,
        "other.user": "/home/${oc.env:USER}"}


@pytest.mark.parametrize("text", [None, "", "- 1", "a: [", "a: &a [1]\nb: *a", "[" * 5000, "a: !!python/name:os.mkdir"])
def test_read_yaml_names_the_file_of_a_text_that_is_no_settings(text):
    with pytest.raises(ValueError, match="^state.bin: its settings are not YAML"):
        read_yaml(text, "state.bin")


@dataclass
class Small(Config):
    width: int = option(low=1, high=10)
    rate: float = option(0.5, high=1)


def test_make_config_takes_its_fields_and_names_file_and_field_of_a_bad_one():
    assert make_config(Small, {"width": 3, "other": 1}, "x") == Small(3, 0.5)
    for values in ({}, {"width": "3"}, {"width": 11}, {"width": 3, "rate": 10**400}):
        with pytest.raises(ValueError, match="^config.json: "):
            make_config(Small, values, "config.json")
