"""What the experiments promise: results that are written whole, found again, and drawn as they are."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from encodec_wrap import load_codec
from experiments import ablations, full_size, plots
from experiments.ablations import SAMPLING_CELLS, add_row, columns_of, read_rows
from model import load_model
from t5_encoder import T5Config, T5Encoder


@pytest.fixture
def ablate(call, tmp_path, monkeypatch):
    """ablate("flags", measure) runs the ablations, with `measure` in place of listening, and writes into tmp_path."""
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)

    def ablate(flags, measure):
        monkeypatch.setattr(ablations, "measure", measure)
        return call(ablations, *flags.split())

    return ablate


def test_ablations_measure_each_cell_once_and_each_with_its_own_settings(ablate, call, tmp_path, monkeypatch):
    measured = []

    def measure(model, config, seed, args, span_len):
        measured.append((model, config.guidance_start, config.guidance_end, seed, span_len))
        return {"overall_seen": 0.5, "overall_unseen": 0.25, "frechet": 3.0, "diversity": 7.25,
                "right": "55" if config.guidance_end == 3 else "54"}

    for _ in range(2):
        ablate("guidance --model toy --seeds 0 1", measure)
    assert len(measured) == len(set(measured)) == 2 * len(SAMPLING_CELLS["guidance"])
    assert ("toy", 10.0, 1.0, 1, 3) in measured and ("toy", 3.0, 3.0, 0, 3) in measured
    rows = read_rows(tmp_path / "guidance.csv")
    assert len(rows) == len(measured) and tuple(rows[0]) == columns_of("toy")
    assert {len(row["model"].removeprefix("toy ")) for row in rows} == {8}, "the name and whose weights"
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    printed = [line for flags in ((), ("--against", "constant 3")) for line in call(plots, *flags).out.splitlines()]
    row = "| constant 3 | 50.0% (40%-60%) | 25.0% (18%-34%) | 3 | 7.2 | +10.0 (-9.6 to +29.6) |"
    # intervals of 100 clips, 50 for each seed; against 3 -> 1: one attribute of five more in one clip of two
    assert row in printed and any("| 10 -> 1 | " in line and "| -10.0 (" in line for line in printed)
    assert (tmp_path / "guidance.png").read_bytes()[1:4] == b"PNG" and ablate("length --seeds 0", measure).code == 0
    assert [span_len for *_, span_len in measured[-5:]] == [1, 2, 3, 5, 10]
    ablate("steps --seeds 0 --settings 5", measure)
    assert len(read_rows(tmp_path / "steps.csv")) == 1 and ablate("steps --settings 6", measure).code == 2
    ablate("steps --seeds 0 --settings 5 --n 8", measure)
    assert "steps.csv: has rows of several" in call(plots).err, "8 prompts and 100 are not averaged"


def test_spans_train_once_and_go_on_where_they_were_cut(ablate, tmp_path, monkeypatch):
    commands, flags = [], f"spans --seeds 0 --out {tmp_path}/runs --span-lengths 3 --train-flags=--dropout=0.5"

    def train(command, **_):
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        if "--resume" not in command:  # cut after its first checkpoint
            out.mkdir(parents=True)
            (out / "checkpoint.pt").touch()
            raise KeyboardInterrupt
        values = {f"val_{k}_{rate}": k + 1 + rate for k in range(4) for rate in (0.1, 0.3)}
        add_row(out / "log.csv", {"step": 5, **values}, ("step", *values))

    monkeypatch.setattr(ablations, "CONTEXTS", (100.0,))
    monkeypatch.setattr(ablations.subprocess, "run", train)
    assert ablate(flags, None).code == 130
    for _ in range(2):
        ablate(flags, lambda *_, **__: {"overall_seen": 0.5})
    assert len(commands) == 2 and commands[1] == [*commands[0], "--resume"] and "dropout_0.5" in commands[0][3]
    assert "--span-len 3 --context-ms 100.0" in " ".join(commands[0]) and commands[0][-1] == "--dropout=0.5"
    row, = read_rows(tmp_path / "spans.csv")
    assert row["setting"] == "span 3, context restricted" and row["model"] == "--dropout=0.5"
    assert [float(row[f"val_{k}"]) for k in (1, 2, 3, 4)] == [1.2, 2.2, 3.2, 4.2]


@pytest.mark.parametrize("sounds", [False, True])
def test_full_size_models_are_laid_out_as_published_and_load_back(sounds, tmp_path, monkeypatch):
    """At a tiny size. The music models name a codec of another repository, the sound-effect models hold their own."""
    monkeypatch.setattr(full_size, "SIZES", {"small": {"dim": 16, "n_heads": 2, "n_layers": 1}})
    monkeypatch.setattr(full_size, "T5", dict.fromkeys(("t5-base", "t5-large"), T5Config(32128, 8, 4, 8, 1, 2)))
    for name in ("CODEC_32KHZ", "CODEC_16KHZ"):
        tiny = replace(getattr(full_size, name), n_filters=2, dimension=4, codebook_size=16)
        monkeypatch.setattr(full_size, name, tiny)
    full_size.write_all(Namespace(sounds=sounds, autoregressive=False, size="small", clip=10.0), tmp_path / "model")
    model, companions = load_model(tmp_path / "model")
    assert (model.config.dim, model.config.n_layers, model.config.seconds) == (16, 1, 10)
    assert companions.sampling["schedule"] == "released"
    assert companions.sampling["temperature"] == (3.5 if sounds else 3.0)
    assert load_codec(companions.codec).config == (full_size.CODEC_16KHZ if sounds else full_size.CODEC_32KHZ)
    assert companions.text_encoder == str(tmp_path / "model" / ("t5-large" if sounds else "t5-base"))
    assert T5Encoder.from_pretrained(companions.text_encoder).config.d_model == 8
