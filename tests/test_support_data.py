"""What data sets and their caches promise: all that is found is used or listed; everything is encoded once.

In this order: what is read and skipped, cutting, the cache, files that are held out, batches. Most tests write a few
small WAVs and read them through the toy codec and the toy text encoder.
"""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_tone

from encodec_wrap import load_codec
from support import data
from support.data import Clips, Entry, cut_clips, encode_audio, fill_cache, load_data
from support.files import read_checkpoint
from t5_encoder import T5Encoder

RATE = 16_000


def spied(function):
    """The same function, which keeps the rows of all its first arguments in `seen`; `function` is the one itself."""
    def spy(rows):
        spy.seen += list(rows)
        return function(rows)
    spy.seen, spy.function = [], function
    return spy


@pytest.fixture
def codec():
    codec = load_codec("toy")
    codec.encode = spied(codec.encode)
    return codec


@pytest.fixture
def encoder():
    encoder = T5Encoder.from_pretrained("toy")
    encoder.encode_text = spied(encoder.encode_text)
    return encoder


@pytest.fixture
def load(tmp_path, codec, encoder):
    """load(path, ...) reads a data set in clips of half a second, through a cache that lasts for one test."""
    def load(path, seconds=0.5, codec=codec, valid_share=0.0, **more):
        return load_data(str(path), codec, encoder, seconds, tmp_path / "cache", valid_share=valid_share, **more)
    return load


@pytest.fixture
def music(tmp_path):
    (tmp_path / "music").mkdir()
    return tmp_path / "music"


def test_load_data_reads_a_folder_of_any_audio_with_its_sub_folders_and_both_kinds_of_captions(load, encoder, music):
    write_tone(music / "a.wav", "a slow flute\n")
    write_tone(music / "sub" / "b.oga", format="OGG")
    (music / "sub" / "b.json").write_text('{"text": " a fast bell ", "main_caption": "a slow flute"}')
    write_tone(music / "sub" / "deep" / "c.recording", "a low organ", hertz=600, format="AU")
    train, _ = load(music, caption_key="text")
    assert train.codes.shape == (3, 4, 25) and train.codes.dtype == torch.int16
    assert [encoder.encode_text.seen[i] for i in train.caption] == ["a slow flute", "a fast bell", "a low organ"]


BAD = {  # file -> a word of the reason for which it is skipped; `write_bad` makes them
    "song.m4a": "is not audio that libsndfile can read; convert it", "no-samples.wav": "no audio",
    "nan.wav": "not finite", "pipe.wav": "not a regular file", "gone.wav": "no such audio file",
    "uncaptioned.wav": "has no caption; want uncaptioned.txt or uncaptioned.json", "lonely.txt": "without audio",
    "caf\\udce9.wav": "has no caption", "latin.wav": "its caption cannot be read: 'utf-8'", "list.wav": "no text",
    "key.wav": "no text under the key 'main_caption'", "nested.wav": "its caption cannot be read",
    "twin": "is a link to a folder"}


def write_bad(folder):
    for name in ("no-samples", "nan", "latin"):
        write_tone(folder / f"{name}.wav", "x", 0.5 * (name != "no-samples"))
    soundfile.write(folder / "nan.wav", [0.1, np.nan], RATE, "FLOAT")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, text in {"key": '{"title": "la"}', "list": "[1]", "nested": "[" * 100_000, "uncaptioned": None}.items():
        write_tone(folder / f"{name}.wav")
        if text:
            (folder / f"{name}.json").write_text(text)
    for name in ("song.m4a", "lonely.txt"):
        (folder / name).write_text("not music at all")
    os.mkfifo(folder / "pipe.wav")
    (folder / "gone.wav").symlink_to("nowhere")
    (folder / "twin").symlink_to(folder)
    shutil.copy(folder / "uncaptioned.wav", os.fsencode(folder) + b"/caf\xe9.wav")


def test_load_data_lists_every_bad_file_with_its_reason_and_everything_adds_up(load, music, capsys):
    write_tone(music / "good.wav", "a slow flute")
    write_bad(music)
    assert len(load(music)[0].codes) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, reason in BAD.items():
        assert [reason in line for line in lines if line.startswith(f"skipped {music}/{name}: ")] == [True], name
    assert f"{music}: {8 + len(BAD)} found = 1 encoded + 7 captions + {len(BAD)} skipped" in lines
    assert len(os.listdir(music)) == 8 + len(BAD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_load_data_lists_a_folder_that_cannot_be_read(load, music, capsys):
    write_tone(music / "good.wav", "a slow flute")
    (music / "closed").mkdir(mode=0)
    load(music)
    assert "closed: Permission denied" in capsys.readouterr().out


def test_load_data_counts_the_clips_that_are_silent_as_where_channels_cancel_each_other_out(load, music, capsys):
    tone = np.sin(np.arange(2 * RATE) / 9) / 2
    for name, wav in {"opposite": np.stack([tone, -tone], 1), "gap": tone * (np.arange(2 * RATE) < RATE)}.items():
        soundfile.write(music / f"{name}.wav", wav, RATE)
        (music / f"{name}.txt").write_text("x")
    load(music)
    out = capsys.readouterr().out
    assert "opposite.wav: 4 of its 4 clips are silent" in out and "gap.wav: 2 of its 4 clips are silent" in out


@pytest.mark.parametrize("keys", [{}, {"audio_key": "path", "caption_key": "text"}])
def test_load_data_reads_a_manifest_whose_paths_start_at_its_folder(load, encoder, music, keys):
    write_tone(music / "one.wav", hertz=300)
    write_tone(music / "sub" / "two.wav", hertz=500)
    audio, caption = keys.get("audio_key", "location"), keys.get("caption_key", "main_caption")
    records = [{audio: "sub/two.wav", caption: "a fast bell"}, {audio: str(music / "one.wav"), caption: "a slow flute"}]
    (music / "list.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    train, _ = load(music / "list.jsonl", **keys)
    assert [encoder.encode_text.seen[i] for i in train.caption] == ["a fast bell", "a slow flute"]


def test_load_data_lists_bad_lines_of_a_manifest_by_number(load, music, capsys):
    write_tone(music / "a.wav")
    lines = ['\ufeff{"location": "a.wav", "main_caption": "one\u2028two\x85"}', "{", "[1]", '{"location": "a.wav"}',
             '{"main_caption": "x"}', '{"location": "b.wav", "main_caption": "x"}', "[" * 100_000,
             '{"location": "a.wav", "main_caption": "\udce9"}', r'{"location": "a.wav", "main_caption": "\udce9"}']
    (music / "list.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    assert len(load(music / "list.jsonl")[0].codes) == 1
    out = capsys.readouterr().out
    assert all(out.count(f"list.jsonl:{number}: ") == 1 for number in range(2, 10))
    assert "list.jsonl: 9 found = 1 encoded + 0 captions + 8 skipped" in out


def test_load_data_names_a_data_set_that_cannot_be_used(load, music):
    (music / "empty").mkdir()
    write_tone(music / "song.wav")
    (music / "noise").mkdir()
    (music / "noise" / "noise.wav").write_text("not music")
    for name, problem in (("nothing", "no such data set"), ("empty", "the data set is empty"),
                          ("noise", "the data set is empty"), ("song.wav", "is not a JSON-lines manifest")):
        with pytest.raises(ValueError, match=f"{name}: {problem}"):
            load(music / name)


def test_cut_clips_keeps_all_in_order_but_a_small_rest():
    for samples, kept in ((1, [1]), (100, [100]), (109, [100]), (110, [100, 10]), (205, [100, 100]),
                          (299, [100, 100, 99])):
        wav = np.arange(1, samples + 1, dtype=np.float32)
        for block in (30, 1000):
            clips, lengths = zip(*cut_clips([wav[i:i + block] for i in range(0, samples, block)], 100), strict=True)
            assert list(lengths) == kept, f"of {samples} samples"
            padded = np.pad(wav[:sum(kept)], (0, 100 * len(kept) - sum(kept)))
            assert np.array_equal(np.stack(clips), padded.reshape(-1, 100))


def test_load_data_gives_the_codes_of_each_piece_and_its_caption_to_all_of_them(load, codec, music):
    write_tone(music / "a.wav", "a slow flute", seconds=1.21)
    write_tone(music / "b.wav", "a fast bell", seconds=0.1, hertz=600)
    train, _ = load(music)
    wav = torch.from_numpy(soundfile.read(music / "a.wav", dtype="float32")[0])
    pieces = torch.nn.functional.pad(wav, (0, 3 * RATE // 2 - len(wav))).view(3, 1, RATE // 2)
    assert torch.equal(train.codes[:3].long(), codec.encode.function(pieces))
    assert train.caption.tolist() == [0, 0, 0, 1]
    assert train.n_frames.tolist() == [25, 25, 11, 5]


def test_encode_audio_reads_a_long_recording_no_further_than_it_encodes(codec, monkeypatch):
    """An hour of clips: when the codec stops at its first batch, at most the one after it has been read."""
    read = []
    entry = Entry("hour", "0", lambda: (read.append(i) or np.zeros(RATE, np.float32) for i in range(3600)), "x")
    monkeypatch.setattr(codec, "encode", lambda wav: next(iter(())))
    with pytest.raises(RuntimeError):  # what StopIteration becomes in a generator
        list(encode_audio({"0": entry}, codec, RATE, "cpu", {}, ["0"]))
    assert len(read) <= 2 * data.BATCH + 1


@pytest.fixture
def three_files(music):
    for i, caption in enumerate(["a slow flute", "a fast bell", " a slow flute\n"]):
        write_tone(music / f"{i}.wav", caption, hertz=300 + 100 * i)
    return music


def test_load_data_encodes_only_what_is_new(load, codec, encoder, three_files):
    first, _ = load(three_files)
    assert (len(codec.encode.seen), len(encoder.encode_text.seen)) == (3, 2), "two of the captions are alike"
    second, _ = load(three_files)
    assert (len(codec.encode.seen), len(encoder.encode_text.seen)) == (3, 2)
    assert torch.equal(first.codes, second.codes) and first.fingerprint == second.fingerprint
    write_tone(three_files / "3.wav", "a low organ", hertz=700)
    shutil.copy(three_files / "0.wav", three_files / "copy.wav")
    (three_files / "copy.txt").write_text("a fast bell")
    third, _ = load(three_files)
    assert len(third.codes) == 5 and (len(codec.encode.seen), len(encoder.encode_text.seen)) == (4, 3)
    assert torch.equal(third.codes[0], third.codes[4]), "the same sound is the same entry"
    write_tone(three_files / "1.wav", hertz=900)
    fourth, _ = load(three_files)
    same = [torch.equal(a, b) for a, b in zip(third.codes, fourth.codes, strict=True)]
    assert same == [True, False, True, True, True] and fourth.fingerprint != third.fingerprint
    (three_files / "2.txt").write_text("a slower flute")
    assert load(three_files)[0].fingerprint != fourth.fingerprint, "another caption is another data set"


def test_load_data_encodes_again_for_other_seconds_codebooks_or_weights(load, codec, encoder, three_files):
    load(three_files)
    assert load(three_files, seconds=0.25)[0].codes.shape == (6, 4, 13) and len(codec.encode.seen) == 9
    two = load_codec("toy", 2)
    assert load(three_files, codec=two)[0].codes.shape == (3, 2, 25)
    with torch.no_grad():
        two.model.encoder.model[0].conv.conv.bias.add_(0.5)
        encoder.final_norm.weight.mul_(2)
    two.encode = spied(two.encode)
    load(three_files, codec=two)
    assert len(two.encode.seen) == 3 and len(encoder.encode_text.seen) == 4
    load(three_files)
    assert len(codec.encode.seen) == 9, "the other caches are still there"


def test_load_data_makes_a_damaged_cache_again_and_says_so(load, codec, three_files, tmp_path, capsys):
    before, files = load(three_files)[0], sorted((tmp_path / "cache").glob("*.pt"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-900])
    after, out = load(three_files)[0], capsys.readouterr().out
    assert torch.equal(before.codes, after.codes) and all(f"{file}: " in out for file in files)
    load(three_files)
    assert len(codec.encode.seen) == 6, "made again once"


def test_fill_cache_saves_before_an_error_or_a_stop_and_now_and_then(tmp_path, monkeypatch):
    def make(keys):
        for key in keys:
            if key == 3:
                raise how("stopped")
            yield key, torch.tensor(key)

    for how in (KeyboardInterrupt, OSError):
        with pytest.raises(how, match="stopped"):
            fill_cache(tmp_path / f"{how}.pt", range(5), make)
        assert set(read_checkpoint(tmp_path / f"{how}.pt")) == {0, 1, 2}
    monkeypatch.setattr(data, "SAVE_SECONDS", -1)
    fill_cache(tmp_path / "c.pt", range(3), lambda keys: ((key, (tmp_path / "c.pt").exists()) for key in keys))
    assert read_checkpoint(tmp_path / "c.pt") == {0: False, 1: True, 2: True}


def test_fill_cache_of_two_processes_keeps_the_entries_of_both(tmp_path):
    code = f"""if True:
        import sys
        from pathlib import Path
        from support import data
        for i in range(12):
            data.fill_cache(Path({str(tmp_path)!r}, "cache.pt"), [f"{{sys.argv[1]}}-{{i}}"], lambda ks: [(ks[0], 1)])"""
    both = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert set(read_checkpoint(tmp_path / "cache.pt")) == {f"{name}-{i}" for name in "ab" for i in range(12)}


def test_load_data_holds_out_whole_files_always_the_same_whatever_is_beside_them(load, music):
    def parts(numbers):
        for path in music.iterdir():
            path.unlink()
        for i in numbers:
            write_tone(music / f"{random.random()}.wav", "very " * i, seconds=1, hertz=200 + 10 * i)
        return [{len(clips.text[i]) for i in clips.caption} for clips in load(music, valid_share=0.4)]

    train, valid = parts(range(16))
    assert train and valid and not train & valid and len(train | valid) == 16, "no file is in both"
    other_train, other_valid = parts(range(8, 24))
    assert not other_train & valid and not other_valid & train, "a file has changed sides"


def test_load_data_validates_a_small_data_set_on_itself_and_says_so(load, three_files, capsys):
    for share in (0.0, 1.0):  # none is held out, or all
        train, valid = load(three_files, valid_share=share)
        assert len(train.codes) == 3 and torch.equal(train.codes, valid.codes)
        assert "validating on the training clips" in capsys.readouterr().out


def test_batch_gives_the_rows_asked_for_and_pads_texts_with_zeros_which_the_mask_marks():
    text = [torch.ones(2, 8).half(), torch.zeros(0, 8).half(), torch.ones(3, 8).half()]  # of 2, 0 and 3 tokens
    clips = Clips(torch.arange(56, dtype=torch.int16).view(2, 4, 7)[[0, 1, 0, 1]], torch.tensor([7, 7, 2, 1]), text,
                  torch.tensor([0, 1, 2, 0]))
    codes, text, mask, valid = clips.batch(torch.tensor([2, 0, 1])).values()
    assert (codes.dtype, text.dtype, mask.dtype) == (torch.long, torch.float32, torch.bool)
    assert torch.equal(codes, clips.codes[[2, 0, 1]].long())
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]] and text.equal(1.0 * mask[..., None].expand(-1, -1, 8))
    assert valid.tolist() == [[True, True] + [False] * 5, [True] * 7, [True] * 7], "False at padding"
    assert not clips.batch(torch.tensor([1]))["text_mask"].any(), "of empty captions only"
