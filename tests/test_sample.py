"""Decoding: the claims of sample.py. The command line is tested in test_support_request.py.

Read in the order of the module: the schedule, guidance, drawing a token, choosing spans, one stage, rescoring,
autoregressive and hybrid decoding, then arguments and a small fuzz. At the end the official code's greedy generations
(`data/magnet_tiny_greedy.pt`, `data/musicgen_tiny_forward.pt`) and recorded ones of the shipped models
(`data/toy_greedy.pt`). Masks are drawn as text: "x" is True (hidden), "." False.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, drawn, random_codes, random_text

import sample
from masking import causal_attention_mask, delay_codes, hybrid_attention_mask, mask_codes, undelay
from model import MAGNeT, load_model
from sample import SamplingConfig, clip_streams, draw_tokens, generate, hide_nonoverlapping, hide_stride1, nucleus
from t5_encoder import T5Encoder

STEPS = (5, 3, 3, 2)
SCORINGS = pytest.mark.parametrize("scoring", ["max", "prod"])


class Fixed(MAGNeT):
    """Stands for a model: whatever it is asked, the same logits (T, card) with a text, and zeros without one."""

    def answer(self, *logits):
        self.logits = torch.tensor(logits)
        return self

    def forward(self, codes, stage, text=None, text_mask=None, mask=None, cache=None):
        has_text = torch.zeros(len(codes))
        if text is not None:
            has_text[:len(text)] = text_mask.any(dim=1).float()
        return has_text[:, None, None] * self.logits.expand(codes.shape[2], -1)


def to_fill(model, T, given=slice(0, 0), B=2):
    """Random codes (B, K, T) where they are `given`, mask tokens elsewhere."""
    hidden = torch.ones(T, dtype=torch.bool)
    hidden[given] = False
    return random_codes(model, T, B).masked_fill(hidden, model.mask_id)


def steps_of(model, codes=None, streams=None, negative=None, rescorer=None, frame_rate=50, **fields):
    """Generate -> what `on_step` saw, a list of dictionaries. By default 50 frames, two clips with texts, few steps."""
    codes, steps = to_fill(model, 50) if codes is None else codes, []
    config = SamplingConfig(**{"decoding_steps": STEPS[:codes.shape[1]]} | fields)
    generate(model, *random_text(model, len(codes)), codes, config, streams, negative, rescorer,
             lambda **step: steps.append(step), frame_rate)
    return steps


def odds(*probabilities):
    """Probabilities as the (1, T) log odds that spans are chosen by."""
    return torch.tensor([probabilities]).logit()


# --------------------------------------------------------------------------------------------------------- the schedule

def test_mask_rate_begins_with_all_and_ends_above_zero_or_as_released_at_zero():
    """cos(pi/2 * i / s) for i = 0 .. s - 1; as released i / (s - 1). Here s = 3; a single step hides everything."""
    assert [sample.mask_rate(i, 3) for i in range(3)] == pytest.approx([1, math.sqrt(3) / 2, 1 / 2])
    assert [sample.mask_rate(i, 3, "released") for i in range(3)] == pytest.approx([1, math.sqrt(1 / 2), 0], abs=1e-6)
    assert sample.mask_rate(0, 1) == sample.mask_rate(0, 1, "released") == 1


def test_guidance_scale_is_strong_while_much_is_hidden():
    assert [sample.guidance_scale(rate, 10, 1) for rate in (1, 0.75, 0)] == [10, 7.75, 1]


def test_annealed_temperature_falls_linearly_to_a_floor_above_zero():
    assert [sample.annealed_temperature(step, 4, 3.0) for step in range(4)] == [2.25, 1.5, 0.75, 0.01]
    assert sample.annealed_temperature(0, 4, 0.0) == 0.01, "softmax divides by it"


@pytest.mark.of("decode_stage")
def test_generate_ties_guidance_to_the_mask_rate_and_not_to_the_step(make_magnet):
    """Two entries, logits 1 and 0 with a text, 0 and 0 without: guided by a scale they are `scale` and 0, and the
    confidence is sigmoid(scale / temperature). At rates cos(0, 22.5, 45 degrees) the scale is 9 * rate + 1."""
    model = make_magnet(kind=Fixed, n_codebooks=1, card=2).answer(1.0, 0.0)
    steps = steps_of(model, to_fill(model, 60), decoding_steps=(4,), temperature=8.0, greedy=True)
    scales = [step["confidence"][0, 0].logit().item() * t for step, t in zip(steps, (6, 4, 2), strict=False)]
    assert scales == pytest.approx([10, 9.315, 7.364], abs=1e-2), "linear in the step would be 10, 7.75, 5.5"


# ------------------------------------------------------------------------------------------------------------- guidance

def test_guided_logits_go_from_the_null_condition_through_the_prompt(make_magnet):
    """0 without the text, 2 with it. One batch of both, and of one alone where the scale leaves it alone."""
    model, seen = make_magnet(kind=Fixed, card=2).answer(2.0, 0.0), []
    model.register_forward_pre_hook(lambda model, args: seen.append(len(args[0])))
    for scale, logit, rows in ((-1.0, -2.0, 4), (0.0, 0.0, 2), (0.5, 1.0, 4), (1.0, 2.0, 2), (3.0, 6.0, 4)):
        logits = sample.guided_logits(model, random_codes(model, 5), 0, *random_text(model), scale)
        assert logits.shape == (2, 5, 2) and (logits[..., 0] == logit).all() and seen.pop() == rows, f"scale {scale}"


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.of("guided_logits", "decode_stage")
def test_generate_guides_away_from_the_null_condition_or_the_negative_prompt(negative, make_magnet):
    """The first step by hand. The null condition is that of a model without a text, all zero: neither the embedding of
    an empty caption, nor the bias of the text's projection."""
    model = make_magnet()
    torch.nn.init.ones_(model.text_proj.bias)
    other = random_text(model, L=5, seed=1) if negative else None
    step = steps_of(model, to_fill(model, 20), negative=other, greedy=True, temperature=4.0)[0]
    blank = torch.full((2, 4, 20), model.mask_id)
    cond, uncond = model(blank, 0, *random_text(model)), model(blank, 0, *(other or ()))
    probs = ((uncond + 10 * (cond - uncond)) / 3.2).softmax(dim=-1)  # step 0 of 5: temperature 4 * 4 / 5
    assert step["codes"][:, 0].equal(probs.argmax(dim=-1))
    torch.testing.assert_close(step["confidence"], probs.amax(dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("damaged", ["magnet", "ar", "hybrid", "rescorer"])
@pytest.mark.of("generate", "rescored")
def test_generate_refuses_logits_and_probabilities_that_are_not_finite(damaged, make_magnet):
    kind = "ar" if damaged == "rescorer" else damaged
    broken = make_magnet(objective=kind)
    broken.heads[0].weight.data[3, 5] = math.nan
    for greedy in (False, True):
        with pytest.raises(ValueError, match="(logits|rescorer's probabilities) are not finite"):
            steps_of(make_magnet() if damaged == "rescorer" else broken, greedy=greedy,
                     rescorer=broken if damaged == "rescorer" else None)


# ------------------------------------------------------------------------------------------------------ drawing a token

def test_nucleus_is_the_smallest_set_of_top_tokens_that_holds_top_p_and_at_most_top_k():
    probs, tied = torch.tensor([[0.0625, 0.5, 0.125, 0.25, 0.0625]]), [0.0625, 0.0625]  # both are kept, or neither
    for top_p, top_k, kept in ((0.01, 0, [0.5]), (0.49, 0, [0.5]), (0.51, 0, [0.5, 0.25]), (0.8, 0, [0.5, 0.25, 0.125]),
                               (0.9, 0, [0.5, 0.25, 0.125, *tied]), (1.0, 2, [0.5, 0.25]), (0.3, 2, [0.5]),
                               (1.0, 9, [0.5, 0.25, 0.125, *tied])):
        got = nucleus(probs, top_p, top_k)
        assert got[got > 0].sort(descending=True).values.tolist() == kept, f"of {top_p}, at most {top_k}"
        assert got[got > 0].equal(probs[got > 0]), "what is kept is not changed"


def test_draw_gives_tokens_in_proportion_to_their_weights():
    """A thousand uniform numbers, evenly spread; the weights need not add up to 1."""
    tokens = sample.draw(torch.tensor([[1.0, 0.6, 0.0, 0.4]]).expand(1000, -1), (torch.arange(1000) + 0.5) / 1000)
    assert tokens.bincount(minlength=4).tolist() == [500, 300, 0, 200]


def test_draw_never_gives_a_token_of_weight_zero_however_the_sums_are_rounded(monkeypatch):
    """On a GPU sums are made in parallel, so that the one behind a weight of zero may differ in the last digit."""
    rounded = torch.tensor([[0.5, 0.5 + 2**-23, 1.0, 1.0 - 2**-24]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: rounded.expand_as(x))
    uniform = torch.tensor([0.0, 0.5, 0.5 + 2**-24, 1 - 2**-24])
    assert set(sample.draw(torch.tensor([[0.5, 0.0, 0.5, 0.0]]).expand(4, -1), uniform).tolist()) <= {0, 2}


def test_draw_tokens_tempers_the_probabilities_before_it_takes_their_nucleus():
    """0.6 alone holds a nucleus of 0.55. At temperature 2 the probabilities are as their roots, 0.43, 0.28, 0.17, 0.12:
    the nucleus is the first two, drawn as 0.61 to 0.39."""
    logits, uniform = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log().expand(1000, -1), (torch.arange(1000) + 0.5) / 1000
    for temperature, share in ((1.0, [1, 0, 0, 0]), (2.0, [0.608, 0.392, 0, 0])):
        tokens = draw_tokens(logits, temperature, 0.55, 0, False, uniform)
        assert (tokens.bincount(minlength=4) / 1000).tolist() == pytest.approx(share, abs=2e-3)


def test_draw_tokens_greedily_of_the_top_1_or_at_temperature_0_is_the_most_probable(generator):
    logits, uniform = torch.randn(20, 16, generator=generator), torch.rand(20, generator=generator)
    for temperature, top_p, top_k, greedy in ((3.0, 0.9, 0, True), (3.0, 1.0, 1, False), (0.0, 0.9, 0, False)):
        assert draw_tokens(logits, temperature, top_p, top_k, greedy, uniform).equal(logits.argmax(dim=-1))


# ------------------------------------------------------------------------------------------------------- choosing spans

def test_log_odds_are_those_of_the_softmax_and_do_not_round_to_one(generator):
    logits, tokens = torch.randn(2, 5, 16, generator=generator), torch.randint(16, (2, 5), generator=generator)
    p = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(sample.log_odds(logits, tokens), (p / (1 - p)).log())
    logits = torch.tensor([[20.0, 0.0], [30.0, 0.0]])
    assert logits.softmax(dim=-1)[:, 0].tolist() == [1, 1]
    assert sample.log_odds(logits, torch.tensor([0, 0])).tolist() == [20, 30]


def test_span_confidence_is_that_of_the_most_probable_token_or_of_all_tokens_together():
    """The last span, of a clip that is no multiple of 3, is shorter. "prod" is given as -log(-log p)."""
    tokens = odds(0.1, 0.9, 0.5, 0.3, 0.2)
    torch.testing.assert_close(sample.span_confidence(tokens, 3, 3, "max").sigmoid(), torch.tensor([[0.9, 0.3]]))
    torch.testing.assert_close(sample.span_confidence(tokens, 3, 1, "max").sigmoid(), torch.tensor([[0.9, 0.9, 0.5]]))
    products = sample.span_confidence(tokens, 3, 3, "prod").neg().exp().neg().exp()
    torch.testing.assert_close(products, torch.tensor([[0.1 * 0.9 * 0.5, 0.3 * 0.2]]))


@SCORINGS
def test_span_confidence_orders_spans_that_are_all_but_certain_or_impossible(scoring):
    spans = sample.span_confidence(torch.tensor([[-900.0, -800.0, -20.0, 20.0, 200.0, 800.0, 900.0]]), 1, 1, scoring)
    assert spans.isfinite().all() and (spans.diff() > 0).all(), "ranks tie"


@SCORINGS
def test_hide_nonoverlapping_never_chooses_a_span_that_is_fixed_and_counts_all_tokens_of_one_that_is_partly(scoring):
    """Then frames 0 and 1 are fixed: the first span is open, and its fixed token of 0.9 makes it the surer one."""
    fixed = torch.tensor([[True] * 3 + [False] * 6])
    assert drawn(hide_nonoverlapping(odds(*[0.1] * 3, *[0.8] * 3, *[0.5] * 3), fixed, 1, 3, scoring)) == ["......xxx"]
    fixed = torch.tensor([[True, True, False, False, False, False]])
    assert drawn(hide_nonoverlapping(odds(0.9, 0.6, 0.6, 0.4, 0.4, 0.4), fixed, 1, 3, scoring)) == ["...xxx"]


def test_hide_stride1_hides_overlapping_spans_the_least_probable_first():
    """By "max" the spans that start at frames 0 to 7 have .9 .9 .8 .1 .2 .3 .4 .5: one, two or four of them."""
    tokens = odds(0.8, 0.9, 0.8, 0.1, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    nothing = torch.zeros(1, 10, dtype=torch.bool)
    for n_frames, hidden in ((1, "...xxx...."), (4, "...xxxx..."), (7, "...xxxxxx.")):
        assert drawn(hide_stride1(tokens, nothing, n_frames, 3, "max")) == [hidden], f"{n_frames} frames"


@SCORINGS
def test_hide_stride1_does_not_count_fixed_tokens_and_prefers_spans_without_them(scoring):
    """Spans at 0, 1, 2 and 3 hold 2, 1, 0 and 0 fixed tokens. In the clips of 4 frames every span holds one."""
    fixed = torch.tensor([[True, True, False, False, False, False]])
    assert drawn(hide_stride1(odds(0.1, 0.1, 0.5, 0.5, 0.5, 0.4), fixed, 3, 3, scoring)) in (["..xxx."], ["...xxx"])
    fixed = torch.tensor([[True, False, False, True]])
    assert drawn(hide_stride1(odds(0.99, 0.4, 0.4, 0.01), fixed[:, :4], 3, 3, scoring)) in (["xxx."], [".xxx"])
    fixed = torch.tensor([[True, False, True, False]])
    assert drawn(hide_stride1(odds(0.01, 0.6, 0.99, 0.2), fixed, 2, 2, scoring)) == ["..xx"], "0.2 before 0.6"


# ------------------------------------------------------------------------------------------------------------ one stage

@pytest.mark.parametrize("P, n", [(0, 20), (6, 18), (7, 18)])
@pytest.mark.of("decode_stage", "spans_to_hide")
def test_a_stage_hides_as_many_spans_as_the_schedule_says(P, n, make_magnet):
    """60 frames, spans of 3, an audio prompt of P frames: n spans have an open frame. int(rate * n) are hidden."""
    model = make_magnet(n_codebooks=1)
    steps = steps_of(model, to_fill(model, 60, slice(P)), decoding_steps=(10,))
    assert drawn(steps[0]["hidden"]) == ["." * P + "x" * (60 - P)] * 2, "at first all that was not given"
    for i, step in enumerate(steps[1:], start=1):
        spans = step["hidden"].view(2, 20, 3).any(dim=2).sum(dim=1)
        assert spans.tolist() == [max(int(math.cos(math.pi / 2 * i / 10) * n), 1)] * 2, f"step {i}"


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
@SCORINGS
@pytest.mark.parametrize("given", [slice(0, 0), slice(0, 7), slice(20, 50)])
@pytest.mark.of("decode_stage")
def test_what_a_stage_has_kept_is_never_hidden_or_changed_again(arrangement, scoring, given, make_magnet):
    model = make_magnet()
    steps = steps_of(model, to_fill(model, 50, given), decoding_steps=(30, 5, 5, 5), temperature=10.0,
                     span_arrangement=arrangement, span_scoring=scoring)
    for before, after in zip(steps, steps[1:], strict=False):
        k, where = after["stage"], f"stage {after['stage']}, step {after['step']}"
        assert after["hidden"].any(dim=1).all(), f"{where}: nothing is hidden"
        if before["stage"] == k:
            kept = ~after["hidden"]
            assert not (after["hidden"] & ~before["hidden"]).any(), f"{where}: a kept token is hidden again"
            assert after["codes"][:, k][kept].equal(before["codes"][:, k][kept]), f"{where}: a kept token has changed"
        assert after["codes"][:, :k].equal(before["codes"][:, :k]), f"{where}: an earlier codebook has changed"


@pytest.mark.of("decode_stage")
def test_hidden_tokens_are_drawn_anew(make_magnet):
    before, after = steps_of(make_magnet(), decoding_steps=(4, 1, 1, 1), temperature=10.0, top_p=1.0)[:2]
    changed = (before["codes"] != after["codes"])[:, 0]
    assert changed[after["hidden"]].float().mean() > 0.5, "of 16 entries nearly all should differ"


@pytest.mark.parametrize("schedule", ["paper", "released"])
@pytest.mark.of("decode_stage")
def test_the_model_is_shown_what_training_showed_it(schedule, make_magnet):
    """Earlier codebooks whole, this one where it is not hidden, later ones never, not even those of the audio prompt:
    these the released code shows."""
    model, shown = make_magnet(), []
    model.register_forward_pre_hook(lambda model, args: shown.append(args[0]))
    codes = to_fill(model, 30, slice(7))
    steps = steps_of(model, codes, guidance_start=1.0, schedule=schedule)
    before = [codes, *(step["codes"] for step in steps)]
    for step, inputs, known in zip(steps, shown, before, strict=False):
        wanted = mask_codes(known, step["stage"], step["hidden"], model.mask_id)
        wanted[:, :, :7] = wanted[:, :, :7] if schedule == "paper" else codes[:, :, :7]
        assert inputs[:2].equal(wanted), f"stage {step['stage']}, step {step['step']}"


@pytest.mark.of("decode_stage")
def test_confidence_is_the_tempered_probability_before_the_nucleus(make_magnet):
    """Of 3 steps the first is at temperature 2, the second at 1. A token that is not hidden counts in its span as the
    one that is drawn, and discarded, in its place."""
    model = make_magnet(kind=Fixed, n_codebooks=1, card=4).answer(2.0, 1.0, 0.0, -3.0)
    steps = steps_of(model, to_fill(model, 300), decoding_steps=(3,), temperature=3.0, top_p=0.7, guidance_start=1.0)
    probs = [(model.logits / temperature).softmax(dim=0) for temperature in (2, 1)]  # at 2: 0.48, 0.29, 0.18, 0.04
    first, second = steps[:2]
    assert set(first["codes"].unique().tolist()) == {0, 1}, "the nucleus of 0.7"
    torch.testing.assert_close(first["confidence"], probs[0][first["codes"][:, 0]])
    kept = second["confidence"][~second["hidden"]].unique()
    torch.testing.assert_close(kept, probs[1][:2].sort().values)


# ------------------------------------------------------------------------------------------------ rescoring [Sec. 3.4]

class Opinion:
    """A rescorer that gives every token 0.1, but 0.9 in the frames it likes; it writes down what it is asked."""

    def __init__(self, liked=()):
        self.liked, self.calls = list(liked), []

    def score_codes(self, codes, stage, text, text_mask):
        self.calls.append((codes.clone(), stage, text, text_mask))
        scores = torch.full(codes[:, 0].shape, 0.1)
        scores[:, self.liked] = 0.9
        return scores


def test_rescored_is_a_convex_combination_of_the_two_probabilities():
    """The weight is the rescorer's: (1 - 0.25) * 0.2 + 0.25 * 0.6 = 0.3."""
    for weight, p in ((0.0, 0.2), (0.25, 0.3), (1.0, 0.6)):
        assert sample.rescored(odds(0.2), torch.tensor([[0.6]]), weight).sigmoid().item() == pytest.approx(p)


@pytest.mark.of("decode_stage")
def test_rescoring_asks_once_per_step_about_the_candidate_with_its_text(make_magnet):
    model, opinion = make_magnet(), Opinion()
    steps = steps_of(model, rescorer=opinion, negative=random_text(model, B=1, L=7, seed=1))
    text, mask = random_text(model)
    assert len(opinion.calls) == len(steps) == sum(STEPS)
    for (codes, stage, asked, asked_mask), step in zip(opinion.calls, steps, strict=True):
        assert codes.equal(step["codes"]) and stage == step["stage"]
        assert (codes[:, :stage + 1] < model.mask_id).all(), "a candidate holds a token for every frame"
        assert asked[:, :3].equal(text) and asked_mask.equal(F.pad(mask, (0, 4))), "its text, and no guidance"


@pytest.mark.of("rescored", "decode_stage")
def test_rescoring_keeps_what_the_rescorer_likes_and_changes_only_the_ranking(make_magnet):
    """With weight 1, at rate 0.71, the 4 of 6 spans that it does not like are hidden again."""
    plain, steps = (steps_of(make_magnet(), to_fill(make_magnet(), 18), decoding_steps=(2, 1), rescorer=rescorer,
                             rescorer_weight=1.0) for rescorer in (None, Opinion(range(6, 12))))
    assert steps[0]["codes"].equal(plain[0]["codes"]), "the candidate itself is not rescored"
    assert drawn(steps[1]["hidden"]) == ["xxxxxx......xxxxxx"] * 2


# ----------------------------------------------------------------------------------------- autoregressive and hybrid

@pytest.mark.parametrize("P", [0, 6])
@pytest.mark.of("decode_autoregressively")
def test_greedy_autoregressive_tokens_are_those_of_one_pass_without_a_cache(P, make_magnet):
    """Guidance included: each token of the result is what the whole result's own guided logits ask for."""
    model = make_magnet(objective="ar")
    codes = steps_of(model, to_fill(model, 15, slice(P)), greedy=True, ar_guidance=2.0)[-1]["codes"]
    delayed, mask = delay_codes(codes, model.mask_id), causal_attention_mask(19, 19)  # 15 frames, 4 codebooks
    cond, uncond = (undelay(model(delayed, None, *text, mask=mask), shift=-1) for text in (random_text(model), ()))
    assert (uncond + 2 * (cond - uncond)).argmax(dim=-1)[:, :, P:].equal(codes[:, :, P:])


@pytest.mark.of("decode_autoregressively")
def test_autoregressive_decoding_reads_its_prompt_at_once_and_then_one_position_a_step(make_magnet):
    """5 frames are given: positions 0 to 5. The last of 12 + 4 positions is never read."""
    model, lengths = make_magnet(objective="ar"), []
    model.register_forward_pre_hook(lambda model, args: lengths.append(args[0].shape[2]))
    steps = steps_of(model, to_fill(model, 12, slice(5)))
    assert lengths == [6] + [1] * 9 and [step["position"] for step in steps] == list(range(6, 16))


@pytest.mark.of("decode_autoregressively")
def test_autoregressive_decoding_draws_from_the_top_k_at_its_own_temperature(make_magnet):
    """Probabilities 0.5, 0.3, 0.2; at temperature 0.5 the first two are as 0.25 to 0.09. Guidance 1 is none."""
    model = make_magnet(kind=Fixed, objective="ar", n_codebooks=1, card=3)
    model.answer(*[math.log(p) for p in (0.5, 0.3, 0.2)])
    model.forward = lambda *args: Fixed.forward(model, *args)[:, None]  # (B, K, T, card)
    codes = steps_of(model, to_fill(model, 800), ar_top_k=2, ar_temperature=0.5, ar_guidance=1.0)[-1]["codes"]
    share = codes.flatten().bincount(minlength=3) / codes.numel()
    assert share.tolist() == pytest.approx([0.25 / 0.34, 0.09 / 0.34, 0], abs=0.03)


@pytest.mark.parametrize("P", [0, 4, 12])
@pytest.mark.of("decode_autoregressively", "generate")
def test_a_hybrid_writes_its_prompt_from_left_to_right_and_keeps_a_longer_one(P, make_magnet):
    """0.2 s are 10 frames at 50 Hz, 15 at 75 Hz; codebook k of the prompt is k frames shorter than the first."""
    model = make_magnet(objective="hybrid")
    codes, frames = to_fill(model, 20, slice(P)), max(P, 10)
    steps = steps_of(model, codes, greedy=True, hybrid_seconds=0.2)
    whole = steps_of(model, codes, greedy=True, hybrid_seconds=9.0)[-1]["codes"]  # all of it from left to right
    assert sum("position" in step for step in steps) == frames - P
    assert sum("position" in step for step in steps_of(model, codes, frame_rate=75, hybrid_seconds=0.2)) == 15 - P
    for k in range(4):
        kept = max(P, frames - k)
        assert steps[-1]["codes"][:, k, :kept].equal(whole[:, k, :kept]), f"the prompt of codebook {k} has changed"


@pytest.mark.parametrize("frames", [0, 4])
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.of("decode_stage")
def test_a_hybrid_fills_in_each_token_at_the_position_before_its_own(stage, frames, make_magnet):
    """The first step of a stage by hand: the prompt is shown whole, the rest as to a MAGNeT, delayed; the logits of
    frame f of codebook k stand at position f + k. Temperature 8 has fallen to 2 or 4 at step 0 of 2 or more."""
    model = make_magnet(objective="hybrid", context=3)
    steps = steps_of(model, to_fill(model, 12), greedy=True, decoding_steps=(2,), temperature=8.0, guidance_start=1.0,
                     hybrid_seconds=frames / 50)
    step = next(step for step in steps if step.get("stage") == stage)
    codes, hidden = step["codes"], step["hidden"]
    assert drawn(hidden) == ["." * max(frames - stage, 0) + "x" * (12 - max(frames - stage, 0))] * 2
    in_prompt = torch.arange(16) <= frames
    inputs = torch.where(in_prompt, delay_codes(codes, 16), delay_codes(mask_codes(codes, stage, hidden, 16), 16))
    logits = model(inputs, None, *random_text(model), mask=hybrid_attention_mask(16, frames, stage, 3))
    probs = (logits[:, stage, stage:stage + 12] / 4).softmax(dim=-1)  # step 0 of 2: temperature 8 * 1 / 2
    assert probs.argmax(dim=-1)[hidden].equal(codes[:, stage][hidden]), "greedy tokens"
    torch.testing.assert_close(step["confidence"], probs.amax(dim=-1), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ arguments, and a fuzz

def test_sampling_config_defaults_are_the_papers():
    config = SamplingConfig()
    assert (config.decoding_steps, config.temperature, config.top_p, config.top_k) == ((20, 10), 3.0, 0.9, 0)
    assert (config.guidance_start, config.guidance_end, config.greedy) == (10.0, 1.0, False)
    assert (config.span_arrangement, config.span_scoring, config.schedule) == ("nonoverlap", "max", "paper")


@pytest.mark.parametrize("change, words", [
    (lambda codes: codes[:, :3], "4 codebooks"), (lambda codes: codes[:, :, :0], "some frames"),
    (lambda codes: codes[:1], "a row for each text"), (lambda codes: codes + 1, "codes must be 0 to 16"),
    (lambda codes: codes.index_fill(1, torch.tensor([2]), 3), "masks the same frames in all clips and codebooks")])
def test_generate_says_what_is_wrong_with_the_codes(change, words, make_magnet):
    """What a kind of model cannot do is asked of the command line, in test_support_request.py."""
    with pytest.raises(ValueError, match=words):
        generate(make_magnet(), *random_text(make_magnet()), change(to_fill(make_magnet(), 9)))


@pytest.mark.parametrize("seed", range(16))
def test_generate_keeps_its_promises_whatever_it_is_asked(seed, make_magnet):
    """Random settings: no mask token is left, what is given stays; one seed gives a clip one result, alone, in a batch,
    or in another order."""
    pick = random.Random(seed)
    objective, K, T = pick.choice(["magnet", "magnet", "ar", "hybrid"]), pick.randint(1, 3), pick.randint(1, 25)
    model = make_magnet(objective=objective, n_codebooks=K, span_len=pick.randint(1, 4), context=pick.randint(-1, 5),
                        text_len=pick.choice([0, 6]), n_layers=1, card=pick.choice([1, 7])).double()
    start = pick.randint(0, T)
    sides = (torch.arange(T) < start // 2) | (torch.arange(T) >= start)  # around a gap
    given = pick.choice([slice(0), slice(start)] + [slice(start, T), sides] * (objective == "magnet"))
    config = SamplingConfig(
        decoding_steps=(pick.randint(1, 4),), top_p=pick.choice([1e-6, 0.5, 1]), top_k=pick.choice([0, 1, 5]),
        temperature=pick.choice([0.0, 1e-3, 3.0, 1e4]), guidance_start=pick.choice([-3.0, 0.0, 1.0, 10.0]),
        span_arrangement=pick.choice(["nonoverlap", "stride1"]), span_scoring=pick.choice(["max", "prod"]),
        schedule=pick.choice(["paper", "released"]), hybrid_seconds=pick.choice([0.0, 0.1, 9.0]))
    before, text, mask, codes = torch.get_rng_state(), *random_text(model), to_fill(model, T, given)
    result, again, alone, turned = (
        generate(model, text[rows], mask[rows], codes[rows], config, clip_streams(1, [5 + row for row in rows]))
        for rows in ([0, 1], [0, 1], [1], [1, 0]))
    assert result.shape == codes.shape and (result < model.mask_id).all(), "a mask token is left"
    assert result[:, :, given].equal(codes[:, :, given]), "what was given has changed"
    assert result.equal(again), "the same seed gives another result"
    assert result[1:].equal(alone) and result.flip(0).equal(turned), "a clip alone, or in another order, is another"
    assert torch.get_rng_state().equal(before), "the global generator has been used"


# -------------------------------------------------------------------------------------------- against the official code

def test_released_decoding_makes_whole_spans_first_as_if_there_were_no_more_frames_and_then_the_rest(make_magnet):
    """50 frames in spans of 3: the first 48 are those of a clip of 48. With stride1 there is no such rest."""
    model, (text, mask) = make_magnet(), random_text(make_magnet())
    config = SamplingConfig(decoding_steps=STEPS, schedule="released")
    for given in (slice(0), slice(7), slice(49, 50)):
        codes = to_fill(model, 50, given)
        made, whole = generate(model, text, mask, codes, config), generate(model, text, mask, codes[:, :, :48], config)
        assert made[:, :, :48].equal(whole) and (made < model.mask_id).all()
        assert made[:, :, given].equal(codes[:, :, given])
    for arrangement, frames in (("nonoverlap", 48), ("stride1", 50)):
        steps = steps_of(model, schedule="released", span_arrangement=arrangement)
        assert len(steps) == sum(STEPS) and {step["codes"].shape[2] for step in steps} == {frames}


@pytest.mark.parametrize("case", torch.load(DATA / "magnet_tiny_greedy.pt", weights_only=True), ids=lambda case: (
    f"{case['span_arrangement']},{case['span_scoring']},{case['decoding_steps']},prompt={case['prompt_len']}"))
def test_generate_repeats_the_official_code_token_for_token(case, magnet_tiny, golden):
    """`magnet_tiny` has text_len = 7, as the official code pads both texts of this batch to 7 tokens. With stride1 the
    official code scores by the product, and so do we, whatever is asked."""
    asked = "max" if case["span_arrangement"] == "stride1" else case["span_scoring"]
    config = SamplingConfig(
        decoding_steps=tuple(case["decoding_steps"]), temperature=case["temp"], top_p=case["top_p"],
        guidance_start=case["max_cfg_coef"], guidance_end=case["min_cfg_coef"], schedule="released", greedy=True,
        span_arrangement=case["span_arrangement"], span_scoring=asked)
    codes = torch.full((2, 4, 48), magnet_tiny.mask_id)
    codes[:, :, :case["prompt_len"]] = golden["codes"][:, :, :case["prompt_len"]]
    made = generate(magnet_tiny, golden["text_embeddings"], golden["text_mask"], codes, config)
    assert made.equal(case["tokens"]), f"{(made != case['tokens']).sum()} of {made.numel()} tokens differ"


@pytest.mark.parametrize("P, name", [(0, "greedy_cfg3"), (6, "greedy_cfg3_prompt6")])
@pytest.mark.of("decode_autoregressively")
def test_generate_repeats_musicgen_token_for_token(P, name, musicgen_tiny, musicgen_golden):
    """Unprompted, and continuing 6 frames; `musicgen_tiny` has text_len = 7, see above."""
    codes = torch.full((2, 4, 20), musicgen_tiny.mask_id)
    codes[:, :, :P] = musicgen_golden["codes"][:, :, :P]
    made = generate(musicgen_tiny, musicgen_golden["text_embeddings"], musicgen_golden["text_mask"], codes,
                    SamplingConfig(greedy=True))
    assert made.equal(musicgen_golden[name])


@pytest.mark.parametrize("name", ["toy", "toy-ar"])
@pytest.mark.of("generate")
def test_the_shipped_models_repeat_their_recorded_codes(name):
    """Greedy codes of 40 frames for two captions."""
    recorded = torch.load(DATA / "toy_greedy.pt", weights_only=True)
    (model, companions), captions = load_model(name), recorded["captions"]
    config = replace(SamplingConfig(**companions.sampling), greedy=True)
    codes = torch.full((2, 4, 40), model.mask_id)
    made = generate(model, *T5Encoder.from_pretrained("toy").encode_text(captions), codes, config)
    assert made.equal(recorded["codes"][name].long())
