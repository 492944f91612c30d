"""MusicBench: the data set is fetched, unpacked once and read; a bad archive leaves nothing behind. The hub is a server
on this machine, the archive a small one of the same form."""

import io
import json
import os
import tarfile

import pytest
from conftest import assert_one_line, write_tone

import train
from support.musicbench import ARCHIVE, LISTS, REPOSITORY

PLACES = {"train": ["data/a.wav", "data/b.wav", "data_aug2/c.wav", "data/gone.wav"], "test_A": ["data/d.wav"],
          "test_B": ["data/a.wav"]}  # what the lists name
FILES = ["data/a.wav", "data_aug2/b.wav", "data/c.wav", "data/d.wav"]  # where the audio lies
FLAGS = "--data musicbench --seconds 0.5 --cache store --out run --device cpu".split()


def pack(repository, *extra):
    """An archive as it is published, of the folder "datashare" beside it, and what is `extra`: (TarInfo, content)."""
    with tarfile.open(repository / ARCHIVE, "w:gz") as tar:
        tar.add(repository / "datashare", "datashare")
        for info, content in extra:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def repository(local_hub):
    folder = local_hub.folder / "datasets" / REPOSITORY
    folder.mkdir(parents=True)
    for name, places in zip(LISTS, PLACES.values(), strict=True):
        lines = [json.dumps({"location": place, "main_caption": f"plays {place}", "captions": "no", "dataset": "x"})
                 for place in places]
        (folder / name).write_text("\n".join(lines))
    for number, name in enumerate(FILES):
        write_tone(folder / "datashare" / name, hertz=300 + 100 * number)
    pack(folder)
    return folder


def test_musicbench_is_fetched_unpacked_once_and_trained_on_its_main_captions(repository, local_hub, call, tmp_path):
    ended = call(train, *FLAGS, *"--steps 2 --dim 16 --n-heads 1 --n-layers 1 --batch-size 2 --sample-every 0".split())
    assert ended.code == 0, ended.err
    assert "3 training clips and 1 validation clips" in ended.out and "MusicBench_train.json: 3 recordings" in ended.out
    assert "skipped" in ended.out and "gone.wav" in ended.out
    assert sorted(os.path.basename(file) for file in local_hub.served) == sorted((*LISTS, ARCHIVE))
    text = train.read_checkpoint(next((tmp_path / "store").glob("text-*.pt")))
    assert set(text) == {f"plays {place}" for places in PLACES.values() for place in places if "gone" not in place}
    local_hub.shutdown()
    (repository / ARCHIVE).unlink()
    again = call(train, *FLAGS, "--resume")
    assert again.code == 0 and "unpacking" not in again.out, again.err


def test_a_download_that_breaks_off_is_told_and_goes_on_the_next_time(repository, local_hub, call, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits before each new try
    local_hub.cut_at = 100
    ended = call(train, *FLAGS)  # the library tells its tries on stderr, before our line
    assert ended.code == 2 and "error: download failed" in ended.err.splitlines()[-1]
    assert "MusicBench_train.json" in ended.err.splitlines()[-1]
    local_hub.cut_at = None
    assert call(train, *FLAGS, "--only-encode").code == 0


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b"evil" if kind == tarfile.REGTYPE else b""


HOSTILE = {
    "a path upwards": [member("datashare/../../../evil.txt")],
    "a link": [member("datashare/link", tarfile.SYMTYPE, "/etc/passwd")],
    "a file through a link": [member("datashare/out", tarfile.SYMTYPE, "../.."), member("datashare/out/evil.txt")],
    "a hard link": [member("datashare/hard", tarfile.LNKTYPE, "/etc/passwd")],
    "a device": [member("datashare/null", tarfile.CHRTYPE)], "a pipe": [member("datashare/pipe", tarfile.FIFOTYPE)]}


@pytest.mark.parametrize("kind", [*HOSTILE, "truncated", "overwritten", "no archive"])
def test_a_hostile_or_damaged_archive_is_named_and_nothing_of_it_stays(kind, repository, call, tmp_path):
    pack(repository, *HOSTILE.get(kind, ()))
    whole = (repository / ARCHIVE).read_bytes()
    half = len(whole) // 2
    damaged = {"truncated": whole[:half], "overwritten": whole[:half] + bytes(200) + whole[half:],
               "no archive": b"<html>"}
    (repository / ARCHIVE).write_bytes(damaged.get(kind, whole))
    words = ("is damaged",) if kind in damaged else (HOSTILE[kind][0][0].name, "nothing is unpacked")
    assert_one_line(call(train, *FLAGS), ARCHIVE, *words)
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "store" / "musicbench").exists() and not list((tmp_path / "store").glob(".*"))
