"""What the comparison promises: each cell is computed once, with the model and the settings that its row names."""

import dataclasses
import sys

import pytest

from encodec_wrap import load_codec
from experiments import compare
from experiments.ablations import read_rows
from experiments.compare import PROMPTS, SPLITS, WEIGHTS, crossings, paired_difference
from sample import SamplingConfig
from support.files import fingerprint, save_whole
from t5_encoder import T5Encoder

MODELS = {"magnet": "m", "ar": "a", "hybrid": "h"}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call("flags") runs the command line, with its results in an empty folder -> the folder."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")

    def call(flags):
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags.split(), "--device", "cpu"])
        compare.main()
        return tmp_path / "results"

    return call


@pytest.fixture
def tiny_models(tmp_path, make_magnet):
    """Random models of clips of one second, one of each kind: the flags that name them."""
    encoder, flags = T5Encoder.from_pretrained("toy"), []
    ids = {"codec_id": fingerprint(load_codec("toy")), "text_encoder_id": fingerprint(encoder)}
    for kind in MODELS:
        model = make_magnet(card=256, text_dim=encoder.config.d_model, seconds=1.0, objective=kind)
        save_whole({"model_config": dataclasses.asdict(model.config), "ema": model.state_dict(), "codec": "toy",
                    "text_encoder": "toy", "sampling": {"decoding_steps": (2, 1, 1, 1)}, **ids},
                   tmp_path / f"{kind}.pt")
        flags += [f"--{kind}", str(tmp_path / f"{kind}.pt")]
    return " ".join(flags)


def test_quality_plays_and_judges_every_cell_once_and_is_drawn(call, tiny_models, monkeypatch):
    monkeypatch.setattr(compare, "WEIGHTS", (1.0,))
    monkeypatch.setattr(compare, "PROMPTS", (0.5,))
    flags = f"quality {tiny_models} --n 4 --seeds 0"
    rows = read_rows(call(flags) / "quality.csv")
    assert [row["method"] for row in rows] == ["autoregressive", "MAGNeT", "MAGNeT + rescoring", "hybrid"]
    for row in rows:
        assert 0 <= float(row["low_seen"]) <= float(row["overall_seen"]) <= float(row["high_seen"]) <= 1
        assert float(row["frechet"]) > 0 and float(row["seconds_per_clip"]) > 0 and row["n_prompts"] == "4"
    assert rows[1]["frechet"] != rows[2]["frechet"], "the rescorer has no say"
    monkeypatch.setattr(compare, "measure", None)  # a cell computed again would fail
    assert read_rows(call(flags) / "quality.csv") == rows
    assert (call("plot") / "quality.png").is_file()


def test_each_cell_is_played_by_its_model_with_its_settings_and_rescorer(call, tiny_models, tmp_path, monkeypatch):
    played = []

    def evaluate(name, config, device, n, *, rescorer, seed, **_):
        name, rescorer = (path and tmp_path.joinpath(path).stem for path in (name, rescorer))
        played.append((name, config.hybrid_seconds, rescorer, config.rescorer_weight, seed))
        assert config.decoding_steps == (2, 1, 1, 1), "the model's own setting"
        shares = {f"model, {kind}": {"overall": {"share": 0.5, "interval": (0.4, 0.6)}} for kind in SPLITS}
        return {"adherence": shares, "right": dict.fromkeys(shares, "34"), "frechet": {"model": 1.0},
                "seconds_per_clip": 1.0}

    monkeypatch.setattr(compare, "evaluate", evaluate)
    rows = read_rows(call(f"quality {tiny_models} --n 4 --seeds 5") / "quality.csv")
    own = SamplingConfig().hybrid_seconds
    assert played == [("ar", own, None, 0.0, 5), ("magnet", own, None, 0.0, 5),
                      *(("magnet", own, "ar", w, 5) for w in WEIGHTS), *(("hybrid", s, None, 0.0, 5) for s in PROMPTS)]
    assert {row["right"] for row in rows} == {"3434"}
    assert [bool(row["rescorer"]) for row in rows] == [w > 0 for *_, w, _ in played]


def test_a_paired_difference_takes_each_prompt_once_and_averages_its_seeds():
    mean, low, high = paired_difference([{"right": "5544"}, {"right": "5544"}], [{"right": "5434"}, {"right": "5454"}])
    assert mean == pytest.approx(5)  # 5 5 4 4 against 5 4 4 4: one attribute of the five in one clip of four
    assert mean - low == pytest.approx(1.96 * 5) == pytest.approx(high - mean)  # 0, 20, 0, 0


def test_differences_are_told_for_each_rescorer_weight_and_for_a_hybrid_used_in_one_way_only(capsys):
    rows = [{"method": m, "setting": s, "right": "5555" if m == "hybrid" else "4444"} for m, s in (
        ("autoregressive", ""), ("MAGNeT", ""), ("MAGNeT + rescoring", "w 0.5"), ("hybrid", "0 s"), ("hybrid", "1 s"),
        ("hybrid", "4 s"))]
    compare.print_differences(rows)
    assert capsys.readouterr().out.splitlines() == [
        "MAGNeT + rescoring w 0.5 against MAGNeT: +0.0 points (+0.0 to +0.0)",
        "hybrid 0 s against MAGNeT: +20.0 points (+20.0 to +20.0)",
        "hybrid 4 s against autoregressive: +20.0 points (+20.0 to +20.0)"]


def test_latency_times_both_ways_of_decoding_once_and_is_drawn(call, monkeypatch, capsys):
    flags = "latency --shape tiny --batches 1 2 --lengths 0.2 0.4 --repeats 1 --dtype fp32"
    rows = read_rows(call(flags) / "latency.csv")
    assert [(row["method"], row["length"], row["batch"]) for row in rows] == [
        (method, length, batch) for method in ("magnet", "ar") for length in ("0.2", "0.4") for batch in ("1", "2")]
    assert all(float(row["seconds"]) > 0 for row in rows)
    monkeypatch.setattr(compare, "seconds_of", None)
    assert read_rows(call(flags) / "latency.csv") == rows
    capsys.readouterr()
    assert len(list(call("plot").glob("latency-tiny-float32-cpu*.png"))) == 1
    assert capsys.readouterr().out.count(" s | ") == 2, "a row for each length"


def row(method, batch, seconds, length="4"):
    return {"method": method, "batch": str(batch), "seconds": str(seconds), "length": length}


def test_crossings_lie_between_the_batches_where_the_faster_one_changes():
    rows = [row("magnet", b, b) for b in (1, 4, 16)] + [row("ar", b, s) for b, s in ((1, 3), (4, 8), (16, 8))]
    assert 4 < crossings(rows)["4"] < 16  # 3 times, 2 times and half of MAGNeT's seconds
    assert crossings([row("magnet", 1, 1), row("ar", 1, 2)]) == {"4": None}
    assert crossings([row("magnet", 1, 1), row("ar", 1, 0.5)]) == {"4": 1}
    assert crossings([row("magnet", 1, 1), row("ar", 1, float("nan"))]) == {"4": None}


def test_the_table_of_latency_is_of_seconds_per_clip(capsys):
    compare.print_latency([row("magnet", 1, 1), row("magnet", 4, 4), row("ar", 1, 1.5), row("ar", 4, 2)])
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "| 4 s | 1 / 1.5 | 1 / 0.5 | 2 clips |"  # by a half slower, then by a half faster


def test_compare_says_what_is_missing_or_wrong(call, tiny_models, tmp_path):
    for flags, words in (("quality", "at least one of --magnet, --ar, --hybrid"), ("plot", "holds neither"),
                         (f"quality --ar {tmp_path / 'magnet.pt'} --n 4", "--ar .*: the model's objective is magnet"),
                         ("latency --shape tiny --batches 0", "--batches and --repeats must be at least 1")):
        with pytest.raises(ValueError, match=words):
            call(flags)
