"""What training promises: the loss of each objective, the recipe [Sec. 4], and runs that stop, go on and split up.

Read in this order: the masks; the three losses, each by what it asks of which position; the batch of a step;
validation; the recipe; what each setting changes (the table TRAINING); whole runs; stopping and resuming; several
processes; the command line. The models are tiny and know no music: numbers are shown to be equal, or to differ.
"""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_one_line, drawn, losses, read_log, read_state, write_tone
from filelock import FileLock
from torch import nn

import sample
import train
from encodec_wrap import TOY_CODEC, load_codec
from masking import causal_attention_mask, delay_codes, hybrid_attention_mask, spans_from_starts
from model import MAGNeT, ModelConfig, load_model
from support.data import Clips
from train import LOSSES, TrainConfig, draw_batch, hybrid_loss_mask, learning_rate, validate

T, K, MASK = 20, 4, 16  # frames, codebooks, and the mask token of a model with 16 entries
ALL = torch.ones(2, T, dtype=torch.bool)


@pytest.fixture
def codes(generator):
    return torch.randint(16, (2, K, T), generator=generator)


def in_spans(hidden, span_len):
    """Whether every hidden frame lies in a span of that many hidden frames, or in one that is cut at the end."""
    starts = F.pad(hidden, (0, span_len - 1), value=True).unfold(1, span_len, 1).all(dim=2)
    return spans_from_starts(starts, span_len).equal(hidden)


def test_draw_hidden_draws_another_rate_for_every_clip_two_over_pi_on_average(generator):
    rates = train.draw_hidden(4000, 200, 3, generator).float().mean(dim=1)
    assert rates.mean() == pytest.approx(2 / math.pi, abs=0.015)
    for r in (0.2, 0.5, 0.8, 0.95):  # cos(pi t / 2) with t ~ U(0, 1) is below r in 1 - 2/pi * acos(r) of all cases
        assert (rates < r).float().mean() == pytest.approx(1 - 2 / math.pi * math.acos(r), abs=0.04)
    for n_frames in (1, 7, 50):
        hidden = train.draw_hidden(500, n_frames, 3, generator)
        assert hidden.any(dim=1).all() and in_spans(hidden, 3), f"of {n_frames} frames"


# ----------------------------------------------------------------------------------------------------------- the losses

class Oracle(nn.Module):
    """Stands for the model: gives logits which were chosen beforehand, and remembers what it was shown."""

    def __init__(self, B, T, card):
        super().__init__()
        self.mask_id, self.config = card, ModelConfig(n_codebooks=1, card=card)
        self.logits = nn.Parameter(torch.randn(B, T, card, generator=torch.Generator().manual_seed(1)))

    def forward(self, inputs, stage, text=None, text_mask=None):
        self.inputs, self.stage = inputs, stage
        return self.logits


@pytest.mark.parametrize("stage", [0, 2])
def test_masked_cross_entropy_asks_for_the_hidden_tokens_of_one_codebook_that_are_not_padding(stage, codes):
    """The sum by hand; other positions get no gradient; nothing hidden and no later codebook is shown."""
    hidden = torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.6
    loss_mask = hidden & (torch.arange(T) < torch.tensor([[T], [12]]))
    oracle = Oracle(2, T, 16)
    loss = train.masked_cross_entropy(oracle, codes, stage, hidden, loss_mask, None, None)
    by_hand = 0.0
    for b, t in loss_mask.nonzero().tolist():
        exponentials = [math.exp(x) for x in oracle.logits[b, t].tolist()]
        by_hand -= math.log(exponentials[codes[b, stage, t]] / sum(exponentials))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert (oracle.logits.grad.abs().sum(dim=2) > 0).equal(loss_mask), "gradient exactly where a token counts"
    assert oracle.stage == stage and oracle.inputs[:, :stage].equal(codes[:, :stage]), "codebooks below are shown"
    assert oracle.inputs[:, stage].equal(codes[:, stage].masked_fill(hidden, MASK)), "hidden, padding or not"
    assert (oracle.inputs[:, stage + 1:] == MASK).all(), "codebooks above are hidden"


def test_next_token_cross_entropy_reads_each_token_off_the_position_before_its_own(codes, make_magnet):
    """Written out: frame f of codebook k is read off position f + k, by head k."""
    model = make_magnet(objective="ar")
    logits = model(delay_codes(codes, MASK), None, mask=causal_attention_mask(T + K, T + K)).log_softmax(dim=-1)
    by_hand = -sum(logits[b, k, f + k, codes[b, k, f]] for b in range(2) for k in range(K) for f in range(T))
    loss = train.next_token_cross_entropy(model, codes, ALL[:, None].expand(-1, K, -1), None, None)
    torch.testing.assert_close(loss, by_hand)


def test_next_token_cross_entropy_hides_the_codebooks_that_are_not_shown(codes, make_magnet):
    model, shown = make_magnet(objective="ar"), torch.tensor([[True, True, False, False], [True] * 4])[..., None]
    losses = []
    for k in (None, 3, 1):  # a token of a hidden codebook changes nothing, one of a codebook that is shown does
        other = codes.clone()
        if k is not None:
            other[0, k] = (other[0, k] + 1) % 16
        losses.append(train.next_token_cross_entropy(model, other, shown & ALL[:, None], None, None, shown))
    assert losses[1].equal(losses[0]) and not losses[2].equal(losses[0])


def test_hybrid_cross_entropy_shows_the_prompt_then_what_magnet_shows_and_reads_the_position_before(codes, make_magnet):
    """Two clips with a stage and a prompt of their own: the token (k, t) stands at position t + k + 1 and is read off
    position t + k."""
    model, seen, stages, prompts = make_magnet(objective="hybrid", context=2), [], torch.tensor([0, 2]), (8, 5)
    hidden = (torch.arange(T) % 3 > 0) & (torch.arange(T) >= (torch.tensor(prompts) - stages)[:, None])
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.append((args[0], kwargs["mask"])),
                                    with_kwargs=True)
    loss_mask = hybrid_loss_mask(ALL, K, stages, hidden, torch.tensor(prompts))
    loss = train.hybrid_cross_entropy(model, codes, stages, hidden, torch.tensor(prompts), loss_mask, None, None)
    inputs, mask = seen[0]
    expected = torch.full((2, K, T + K), MASK)
    for b, k, t in torch.ones(2, K, T).nonzero().tolist():
        if t + k + 1 <= prompts[b] or k < stages[b] or k == stages[b] and not hidden[b, t]:
            expected[b, k, t + k + 1] = codes[b, k, t]
    assert inputs.equal(expected), f"differs at clip, codebook, position {(inputs != expected).nonzero()[0].tolist()}"
    assert mask.equal(hybrid_attention_mask(T + K, torch.tensor(prompts), stages, 2)), "as the picture in masking.py"
    log_probs = model(expected, None, mask=mask).log_softmax(dim=-1)
    by_hand = -sum(log_probs[b, k, t + k, codes[b, k, t]] for b, k, t in loss_mask.nonzero().tolist())
    torch.testing.assert_close(loss, by_hand)


def test_hybrid_loss_mask_counts_the_prompt_and_the_hidden_tokens_of_the_stage_and_no_padding():
    """K = 2, 6 frames, two of which are padding; a prompt of 3 frames, of 2 in the second codebook, which is hidden."""
    valid, hidden = torch.arange(6)[None] < 4, torch.arange(6)[None] >= 2
    for stage, rows in ((0, ["xxxx..", "xx...."]), (1, ["xxx...", "xxxx.."])):
        counted = hybrid_loss_mask(valid, 2, torch.tensor([stage]), hidden, torch.tensor([3]))
        assert drawn(counted[0]) == rows, f"stage {stage}"


@pytest.fixture
def clips(generator):
    """12 clips of 20 frames, the last four of which end after nine; every third has no caption."""
    text = [torch.randn(n, 8, generator=generator).half() for n in (3, 0, 5)]
    codes = torch.randint(16, (12, K, T), generator=generator).to(torch.int16)
    return Clips(codes, torch.tensor([T] * 8 + [9] * 4), text, torch.arange(12) % 3)


def draw(clips, n, generator, **settings):
    return draw_batch(clips, TrainConfig(batch_size=n, **settings), K, generator)


def test_draw_batch_draws_clips_at_random_and_drops_the_text_of_three_in_ten(clips, generator):
    batch = draw(clips, 2000, generator)
    numbers = torch.stack([(batch["codes"] == row).all(dim=(1, 2)) for row in clips.codes]).float().mean(dim=1)
    assert numbers.tolist() == pytest.approx([1 / 12] * 12, abs=0.03), "every clip as often as any other"
    assert batch["text_mask"].any(dim=1).float().mean() == pytest.approx(0.7 * 2 / 3, abs=0.04)


def test_draw_batch_draws_one_stage_for_all_clips_of_a_magnet_as_often_as_its_weight(clips, generator):
    stages = torch.stack([draw(clips, 2, generator, stage_weights=(3.0, 1.0, 0.0))["stage"] for _ in range(400)])
    assert (stages[:, 0] == stages[:, 1]).all()
    assert (stages[:, 0].bincount(minlength=K) / 400).tolist() == pytest.approx([0.75, 0.25, 0, 0], abs=0.07)
    stages = draw(clips, 400, generator, objective="hybrid", stage_weights=(0.0, 1.0))["stage"]
    assert (stages.bincount(minlength=K) / 400).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.07), \
        "a hybrid: one for each clip; the last weight is that of all codebooks that follow"


def test_draw_batch_counts_what_is_hidden_and_no_padding(clips, generator):
    batch = draw(clips, 500, generator)
    short = (batch["codes"][:, None] == clips.codes[8:]).all(dim=(2, 3)).any(dim=1)
    valid = torch.arange(T) < torch.where(short, 9, T)[:, None]
    assert in_spans(batch["hidden"], 3) and batch["hidden"][~valid].any(), "padding may be hidden"
    assert batch["loss_mask"].equal(batch["hidden"] & valid)


def test_draw_batch_of_a_hybrid_draws_prompts_of_every_length_and_spans_behind_them(clips, generator):
    batch = draw(clips, 4000, generator, objective="hybrid")
    n_prompt, hidden = batch["n_prompt"], batch["hidden"]
    assert (n_prompt.bincount(minlength=T) / 4000).tolist() == pytest.approx([1 / T] * T, abs=0.015), "0 to T - 1"
    first = (n_prompt - batch["stage"]).clamp(min=0)[:, None]  # where codebook `stage` goes on after the prompt
    behind = torch.arange(T) >= first
    assert not (hidden & ~behind).any() and hidden.any(dim=1).all()
    rates = hidden.sum(dim=1) / behind.sum(dim=1)
    assert rates[first[:, 0] < 10].mean() == pytest.approx(2 / math.pi, abs=0.03), "a share of that part's own length"


def test_draw_batch_hides_the_later_codebooks_of_some_clips_from_an_autoregressive_model(clips, generator):
    batch = draw(clips, 2000, generator, objective="ar", codebook_dropout=0.5)
    shown = batch["shown"][..., 0]  # (B, K)
    assert shown[:, 0].all() and (shown[:, 1:] <= shown[:, :-1]).all(), "always the first ones"
    assert (~shown[:, 3]).float().mean().item() == pytest.approx(0.5 * 3 / 4, abs=0.05)
    assert not (batch["loss_mask"] & ~batch["shown"]).any(), "what is hidden is not asked for"


def test_validate_hides_spans_at_each_fixed_rate_on_clips_from_all_over_the_set(make_magnet):
    """Clip i of 200 holds nothing but i, so that the inputs tell which clips are used."""
    model, inputs = make_magnet(card=200, n_layers=1), []
    model.register_forward_pre_hook(lambda model, args: inputs.append(args[:2]))
    codes = torch.arange(200)[:, None, None].expand(200, K, 60).to(torch.int16)
    clips = Clips(codes, torch.full((200,), 60), [torch.zeros(0, 8)], torch.zeros(200).long())
    validate(model, clips, "cpu", nullcontext)
    used = {int(row[0, 0]) for codes, stage in inputs if stage == 1 for row in codes}
    assert len(used) == 64 and all(len(used & set(range(i, i + 50))) == 16 for i in range(0, 200, 50)), "a quarter each"
    for stage in range(K):
        hidden = torch.cat([codes[:, stage] == 200 for codes, s in inputs if s == stage]).view(4, 64, 60)
        for rate, rows in zip((0.25, 0.5, 0.75, 1.0), hidden, strict=True):
            assert rows.float().mean() == pytest.approx(rate, abs=0.05) and in_spans(rows, 3), (stage, rate)


@pytest.mark.parametrize("objective, kinds", [("magnet", [0.25, 0.5, 0.75, 1.0]), ("ar", ["ar"]),
                                              ("hybrid", [0.25, 0.5, 0.75, 1.0, "ar"])])
def test_validate_measures_what_was_trained_alike_each_time_and_gives_chance_for_a_model_that_knows_nothing(
        objective, kinds, clips, make_magnet):
    model, random_state = make_magnet(objective=objective), torch.get_rng_state()
    assert validate(model, clips, "cpu", nullcontext) == validate(model, clips, "cpu", nullcontext)
    assert torch.get_rng_state().equal(random_state), "training would go on otherwise than without it"
    for head in model.heads:
        nn.init.zeros_(head.weight)
    values = validate(model, clips, "cpu", nullcontext)
    assert list(values) == list(range(K)) and all(list(row) == kinds for row in values.values())
    assert all(value == pytest.approx(math.log(16), rel=1e-5) for row in values.values() for value in row.values())


def test_validate_does_not_count_padding_and_gives_nan_where_nothing_counts(clips):
    oracle, real = Oracle(12, T, 16), clips.batch(torch.arange(12))["valid"]
    with torch.no_grad():  # it knows the tokens of all frames that are not padding
        oracle.logits.copy_(100.0 * F.one_hot(clips.codes[:, 0].long(), 16) * real[..., None])
    assert list(validate(oracle, clips, "cpu", nullcontext)[0].values()) == pytest.approx([0] * 4)
    clips.n_frames = torch.zeros_like(clips.n_frames)
    values = validate(oracle, clips, "cpu", nullcontext)[0].values()
    assert all(math.isnan(value) for value in values), "not 0.0, which is a perfect loss"


# ----------------------------------------------------------------------------------------------------------- the recipe

def test_learning_rate_rises_linearly_and_then_falls_as_a_cosine_to_zero():
    config = TrainConfig(lr=2.0, warmup=10, steps=110)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    wanted = [2, 1 + math.cos(math.pi / 4), 1, 0]
    assert [rates[i] for i in (10, 35, 60, 110)] == pytest.approx(wanted, abs=1e-9)
    for warmup, steps in [(0, 5), (5, 5), (9, 5), (4, 5)]:
        config = TrainConfig(lr=1.0, warmup=warmup, steps=steps)
        assert all(0 < learning_rate(step, config) <= 1 for step in range(steps)), (warmup, steps)


def test_update_ema_moves_by_one_minus_the_decay_and_faster_at_first():
    ema, model = (nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in range(2))
    for step, expected in ((10_000, 0.9 * 1 + 0.1 * 2), (0, 0.1 * 1 + 0.9 * 2)):
        ema.weight.fill_(1.0)
        model.weight.fill_(2.0)
        train.update_ema(ema, model, 0.9, step)
        assert ema.weight.item() == pytest.approx(expected) and model.weight.item() == 2.0


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.fixture(scope="module")
def watch(train_tiny, tmp_path_factory):
    """watch(flags) trains for two steps and gives what went on: the `parts` of the batches; at every step of the
    optimiser its `rates` and `gradients`; the weights at the `start` and in the `run` at the end; and the `type` of the
    products. Nothing is replaced: hooks look on."""
    def watch(flags=""):
        seen = SimpleNamespace(parts=[], rates=[], gradients=[])

        class Watched(train.Run):
            def __init__(self, *args):
                super().__init__(*args)
                seen.run, seen.start = self, flat(self.model.parameters()).clone()
                self.optimizer.register_step_pre_hook(self.look)
                self.model.blocks[0].linear1.register_forward_hook(lambda *args: setattr(seen, "type", args[2].dtype))

            def look(self, optimizer, *_):
                seen.rates.append(optimizer.param_groups[0]["lr"])
                seen.gradients.append(flat(p.grad for p in self.model.parameters() if p.grad is not None))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "Run", Watched)
            for objective, loss in LOSSES.items():
                patch.setitem(LOSSES, objective, lambda model, loss=loss, **part: (
                    seen.parts.append(part) or loss(model, **part)))
            train_tiny(tmp_path_factory.mktemp("watched"), f"--steps 2 {flags}")
        return seen

    return watch


def test_train_sets_the_rate_of_the_schedule_before_each_step_of_adamw(watch):
    seen = watch("--lr 0.004 --warmup 2 --steps 5")
    assert seen.rates == pytest.approx([learning_rate(i, TrainConfig(lr=0.004, warmup=2, steps=5)) for i in range(5)])
    groups = seen.run.optimizer.param_groups
    assert type(seen.run.optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.1 for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(seen.run.model.parameters()))


def test_train_clips_the_gradient_as_a_whole_to_its_norm(watch):
    free, clipped = watch("--clip-norm 1e9").gradients, watch("--clip-norm 0.1").gradients
    assert all(gradient.norm() > 0.5 for gradient in free)
    assert [gradient.norm().item() for gradient in clipped] == pytest.approx([0.1] * 2, rel=1e-3)
    torch.testing.assert_close(clipped[0], free[0] * 0.1 / free[0].norm()), "its direction stays"


def test_train_takes_the_average_after_the_step(watch):
    """After the first step the average is 0.1 of the weights before it and 0.9 of those after it."""
    seen = watch("--steps 1 --warmup 0 --lr 0.01")
    after = flat(seen.run.model.parameters())
    assert (after - seen.start).abs().max() > 0.005
    torch.testing.assert_close(flat(seen.run.ema.parameters()), 0.1 * seen.start + 0.9 * after, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", LOSSES)
def test_train_in_parts_has_the_gradient_of_the_mean_over_all_tokens_of_the_batch(objective, watch):
    flags = f"--objective {objective} --clip-norm 1e9 --condition-dropout 0"
    whole, parts = watch(flags), watch(f"{flags} --accumulate 4")
    assert len(whole.parts) == 2 and len(parts.parts) == 8
    torch.testing.assert_close(parts.gradients[0], whole.gradients[0], atol=1e-6, rtol=1e-3)
    torch.manual_seed(0)
    model = MAGNeT(whole.run.model.config)
    batch = whole.parts[0]
    (LOSSES[objective](model, **batch) / batch["loss_mask"].sum()).backward()
    by_hand = flat(p.grad for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(whole.gradients[0], by_hand, atol=1e-6, rtol=1e-3)


TRAINING = {  # a value of each setting that is not the default one; FLAGS: what it needs beside it
    "objective": "ar", "data": "music", "codec": "codec.pt", "text_encoder": "text", "n_codebooks": 2, "seconds": 0.5,
    "audio_key": "file", "caption_key": "words", "toy_clips": 7, "text_len": 40, "dim": 48, "n_heads": 4, "n_layers": 3,
    "dropout": 1.0, "span_len": 50, "context_ms": 30.0, "train_blocks": 1, "steps": 3, "batch_size": 6,
    "stage_weights": "0 0 0 1", "lr": 0.4, "warmup": 1, "weight_decay": 50, "ema_decay": 0, "condition_dropout": 1,
    "codebook_dropout": 0, "seed": 1, "dtype": "bf16"}
FLAGS = {"audio_key": "--data list.jsonl", "caption_key": "--data list.jsonl", "codebook_dropout": "--objective ar"}


def other_codec(path):
    codec = load_codec("toy")
    next(codec.parameters()).mul_(1.1)
    codec.save(path)


@pytest.fixture(scope="module")
def logged(train_tiny, tmp_path_factory):
    """logged(flags) trains for two steps -> the rows of log.csv, beside the files that TRAINING names."""
    folder = tmp_path_factory.mktemp("folder")
    for place, hertz in (("music/a.wav", 440), ("music/b.wav", 500), ("s.wav", 600)):
        write_tone(folder / place, "a flute", 2, hertz)
    line = {"location": "music/a.wav", "file": "s.wav", "main_caption": "", "words": "a flute"}
    (folder / "list.jsonl").write_text(json.dumps(line))
    other_codec(folder / "codec.pt")
    shutil.copytree(ROOT / "toy" / "weights" / "text", folder / "text")
    weights = torch.load(folder / "text" / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor * 0 for name, tensor in weights.items()}, folder / "text" / "pytorch_model.bin")

    def logged(flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return read_log(train_tiny(tmp_path_factory.mktemp("run"), f"--steps 2 --batch-size 16 {flags}"))
    return functools.cache(logged)


@pytest.mark.parametrize("setting", [field.name for field in fields(TrainConfig)
                                     if field.name not in ("accumulate", "clip_norm")])  # in the recipe, see above
def test_a_setting_of_train_config_changes_the_run(setting, logged):
    flags = FLAGS.get(setting, "")
    assert logged(flags) != logged(f"{flags} --{setting.replace('_', '-')} {TRAINING[setting]}")


def test_train_scales_the_loss_for_float16_only(watch):
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        seen = watch(f"--dtype {name} --steps 1")
        assert seen.type == dtype and seen.run.scaler.is_enabled() == (name == "fp16")


def test_model_config_turns_the_context_into_frames_to_the_nearest_and_a_negative_one_into_everywhere():
    codec = SimpleNamespace(n_codebooks=1, codebook_size=16, frame_rate=50.0)
    encoder = SimpleNamespace(config=SimpleNamespace(d_model=8))
    for ms, frames in ((100, 5), (30, 2), (0, 0), (-1, -1)):
        config = train.model_config([], TrainConfig(context_ms=ms, dim=8, n_heads=1), {}, codec, encoder)
        assert config.context == frames, f"{ms} ms at 50 frames a second"


# ----------------------------------------------------------------------------------------------------------- whole runs

def assert_same(a, b, where="checkpoint"):
    """Two nested structures are equal, every bit of them."""
    assert type(a) is type(b), where
    if isinstance(a, dict | list | tuple):
        a, b = (dict(x if isinstance(x, dict) else enumerate(x)) for x in (a, b))
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same(a[name], b[name], f"{where}/{name}")
    else:
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b, where


def test_train_logs_each_codebook_and_rate_as_the_averaged_weights_have_them(tiny_run, watch):
    rows = read_log(tiny_run)
    assert [int(row["step"]) for row in rows] == list(range(1, 11)) and abs(losses(tiny_run)[0] - math.log(256)) < 1.2
    assert [bool(row["val_0_0.5"]) for row in rows] == [step in (5, 10) for step in range(1, 11)]
    values = validate(load_model(tiny_run)[0], watch().run.valid_clips, "cpu", nullcontext)
    expected = {f"val_{k}_{rate}": value for k, row in values.items() for rate, value in row.items()}
    assert set(rows[-1]) == {"step", "loss", "lr", "chance", *expected}
    assert {name: float(rows[-1][name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_train_logs_the_mean_loss_per_hidden_token_since_the_last_row(train_tiny, tiny_run, tmp_path):
    mean = [sum(losses(tiny_run)[i:i + 5]) / 5 for i in (0, 5)]
    assert losses(train_tiny(tmp_path / "run", "--log-every 5")) == pytest.approx(mean, rel=1e-4)


def test_train_init_from_takes_the_averaged_weights_and_nothing_else(call, train_tiny, tiny_run, tmp_path):
    state = read_state(train_tiny(tmp_path / "run", f"--init-from {tiny_run} --steps 1 --lr 1e-9 --seed 5"))
    assert state["step"] == 1 and all(entry["step"] == 1 for entry in state["optimizer"]["state"].values())
    for weights in (state["model"], state["ema"]):
        torch.testing.assert_close(weights, read_state(tiny_run)["ema"], atol=1e-6, rtol=0)
    flags = ["--init-from", tiny_run, "--objective", "ar", "--cache", train_tiny.cache, *TINY, "--steps", 1]
    ended = call(train, "--out", "ar", *flags)
    assert ended.code == 0 and "was trained for the objective magnet; this run is ar" in ended.out


def test_train_writes_audio_samples_when_asked(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "run", "--sample-every 2 --steps 2 --sample-captions flute")
    assert [path.name for path in (run / "samples").iterdir()] == ["step-000002.wav"]


# ------------------------------------------------------------------------------------------------ stopping and resuming

def at_step(step, act):
    """`learning_rate`, which the loop calls in every step; in one of them act() goes first, and may give the rate."""
    return lambda i, config: (act() if i == step else None) or learning_rate(i, config)


def test_train_resume_after_a_crash_ends_bit_for_bit_as_if_never_stopped(train_tiny, tmp_path, monkeypatch):
    """In the eighth step: the checkpoint is of step 5, the log has rows of steps that will be made again."""
    def crash():
        raise MemoryError

    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "log.csv").write_text("step,val_0\n1,5\n")  # of a run that came to no checkpoint
    whole, run = train_tiny(tmp_path / "whole", "--dropout 0.2"), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "learning_rate", at_step(7, crash))
        train_tiny(run, "--dropout 0.2")
    assert read_state(run)["step"] == 5 and len(read_log(run)) == 7
    with (run / "log.csv").open("a") as file:
        file.write("8,5.1")  # a row that was torn
    train_tiny(run, "--resume")
    assert read_log(run) == read_log(whole)
    assert_same(read_state(run), read_state(whole))


@pytest.mark.parametrize("number, code, flags", [
    (signal.SIGINT, 130, "--log-every 4"), (signal.SIGTERM, 143, "--objective hybrid --log-every 4 --dropout 0.2")])
def test_train_stops_at_a_signal_with_a_checkpoint_from_which_it_goes_on(
        number, code, flags, call, train_tiny, tiny_run, tmp_path, monkeypatch):
    whole = train_tiny(tmp_path / "whole", flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", at_step(2, lambda: os.kill(os.getpid(), number)))
        ended = call(train, "--out", "run", "--cache", train_tiny.cache, *TINY, *flags.split())
    assert ended.code == code and ended.err.splitlines()[-1] == "stopped", ended.err
    assert read_state(tmp_path / "run")["step"] == 3, "the step in which the signal came is finished"
    run = train_tiny(tmp_path / "run", "--resume " + flags)
    assert read_log(run) == read_log(whole), "no extra row, and means over the steps before the stop and after it"
    assert_same(read_state(run), read_state(whole))


@pytest.mark.parametrize("step, message", [(6, "step 8: training diverged (loss nan"), (9, "step 10: training div")])
def test_train_that_diverges_stops_with_one_line_and_keeps_the_last_finite_checkpoint(
        step, message, call, train_tiny, tiny_run, tmp_path, monkeypatch):
    """A rate of infinity makes the weights useless: the next loss shows it, or the checkpoint that is due."""
    monkeypatch.setattr(train, "learning_rate", at_step(step, lambda: math.inf))
    ended = call(train, "--out", "run", "--cache", train_tiny.cache, *TINY)
    assert_one_line(ended, message, "the last checkpoint is kept")
    state = read_state(tmp_path / "run")
    assert state["step"] == 5 and all(x.isfinite().all() for name in ("model", "ema") for x in state[name].values())


def test_train_touches_a_run_only_to_resume_it_with_its_settings_in_any_precision_and_not_if_finished_or_in_use(
        train_tiny, tiny_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(ValueError, match="holds a run already.*--resume"):
        train_tiny(run)
    with pytest.raises(ValueError, match="goes on with dim 32; --dim 96"):
        train_tiny(run, "--resume --dim 96")
    with FileLock(run / ".lock"), pytest.raises(ValueError, match="another process trains there"):
        train_tiny(run, "--resume")
    monkeypatch.setattr("support.training.pick_dtype", lambda *_: torch.float16)  # on another machine
    train_tiny(run, "--resume")
    assert_same((read_state(run), read_log(run)), (read_state(tiny_run), read_log(tiny_run)))
    assert sorted(os.listdir(run)) == [".lock", "checkpoint.pt", "log.csv"]


# Both objectives in one launch of the two processes, because it is the launch that takes long.
TWO = """
import atexit, glob, sys, time, torch, train
threads = lambda: time.sleep(1) or [next(open(x)) for x in glob.glob("/proc/self/task/*/comm")]  # ended ones are gone
atexit.register(lambda: print(f"seed {torch.initial_seed()} {threads()}"))
flags = sys.argv[1:]
for objective in ("magnet", "hybrid"):
    sys.argv = ["train.py", *flags, "--out", objective, "--objective", objective]
    train.main()
"""


def test_train_in_two_processes_has_losses_and_gradients_of_one_and_ends_its_threads(train_tiny, tiny_run, tmp_path):
    """AdamW's first moment is a sum of gradients: unlike the weights, it shows their scale."""
    (tmp_path / "two.py").write_text(TWO)
    flags = "--steps 3 --accumulate 2 --clip-norm 1e9 --lr 1e-6"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"]
    ended = subprocess.run([*launcher, "--cache", train_tiny.cache, *TINY, *flags.split()], cwd=tmp_path,
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    assert "gloo" not in ended.stdout, "a thread that outlives Python aborts the process, now and then"
    assert len(set(re.findall(r"seed (\d+)", ended.stdout))) == 2, "each drops out other values"
    for objective in ("magnet", "hybrid"):
        one, two = train_tiny(tmp_path / "one" / objective, f"{flags} --objective {objective}"), tmp_path / objective
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        moments = [flat(entry["exp_avg"] for entry in read_state(run)["optimizer"]["state"].values())
                   for run in (one, two)]
        torch.testing.assert_close(*moments, atol=1e-6, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- command line

WRONG = {  # flags: what the line names
    "--data missing": "missing", "--data empty": "empty", "--resume": "there is no run", "--device nosuch": "nosuch",
    "--codec nosuch": "nosuch", "--text-encoder nosuch": "nosuch", "--text-encoder empty": "config.json",
    "--n-codebooks 5": "codebooks", "--steps 0": "steps must be", "--batch-size 3 --accumulate 2": "--batch-size 3",
    "--n-heads 7": "n_heads", "--init-from missing": "missing", "--stage-weights 0 0 0 0 1": "none of 4 codebooks",
    "--lr nan": "lr must be", "--dim 4294967296": "dim must be", "--objective x": "--object", "--nonsense 1": "--nons",
}


@pytest.mark.parametrize("flags", WRONG)
def test_train_says_in_one_line_what_is_wrong_and_writes_nothing(flags, call, tiny_run, train_tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    given = [] if "--resume" in flags else "--toy-clips 24 --seconds 1 --steps 2".split()
    ended = call(train, "--out", "run", "--cache", train_tiny.cache, "--device", "cpu", *given, *flags.split())
    assert_one_line(ended, WRONG[flags].replace("no run", f"no {Path('run', 'checkpoint.pt')}"))
    assert os.listdir(tmp_path) == ["empty"]


def test_train_only_encode_fills_the_cache_that_training_reads_and_stops_and_touches_no_run(call, tiny_run):
    write_tone(Path("music", "a.wav"), "a flute", seconds=2)
    ended = call(train, "--data", "music", "--seconds", 1, "--cache", "cache", "--out", tiny_run, "--only-encode")
    assert ended.code == 0 and "2 training clips and 2 validation clips of 1 s" in ended.out
    assert {path.name.split("-")[0] for path in Path("cache").glob("*.pt")} == {"codes", "text"}
    assert read_state(tiny_run)["step"] == 10 and sorted(os.listdir()) == ["cache", "music"]


def test_a_run_that_is_moved_is_played_and_resumed_with_the_same_codec_and_data_only(call, train_tiny, tmp_path):
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "there" / "run"
    write_tone(here / "music" / "a.wav", "a flute", seconds=2)
    shutil.copyfile(TOY_CODEC, here / "codec.pt")
    train_tiny(here / "run", f"--data {here}/music --codec {here}/codec.pt --steps 2")
    here.rename(there)

    def played_and_resumed(*codec, words=None):
        for ended in (call(sample, "a flute", "--model", run, "--decoding-steps", 1, *codec),
                      call(train, "--out", run, "--resume", "--cache", train_tiny.cache, *codec)):
            assert ended.code == (2 if words else 0) and (words or "") in ended.err, ended.err

    played_and_resumed()
    (there / "codec.pt").rename("elsewhere.pt")
    played_and_resumed(words="codec.pt")
    played_and_resumed("--codec", "elsewhere.pt")
    other_codec("other.pt")
    played_and_resumed("--codec", "other.pt", words="has other weights")
    (there / "music" / "a.txt").write_text("a drum")
    ended = call(train, "--out", run, "--resume", "--cache", train_tiny.cache, "--codec", "elsewhere.pt")
    assert ended.code == 2 and "music has changed since the run began" in ended.err.splitlines()[-1]
