"""Decoding: the claims of decoding.py and sample.py. The command line is tested elsewhere.

`data/magnet_tiny_greedy.pt` holds greedy generations of the released code, which ours must repeat token for token.
"""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA

import decoding
import sample
from decoding import (
    annealed_temperature,
    decode_stage,
    fit_steps,
    guidance_scale,
    guided_logits,
    hide_nonoverlapping,
    hide_stride1,
    mask_rate,
    nucleus,
    span_scores,
    spans_to_hide,
    token_scores,
    with_noise,
)
from masking import cosine_schedule, hide_codes, span_mask, spans_for_mask_rate
from model import MAGNeT
from sample import SamplingConfig, generate, generate_windows, windows

GOLDEN = torch.load(DATA / "magnet_tiny_greedy.pt", weights_only=True)
ARRANGEMENTS = pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
SCORINGS = pytest.mark.parametrize("scoring", ["max", "prod"])
SCHEDULES = pytest.mark.parametrize("schedule", ["paper", "released"])
STEPS = (5, 3, 3, 2)


class Spy(MAGNeT):
    """A MAGNeT that writes down what it is asked for."""

    def forward(self, codes, stage, text=None, text_mask=None, prepared=None):
        self.__dict__.setdefault("calls", []).append({"codes": codes.clone(), "stage": stage, "prepared": prepared})
        return super().forward(codes, stage, text, text_mask, prepared)


class Constant(MAGNeT):
    """A stand-in for a model: the same `logits` (card,) for every frame."""

    logits = None

    def forward(self, codes, stage, text=None, text_mask=None, prepared=None):
        return self.logits.expand(codes.shape[0], codes.shape[2], -1)


def random_text(model, B=2, N=3, seed=0):
    text = torch.randn(B, N, model.config.text_dim, generator=torch.Generator().manual_seed(seed))
    return text, torch.ones(B, N, dtype=torch.bool)


def random_prompt(model, P, B=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.card, (B, model.config.n_codebooks, P), generator=generator)


def steps_of(model, n_frames=50, prompt=None, B=2, seed=0, **fields):
    """Generate, and give back what `on_step` saw: a list of dictionaries."""
    seen = []
    config = SamplingConfig(**{"decoding_steps": STEPS} | fields)
    generate(model, *random_text(model, B), n_frames, config, prompt, torch.Generator().manual_seed(seed),
             lambda **step: seen.append(step))
    return seen


@pytest.mark.parametrize("module, examples", [(decoding, 2), (sample, 1)])
def test_docstring_examples_of_decoding_are_true(module, examples):
    result = doctest.testmod(module)
    assert result.attempted >= examples and result.failed == 0


# --------------------------------------------------------------------------------------------------------- the schedule

@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_mask_rate_of_the_paper_is_equation_3(steps):
    """gamma(i; s) = cos(pi (i - 1) / 2s) for i = 1..s: the first is 1, the last above 0."""
    for i in range(1, steps + 1):
        assert mask_rate(i - 1, steps) == pytest.approx(math.cos(math.pi * (i - 1) / (2 * steps)))
    assert mask_rate(steps - 1, steps) > 0


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_mask_rate_as_released_ends_at_zero(steps):
    rates = [float(mask_rate(step, steps, "released")) for step in range(steps)]
    assert rates[0] == 1 and rates[-1] == pytest.approx(0, abs=1e-6)
    assert rates == pytest.approx([math.cos(math.pi / 2 * step / (steps - 1)) for step in range(steps)], abs=1e-6)


@SCHEDULES
def test_mask_rate_with_a_single_step_hides_everything(schedule):
    assert mask_rate(0, 1, schedule) == 1


def test_guidance_scale_goes_from_its_start_to_its_end():
    assert guidance_scale(1.0, 10, 1) == 10
    assert guidance_scale(0.0, 10, 1) == 1
    assert guidance_scale(torch.tensor(0.25), 10, 2) == pytest.approx(0.25 * 10 + 0.75 * 2)


def test_guidance_is_strong_at_first_and_weak_at_last(make_magnet, monkeypatch):
    scales, real = [], decoding.guided_logits
    monkeypatch.setattr(decoding, "guided_logits", lambda *args: scales.append(args[-1]) or real(*args))
    steps_of(make_magnet(n_codebooks=1), decoding_steps=(20,), guidance_start=10.0, guidance_end=1.0)
    assert scales[0] == 10 and 1 < scales[-1] < 2
    assert scales == sorted(scales, reverse=True)


def test_annealed_temperature_falls_linearly_to_a_small_positive_floor():
    temperatures = [annealed_temperature(step, 10, 3.0) for step in range(10)]
    assert temperatures[:9] == pytest.approx([2.7, 2.4, 2.1, 1.8, 1.5, 1.2, 0.9, 0.6, 0.3])
    assert 0 < temperatures[9] <= 0.01


def test_annealed_temperature_ends_where_it_is_told():
    assert [annealed_temperature(step, 4, 3.0, 1.0) for step in range(4)] == [2.5, 2.0, 1.5, 1.0]
    assert {annealed_temperature(step, 7, 1.0, 1.0) for step in range(7)} == {1.0}


def test_annealed_temperature_is_positive_even_from_zero():
    assert annealed_temperature(0, 10, 0.0) > 0 and annealed_temperature(0, 1, 0.0) > 0


# ------------------------------------------------------------------------------------------------------------- guidance

@pytest.fixture
def spy(make_magnet):
    return make_magnet(kind=Spy)


def prepared_twice(model, B=2):
    """The prompts, then as many null conditions: what `guided_logits` wants."""
    text, mask = random_text(model, B)
    return model.prepare_text(torch.cat([text, text]), torch.cat([mask, mask & False]))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 10.0])
def test_guided_logits_go_from_the_unconditional_towards_the_conditional(scale, make_magnet):
    model = make_magnet()
    seen = random_prompt(model, 9)
    cond, uncond = model(seen, 1, *random_text(model)), model(seen, 1)
    guided = guided_logits(model, seen, 1, prepared_twice(model), scale)
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond), atol=1e-4, rtol=0)


def test_guided_logits_run_both_conditions_as_one_batch(spy):
    guided_logits(spy, random_prompt(spy, 9), 0, prepared_twice(spy), 3.0)
    assert [len(call["codes"]) for call in spy.calls] == [4]


def test_guided_logits_skip_the_null_condition_at_scale_1(spy):
    seen = random_prompt(spy, 9)
    logits = guided_logits(spy, seen, 0, prepared_twice(spy), 1.0)
    assert [len(call["codes"]) for call in spy.calls] == [2]
    torch.testing.assert_close(logits, spy(seen, 0, *random_text(spy)), atol=1e-5, rtol=0)


def test_guided_logits_skip_the_text_at_scale_0(spy):
    seen = random_prompt(spy, 9)
    logits = guided_logits(spy, seen, 0, prepared_twice(spy), 0.0)
    assert [len(call["codes"]) for call in spy.calls] == [2]
    torch.testing.assert_close(logits, spy(seen, 0), atol=1e-5, rtol=0)


def test_guided_logits_without_a_text_run_the_null_condition_once(spy):
    seen = random_prompt(spy, 9)
    assert guided_logits(spy, seen, 0, None, 7.0).equal(spy(seen, 0))
    assert len(spy.calls) == 2 and len(spy.calls[0]["codes"]) == 2


def test_an_empty_caption_is_the_unconditional_music(make_magnet):
    model = make_magnet()
    text, mask = random_text(model, B=1)
    config = SamplingConfig(decoding_steps=STEPS, greedy=True)
    assert generate(model, text, mask & False, 30, config).equal(generate(model, None, None, 30, config))


# -------------------------------------------------------------------------------------------------------------- nucleus

def test_nucleus_keeps_the_smallest_set_that_holds_top_p(generator):
    probs = torch.rand(200, 12, generator=generator).pow(3)
    probs /= probs.sum(dim=1, keepdim=True)
    kept = nucleus(probs, 0.8)
    for row, kept_row in zip(probs.tolist(), kept.tolist(), strict=True):
        inside = [p for p in kept_row if p > 0]
        assert sorted(inside) == sorted(row)[-len(inside):]  # the most probable ones
        assert sum(inside) >= 0.8 - 1e-6 > sum(inside) - min(inside) - 2e-6  # enough, and not one too many


def test_nucleus_leaves_the_probabilities_it_keeps_as_they_are(generator):
    probs = torch.rand(3, 4, 12, generator=generator).softmax(dim=-1)
    kept = nucleus(probs, 0.5)
    assert kept.shape == probs.shape and kept[kept > 0].equal(probs[kept > 0])


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.59])
def test_nucleus_always_keeps_the_most_probable_token(top_p):
    assert nucleus(torch.tensor([0.1, 0.6, 0.3]), top_p).equal(torch.tensor([0, 0.6, 0]))


def test_nucleus_of_1_keeps_all(generator):
    probs = torch.randn(50, 30, generator=generator).softmax(dim=-1)
    assert nucleus(probs, 1.0).gt(0).float().mean() > 0.999  # rounding may reach 1 one token early


def test_nucleus_with_top_k_keeps_the_k_most_probable():
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.05, 0.05, 0.2]])
    assert nucleus(probs, 1.0, top_k=2).equal(torch.tensor([[0, 0.4, 0.3, 0], [0.7, 0, 0, 0.2]]))
    assert nucleus(probs, 0.5, top_k=2).equal(torch.tensor([[0, 0.4, 0.3, 0], [0.7, 0, 0, 0]]))
    assert nucleus(probs, 1.0, top_k=9).equal(probs)


# ---------------------------------------------------------------------------------------------------------- span scores

def test_token_scores_are_higher_for_less_probable_tokens():
    confidence = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(token_scores(confidence, "max"), torch.tensor([0.9, 0.5, 0.1]))
    torch.testing.assert_close(token_scores(confidence, "prod"), -confidence.log())


@SCORINGS
def test_token_scores_of_impossible_and_certain_tokens_are_finite(scoring):
    assert token_scores(torch.tensor([0.0, 1.0]), scoring).isfinite().all()


def test_span_scores_max_is_that_of_the_most_probable_token():
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.1]])
    scores = span_scores(token_scores(confidence, "max"), 3, 3, "max")
    torch.testing.assert_close(scores, torch.tensor([[1 - 0.9, 1 - 0.3]]))


def test_span_scores_prod_is_that_of_all_tokens_together():
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.1]])
    scores = span_scores(token_scores(confidence, "prod"), 3, 3, "prod")
    torch.testing.assert_close(scores, -torch.tensor([[0.1 * 0.9 * 0.5, 0.3 * 0.2 * 0.1]]).log())


@pytest.mark.parametrize("scoring, last", [("max", 0.3), ("prod", 0.3 + 0.4)])
def test_span_scores_of_a_shorter_last_span_count_its_own_tokens(scoring, last):
    scores = span_scores(torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.4]]), 3, 3, scoring)
    assert scores.shape == (1, 2) and scores[0, 1].item() == pytest.approx(last)


def test_span_scores_with_stride_1_start_at_every_frame_that_holds_a_span():
    scores = span_scores(torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.4]]), 3, 1, "max")
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.1, 0.3]]))


# --------------------------------------------------------------------------------------------------- what to hide again

def test_with_noise_gives_ranks_that_follow_the_confidence_less_the_more_noise_there_is(generator):
    confidence = torch.rand(50, 100, generator=generator)
    agreement = []
    for noise in (0.0, 1.0, 100.0):
        ranks = with_noise(confidence, noise, generator)
        assert ranks.sort(dim=1).values.equal(((torch.arange(100) + 1) / 100).expand(50, -1))
        agreement.append(torch.corrcoef(torch.stack([confidence.flatten(), ranks.flatten()]))[0, 1])
    assert agreement[0] > 0.99 > 0.8 > agreement[1] > 0.3 > 0.1 > agreement[2].abs()
    assert with_noise(confidence, 0.0).equal((confidence.argsort(dim=1).argsort(dim=1) + 1) / 100)


def test_hide_nonoverlapping_hides_the_least_probable_spans():
    confidence = torch.tensor([[0.9, 0.9, 0.9, 0.2, 0.1, 0.1, 0.5, 0.1, 0.1, 0.3, 0.1]])  # spans: 0.9, 0.2, 0.5, 0.3
    scores, nothing = token_scores(confidence, "max"), torch.zeros(1, 11, dtype=torch.bool)
    for n_spans, frames in [(1, {3, 4, 5}), (2, {3, 4, 5, 9, 10}), (3, set(range(3, 11))), (4, set(range(11)))]:
        hidden = hide_nonoverlapping(scores, nothing, n_spans, 3, "max")
        assert hidden.shape == (1, 11) and set(hidden[0].nonzero()[:, 0].tolist()) == frames


def test_hide_nonoverlapping_does_not_choose_a_fixed_span():
    confidence = torch.tensor([[0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5]])
    fixed = torch.tensor([[True] * 3 + [False] * 6])
    hidden = hide_nonoverlapping(token_scores(confidence, "max"), fixed, 1, 3, "max")
    assert hidden[0].nonzero()[:, 0].tolist() == [6, 7, 8]


def test_hide_nonoverlapping_chooses_a_span_that_is_partly_open():
    fixed = torch.tensor([[True] * 5 + [False] * 4])
    hidden = hide_nonoverlapping(token_scores(torch.full((1, 9), 0.5), "max"), fixed, 2, 3, "max")
    assert hidden[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 8]


@SCORINGS
@pytest.mark.parametrize("T, span_len, n_frames", [(40, 3, 1), (40, 3, 20), (41, 3, 40), (41, 1, 13), (50, 5, 30)])
def test_hide_stride1_hides_the_least_probable_spans_up_to_about_n_frames(scoring, T, span_len, n_frames, generator):
    scores = token_scores(torch.rand(1, T, generator=generator), scoring)
    hidden = hide_stride1(scores, torch.zeros(1, T, dtype=torch.bool), n_frames, span_len, scoring)
    starts = range(T - span_len + 1)
    score = {t: span_scores(scores[:, t:t + span_len], span_len, span_len, scoring).item() for t in starts}
    worst_first = sorted(starts, key=lambda t: -score[t])
    unions = [{t + i for t in worst_first[:u] for i in range(span_len)} for u in range(1, len(starts) + 1)]
    assert set(hidden[0].nonzero()[:, 0].tolist()) in unions
    assert abs(hidden.sum() - max(n_frames, span_len)) <= span_len


@SCORINGS
def test_hide_stride1_keeps_away_from_fixed_frames(scoring, generator):
    fixed = torch.arange(40).expand(3, -1) % 10 < 5
    scores = token_scores(torch.rand(3, 40, generator=generator), scoring)
    assert not (hide_stride1(scores, fixed, 6, 3, scoring) & fixed).any()


@ARRANGEMENTS
@SCORINGS
@pytest.mark.parametrize("T", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_spans_to_hide_always_hides_something(arrangement, scoring, T, rate, generator):
    config = SamplingConfig(span_arrangement=arrangement, span_scoring=scoring)
    confidence, fixed = torch.rand(4, T, generator=generator), torch.zeros(4, T, dtype=torch.bool)
    hidden = spans_to_hide(confidence, fixed, rate, fixed[0], 3, config)
    assert hidden.shape == (4, T) and hidden.any(dim=1).all()


@ARRANGEMENTS
@SCORINGS
def test_spans_to_hide_at_rate_1_hides_everything(arrangement, scoring, generator):
    config = SamplingConfig(span_arrangement=arrangement, span_scoring=scoring)
    confidence, fixed = torch.rand(4, 48, generator=generator), torch.zeros(4, 48, dtype=torch.bool)
    assert spans_to_hide(confidence, fixed, 1.0, fixed[0], 3, config).sum(dim=1).min() >= 48 - 3


@ARRANGEMENTS
def test_spans_to_hide_finds_the_improbable_half(arrangement, generator):
    confidence = torch.where(torch.arange(60) < 30, 0.1, 0.8) + 0.1 * torch.rand(2, 60, generator=generator)
    config = SamplingConfig(span_arrangement=arrangement)
    fixed = torch.zeros(2, 60, dtype=torch.bool)
    hidden = spans_to_hide(confidence, fixed, 0.5, fixed[0], 3, config)
    assert hidden[:, :30].float().mean() > 0.8 and not hidden[:, 33:].any()


# ------------------------------------------------------------------------------------------------------ the whole of it

def name_of(case):
    steps = "-".join(map(str, case["decoding_steps"]))
    return f"{case['span_arrangement']},{case['span_scoring']},steps={steps},prompt={case['prompt_len']}"


@pytest.mark.parametrize("case", GOLDEN, ids=name_of)
def test_generate_repeats_the_released_code_token_for_token(case, magnet_tiny, golden):
    config = SamplingConfig(
        decoding_steps=tuple(case["decoding_steps"]), temperature=case["temp"], top_p=case["top_p"],
        guidance_start=case["max_cfg_coef"], guidance_end=case["min_cfg_coef"], schedule="released", greedy=True,
        span_arrangement=case["span_arrangement"], span_scoring=case["span_scoring"])
    prompt = golden["codes"][:, :, :case["prompt_len"]]
    codes = generate(magnet_tiny, golden["text_embeddings"], golden["text_mask"], 48, config, prompt)
    assert codes.equal(case["tokens"])


@ARRANGEMENTS
@SCORINGS
@SCHEDULES
@pytest.mark.parametrize("n_frames", [1, 2, 3, 7, 50, 101])
def test_generate_gives_codes_of_exactly_that_length(n_frames, arrangement, scoring, schedule, make_magnet, generator):
    """And nothing but codes: no mask token is left."""
    model = make_magnet()
    config = SamplingConfig(decoding_steps=STEPS, span_arrangement=arrangement, span_scoring=scoring,
                            schedule=schedule)
    codes = generate(model, *random_text(model), n_frames, config, generator=generator)
    assert codes.shape == (2, 4, n_frames) and codes.dtype == torch.long
    assert codes.min() >= 0 and codes.max() < model.mask_id


@ARRANGEMENTS
@SCORINGS
@SCHEDULES
@pytest.mark.parametrize("P, n_frames", [(1, 2), (2, 3), (3, 4), (4, 7), (7, 50), (50, 51), (100, 101)])
def test_generate_keeps_an_audio_prompt(P, n_frames, arrangement, scoring, schedule, make_magnet, generator):
    model = make_magnet()
    prompt = random_prompt(model, P)
    config = SamplingConfig(decoding_steps=STEPS, span_arrangement=arrangement, span_scoring=scoring,
                            schedule=schedule)
    codes = generate(model, *random_text(model), n_frames, config, prompt.clone(), generator)
    assert codes.shape == (2, 4, n_frames) and codes.max() < model.mask_id
    assert codes[:, :, :P].equal(prompt)


@SCHEDULES
def test_generate_gives_back_a_prompt_as_long_as_the_clip(schedule, spy):
    prompt = random_prompt(spy, 9)
    config = SamplingConfig(decoding_steps=STEPS, schedule=schedule)
    assert generate(spy, *random_text(spy), 9, config, prompt).equal(prompt)
    assert not hasattr(spy, "calls")  # without asking the model


def test_generate_without_a_text_works_with_and_without_a_prompt(make_magnet):
    model = make_magnet()
    config = SamplingConfig(decoding_steps=STEPS)
    assert generate(model, None, None, 20, config).shape == (1, 4, 20)
    assert generate(model, None, None, 20, config, random_prompt(model, 5, B=3)).shape == (3, 4, 20)


@ARRANGEMENTS
@SCHEDULES
def test_generate_works_with_one_codebook(arrangement, schedule, make_magnet):
    model = make_magnet(n_codebooks=1)
    config = SamplingConfig(decoding_steps=(6,), span_arrangement=arrangement, schedule=schedule)
    codes = generate(model, *random_text(model), 20, config)
    assert codes.shape == (2, 1, 20) and codes.max() < model.mask_id


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e6])
@SCORINGS
def test_generate_survives_any_temperature(temperature, scoring, make_magnet):
    steps = steps_of(make_magnet(), temperature=temperature, span_scoring=scoring)
    assert all(step["confidence"].isfinite().all() for step in steps)


def test_generate_at_temperature_0_is_greedy(make_magnet):
    model = make_magnet()
    cold, greedy = (steps_of(model, temperature=0.0, top_p=1e-9, greedy=greedy)[-1] for greedy in (False, True))
    assert cold["codes"].equal(greedy["codes"])


@pytest.mark.parametrize("span_len", [1, 3, 10])
@ARRANGEMENTS
def test_generate_works_with_any_span_length(span_len, arrangement, make_magnet):
    steps = steps_of(make_magnet(span_len=span_len), n_frames=23, span_arrangement=arrangement)
    assert steps[-1]["codes"].max() < 16


def test_generate_repeats_with_the_same_seed_only(make_magnet):
    model = make_magnet()
    first, again, other = (steps_of(model, seed=seed)[-1]["codes"] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_generate_does_not_touch_the_global_random_state(make_magnet):
    model = make_magnet()
    before = torch.get_rng_state()
    steps_of(model)
    assert torch.get_rng_state().equal(before)


@ARRANGEMENTS
def test_rows_of_a_batch_are_generated_as_if_alone(arrangement, magnet_tiny, golden):
    text, mask = golden["text_embeddings"], golden["text_mask"]
    config = SamplingConfig(decoding_steps=STEPS, greedy=True, span_arrangement=arrangement)
    together = generate(magnet_tiny, text, mask, 50, config)
    for b in range(2):
        assert generate(magnet_tiny, text[b:b + 1], mask[b:b + 1], 50, config).equal(together[b:b + 1])


# --------------------------------------------------------------------------------- gaps, windows and negative prompts

def gap(T, start, end):
    """Given everywhere but from frame `start` to frame `end`."""
    return ~((torch.arange(T) >= start) & (torch.arange(T) < end))


@ARRANGEMENTS
@SCHEDULES
@pytest.mark.parametrize("start, end", [(10, 20), (11, 12), (0, 7), (25, 30), (0, 30), (7, 7)])
def test_generate_fills_a_gap_and_keeps_everything_around_it(start, end, schedule, arrangement, make_magnet, generator):
    model = make_magnet()
    music, given = random_prompt(model, 30), gap(30, start, end)
    config = SamplingConfig(decoding_steps=STEPS, schedule=schedule, span_arrangement=arrangement)
    codes = generate(model, *random_text(model), 30, config, music, generator, given=given)
    assert codes[:, :, given].equal(music[:, :, given])
    assert codes.max() < model.mask_id


@SCHEDULES
def test_generate_never_sees_what_was_in_the_gap(schedule, make_magnet):
    model, given = make_magnet(), gap(30, 10, 20)
    music = random_prompt(model, 30)
    other = torch.where(given, music, 15 - music)
    first, second = (generate(model, *random_text(model), 30, SamplingConfig(decoding_steps=STEPS, schedule=schedule),
                              codes, torch.Generator().manual_seed(0), given=given) for codes in (music, other))
    assert first.equal(second)


def test_generate_fills_a_gap_in_sight_of_both_sides(make_magnet):
    model, given = make_magnet(), gap(30, 10, 20)
    config = SamplingConfig(decoding_steps=STEPS, greedy=True)
    music = random_prompt(model, 30, B=1)
    for side in (slice(0, 10), slice(20, 30)):
        other = music.clone()
        other[:, :, side] = 15 - music[:, :, side]
        first, second = (generate(model, None, None, 30, config, codes, given=given) for codes in (music, other))
        assert not first[:, :, ~given].equal(second[:, :, ~given])


def test_a_prompt_given_as_a_mask_is_continued_as_one_given_alone(make_magnet):
    model, prompt = make_magnet(), random_prompt(make_magnet(), 12)
    config = SamplingConfig(decoding_steps=STEPS)
    alone, masked = (
        generate(model, *random_text(model), 30, config, codes, torch.Generator().manual_seed(0), given=given)
        for codes, given in ((prompt, None), (F.pad(prompt, (0, 18)), torch.arange(30) < 12)))
    assert alone.equal(masked)


def test_spans_to_hide_counts_the_tiles_that_a_gap_touches():
    """Frames 2 and 3 lie in two tiles of 3: at rate 1 both are hidden."""
    given = gap(12, 2, 4)
    hidden = spans_to_hide(torch.rand(1, 12), given[None], 1.0, given, 3, SamplingConfig())
    assert hidden[0, :6].all() and not hidden[0, 6:].any()


@pytest.mark.parametrize("given", [torch.zeros(9, dtype=torch.bool), torch.ones(10, dtype=torch.bool)])
def test_generate_refuses_a_mask_that_does_not_fit(given, make_magnet):
    model = make_magnet()
    with pytest.raises(ValueError, match="given must be 10 booleans"):
        generate(model, None, None, 10, audio_prompt=random_prompt(model, 8), given=given)


@pytest.mark.parametrize("T, size, overlap, starts", [
    (10, 10, 4, [0]), (7, 10, 4, [0]), (11, 10, 4, [0, 1]), (22, 10, 4, [0, 6, 12]), (20, 10, 0, [0, 10])])
def test_windows_cover_the_clip_and_overlap(T, size, overlap, starts):
    assert windows(torch.zeros(T, dtype=torch.bool), size, overlap) == starts


def test_windows_leave_out_what_is_given():
    assert windows(torch.ones(50, dtype=torch.bool), 10, 4) == []
    assert windows(torch.arange(50) < 40, 10, 4) == [36, 40]
    assert windows(gap(50, 20, 24), 10, 4) == [17]
    assert windows(gap(50, 2, 4) & gap(50, 47, 50), 10, 4) == [0, 40]


@pytest.mark.parametrize("first, end, size, overlap", [(20, 26, 10, 4), (200, 333, 200, 67), (20, 25, 10, 0)])
def test_a_gap_that_fits_into_a_window_is_filled_in_sight_of_both_sides(first, end, size, overlap):
    start, = windows(gap(500, first, end), size, overlap)
    before, after = first - start, start + size - end
    assert before > 0 and after > 0 and abs(before - after) <= 1



def test_generate_windows_makes_each_window_continue_the_last(make_magnet):
    """Its result is that of generating the windows by hand, the end of one being the audio prompt of the next."""
    model, config = make_magnet(), SamplingConfig(decoding_steps=STEPS)
    text, generator = random_text(model), torch.Generator().manual_seed(0)
    first = generate(model, *text, 10, config, generator=generator)
    second = generate(model, *text, 10, config, first[:, :, 6:], generator)
    last = generate(model, *text, 10, config, second[:, :, 4:], generator)
    nothing = torch.zeros(2, 4, 20, dtype=torch.long)
    codes = generate_windows(model, *text, nothing, torch.zeros(20, dtype=torch.bool), 10, 4, config,
                             torch.Generator().manual_seed(0))
    assert codes.equal(torch.cat([first, second[:, :, 4:], last[:, :, 6:]], dim=2))


def test_generate_windows_of_a_short_clip_is_generate(make_magnet):
    model, config = make_magnet(), SamplingConfig(decoding_steps=STEPS)
    nothing = torch.zeros(2, 4, 20, dtype=torch.long)
    codes = generate_windows(model, *random_text(model), nothing, torch.zeros(20, dtype=torch.bool), 30, 10, config,
                             torch.Generator().manual_seed(0))
    assert codes.equal(generate(model, *random_text(model), 20, config, generator=torch.Generator().manual_seed(0)))


def test_a_negative_prompt_of_nothing_changes_nothing(make_magnet):
    model, config = make_magnet(), SamplingConfig(decoding_steps=STEPS, greedy=True)
    text, mask = random_text(model)
    plain = generate(model, text, mask, 20, config)
    assert generate(model, text, mask, 20, config, negative=(text[:1], mask[:1] & False)).equal(plain)


def test_a_negative_prompt_takes_the_place_of_the_null_condition(make_magnet):
    """The guided logits are those of the prompt, away from those of the negative one, of any length."""
    model, seen = make_magnet(), random_prompt(make_magnet(), 9)
    text, mask = random_text(model)
    for N in (2, 3, 5):
        negative = random_text(model, B=1, N=N, seed=1)
        prepared = model.prepare_text(*decoding.with_null_condition(text, mask, negative))
        wide = max(N, 3)
        cond = model(seen, 1, F.pad(text, (0, 0, 0, wide - 3)), F.pad(mask, (0, wide - 3)))
        away = model(seen, 1, F.pad(negative[0], (0, 0, 0, wide - N)).expand(2, -1, -1),
                     F.pad(negative[1], (0, wide - N)).expand(2, -1))
        guided = guided_logits(model, seen, 1, prepared, 3.0)
        torch.testing.assert_close(guided, away + 3 * (cond - away), atol=1e-4, rtol=0)
        torch.testing.assert_close(guided_logits(model, seen, 1, prepared, 0), away, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------- what a step may do

def test_on_step_sees_every_step_of_every_stage(make_magnet):
    steps = steps_of(make_magnet())
    assert [(step["stage"], step["step"]) for step in steps] == [(k, i) for k, s in enumerate(STEPS) for i in range(s)]
    for step in steps:
        assert step["codes"].shape == (2, 4, 50)
        assert step["hidden"].shape == (2, 50) and step["hidden"].dtype == torch.bool
        assert step["confidence"].shape == (2, 50)
        assert (step["confidence"] > 0).all() and (step["confidence"] <= 1).all()
        assert (step["codes"][:, step["stage"] + 1:] == 16).all()  # the later codebooks are still hidden


@ARRANGEMENTS
@SCORINGS
@pytest.mark.parametrize("P, noise", [(0, 0.0), (7, 0.0), (7, 1.0)])
def test_a_token_that_was_kept_never_changes(arrangement, scoring, P, noise, make_magnet):
    model = make_magnet()
    steps = steps_of(model, prompt=random_prompt(model, P), decoding_steps=(40, 5, 5, 5), temperature=10.0,
                     span_arrangement=arrangement, span_scoring=scoring, span_noise=noise)
    for before, after in zip(steps, steps[1:], strict=False):
        if before["stage"] == after["stage"]:
            kept = ~after["hidden"]
            k = after["stage"]
            assert after["codes"][:, k][kept].equal(before["codes"][:, k][kept])
            assert not (after["hidden"] & ~before["hidden"]).any()  # what was kept once is not hidden again
        assert after["codes"][:, :after["stage"]].equal(before["codes"][:, :after["stage"]])


@SCHEDULES
@ARRANGEMENTS
def test_hidden_tokens_are_drawn_anew(schedule, arrangement, make_magnet):
    steps = steps_of(make_magnet(), decoding_steps=(4, 4, 4, 4), temperature=10.0, top_p=1.0, schedule=schedule,
                     span_arrangement=arrangement)
    before, after = steps[0], steps[1]
    changed = before["codes"][:, 0] != after["codes"][:, 0]
    assert changed[after["hidden"]].float().mean() > 0.5  # 16 entries: nearly all differ
    assert not changed[~after["hidden"]].any()


@SCORINGS
@pytest.mark.parametrize("P", [0, 6, 7])
def test_nonoverlapping_spans_are_as_many_as_the_schedule_says(scoring, P, make_magnet):
    """max(int(rate * n), 1) of the n spans that hold an open frame; at first all of them."""
    model = make_magnet(n_codebooks=1)
    steps = steps_of(model, 60, random_prompt(model, P), decoding_steps=(10,), span_scoring=scoring)
    n_spans = 20 - P // 3
    assert steps[0]["hidden"].equal((torch.arange(60) >= P).expand(2, -1))
    for i, step in enumerate(steps[1:], start=1):
        spans = step["hidden"].view(2, 20, 3).any(dim=2)
        assert spans.sum(dim=1).tolist() == [max(int(math.cos(math.pi / 2 * i / 10) * n_spans), 1)] * 2


def test_stride1_hides_as_many_frames_as_the_schedule_says(make_magnet):
    """For the released schedule, where spans may be hidden again; within one span."""
    steps = steps_of(make_magnet(n_codebooks=1), 60, decoding_steps=(10,), span_arrangement="stride1",
                     schedule="released")
    for i, step in enumerate(steps):
        frames = max(int(math.cos(math.pi / 2 * i / 9) * 60), 3)
        assert (step["hidden"].sum(dim=1) - frames).abs().max() <= 3


def test_the_spans_hidden_again_are_the_least_probable(make_magnet):
    """Every span that a step hides again is less probable than every one that it fixes."""
    steps = steps_of(make_magnet(n_codebooks=1), 60, decoding_steps=(6,))
    for before, after in zip(steps, steps[1:], strict=False):
        best = before["confidence"].view(2, 20, 3).amax(dim=2)
        hidden, was_open = (step["hidden"].view(2, 20, 3).any(dim=2) for step in (after, before))
        for b in range(2):
            fixed_now = was_open[b] & ~hidden[b]
            assert best[b][hidden[b]].max() <= best[b][fixed_now].min()


def test_noise_changes_which_spans_are_hidden_and_not_how_many(make_magnet):
    model = make_magnet(n_codebooks=1)
    plain, noisy = (steps_of(model, 60, decoding_steps=(6,), span_noise=noise)[1]["hidden"] for noise in (0.0, 10.0))
    assert plain.sum(dim=1).equal(noisy.sum(dim=1)) and not plain.equal(noisy)


@pytest.mark.parametrize("P", [0, 7])
def test_the_model_sees_only_what_training_showed_it(P, spy):
    """Schedule "paper": earlier codebooks whole, this one where not hidden, later ones never, not even the prompt's."""
    prompt = random_prompt(spy, P)
    steps = steps_of(spy, 30, prompt, guidance_start=1.0)  # one batch row per prompt: nothing is run twice
    for i, (call, step) in enumerate(zip(spy.calls, steps, strict=True)):
        k = step["stage"]
        assert call["stage"] == k
        assert (call["codes"][:, k + 1:] == spy.mask_id).all()
        assert (call["codes"][:, k] == spy.mask_id).equal(step["hidden"])
        assert call["codes"][:, :k].equal(step["codes"][:, :k])
        shown = ~step["hidden"] if step["step"] > 0 else torch.arange(30).expand(2, -1) < P
        truth = steps[i - 1]["codes"] if step["step"] > 0 else F.pad(prompt, (0, 30 - P))
        assert call["codes"][:, k][shown].equal(truth[:, k][shown])


def test_the_released_schedule_shows_all_codebooks_of_the_prompt(spy):
    prompt = random_prompt(spy, 7)
    steps_of(spy, 30, prompt, guidance_start=1.0, schedule="released")
    for call in spy.calls:
        assert call["codes"][:, :, :7].equal(prompt)


@pytest.fixture
def constant(make_magnet):
    """A model that always says the same; at step 0 of 2 the temperature 4.0 has fallen to 2."""
    model = make_magnet(kind=Constant, n_codebooks=1, card=4)
    model.logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    return model


def first_step(model, n_frames, **fields):
    return steps_of(model, n_frames, B=1, decoding_steps=(2,), temperature=4.0, **fields)[0]


def test_tokens_are_drawn_in_proportion_from_the_nucleus(constant):
    """Tempered probabilities 0.48, 0.29, 0.18, 0.04; a nucleus of 0.7 is the first two."""
    codes = first_step(constant, 20_000, top_p=0.7)["codes"][0, 0]
    share = codes.bincount(minlength=4) / 20_000
    inside = torch.tensor([2.0, 1.0]).div(2).softmax(dim=0)
    assert share[2:].tolist() == [0, 0]
    torch.testing.assert_close(share[:2], inside, atol=0.02, rtol=0)


def test_top_p_of_1_draws_from_the_tempered_probabilities(constant):
    codes = first_step(constant, 20_000, top_p=1.0)["codes"][0, 0]
    share = codes.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, constant.logits.div(2).softmax(dim=0), atol=0.02, rtol=0)


def test_top_k_limits_what_is_drawn(constant):
    assert set(first_step(constant, 2000, top_p=1.0, top_k=3)["codes"].unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("greedy", [False, True])
def test_confidence_is_the_tempered_probability_before_the_nucleus(greedy, constant):
    step = first_step(constant, 500, top_p=0.7, greedy=greedy)
    probs = constant.logits.div(2).softmax(dim=0)
    torch.testing.assert_close(step["confidence"][0], probs[step["codes"][0, 0]])


def test_a_token_that_is_not_hidden_counts_with_the_models_best_guess(constant):
    steps = steps_of(constant, 60, B=1, decoding_steps=(4,), temperature=4.0, top_p=1.0)
    visible = ~steps[1]["hidden"]
    best = constant.logits.div(2).softmax(dim=0).max()  # at step 1 of 4 the temperature 4.0 has fallen to 2
    torch.testing.assert_close(steps[1]["confidence"][visible], best.expand(int(visible.sum())))


def test_decode_stage_leaves_its_input_as_it_was(make_magnet):
    model = make_magnet()
    codes = torch.full((1, 4, 12), model.mask_id)
    decode_stage(model, codes, 0, torch.zeros(12, dtype=torch.bool), None, SamplingConfig(decoding_steps=STEPS))
    assert (codes == model.mask_id).all()


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("field, value", [
    ("decoding_steps", ()), ("decoding_steps", (20, 0, 10, 10)), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
    ("top_k", -1), ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf),
    ("guidance_start", math.nan), ("guidance_end", math.inf), ("span_arrangement", "random"),
    ("span_scoring", "mean"), ("schedule", "linear")])
def test_sampling_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field.removesuffix("_start").removesuffix("_end") + " must be"):
        SamplingConfig(**{field: value})


def test_sampling_config_defaults_are_the_papers():
    config = SamplingConfig()
    assert (config.decoding_steps, config.temperature, config.top_p, config.top_k) == ((20, 10, 10, 10), 3.0, 0.9, 0)
    assert (config.guidance_start, config.guidance_end) == (10.0, 1.0)
    assert (config.span_arrangement, config.span_scoring, config.schedule) == ("nonoverlap", "max", "paper")
    assert not config.greedy


@pytest.mark.parametrize("steps", [(5,), (5, 5, 5), (5, 5, 5, 5, 5)])
def test_generate_wants_as_many_steps_as_codebooks(steps, make_magnet):
    with pytest.raises(ValueError, match="decoding_steps must hold 4 numbers, one per codebook: .*5"):
        generate(make_magnet(), None, None, 10, SamplingConfig(decoding_steps=steps))


@pytest.mark.parametrize("K", [1, 2, 8])
def test_fit_steps_extends_the_papers_default_to_any_number_of_codebooks(K):
    assert fit_steps(SamplingConfig(), K).decoding_steps == (20, 10, 10, 10, 10, 10, 10, 10)[:K]


@pytest.mark.parametrize("n_frames", [0, -1])
def test_generate_refuses_a_clip_without_frames(n_frames, make_magnet):
    with pytest.raises(ValueError, match=f"n_frames must be at least 1, not {n_frames}"):
        generate(make_magnet(), None, None, n_frames)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 11), (3, 4, 5)])
def test_generate_refuses_an_audio_prompt_that_does_not_fit(shape, make_magnet):
    model = make_magnet()
    with pytest.raises(ValueError, match="audio_prompt has shape"):
        generate(model, *random_text(model), 10, audio_prompt=torch.zeros(shape, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- does it learn?

def masked_loss(model, codes, text, text_mask, stage, generator):
    """[Sec. 3.1] One step of the paper's objective: hide spans at a random rate, predict the hidden tokens."""
    rate = cosine_schedule(torch.rand(len(codes), generator=generator))
    T, span_len = codes.shape[2], model.config.span_len
    hidden = span_mask(spans_for_mask_rate(rate, T, span_len), T, span_len, generator)
    keep_text = torch.rand(len(codes), 1, generator=generator) > 0.3
    logits = model(hide_codes(codes, stage, hidden, model.mask_id), stage, text, text_mask & keep_text)
    return F.cross_entropy(logits[hidden], codes[:, stage][hidden])


def test_a_model_can_learn_two_clips_by_heart_and_generate_them_from_their_texts(make_magnet, generator):
    """Guidance is gentle: 10 times the difference of two overfitted predictions is mostly noise."""
    model = make_magnet(n_codebooks=2, dim=64, n_heads=4)
    codes, (text, text_mask) = random_prompt(model, 23), random_text(model)
    batch = [x.repeat_interleave(8, dim=0) for x in (codes, text, text_mask)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(400):
        loss = masked_loss(model, *batch, i % 2, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    config = SamplingConfig(decoding_steps=(8, 4), guidance_start=2.0, greedy=True)
    assert generate(model, text, text_mask, 23, config).equal(codes)
    assert generate(model, text.flip(0), text_mask, 23, config).equal(codes.flip(0))


@ARRANGEMENTS
@SCORINGS
@pytest.mark.parametrize("P, T", [(3, 4), (5, 7), (1, 2), (6, 8)])
def test_every_step_hides_something_even_when_little_is_left_to_do(P, T, arrangement, scoring, make_magnet):
    model = make_magnet()
    steps = steps_of(model, T, random_prompt(model, P), span_arrangement=arrangement, span_scoring=scoring)
    assert len(steps) == sum(STEPS)
    assert all(step["hidden"].any(dim=1).all() for step in steps)


@pytest.mark.parametrize("wrong", [-1, 16])
def test_generate_refuses_an_audio_prompt_with_codes_that_do_not_exist(wrong, make_magnet):
    with pytest.raises(ValueError, match="audio_prompt"):
        steps_of(make_magnet(), 8, torch.full((2, 4, 3), wrong))


# ------------------------------------------------------------------------------------------------ rescoring [Sec. 3.4]

class Opinion:
    """A rescorer that gives every token the same score but those of the frames it likes, and counts its calls."""

    def __init__(self, liked=()):
        self.liked, self.calls = list(liked), []

    def score_codes(self, codes, stage, text, text_mask):
        self.calls.append((codes.clone(), stage, text))
        scores = torch.full(codes[:, 0].shape, 0.1)
        scores[:, self.liked] = 0.9
        return scores


@pytest.mark.parametrize("rescorer", [None, Opinion()])
def test_rescoring_with_weight_0_changes_nothing_and_costs_nothing(rescorer, make_magnet):
    model, config = make_magnet(), SamplingConfig(decoding_steps=STEPS)
    results = [generate(model, *random_text(model), 20, config, generator=torch.Generator().manual_seed(0), **more)
               for more in ({}, {"rescorer": rescorer, "rescorer_weight": 0.0})]
    assert results[0].equal(results[1])
    assert rescorer is None or not rescorer.calls


def test_rescoring_asks_once_per_step_about_the_candidate_with_its_text(make_magnet):
    model, opinion, steps = make_magnet(), Opinion(), []
    text = random_text(model)
    generate(model, *text, 20, SamplingConfig(decoding_steps=STEPS), on_step=lambda **step: steps.append(step),
             rescorer=opinion, rescorer_weight=0.5)
    assert len(opinion.calls) == len(steps) == sum(STEPS)
    for (codes, stage, condition), step in zip(opinion.calls, steps, strict=True):
        assert codes.equal(step["codes"]) and stage == step["stage"] and condition.equal(text[0])
        assert (codes[:, :stage + 1] < model.mask_id).all(), "a candidate for every frame"


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_rescoring_mixes_the_two_probabilities(weight, make_magnet):
    model, prepared, given = make_magnet(), None, torch.zeros(12, dtype=torch.bool)
    confidence = []
    for rescore in (None, decoding.rescoring(Opinion([3, 4, 5]), weight, None, None)):
        codes = torch.full((1, 4, 12), model.mask_id)
        decode_stage(model, codes, 0, given, prepared, SamplingConfig(decoding_steps=(1,) * 4, greedy=True),
                     on_step=lambda **step: confidence.append(step["confidence"]), rescore=rescore)
    opinion = Opinion([3, 4, 5]).score_codes(codes, 0, None, None)
    torch.testing.assert_close(confidence[1], (1 - weight) * confidence[0] + weight * opinion)


def test_rescoring_with_weight_1_keeps_what_the_rescorer_likes(make_magnet):
    model, hidden = make_magnet(), []
    generate(model, *random_text(model), 18, SamplingConfig(decoding_steps=(2, 1, 1, 1)),
             on_step=lambda **step: hidden.append(step["hidden"]), rescorer=Opinion(range(6, 12)), rescorer_weight=1.0)
    frame = torch.arange(18)
    assert hidden[0].all() and hidden[1].equal(((frame < 6) | (frame >= 12)).expand(2, 18)), "4 of 6 spans at rate 0.71"


@pytest.mark.parametrize("objective", ["magnet", "ar", "hybrid"])
def test_any_kind_of_model_can_rescore_and_makes_a_difference(objective, make_magnet):
    model, rescorer = make_magnet(), make_magnet(seed=1, objective=objective)
    alone, rescored = (
        generate(model, *random_text(model), 40, SamplingConfig(decoding_steps=(6, 4, 4, 4)),
                 generator=torch.Generator().manual_seed(0), rescorer=rescorer, rescorer_weight=weight)
        for weight in (0.0, 0.9))
    assert rescored.shape == alone.shape and not rescored.equal(alone)


@pytest.mark.parametrize("objective", ["magnet", "ar", "hybrid"])
def test_what_a_rescorer_thinks_does_not_depend_on_the_padding_of_the_text(objective, make_magnet):
    rescorer, codes = make_magnet(objective=objective), torch.randint(16, (2, 4, 12))
    text, mask = random_text(rescorer, N=5)
    mask[1, 3:] = False
    confidence = decoding.rescoring(rescorer, 1.0, text, mask)(torch.zeros(2, 12), codes, 1)
    assert confidence.equal(rescorer.score_codes(codes, 1, text, mask))
    assert not confidence.equal(rescorer.score_codes(codes, 1, text, torch.ones_like(mask)))
    text[1, 3:] += 1
    assert confidence.equal(rescorer.score_codes(codes, 1, text, mask))


def test_rescoring_refuses_scores_that_are_not_one_for_each_token(make_magnet):
    class Wrong:
        def score_codes(self, codes, *_):
            return torch.ones(len(codes), 1)

    with pytest.raises(ValueError, match=r"rescorer gave \(1, 1\) for \(1, 5\) tokens"):
        generate(make_magnet(), None, None, 5, rescorer=Wrong(), rescorer_weight=0.5)


@pytest.mark.parametrize("rescorer, weight", [(None, 0.5), (Opinion(), -0.1), (Opinion(), 1.1), (Opinion(), math.nan)])
def test_rescoring_refuses_a_weight_that_is_none(rescorer, weight, make_magnet):
    with pytest.raises(ValueError, match="rescorer_weight must be between 0 and 1"):
        generate(make_magnet(), None, None, 5, rescorer=rescorer, rescorer_weight=weight)
