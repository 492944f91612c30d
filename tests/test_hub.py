"""What fetching and reading published files promise. The hub is a server on this machine."""

import hashlib
import json

import pytest
import torch
from conftest import write_safetensors

import hub

CONTENT = bytes(range(256)) * 20_000  # 5 MB: more than the buffers on the way
REPOSITORY, FILE = "facebook/some-model", "state_dict.bin"


def put(local_hub, content=CONTENT, file=FILE):
    path = local_hub.folder / REPOSITORY / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fetched(file=FILE):
    return hub.cache_folder(REPOSITORY) / file


def fetch(*files):
    hub.fetch({REPOSITORY: files or (FILE,)})


# ------------------------------------------------------------------------------------------------------------- fetching

def test_fetch_puts_the_file_into_the_cache_folder_once(local_hub):
    put(local_hub)
    for _ in range(2):
        fetch()
        assert fetched().read_bytes() == CONTENT
    assert local_hub.served == [(f"{REPOSITORY}/{FILE}", 0)]
    assert [path.name for path in fetched().parent.iterdir()] == [FILE]


def test_fetch_shows_how_far_it_is(local_hub, capsys):
    put(local_hub)
    fetch()
    assert FILE in (bar := capsys.readouterr().err) and "100%" in bar and "4.88M" in bar


def test_fetch_after_a_cut_goes_on_where_it_broke_off(local_hub):
    put(local_hub)
    local_hub.cut_at = 1_000_000
    with pytest.raises(ConnectionError, match="broke off after 1000000 of 5120000 bytes"):
        fetch()
    assert not fetched().exists()
    local_hub.cut_at = None
    fetch()
    assert fetched().read_bytes() == CONTENT
    assert [offset for _, offset in local_hub.served] == [0, 1_000_000]


def test_fetch_begins_again_where_the_server_cannot_resume(local_hub):
    put(local_hub)
    local_hub.cut_at, local_hub.resumes = 1_000_000, False
    with pytest.raises(ConnectionError):
        fetch()
    local_hub.cut_at = None
    fetch()
    assert fetched().read_bytes() == CONTENT


def test_fetch_begins_again_where_the_rest_is_of_another_file(local_hub):
    """The bytes of an earlier version lie in the cache: the whole has the wrong hash; the next try is right."""
    put(local_hub)
    fetched().parent.mkdir(parents=True)
    fetched("state_dict.bin.part").write_bytes(b"other" * 100)
    with pytest.raises(ConnectionError, match="arrived damaged"):
        fetch()
    assert not fetched().exists()
    fetch()
    assert fetched().read_bytes() == CONTENT


@pytest.mark.parametrize("left", [len(CONTENT), len(CONTENT) + 7])
def test_fetch_begins_again_where_as_much_as_all_is_there_already(left, local_hub):
    put(local_hub)
    fetched().parent.mkdir(parents=True)
    fetched("state_dict.bin.part").write_bytes(b"x" * left)
    fetch()
    assert fetched().read_bytes() == CONTENT


def test_fetch_refuses_a_file_with_another_hash_than_the_hub_states(local_hub):
    put(local_hub)
    local_hub.sha256 = "0" * 64
    with pytest.raises(ConnectionError, match=f"{FILE} arrived damaged"):
        fetch()
    assert list(fetched().parent.iterdir()) == []


def test_download_checks_the_hash_that_it_is_given(local_hub, tmp_path):
    put(local_hub)
    url, digest = hub.file_url(REPOSITORY, FILE), hashlib.sha256(CONTENT).hexdigest()
    hub.download(url, tmp_path / "a", sha256=digest[:8])
    with pytest.raises(OSError, match="arrived damaged"):
        hub.download(url, tmp_path / "b", sha256="12345678")
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_fetch_takes_the_first_of_two_files_that_is_there(local_hub):
    put(local_hub, b"bin", "pytorch_model.bin")
    for _ in range(2):
        fetch("model.safetensors|pytorch_model.bin")
    assert fetched("pytorch_model.bin").read_bytes() == b"bin"
    assert local_hub.served == [(f"{REPOSITORY}/pytorch_model.bin", 0)]


def test_fetch_offline_names_in_one_line_what_to_fetch_and_where_to_put_it(offline):
    (offline / "facebook--some-model").mkdir(parents=True)
    (offline / "facebook--some-model" / "here.bin").write_bytes(b"")
    with pytest.raises(ConnectionError) as error:
        hub.fetch({REPOSITORY: ("here.bin", FILE), "google-t5/t5-base": ("a|b",)})
    message = str(error.value)
    assert f"/{REPOSITORY}/resolve/main/{FILE} into {offline}/facebook--some-model" in message
    assert "/google-t5/t5-base/resolve/main/a or " in message and f"into {offline}/google-t5--t5-base" in message
    assert "here.bin" not in message and "\n" not in message


def test_fetch_names_a_file_that_the_hub_has_not(local_hub):
    put(local_hub)
    with pytest.raises(ConnectionError, match=r"404.*nothing\.bin"):
        fetch("nothing.bin")


def test_file_url_is_that_of_the_hub(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub.file_url("facebook/magnet-small-10secs", FILE) == (
        "https://huggingface.co/facebook/magnet-small-10secs/resolve/main/state_dict.bin")


def test_beside_finds_a_repository_in_the_folder_or_next_to_it(tmp_path):
    model = tmp_path / "magnet"
    model.mkdir()
    assert hub.beside(model, "facebook/encodec_32khz") == "facebook/encodec_32khz"
    (tmp_path / "encodec_32khz").mkdir()
    assert hub.beside(model, "facebook/encodec_32khz") == str(tmp_path / "encodec_32khz")
    (model / "encodec_32khz").mkdir()
    assert hub.beside(model, "facebook/encodec_32khz") == str(model / "encodec_32khz")


# -------------------------------------------------------------------------------------------------------------- reading

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3), "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "half": torch.tensor([1.5, -2.0]).half(), "brain": torch.tensor([3.0]).bfloat16(), "number": torch.tensor(7),
    "flags": torch.tensor([True, False]), "nothing": torch.zeros(0, 4)}


@pytest.mark.parametrize("align", [8, 1])
def test_read_safetensors_gives_back_what_was_written(align, tmp_path):
    write_safetensors(TENSORS, tmp_path / "model.safetensors", align)
    tensors = hub.read_state_dict(tmp_path / "model.safetensors")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def raw_safetensors(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "empty": b"", "a length alone": b"\1\0\0", "a length beyond the file": b"\xff" * 8 + b"{}",
    "not JSON": raw_safetensors(b"{]"),
    "a list": raw_safetensors([1]), "unknown type": raw_safetensors({"a": entry("F12")}),
    "cut": raw_safetensors({"a": entry()}, b"\0" * 7), "too long": raw_safetensors({"a": entry()}, b"\0" * 9),
    "wrong size": raw_safetensors({"a": entry(shape=(3,))}), "overlap": raw_safetensors({"a": entry(), "b": entry()}),
    "gap": raw_safetensors({"a": entry(begin=4, end=8, shape=(1,))}),
    "negative": raw_safetensors({"a": entry(shape=(-2, -1))}), "no offsets": raw_safetensors({"a": {"dtype": "F32"}}),
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_read_safetensors_names_a_damaged_file(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file, or is damaged") as error:
        hub.read_safetensors(path)
    assert "\n" not in str(error.value)


YAML = """\
# settings
dim: 1
lm:
  dim: 64
  # a note
  inner:
    dim: 2
  name: 't: x'
  ratios: [8, 5]
lm_model:
  ratios:
  - 4
  - 2
  causal: ${lm.dim}
"""


def test_read_yaml_tells_sections_apart():
    settings = hub.read_yaml(YAML)
    assert settings["dim"] == "1" and settings["lm.dim"] == "64" and settings["lm.inner.dim"] == "2"
    assert settings["lm.name"] == "t: x" and "lm.note" not in settings and "lm_model.dim" not in settings


def test_read_yaml_reads_lists_in_both_spellings_and_follows_references():
    settings = hub.read_yaml(YAML)
    assert settings["lm.ratios"] == "[8, 5]" and settings["lm_model.ratios"].split() == ["4", "2"]
    assert settings["lm_model.causal"] == "64"


@pytest.mark.parametrize("text", ["", "\n", "- 1\n- 2\n", "no settings", ":", "a: ${b}"])
def test_read_yaml_survives_any_text(text):
    assert isinstance(hub.read_yaml(text), dict)
