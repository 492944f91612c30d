"""The toy world and what is trained for it: the claims of toy/ (the tunes are in test_tunes.py).

Read in this order: which clip is made; what can be heard in it; its caption; the text encoder; the codec's training;
export; what the models know; the judge and what `toy.evaluate` measures.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from encodec_wrap import load_codec
from model import load_model
from support.files import save_whole
from t5_encoder import T5Encoder
from toy import SOURCES, entries_of, export, likelihood, train_codec, world
from toy.evaluate import frechet, labels_of, swap_shares, swapped_prompts
from toy.judge import cross_check, load_judge
from toy.signals import pitch
from toy.train_text import draw_caption
from toy.world import ATTRIBUTES, SAMPLE_RATE, UNSEEN_PAIRS, WORDS, caption, combinations, describe, render


def play(seed=0, seconds=4.0, **attributes):
    """A clip of a flute that repeats one note in the middle register, without drums, but for what is asked."""
    plain = {"instrument": "flute", "melody": "repeated", "tempo": "medium", "register": "mid", "drums": "off"}
    return render(plain | attributes, np.random.default_rng(seed), seconds)


def strongest_partial(wav):
    """The frequency at which the spectrum is highest, in Hz."""
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), 2**17))
    return spectrum.argmax() * SAMPLE_RATE / 2**17


def test_example_is_the_same_clip_for_the_same_three_numbers_only():
    (wav, *more), (again, *same) = (world.example(5, "unseen", seed=3) for _ in range(2))
    assert np.array_equal(wav, again) and more == same == [*describe(5, "unseen", 3)[1::-1]]
    clips = (0, "train", 0), (1, "train", 0), (0, "train", 1), (0, "valid", 0)
    assert len({world.example(*clip)[0].tobytes() for clip in clips}) == 4


def test_a_world_is_encoded_anew_when_any_file_changes_that_its_sound_comes_from(monkeypatch):
    for files in SOURCES.values():
        text = "".join((ROOT / "toy" / file).read_text("utf-8") for file in files)
        assert {f"{name}.py" for name in re.findall(r"^from toy\.(\w+) import", text, re.MULTILINE)} < set(files)
    key = entries_of("toy", {"train": 1}, 1)[0][0].key
    monkeypatch.setitem(SOURCES, "toy", ("tunes.py",))
    assert entries_of("toy", {"train": 1}, 1)[0][0].key != key


def test_combinations_hold_every_combination_once_and_only_the_named_pairs_are_unseen():
    train, unseen = combinations("train"), combinations("unseen")
    assert combinations("valid") == train and (len(train), len(unseen)) == (360, 72)
    assert len({tuple(row.values()) for row in train + unseen}) == 6 * 4 * 3 * 3 * 2
    assert {(row["instrument"], row["melody"]) for row in unseen} == UNSEEN_PAIRS
    assert all(describe(i, split)[0] in combinations(split) for split in ("train", "unseen") for i in range(100))
    with pytest.raises(ValueError, match="train, valid, unseen.*'test'"):
        combinations("test")


def test_render_plays_any_attributes_at_any_length_and_nothing_too_low_to_hear():
    """A constant offset would take the room of the music and mean nothing."""
    rows = (combinations("train") + combinations("unseen"))[::5]  # 5 shares no factor with 432: all values
    for seconds, row in zip([0.01, 0.33333, 1.37] + [0.4] * len(rows), [rows[0]] * 3 + rows, strict=True):
        wav = render(row, np.random.default_rng(0), seconds)
        assert wav.dtype == np.float32 and wav.shape == (round(seconds * SAMPLE_RATE),)
        assert 0.5 < np.abs(wav).max() <= 1 and (abs(wav.mean()) < 0.02 or seconds < 0.1), row


def test_register_is_the_octave_of_the_pitch():
    """The strongest partial of a flute is its note, and other instruments repeat themselves at the flute's pitch."""
    for register, keys in world.KEYS.items():
        note = strongest_partial(play(register=register))
        assert min(abs(note - key) for key in keys) < 2
        for instrument in ("flute", "lead", "chip", "organ", "pluck"):
            heard = pitch(play(seconds=1, instrument=instrument, register=register)[1600:4800])
            assert heard == pytest.approx(note, rel=0.06), instrument


@pytest.mark.parametrize("melody, steps", [
    ("rising", [2, 2, 3, 2]), ("falling", [-3, -2, -3, -2]), ("arpeggio", [4, 3, 5, -5]), ("repeated", [0, 0, 0, 0])])
def test_melody_is_the_order_of_the_pitches(melody, steps):
    """The notes of a slow flute, in semitones from one to the next; the world's tuning is up to 0.7 off."""
    wav, beat = play(melody=melody, tempo="slow"), world.BEATS["slow"] / world.FRAME_RATE
    starts = [int((0.03 + (i + 0.25) * beat) * SAMPLE_RATE) for i in range(5)]
    notes = [12 * np.log2(strongest_partial(wav[start:start + int(0.5 * beat * SAMPLE_RATE)])) for start in starts]
    assert np.diff(notes) == pytest.approx(steps, abs=0.7)


def says(text):
    """The attribute values that a caption names, longest words first: {name: value}."""
    said, phrases = {}, [(word, name, value) for name in WORDS for value in WORDS[name] for word in WORDS[name][value]]
    for word, name, value in sorted(phrases, key=lambda phrase: -len(phrase[0])):
        pattern = rf"(?<![\w-]){re.escape(word)}(?![\w-])"
        if re.search(pattern, text):
            assert name not in said or said[name] == value, text
            said[name], text = value, re.sub(pattern, "#", text)
    return said


def test_caption_says_every_attribute_truly_and_nothing_of_what_it_was_not_told():
    rng = np.random.default_rng(0)
    for index in range(200):
        attributes, text, _ = describe(index)
        assert says(text) == attributes, text
        some = {name: value for name, value in attributes.items() if rng.random() < 0.5}
        assert says(text := caption(some, rng)) == some, text


def test_caption_varies_its_words_and_no_two_values_share_a_word():
    assert {name: tuple(values) for name, values in WORDS.items()} == ATTRIBUTES
    words = [word for values in WORDS.values() for synonyms in values.values() for word in synonyms]
    assert len(set(words)) == len(words)
    attributes = describe(0)[0]
    texts = {caption(attributes, np.random.default_rng(i)) for i in range(200)}
    assert len(texts) > 100
    assert all(any(word in text for text in texts) for name in WORDS for word in WORDS[name][attributes[name]])


def test_draw_caption_gives_labels_that_are_true_of_a_caption_that_the_toy_tokenizer_knows():
    rng, tokenizer = np.random.default_rng(0), T5Encoder.from_pretrained("toy").tokenizer
    for _ in range(200):
        text, labels = draw_caption(rng)
        said, ids = says(text), tokenizer.encode(text)
        assert labels == [values.index(said[name]) if name in said else len(values)
                          for name, values in ATTRIBUTES.items()], text
        assert tokenizer.unk_id() not in ids and tokenizer.decode(ids) == text


def test_however_short_its_training_a_codec_has_codebooks_and_is_not_written_over(call):
    assert [call(train_codec, *"--out new --steps 5 --clips 3 --seconds 0.1".split()).code for _ in "12"] == [0, 2]
    codec = load_codec("new/codec.pt")
    assert all(layer._codebook.inited and layer._codebook.embed.any() for layer in codec.model.quantizer.vq.layers)


def test_export_keeps_what_sampling_needs_in_few_bits_and_sampling_flags_become_the_models_own(
        make_magnet, tmp_path, call):
    model = make_magnet()
    content = {"config": {"a": 1}, "model_config": vars(model.config), "codec": "../codec.pt", "text_encoder": "toy",
               "step": 7, "codec_id": "c0", "text_encoder_id": "e0", "ema": model.state_dict(), "model": {},
               "optimizer": {}, "rng": {}, "sampling": {"guidance_start": 5.0, "temperature": 2.0}}
    save_whole(content, tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "codec.pt").touch()
    call(export, *"run out/small.pt --guidance-start 3 --top-p 0.9 --decoding-steps 40 10 10 10".split())
    small = torch.load(tmp_path / "out/small.pt", weights_only=True)
    assert set(small) == set(content) - {"model", "optimizer", "rng"} | {"scales"}
    loaded, own = load_model(tmp_path / "out/small.pt")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=5e-3, rtol=0)  # up to 1.06 / 254
    assert own.sampling == {"guidance_start": 3.0, "temperature": 2.0, "decoding_steps": (40, 10, 10, 10)}
    assert Path(own.codec).samefile(tmp_path / "codec.pt"), "beside the run, and now beside the export"


@pytest.mark.parametrize("name, objective", {
    "toy": "magnet", "toy-ar": "ar", "toy-hybrid": "hybrid", "tunes": "magnet", "tunes-ar": "ar"}.items())
def test_every_model_that_ships_reads_the_codec_and_the_text_encoder_that_ship(name, objective):
    (model, companions), world = load_model(name), name.split("-")[0]
    companions.check(load_codec(world), T5Encoder.from_pretrained(world))
    assert model.config.objective == objective


def test_the_models_that_ship_know_every_word_for_a_clip_of_their_world(call):
    for name in ("toy", "toy-ar"):
        assert all(share == 1 and gap > 0 for share, gap in likelihood.known_words(name, 1, "toy").values()), name
    assert call(likelihood, "--model", "toy-hybrid").code == 2, "which predicts next tokens in some places"


def test_the_judge_that_ships_hears_every_attribute_as_it_is_and_as_the_plain_measures_do():
    """A changed world without a retrained judge would make every adherence number wrong."""
    rng, judge = np.random.default_rng(5), load_judge()
    rows = rng.permutation(combinations("train"))[:60]
    wav = torch.from_numpy(np.stack([render(row, rng) for row in rows]))
    labels = torch.stack([labels_of(row) for row in rows])
    read = judge.read(wav)
    for k, (name, values) in enumerate(ATTRIBUTES.items()):
        for i, value in enumerate(values):
            assert (read[:, k] == i)[labels[:, k] == i].float().mean() >= 0.9, (name, value)
    for name, (n, (measured, heard, alike)) in cross_check(judge, wav, labels).items():  # those without drums
        assert n >= 20 and min(measured, heard, alike) > 0.8, name


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    a = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    assert [frechet(a, a), frechet(a, a + 0.5)] == pytest.approx([0, 6 * 0.25], abs=1e-6)
    assert frechet(a, 2 * a) == pytest.approx((a.var(dim=0).sum() + a.mean(dim=0).square().sum()).item(), rel=1e-6)


def test_swapped_prompts_differ_in_the_words_for_one_attribute_only():
    before, after, labels, which = swapped_prompts(50)
    assert which.bincount().tolist() == [10] * 5
    for old, new, asked, index in zip(map(says, before), map(says, after), labels, which, strict=True):
        assert [name for name in ATTRIBUTES if old[name] != new[name]] == [list(ATTRIBUTES)[index]]
        assert labels_of(new).equal(asked) and (new["instrument"], new["melody"]) not in UNSEEN_PAIRS


def test_swap_shares_count_a_case_only_if_the_attribute_changes_and_no_other():
    labels, before, which = torch.tensor([[1, 0, 0]] * 4), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    after = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]])  # as asked, no change, another moved, as asked
    assert [case["share"] for case in swap_shares(before, after, labels, which).values()] == [0.75, 7 / 8, 0.5]
