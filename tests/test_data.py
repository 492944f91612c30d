"""What the data sets and their cache promise: folders, manifests, cutting, encoding once, splitting, batches."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import data
from cli import fingerprint
from data import Clips, cut_clips, encode_audio, load_data
from encodec_wrap import Codec, CodecConfig, load_codec
from model import MAGNeT, ModelConfig
from t5_encoder import T5Encoder
from toy.world import describe

RATE = 16_000


class Spy:
    """Stands for a function and counts: `calls`, and the number of rows in all of their first arguments."""

    def __init__(self, function):
        self.function, self.calls, self.rows = function, 0, 0

    def __call__(self, rows):
        self.calls, self.rows = self.calls + 1, self.rows + len(rows)
        return self.function(rows)


@pytest.fixture
def codec():
    codec = load_codec("toy")
    codec.encode = Spy(codec.encode)
    return codec


@pytest.fixture
def encoder():
    encoder = T5Encoder.from_pretrained("toy")
    encoder.encode_text = Spy(encoder.encode_text)
    return encoder


@pytest.fixture
def no_validation(monkeypatch):
    """No file is held out, whatever its content."""
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.0)


@pytest.fixture
def load(tmp_path, codec, encoder):
    """load(path, ...) reads a data set in clips of half a second, through a cache that lasts for one test."""
    def load(path, seconds=0.5, codec=codec, **more):
        return load_data(str(path), codec, encoder, seconds, tmp_path / "cache", **more)
    return load


@pytest.fixture
def music(tmp_path):
    return tmp_path / "music"


def write_tone(path, caption=None, seconds=0.5, hertz=440.0):
    """A sine in a WAV file, with its caption beside it; a dictionary is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE), RATE)
    if isinstance(caption, dict):
        path.with_suffix(".json").write_text(json.dumps(caption))
    elif caption is not None:
        path.with_suffix(".txt").write_text(caption)


def embedding(encoder, caption):
    """What the text encoder says about one caption, without its padding: (N, D) float32."""
    rows, mask = encoder.encode_text.function([caption])
    return rows[0][mask[0]].half().float()


def read_captions(clips, encoder, captions):
    """Which of `captions` each clip has, by its embedding."""
    known = {caption: embedding(encoder, caption) for caption in captions}
    texts = [clips.text[i].float() for i in clips.caption]
    return [next(c for c, e in known.items() if e.shape == t.shape and torch.allclose(e, t, atol=1e-2)) for t in texts]


# -------------------------------------------------------------------------------------------------------------- sources

def test_load_data_reads_a_folder_with_its_sub_folders_and_both_kinds_of_captions(load, encoder, music, no_validation):
    write_tone(music / "a.wav", "a slow flute\n")
    write_tone(music / "sub" / "b.wav", {"main_caption": " a fast bell "}, hertz=500)
    write_tone(music / "sub" / "deep" / "c.WAV", "a low organ", hertz=600)
    train, _ = load(music)
    assert train.codes.shape == (3, 4, 25) and train.codes.dtype == torch.int16
    captions = ["a slow flute", "a fast bell", "a low organ"]
    assert read_captions(train, encoder, captions) == captions


def test_load_data_finds_json_captions_under_another_key(load, encoder, music, no_validation):
    write_tone(music / "a.wav", {"text": "a fast bell", "main_caption": "a slow flute"})
    train, _ = load(music, caption_key="text")
    assert read_captions(train, encoder, ["a fast bell", "a slow flute"]) == ["a fast bell"]


@pytest.mark.parametrize("keys", [{}, {"audio_key": "path", "caption_key": "text"}])
def test_load_data_reads_a_manifest_whose_paths_start_at_its_folder(load, encoder, music, no_validation, keys):
    write_tone(music / "one.wav", hertz=300)
    write_tone(music / "sub" / "two.wav", hertz=500)
    audio, caption = keys.get("audio_key", "location"), keys.get("caption_key", "main_caption")
    records = [{audio: "sub/two.wav", caption: "a fast bell"}, {audio: str(music / "one.wav"), caption: "a slow flute"}]
    (music / "list.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    train, _ = load(music / "list.jsonl", **keys)
    assert read_captions(train, encoder, ["a slow flute", "a fast bell"]) == ["a fast bell", "a slow flute"]


def test_load_data_lists_bad_files_skips_them_and_counts_them(load, music, no_validation, capsys):
    write_tone(music / "good.wav", "a slow flute")
    write_tone(music / "silent-less.wav", "no samples", seconds=0)
    write_tone(music / "uncaptioned.wav")
    write_tone(music / "otherkey.wav", {"title": "la la"})
    write_tone(music / "brokenjson.wav", hertz=500)
    (music / "brokenjson.json").write_text("{")
    write_tone(music / "latin.wav", hertz=600)
    (music / "latin.txt").write_bytes(b"\xff\xfe\xff")
    (music / "noise.mp3").write_bytes(b"not music at all")
    (music / "noise.txt").write_text("noise")
    train, _ = load(music)
    assert len(train) == 1
    lines = capsys.readouterr().out.splitlines()
    for name in ("silent-less", "uncaptioned", "otherkey", "brokenjson", "latin", "noise"):
        assert sum(line.startswith("skipped ") and f"{name}." in line for line in lines) == 1, name
    assert "skipped 6 of 7 files" in lines


def test_load_data_lists_bad_lines_of_a_manifest_by_number(load, music, no_validation, capsys):
    write_tone(music / "a.wav")
    good = json.dumps({"location": "a.wav", "main_caption": "a slow flute"})
    bad = ["{", "[1]", '{"location": "a.wav"}', '{"main_caption": "x"}', '{"location": "b.wav", "main_caption": "x"}']
    (music / "list.jsonl").write_text("\n".join([good, *bad]))
    assert len(load(music / "list.jsonl")[0]) == 1
    out = capsys.readouterr().out
    assert all(f"list.jsonl:{number}: " in out for number in range(2, 7))
    assert "skipped 5 of 6 files" in out


def test_load_data_refuses_a_data_set_in_which_nothing_can_be_read(load, music):
    music.mkdir()
    with pytest.raises(ValueError, match="music.*empty"):
        load(music)
    (music / "noise.wav").write_text("not music")
    (music / "noise.txt").write_text("a caption")
    with pytest.raises(ValueError, match="music.*empty"):
        load(music)


def test_load_data_names_a_data_set_that_is_not_there(load, music):
    with pytest.raises(ValueError, match="music.*no such data set"):
        load(music)


def test_load_data_names_a_file_that_is_no_manifest(load, music):
    write_tone(music / "song.wav")
    with pytest.raises(ValueError, match="song.wav"):
        load(music / "song.wav")


# -------------------------------------------------------------------------------------------------------------- cutting

def test_cut_clips_cuts_long_audio_in_order_and_pads_the_last_clip():
    wav = torch.arange(1.0, 251.0)[None]
    clips, samples = cut_clips(wav, 100)
    assert clips.shape == (3, 1, 100) and samples.tolist() == [100, 100, 50]
    assert torch.equal(clips.flatten()[:250], wav[0]) and not clips.flatten()[250:].any()


@pytest.mark.parametrize("samples, kept", [
    (1, [1]), (9, [9]), (99, [99]), (100, [100]), (109, [100]), (110, [100, 10]), (200, [100, 100]),
    (205, [100, 100]), (299, [100, 100, 99])])
def test_cut_clips_drops_a_small_rest_unless_it_is_all_there_is(samples, kept):
    clips, lengths = cut_clips(torch.ones(1, samples), 100)
    assert lengths.tolist() == kept
    assert clips.sum(dim=(1, 2)).tolist() == kept


def test_load_data_gives_the_codes_of_each_piece_and_its_caption_to_all_of_them(load, codec, music, no_validation):
    write_tone(music / "a.wav", "a slow flute", seconds=1.2)
    write_tone(music / "b.wav", "a fast bell", seconds=0.1, hertz=600)
    train, _ = load(music)
    wav = torch.from_numpy(soundfile.read(music / "a.wav", dtype="float32")[0])
    pieces, _ = cut_clips(wav[None], RATE // 2)
    assert torch.equal(train.codes[:3].long(), codec.encode.function(pieces))
    assert train.caption.tolist() == [0, 0, 0, 1]
    assert train.n_frames.tolist() == [25, 25, 10, 5]


def test_valid_is_false_at_padding():
    clips = Clips(torch.zeros(3, 4, 6, dtype=torch.int16), torch.tensor([6, 2, 1]), [torch.zeros(0, 8)],
                  torch.zeros(3, dtype=torch.long))
    assert clips.valid(torch.tensor([1, 0])).tolist() == [[True, True] + [False] * 4, [True] * 6]


# ------------------------------------------------------------------------------------------------------------ the cache

@pytest.fixture
def three_files(music, no_validation):
    for i, caption in enumerate(["a slow flute", "a fast bell", "a slow flute"]):
        write_tone(music / f"{i}.wav", caption, hertz=300 + 100 * i)
    return music


def test_load_data_encodes_every_clip_and_every_caption_once_and_never_again(load, codec, encoder, three_files):
    first, _ = load(three_files)
    assert (codec.encode.rows, encoder.encode_text.rows) == (3, 2)
    second, _ = load(three_files)
    assert (codec.encode.rows, encoder.encode_text.rows) == (3, 2)
    assert torch.equal(first.codes, second.codes) and len(second.text) == 2
    assert all(torch.equal(a, b) for a, b in zip(first.text, second.text, strict=True))


def test_load_data_encodes_only_what_is_new(load, codec, encoder, three_files):
    load(three_files)
    write_tone(three_files / "3.wav", "a low organ", hertz=700)
    shutil.copy(three_files / "0.wav", three_files / "copy.wav")
    (three_files / "copy.txt").write_text("a fast bell")
    train, _ = load(three_files)
    assert len(train) == 5 and (codec.encode.rows, encoder.encode_text.rows) == (4, 3)
    assert torch.equal(train.codes[0], train.codes[4])


def test_load_data_encodes_a_file_again_when_its_content_changes(load, codec, three_files):
    before, _ = load(three_files)
    write_tone(three_files / "1.wav", hertz=900)
    after, _ = load(three_files)
    assert codec.encode.rows == 4
    assert [torch.equal(a, b) for a, b in zip(before.codes, after.codes, strict=True)] == [True, False, True]


def test_load_data_encodes_again_for_other_seconds_codebooks_or_codec_weights(load, codec, three_files):
    load(three_files)
    assert load(three_files, seconds=0.25)[0].codes.shape == (6, 4, 13)
    assert codec.encode.rows == 9
    two = load_codec("toy", 2)
    assert load(three_files, codec=two)[0].codes.shape == (3, 2, 25)
    with torch.no_grad():
        two.model.encoder.model[0].conv.conv.bias.add_(0.5)
    two.encode = Spy(two.encode)
    load(three_files, codec=two)
    assert two.encode.rows == 3
    load(three_files)
    assert codec.encode.rows == 9, "the other caches are still there"


def test_load_data_encodes_captions_again_for_another_text_encoder(load, encoder, three_files):
    load(three_files)
    with torch.no_grad():
        encoder.final_norm.weight.mul_(2)
    train, _ = load(three_files)
    assert encoder.encode_text.rows == 4
    torch.testing.assert_close(train.text[0].float(), embedding(encoder, "a slow flute"))


@pytest.mark.parametrize("how", ["cut", "garbage", "empty"])
def test_load_data_makes_a_damaged_cache_again_and_says_so(load, codec, three_files, tmp_path, capsys, how):
    before, _ = load(three_files)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        file.write_bytes({"cut": content[:len(content) // 2], "garbage": b"garbage", "empty": b""}[how])
    after, _ = load(three_files)
    assert torch.equal(before.codes, after.codes) and codec.encode.rows == 6
    out = capsys.readouterr().out
    assert all(f"{file} is damaged" in out for file in files)
    load(three_files)
    assert codec.encode.rows == 6


def test_encode_audio_keeps_what_was_saved_when_it_is_interrupted(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAVE_EVERY", 2)

    def read(i):
        if i == 3:
            raise KeyboardInterrupt
        return torch.full((1, 800), i / 10)

    entries = [(f"clip {i}", f"key{i}", lambda i=i: read(i), "") for i in range(5)]
    with pytest.raises(KeyboardInterrupt):
        encode_audio(entries, codec, 0.05, tmp_path / "codes.pt", "cpu")
    assert set(torch.load(tmp_path / "codes.pt", weights_only=True)) == {"key0", "key1", "key2"}
    monkeypatch.setattr(data, "SAVE_EVERY", 1000)
    codes, bad = encode_audio(entries[:3], codec, 0.05, tmp_path / "codes.pt", "cpu")
    assert set(codes) == {"key0", "key1", "key2"} and bad == []
    assert codec.encode.rows == 3


def test_manifest_may_hold_a_byte_order_mark_and_unusual_line_separators(tmp_path):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", torch.rand(800).numpy(), 16_000)
    caption = "one\u2028two\x85"
    rows = [{"location": f"{i}.wav", "main_caption": caption} for i in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "list.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    entries, bad = data.manifest_sources(tmp_path / "list.jsonl", "location", "main_caption", 16_000)
    assert len(entries) == 2 and not bad


# ------------------------------------------------------------------------------------------------------------ splitting

def captions_of(clips):
    return {tuple(text.flatten().tolist()) for text in clips.text}


def test_load_data_holds_out_whole_files_for_validation_that_no_training_clip_comes_from(load, music, monkeypatch):
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.5)
    for i in range(16):
        write_tone(music / f"{i}.wav", describe(i)[1], seconds=1, hertz=200 + 40 * i)
    train, valid = load(music)
    assert len(train) + len(valid) == 32 and 0 < len(valid) < 32 and len(valid) % 2 == 0
    assert not captions_of(train) & captions_of(valid)
    assert len(captions_of(train) | captions_of(valid)) == 16


def test_load_data_holds_out_the_same_files_after_others_were_added(load, music, monkeypatch):
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.5)
    for i in range(16):
        write_tone(music / f"b{i}.wav", describe(i)[1], hertz=200 + 40 * i)
    train, valid = load(music)
    for i in range(4):
        write_tone(music / f"a{i}.wav", describe(100 + i)[1], hertz=1000 + 40 * i)
    more_train, more_valid = load(music)
    assert captions_of(train) <= captions_of(more_train) and captions_of(valid) <= captions_of(more_valid)


def test_load_data_holds_out_one_of_ten_files_where_the_share_picks_none(load, music, no_validation, capsys):
    for i in range(10):
        write_tone(music / f"{i}.wav", describe(i)[1], hertz=200 + 40 * i)
    train, valid = load(music)
    assert (len(train), len(valid)) == (9, 1) and not captions_of(train) & captions_of(valid)
    assert "validating on the training clips" not in capsys.readouterr().out


def test_load_data_validates_a_small_data_set_on_itself_and_says_so(load, three_files, capsys):
    train, valid = load(three_files)
    assert torch.equal(train.codes, valid.codes) and "validating on the training clips" in capsys.readouterr().out


def test_load_data_trains_on_what_can_be_read_even_if_all_of_it_was_held_out(load, music, monkeypatch):
    write_tone(music / "good.wav", "a slow flute")
    monkeypatch.setattr(data, "VALIDATION_SHARE", 1.0)
    train, valid = load(music)
    assert len(train) == 1 and len(valid) == 1


def test_load_data_gives_other_toy_clips_for_validation(load):
    train, valid = load("toy", toy_clips=20)
    assert (len(train), len(valid)) == (20, 1)
    assert not any(torch.equal(valid.codes[0], codes) for codes in train.codes)
    again, _ = load("toy", toy_clips=10)
    assert torch.equal(again.codes, train.codes[:10])


# -------------------------------------------------------------------------------------------------------------- batches

@pytest.fixture
def clips():
    """Four clips whose captions have 2, 0, 3 and 2 tokens of width 8."""
    torch.manual_seed(0)
    text = [torch.randn(2, 8).half(), torch.zeros(0, 8).half(), torch.randn(3, 8).half()]
    codes = torch.randint(16, (4, 4, 7)).to(torch.int16)
    return Clips(codes, torch.tensor([7, 7, 7, 3]), text, torch.tensor([0, 1, 2, 0]))


def test_batch_gives_the_rows_asked_for_in_types_that_a_model_reads(clips):
    codes, text, mask = clips.batch(torch.tensor([2, 0]))
    assert (codes.dtype, text.dtype, mask.dtype) == (torch.long, torch.float32, torch.float32)
    assert torch.equal(codes, clips.codes[[2, 0]].long())
    assert torch.equal(text[0], clips.text[2].float())


def test_batch_pads_texts_with_zeros_which_the_mask_marks(clips):
    _, text, mask = clips.batch(torch.tensor([0, 1, 2]))
    assert text.shape == (3, 3, 8)
    assert mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert torch.equal(text[0, :2], clips.text[0].float()) and not text[0, 2:].any() and not text[1].any()


@pytest.mark.parametrize("rows", [[1], [1, 1, 1]])
def test_batch_of_empty_captions_is_the_null_condition_of_the_model(clips, rows):
    codes, text, mask = clips.batch(torch.tensor(rows))
    assert not mask.any()
    model = MAGNeT(ModelConfig(card=16, dim=32, n_heads=2, n_layers=2, text_dim=8)).eval()
    with torch.no_grad():
        logits = model(codes, 0, text, mask)
        torch.testing.assert_close(logits, model(codes, 0))


def test_batch_of_empty_captions_can_be_trained_on(clips):
    codes, text, mask = clips.batch(torch.tensor([1, 1]))
    model = MAGNeT(ModelConfig(card=16, dim=32, n_heads=2, n_layers=2, text_dim=8))
    model(codes, 0, text, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_load_data_gives_an_empty_caption_no_tokens(load, music, no_validation):
    write_tone(music / "a.wav", "")
    train, _ = load(music)
    assert [tuple(text.shape) for text in train.text] == [(0, 64)]


def test_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    config = CodecConfig(ratios=(2,), n_codebooks=1, codebook_size=4, dimension=4, n_filters=2)
    one, other = Codec.from_config(config), Codec.from_config(config)
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
