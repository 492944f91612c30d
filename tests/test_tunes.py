"""What the tunes world promises: clips that can be made again, true captions, and no tune in two splits.

All but the first tests want the packages in requirements-tunes.txt, and are skipped with a word where they are missing.
"""

import importlib.util
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encodec_wrap import load_codec
from t5_encoder import T5Encoder
from toy import band, memory, signals, tunebook, tunes, weights_of
from toy.judge import KeyNet, draw_clips, load_judge, through_codec
from toy.mel import pitch_profile
from toy.train_codec import check
from toy.tunes import ATTRIBUTES, PAIR, PITCHES, PROGRAMS, RATES, SAMPLE_RATE, SPLITS, UNSEEN_PAIRS, WORDS

PACKAGES = ("music21", "symusic", "tinysoundfont", "pretty_midi")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
wants_tunes = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (requirements-tunes.txt)")

PLAIN = {"instrument": "clarinet", "dance": "reel", "mode": "major", "tempo": "medium", "register": "mid",
         "accompaniment": "none"}


def notes(seed=0, split="train", **attributes):
    """The notes of a plain clip, but for what is asked: see `toy.tunes.score`."""
    return tunes.score(PLAIN | attributes, np.random.default_rng(seed), split=split)


def play(seed=0, **attributes):
    return tunes.render(PLAIN | attributes, np.random.default_rng(seed))


def share_in_melody(clips, length):
    """Of the runs of intervals that the pitch track hears in clips, the share that are their melodies' own.

    clips: pairs of a sound and of its melody's notes, of which repeated pitches count once."""
    found = []
    for wav, melody in clips:
        known = set(memory.runs(melody[np.argsort(melody[:, 0]), 2].astype(int), length))
        found += [run in known for run in memory.runs(signals.melody(wav), length)]
    assert len(found) > 20
    return np.mean(found)


# ----------------------------------------------------------------------------------------------- without any packages

def test_tunes_say_in_one_line_which_packages_are_missing(monkeypatch):
    monkeypatch.setattr(tunebook, "symusic", None)
    with pytest.raises(ModuleNotFoundError, match=r"requirements-tunes\.txt$"):
        tunebook.folder_of("music21")


def test_tunes_hold_some_pairs_out_of_training_but_no_single_value():
    train, unseen = tunes.combinations("train"), tunes.combinations("unseen")
    pairs = [{tuple(row[name] for name in PAIR) for row in rows} for rows in (train, unseen)]
    assert pairs[1] == UNSEEN_PAIRS and not pairs[0] & UNSEEN_PAIRS
    for name, values in ATTRIBUTES.items():
        assert {row[name] for row in train} == set(values), name
    assert tunes.combinations("valid") == tunes.combinations("test") == train
    with pytest.raises(ValueError, match="train, valid, test, unseen, not 'tset'"):
        tunes.describe(0, "tset")


def said(caption):
    """The attribute values whose words a caption holds: {name: set}."""
    text = f" {caption.replace(',', '')} "
    return {name: {value for value in values if any(f" {word} " in text for word in WORDS[name][value])}
            for name, values in ATTRIBUTES.items()}


def test_tunes_caption_says_every_attribute_and_each_value_has_words_of_its_own():
    for index in range(300):
        attributes, caption, _ = tunes.describe(index, "test")
        assert all(value in said(caption)[name] for name, value in attributes.items()), caption
    words = [word for values in WORDS.values() for synonyms in values.values() for word in synonyms]
    assert len(words) == len(set(words))


def test_tunes_training_captions_leave_an_attribute_unsaid_now_and_then():
    silent = [value not in said(caption)[name] for attributes, caption, _ in (
        tunes.describe(index, "train") for index in range(1000)) for name, value in attributes.items()]
    assert np.mean(silent) == pytest.approx(tunes.UNSAID, abs=0.02)
    phrases = {tunes.caption({"tempo": "fast"}, np.random.default_rng(seed)).split()[-1] for seed in range(20)}
    assert phrases <= {"fast", "quick", "up-tempo", "instrument", "tune"} and len(phrases) > 2, "still a phrase"


@pytest.mark.parametrize("dance, group", [("reel", 1), ("hornpipe", 2), ("jig", 3)])
def test_tunes_swing_moves_notes_inside_a_group_and_never_its_first(dance, group):
    units = np.arange(-6, 13) / 2
    swung = band.swing(dance, units)
    assert (np.diff(swung) > 0).all(), "no note overtakes another"
    assert np.array_equal(swung[units % group == 0], units[units % group == 0])
    assert np.array_equal(swung, units) == (dance == "reel")


def test_tunes_families_join_a_copy_in_another_key_with_changes_and_no_stranger():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(60, 80, 80) for _ in range(2))
    copy = one + 5
    copy[40] += 1  # one note changed
    played = one, other, copy, np.repeat(one, 2)  # the last with each note played twice
    tunes_of = [{"notes": np.array([(240 * i, 240, pitch) for i, pitch in enumerate(pitches)])} for pitches in played]
    assert tunebook.families(tunes_of) == [0, 1, 0, 0]


def test_memory_nearest_codes_is_one_for_a_copy_and_counts_equal_frames_and_embeddings_by_distance():
    bank = torch.tensor([[[1, 2, 3, 4]], [[1, 1, 1, 1]]])  # (m, K, T)
    codes = torch.tensor([[[1, 1, 1, 1]], [[1, 2, 9, 9]]])
    assert memory.nearest_codes(codes, bank).tolist() == [1.0, 0.5]
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert memory.nearest_embeddings(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), bank).tolist() == pytest.approx([1, 0])


def test_codec_check_measures_no_distance_of_a_copy_and_half_of_half_the_level():
    clips = torch.randn(3, 8000).half()
    for gain in (1.0, 0.5):  # a codec that keeps everything, in one code, but for the level
        codec = SimpleNamespace(codebook_size=4, encode=lambda wav: torch.zeros(len(wav), 1, 5, dtype=torch.long),
                                decode=lambda codes, gain=gain: gain * clips[:, None].float())
        found = check(codec, clips)
        assert found["relative mel distance"] == pytest.approx(1 - gain, abs=1e-4) and found["bits per code"] == 0
        assert (found["log-mel distance"] < 1e-5) == (gain == 1)


def tones(pitches, seconds=1.0):
    """Plain tones of these MIDI pitches together: (1, S)."""
    t = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return sum(torch.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * t) for pitch in pitches)[None]


def test_judge_key_net_hears_the_same_in_every_key_and_another_mode_as_another():
    """The twelve keys are turns of the octave, each by three thirds of a semitone."""
    torch.manual_seed(0)
    net, (major, minor) = KeyNet(), (pitch_profile(tones(chord), SAMPLE_RATE) for chord in ((60, 64, 67), (60, 63, 67)))
    assert all(net(major).allclose(net(major.roll(3 * key, dims=2)), atol=1e-5) for key in range(12))
    assert (net(major) - net(minor)).abs().max() > 1e-2


def test_signals_melody_hears_the_notes_of_plain_tones_and_no_slips():
    wav = torch.cat([tones([pitch], 0.25) for pitch in (69, 72, 72, 65)], dim=1)[0].numpy()
    assert signals.melody(wav).tolist() == [69, 72, 65]


# ------------------------------------------------------------------------------------------------- with the packages

ABC = """X:1
T:Two Bars -- Reel
M:C|
L:1/8
K:G
D2|:"Am"GABc {e}d2B2|g2d2 vG4:|
|:"_f"GABc d2B2|g2d2 G4:|c2B2 A2G2|
"""


@wants_tunes
def test_tunes_reader_unrolls_repeats_drops_signs_and_finds_the_first_bar_line():
    tune = tunebook.read_tune(ABC)
    assert (tune["dance"], tune["mode"], tune["tonic"], tune["bar"]) == ("reel", "major", 7, 1920)
    assert tune["first"] == 480, "two eighths come before it"
    part = [67, 69, 71, 72, 74, 71, 79, 74, 67]
    assert tune["notes"][:, 2].tolist() == [62] + 4 * part + [72, 71, 69, 67]
    assert tune["notes"][1, 0] == 480 and tune["notes"][1, 1] == 240


@wants_tunes
def test_tunes_mode_is_heard_in_the_notes_not_taken_from_the_key():
    minor = tunebook.read_tune(ABC.replace("B", "_B"))  # all thirds flat, as the folk songs are written
    assert minor["mode"] == "minor"
    unclear = tunebook.read_tune(ABC.replace("|:\"_f\"GABc d2B2", "|:\"_f\"GA_Bc d2_B2"))
    assert unclear is None


@wants_tunes
def test_tunes_clip_is_the_same_again_whatever_was_played_before():
    first = tunes.example(3, "train", seed=1)
    for split in SPLITS:
        tunes.example(4, split)
    again = tunes.example(3, "train", seed=1)
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], tunes.example(3, "train", seed=2)[0])
    assert tunes.describe(3, "train", seed=1)[:2] == (first[2], first[1])


@wants_tunes
@pytest.mark.parametrize("split", SPLITS)
def test_tunes_clips_are_as_long_as_asked_and_even_in_level(split):
    for seconds in (1.0, 2.5, 6.0):
        assert len(tunes.example(0, split, seconds=seconds)[0]) == round(seconds * SAMPLE_RATE)
    for index in range(12):
        wav, _, attributes = tunes.example(index, split)
        assert wav.shape == (4 * SAMPLE_RATE,) and wav.dtype == np.float32
        assert 0.59 < np.abs(wav).max() < 0.91 and abs(wav.mean()) < 0.02
        seconds = np.sqrt((wav.reshape(4, -1) ** 2).mean(axis=1))
        assert seconds.min() > 0.01, ("a second of silence", index, attributes)


@wants_tunes
def test_tunes_no_tune_shares_a_quarter_of_its_runs_with_a_tune_of_another_split():
    """Asked of each test and validation tune and each training tune, by another way than `families` goes."""
    sets = {split: [set(memory.runs(tune["notes"][:, 2], 10)) for tune in tunebook.corpus() if tune["split"] == split]
            for split in tunebook.SHARES}
    for held_out, training in (("test", "train"), ("valid", "train"), ("valid", "test")):
        holders = {}  # of each run, the numbers of the training tunes that hold it
        for i, row in enumerate(sets[training]):
            for run in row:
                holders.setdefault(run, []).append(i)
        for row in sets[held_out]:
            shared = Counter(i for run in row for i in holders.get(run, ()))
            assert all(n < 0.25 * min(len(row), len(sets[training][i])) for i, n in shared.items())


@wants_tunes
def test_tunes_every_split_has_tunes_of_every_dance_and_mode_that_is_asked_for():
    for dance, mode in {(row["dance"], row["mode"]) for row in tunes.combinations("train")}:
        assert all(len(tunes.tunes_of(split, dance, mode)) >= 4 for split in tunebook.SHARES), (dance, mode)


@wants_tunes
def test_tunes_programs_are_the_instruments_that_captions_name():
    """The soundfont's own names for the programs."""
    synth, font = band.synthesizer()
    own = {"fiddle": "violin", "harmonium": "reed organ", "vibraphone": "vib"}
    for instrument, program in PROGRAMS.items():
        assert own.get(instrument, instrument) in synth.sfpreset_name(font, 0, program).lower()


@wants_tunes
@pytest.mark.parametrize("instrument", ["fiddle", "harmonium", "clarinet", "banjo"])
def test_tunes_what_is_played_is_in_tune_and_at_the_pitch_that_is_written(instrument):
    clips = [(play(seed, instrument=instrument), notes(seed, instrument=instrument)["melody"]) for seed in range(6)]
    assert share_in_melody(clips, 4) > 0.75


@wants_tunes
@pytest.mark.parametrize("dance", ATTRIBUTES["dance"])
def test_tunes_tempo_and_register_are_those_of_the_notes(dance):
    assert RATES["slow"][1] < RATES["medium"][0] and RATES["medium"][1] < RATES["fast"][0], "the classes are apart"
    for (tempo, (low, high)), (register, pitch) in itertools.product(RATES.items(), PITCHES.items()):
        melody = notes(1, dance=dance, tempo=tempo, register=register)["melody"]
        assert low <= len(melody) / tunes.SECONDS <= high, (tempo, register)
        lengths = melody[:, 1] - melody[:, 0]
        assert abs(np.average(melody[:, 2], weights=lengths) - pitch) < 3.5, (tempo, register)


@wants_tunes
@pytest.mark.parametrize("mode, third", [("major", 4), ("minor", 3)])
def test_tunes_mode_is_that_of_melody_and_drone(mode, third):
    for seed in range(5):
        parts = notes(seed, mode=mode, accompaniment="drone")
        tonic = parts[band.CELLO][:, 2].min()  # the drone holds tonic and fifth
        assert sorted((parts[band.CELLO][:, 2] - tonic).tolist()) == [0, 7]
        degrees = (parts["melody"][:, 2] - tonic) % 12
        assert (degrees == third).sum() > 2 * (degrees == 7 - third).sum()


@wants_tunes
def test_tunes_accompaniment_is_heard_beside_the_melody_and_only_if_asked():
    expected = {"none": {"melody"}, "drone": {"melody", band.CELLO}, "chords": {"melody", band.BASS, band.GUITAR},
                "percussion": {"melody", band.DRUMS}}
    for name, parts in expected.items():
        assert set(notes(2, accompaniment=name)) == parts
        assert not np.array_equal(play(2), play(2, accompaniment=name)) or name == "none"
    assert set(np.unique(notes(2, accompaniment="percussion")[band.DRUMS][:, 2])) == {band.KICK, band.SNARE, band.HAT}


@wants_tunes
def test_tunes_test_clips_play_test_tunes(monkeypatch):
    asked, choose = [], tunes.choose
    monkeypatch.setattr(tunes, "choose", lambda *args: asked.append(args[-1]) or choose(*args))
    for split in SPLITS:
        tunes.example(0, split)
    assert asked == ["train", "valid", "test", "test"], "held-out pairs are played on test tunes"


@wants_tunes
def test_memory_finds_training_tunes_in_clips_of_them_more_than_in_test_tunes():
    shares = {}
    for split in ("train", "test"):
        clips = [tunes.render(PLAIN | {"tempo": "medium"}, np.random.default_rng(seed), split=split)
                 for seed in range(25)]
        shares[split] = memory.found_melodies(torch.from_numpy(np.stack(clips))).mean().item()
    assert shares["train"] > shares["test"] + 0.1


# ------------------------------------------------------------------------------------------------ what ships for them

def test_tunes_weights_that_ship_fit_their_world_and_stay_small():
    codec = load_codec(weights_of("tunes") / "codec.pt")
    assert (codec.sample_rate, codec.frame_rate, codec.n_codebooks, codec.codebook_size) == (SAMPLE_RATE, 50, 4, 1024)
    assert sum(path.stat().st_size for path in weights_of("tunes").rglob("*") if path.is_file()) < 20e6


def test_tunes_text_encoder_that_ships_has_a_piece_for_every_letter_of_the_captions():
    captions = [tunes.describe(index, "test")[1] for index in range(200)]
    ids, mask = T5Encoder.from_pretrained(weights_of("tunes") / "text").tokenize(captions)
    assert not (ids[mask] == 2).any(), "an unknown piece"


@wants_tunes
def test_tunes_melodies_of_test_tunes_go_through_the_codec_that_ships():
    codec, clips = load_codec(weights_of("tunes") / "codec.pt"), []
    for seed, instrument in enumerate(("fiddle", "harmonium", "trumpet", "banjo") * 2):
        wav = tunes.render(PLAIN | {"instrument": instrument}, np.random.default_rng(seed), split="test")
        coded = codec.decode(codec.encode(torch.from_numpy(wav)[None, None]))[0, 0].numpy()
        clips.append((coded, notes(seed, "test", instrument=instrument)["melody"]))
    assert share_in_melody(clips, 3) > 0.7


@wants_tunes
def test_the_judge_that_ships_hears_what_test_tunes_are_through_the_codec_too():
    """Of 96 clips, of which it heard none before; the dance is the hardest, a fifth is chance."""
    wav, labels = draw_clips(96, 4, "tunes", split="test")
    judge, coded = load_judge("tunes"), through_codec(wav, weights_of("tunes") / "codec.pt")
    for sound in (wav, coded):
        right = (judge.read(sound.float()) == labels).float().mean(dim=0).tolist()
        shares = dict(zip(judge.attributes, right, strict=True))
        assert shares.pop("dance") > 0.55 and min(shares.values()) > 0.85, shares
