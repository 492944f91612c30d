"""Files that are there whole or not at all, and weights that are read with every check that a file allows.

Read in this order: `whole_file` and `save_whole` (writing), `read_checkpoint` (what a file may be), `load_strictly`
(what tensors may be), `Companions`. Files are damaged and disks are full for real.
"""

import os
import pickle
import random
import time
from pathlib import Path

import pytest
import torch
from conftest import full_disk
from torch import nn

from support import files
from support.files import Companions, fingerprint, load_strictly, read_checkpoint, save_whole, whole_file


def test_whole_file_takes_its_name_at_the_end_only_and_an_error_or_a_stop_keeps_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]


def test_whole_file_removes_what_killed_processes_left_behind_but_nothing_fresh(tmp_path):
    old, fresh = (tmp_path / name for name in (".file.txt.11.tmp", ".file.txt.12.tmp"))
    for path in (old, fresh):
        path.write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    (tmp_path / ".file.txt.13.tmp").symlink_to("gone")  # as another process's is, once it is finished
    with whole_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
    assert not old.exists() and fresh.exists()


def test_save_whole_on_a_full_disk_is_one_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_whole({"a": 1}, path)
    with pytest.raises(OSError, match="checkpoint.pt: could not be written, what was there is kept"), full_disk(50_000):
        save_whole({"a": torch.zeros(100_000)}, path)
    assert read_checkpoint(path) == {"a": 1} and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.fixture
def weights():
    return nn.Linear(40, 30).state_dict()


def test_read_checkpoint_notices_one_flipped_bit_wherever_it_lies(weights, tmp_path):
    """Either it is refused, or the bit lies where it means nothing, and all is read as it was."""
    path, rng = tmp_path / "a.pt", random.Random(0)
    save_whole(weights, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            assert all(content[name].equal(tensor) for name, tensor in weights.items()), "read with another number"
    assert refused > 150, "most of the file is weights"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_read_checkpoint_names_a_file_that_is_damaged_or_something_else_or_lacks_keys(weights, tmp_path):
    """Cut, empty, text, the beginning of a zip, a pickle that would run a program, a list, and other keys."""
    path = tmp_path / "a.pt"
    save_whole([1], path)
    a_list = path.read_bytes()
    save_whole(weights, path)
    whole = path.read_bytes()
    for content in (whole[:-900], b"", b"hello", b"PK\3\4" + bytes(99), pickle.dumps(os.system), a_list):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.pt: cannot be read: it is damaged or something else"):
            read_checkpoint(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="it lacks step, rng"):
        read_checkpoint(path, keys=("weight", "step", "rng"))


BAD = {  # what is done to the weight: what the message says
    "bias is missing": (lambda w: {"bias": ...}, "tensor bias is missing"),
    "one too many": (lambda w: {"more": w}, "tensor more is unexpected"),
    "transposed": (lambda w: {"weight": w.T}, "has shape .40, 30., want .30, 40."),
    "a list": (lambda w: {"weight": [1.0]}, "not plain"), "infinity": (lambda w: {"weight": w / 0}, "not finite"),
    "sparse": (lambda w: {"weight": w.to_sparse()}, "plain tensors by name"),
    "quantised": (lambda w: {"weight": torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)}, "plain tensors"),
    "complex": (lambda w: {"weight": w.to(torch.complex64)}, "plain tensors"),
    "nowhere": (lambda w: {"weight": w.to("meta")}, "plain tensor"), "no name": (lambda w: {3: w}, "not plain"),
    "whole numbers": (lambda w: {"weight": w.to(torch.int8)}, "of type torch.int8"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about sparse and quantised tensors
@pytest.mark.parametrize("kind", BAD)
def test_load_strictly_names_the_file_and_the_tensor_that_is_wrong_and_changes_nothing(kind, weights):
    model, (change, message) = nn.Linear(40, 30), BAD[kind]
    before, state = model.weight.clone(), weights | change(weights["weight"])
    with pytest.raises(ValueError, match=f"a.pt.*{message}"):
        load_strictly(model, {name: tensor for name, tensor in state.items() if tensor is not ...}, "a.pt")
    assert model.weight.equal(before)


def test_load_strictly_multiplies_rows_stored_in_8_bits_by_their_scales(weights):
    model, scale = nn.Linear(40, 30), weights["weight"].abs().amax(dim=1, keepdim=True) / 127
    stored = weights | {"weight": (weights["weight"] / scale).round().to(torch.int8)}
    load_strictly(model, stored, "a.pt", scales={"weight": scale})
    assert (model.weight - weights["weight"]).abs().max() <= scale.max() / 2 + 1e-6, "half a step of 8 bits"
    assert model.bias.equal(weights["bias"])
    for shape in ((30,), (1, 30), (40, 1)):
        with pytest.raises(ValueError, match="a.pt: the scales of tensor weight have shape"):
            load_strictly(model, stored, "a.pt", scales={"weight": torch.ones(shape)})


def test_companions_check_refuses_a_codec_or_text_encoder_of_other_weights():
    codec, encoder = nn.Linear(2, 2), nn.Linear(3, 3)
    companions = Companions("c.pt", "t5", fingerprint(codec), fingerprint(encoder))
    companions.check(codec, encoder)
    Companions("c.pt", "t5").check(codec, encoder)  # from a file that does not say
    nn.init.constant_(encoder.bias, 5.0)
    with pytest.raises(ValueError, match="^--rescorer ar was trained with the text_encoder t5, which has other w"):
        companions.check(codec, encoder, "--rescorer ar")


def test_portable_settings_are_located_after_the_run_was_moved_with_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "here" / "run").mkdir(parents=True)
    for name in ("blob", "here/run/own.pt", "far", "toy"):
        (tmp_path / name).touch()
    (tmp_path / "here" / "codec.pt").symlink_to("../blob")  # and stays a link: it has another name
    monkeypatch.chdir(tmp_path)  # in which there is a file "toy", too
    kept = files.portable({"data": "toy", "codec": "here/codec.pt", "seconds": 1}, "here/run")
    assert kept == {"data": "toy", "codec": "./../codec.pt", "seconds": 1}
    own = files.portable({"codec": "here/run/own.pt"}, "here/run")
    assert files.portable({"codec": "far", "text_encoder": "t5-base"}, "here/run") == {
        "codec": str(tmp_path / "far"), "text_encoder": "t5-base"}
    (tmp_path / "here").rename(tmp_path / "there")
    assert Path(files.located(kept, "there/run")["codec"]).samefile("there/codec.pt")
    assert Path(files.located(own, "there/run")["codec"]).samefile("there/run/own.pt")
