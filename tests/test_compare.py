"""What the comparison promises: each cell is computed once, with the model and the settings that its row names."""

import dataclasses
import itertools
import sys

import pytest

from encodec_wrap import load_codec
from experiments import compare
from experiments.ablations import read_rows
from experiments.compare import PROMPTS, SPLITS, WEIGHTS, crossings
from sample import SamplingConfig
from support.files import fingerprint, save_whole
from t5_encoder import T5Encoder
from train import LOSSES


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compared("flags") runs the command line, with its results in an empty folder -> the folder."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")

    def compared(flags):
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags.split(), "--device", "cpu"])
        compare.main()
        return tmp_path / "results"

    return compared


@pytest.fixture
def tiny_models(tmp_path, make_magnet):
    """Random models of clips of one second, one of each kind: the flags that name them."""
    encoder, paths = T5Encoder.from_pretrained("toy"), {kind: tmp_path / f"{kind}.pt" for kind in LOSSES}
    ids = {"codec_id": fingerprint(load_codec("toy")), "text_encoder_id": fingerprint(encoder)}
    for kind, path in paths.items():
        model = make_magnet(card=256, text_dim=encoder.config.d_model, seconds=1.0, objective=kind)
        save_whole({"model_config": dataclasses.asdict(model.config), "ema": model.state_dict(), "codec": "toy",
                    "text_encoder": "toy", "sampling": {"decoding_steps": (2, 1, 1, 1)}, **ids}, path)
    return " ".join(f"--{kind} {path}" for kind, path in paths.items())


def test_quality_plays_and_judges_every_cell_once_and_is_drawn(compared, tiny_models, monkeypatch):
    monkeypatch.setattr(compare, "PROMPTS", (0.5,))
    flags = f"quality {tiny_models} --n 4 --seeds 0 --weights 1"
    rows = read_rows(compared(flags) / "quality.csv")
    assert [row["method"] for row in rows] == ["autoregressive", "MAGNeT", "MAGNeT + rescoring", "hybrid"]
    for row in rows:
        assert 0 <= float(row["low_seen"]) <= float(row["overall_seen"]) <= float(row["high_seen"]) <= 1
        assert float(row["frechet"]) > 0 and float(row["seconds_per_clip"]) > 0 and row["n_prompts"] == "4"
    assert rows[1]["frechet"] != rows[2]["frechet"], "the rescorer has no say"
    monkeypatch.setattr(compare, "measure", None)  # a cell computed again would fail
    assert read_rows(compared(flags) / "quality.csv") == rows
    assert (compared("plot") / "quality.png").is_file()


def test_each_cell_is_played_by_its_model_with_its_settings_and_rescorer(compared, tiny_models, tmp_path, monkeypatch):
    played = []

    def evaluate(name, config, device, n, *, rescorer, seed, **_):
        name, rescorer = (path and tmp_path.joinpath(path).stem for path in (name, rescorer))
        played.append((name, config.hybrid_seconds, rescorer, config.rescorer_weight, seed))
        assert config.decoding_steps == (2, 1, 1, 1), "the model's own setting"
        shares = {f"model, {kind}": {"overall": {"share": 0.5, "interval": (0.4, 0.6)}} for kind in SPLITS}
        return {"adherence": shares, "right": dict.fromkeys(shares, "34"), "frechet": {"model": 1.0},
                "seconds_per_clip": 1.0}

    monkeypatch.setattr(compare, "evaluate", evaluate)
    rows = read_rows(compared(f"quality {tiny_models} --n 4 --seeds 5") / "quality.csv")
    own = SamplingConfig().hybrid_seconds
    assert played == [("ar", own, None, 0.0, 5), ("magnet", own, None, 0.0, 5),
                      *(("magnet", own, "ar", w, 5) for w in WEIGHTS), *(("hybrid", s, None, 0.0, 5) for s in PROMPTS)]
    assert {row["right"] for row in rows} == {"3434"}
    assert [bool(row["rescorer"]) for row in rows] == [w > 0 for *_, w, _ in played]


def test_latency_times_both_ways_of_decoding_once_and_is_drawn(compared, monkeypatch, capsys):
    flags = "latency --shape tiny --batches 1 2 --lengths 0.2 0.4 --repeats 1 --dtype fp32"
    rows = read_rows(compared(flags) / "latency.csv")
    assert [(row["method"], row["length"], row["batch"]) for row in rows] == [
        *itertools.product(("magnet", "ar"), ("0.2", "0.4"), ("1", "2"))]
    assert all(float(row["seconds"]) > 0 for row in rows)
    monkeypatch.setattr(compare, "seconds_of", None)
    assert read_rows(compared(flags) / "latency.csv") == rows
    capsys.readouterr()
    assert len(list(compared("plot").glob("latency-tiny-float32-cpu*.png"))) == 1
    assert capsys.readouterr().out.count(" s | ") == 2, "a row for each length"


def test_crossings_lie_between_the_batches_where_the_faster_one_changes():
    """By the seconds of MAGNeT and of the autoregressive model at each batch size."""
    def crossing(seconds):
        return crossings([{"method": method, "batch": str(batch), "seconds": str(s), "length": "4"}
                          for batch, both in seconds.items() for method, s in zip(("magnet", "ar"), both, strict=True)])

    assert 4 < crossing({1: (1, 3), 4: (4, 8), 16: (16, 8)})["4"] < 16, "3 times, 2 times and half of MAGNeT's seconds"
    assert crossing({1: (1, 2)}) == crossing({1: (1, float("nan"))}) == {"4": None}
    assert crossing({1: (1, 0.5)}) == {"4": 1}


def test_compare_says_what_is_missing_or_wrong(compared, tiny_models, tmp_path):
    for flags, words in (("quality", "at least one of --magnet, --ar, --hybrid"), ("plot", "holds neither"),
                         (f"quality --ar {tmp_path / 'magnet.pt'} --n 4", "--ar .*: the model's objective is magnet"),
                         ("latency --shape tiny --batches 0", "--batches and --repeats must be at least 1")):
        with pytest.raises(ValueError, match=words):
            compared(flags)
