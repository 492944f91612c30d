"""What is hidden, and who may attend to whom: the claims of masking.py.

`data/span_rates.pt` holds mask rates that another program computed: the paper's formula, and the exact one for spans
that are cut at the end.
"""

import doctest
import math

import pytest
import torch
from conftest import DATA

import masking
from masking import (
    causal_attention_mask,
    cosine_schedule,
    delay_codes,
    expected_mask_rate,
    hide_codes,
    hybrid_attention_mask,
    restricted_attention_mask,
    span_mask,
    spans_for_mask_rate,
    spans_from_starts,
    undelay_codes,
)

MASK = 99  # a mask id that no code has


@pytest.fixture(scope="module")
def span_rates():
    return torch.load(DATA / "span_rates.pt", weights_only=True)


def test_docstring_examples_of_masking_are_true():
    result = doctest.testmod(masking)
    assert result.attempted >= 3 and result.failed == 0


# ------------------------------------------------------------------------------------------------------ cosine_schedule

@pytest.mark.parametrize("t, gamma", [(0.0, 1.0), (0.5, math.sqrt(0.5)), (1.0, 0.0)])
def test_cosine_schedule_falls_from_one_to_zero(t, gamma):
    assert cosine_schedule(t) == pytest.approx(gamma, abs=1e-12)


def test_cosine_schedule_gives_a_float_for_a_float_and_a_tensor_for_a_tensor():
    times = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=torch.float64)
    assert isinstance(cosine_schedule(0.25), float)
    expected = torch.tensor([[cosine_schedule(t) for t in row] for row in times.tolist()], dtype=torch.float64)
    torch.testing.assert_close(cosine_schedule(times), expected)


def test_cosine_schedule_always_falls():
    assert (cosine_schedule(torch.linspace(0, 1, 100, dtype=torch.float64)).diff() < 0).all()


# --------------------------------------------------------------------------------------------------- expected_mask_rate

def test_expected_mask_rate_equals_the_papers_formula(span_rates):
    for row in span_rates:
        assert abs(expected_mask_rate(row["u"], row["T"], row["span_len"]) - row["paper_rate"]) < 1e-12, row


def test_expected_mask_rate_equals_the_binomials_on_small_cases():
    for T in range(1, 13):
        for span_len in range(1, T + 3):
            for u in range(1, T + 1):
                expected = 1 - math.comb(max(T - span_len, 0), u) / math.comb(T, u)
                assert expected_mask_rate(u, T, span_len).item() == pytest.approx(expected, abs=1e-12)


def test_expected_mask_rate_is_near_the_exact_rate_of_cut_spans(span_rates):
    """The paper's formula forgets that the first frames are covered by fewer starts: an error of the order l / T."""
    for row in span_rates:
        rate = expected_mask_rate(row["u"], row["T"], row["span_len"]).item()
        assert row["exact_clipped_rate"] <= rate + 1e-9, row
        assert rate - row["exact_clipped_rate"] < row["span_len"] / row["T"], row


def test_expected_mask_rate_is_what_random_masks_hide_on_average(generator):
    n_spans = torch.full((2000,), 25)
    hidden = span_mask(n_spans, 150, 3, generator)
    assert hidden.float().mean().item() == pytest.approx(expected_mask_rate(25, 150, 3).item(), abs=0.01)


def test_expected_mask_rate_takes_a_tensor_of_any_shape():
    counts = torch.tensor([[1, 2], [5, 10]])
    rates = expected_mask_rate(counts, 10, 3)
    assert rates.dtype == torch.float64 and rates.shape == (2, 2)
    assert rates[1, 0] == expected_mask_rate(5, 10, 3)


def test_expected_mask_rate_does_not_overflow_for_long_clips():
    """C(1500, 750) has 450 digits."""
    rates = expected_mask_rate(torch.arange(1501), 1500, 3)
    assert rates.isfinite().all() and (rates.diff() >= 0).all()
    assert rates[0] == 0 and rates[1500] == 1
    assert rates[1].item() == pytest.approx(3 / 1500)


# -------------------------------------------------------------------------------------------------- spans_for_mask_rate

@pytest.mark.parametrize("T, span_len", [(1, 3), (2, 3), (7, 3), (50, 1), (50, 3), (101, 10)])
def test_spans_for_mask_rate_is_the_nearest_count_above_zero(T, span_len):
    for rate in [0.0, 0.01, 0.123, 0.37, 0.5, 0.77, 0.99, 1.0]:
        u = spans_for_mask_rate(rate, T, span_len)
        error = [abs(expected_mask_rate(count, T, span_len).item() - rate) for count in range(1, T + 1)]
        assert 1 <= u <= T and error[u - 1] == min(error)


def test_spans_for_mask_rate_inverts_expected_mask_rate():
    for u in (1, 7, 40, 90):
        assert spans_for_mask_rate(expected_mask_rate(u, 120, 3).item(), 120, 3) == u


def test_spans_for_mask_rate_agrees_for_floats_and_tensors():
    rates = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = spans_for_mask_rate(rates, 77, 3)
    assert counts.dtype == torch.long and counts.shape == (20,)
    assert counts.tolist() == [spans_for_mask_rate(rate, 77, 3) for rate in rates.tolist()]
    assert isinstance(spans_for_mask_rate(0.5, 77, 3), int)


# ---------------------------------------------------------------------------------------- span_mask, spans_from_starts

def test_span_mask_covers_every_start(generator):
    """Spans of one frame are the starts themselves: each frame is drawn equally often, the last ones too."""
    share = span_mask(torch.full((20_000,), 3), 10, 1, generator).float().mean(dim=0)
    torch.testing.assert_close(share, torch.full((10,), 0.3), atol=0.02, rtol=0)


def test_span_mask_can_begin_a_span_at_the_last_frame(generator):
    alone = span_mask(torch.ones(500, dtype=torch.long), 10, 3, generator).sum(dim=1)
    assert set(alone.tolist()) == {1, 2, 3}  # cut to 1 or 2 frames where it begins at the last or last but one


@pytest.mark.parametrize("T", [1, 2, 9, 50])
def test_span_mask_draws_its_starts_without_replacement(T, generator):
    counts = torch.arange(1, T + 1)
    assert span_mask(counts, T, 1, generator).sum(dim=1).equal(counts)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 50, 101])
def test_span_mask_is_a_union_of_whole_spans_cut_at_the_end(T, generator):
    hidden = span_mask(torch.randint(1, T + 1, (200,), generator=generator), T, 3, generator)
    assert hidden.shape == (200, T) and hidden.dtype == torch.bool
    for row in hidden.int().tolist():
        runs = "".join(map(str, row)).split("0")
        whole, last = runs[:-1], runs[-1]  # `last` reaches the end, and may be cut there
        assert all(len(run) == 0 or len(run) >= 3 for run in whole), (row, last)


@pytest.mark.parametrize("T", [1, 2, 3, 50])
def test_span_mask_never_leaves_all_visible(T, generator):
    assert span_mask(torch.zeros(100, dtype=torch.long), T, 3, generator).any(dim=1).all()


@pytest.mark.parametrize("T", [1, 7])
def test_span_mask_with_every_start_hides_everything(T, generator):
    assert span_mask(torch.tensor([T]), T, 3, generator).all()


def test_span_mask_repeats_with_the_same_seed_only():
    counts = torch.full((4,), 10)
    first, again, other = (span_mask(counts, 60, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_span_mask_draws_each_row_by_itself(generator):
    hidden = span_mask(torch.full((8,), 10), 60, 3, generator)
    assert len({tuple(row) for row in hidden.tolist()}) == 8


def test_span_mask_works_without_a_generator():
    assert span_mask(torch.tensor([2]), 9, 3).any()


@pytest.mark.parametrize("T, span_len", [(1, 1), (1, 3), (2, 3), (10, 3), (11, 4)])
def test_spans_from_starts_is_equation_7(T, span_len, generator):
    starts = torch.rand(50, T, generator=generator) < 0.2
    hidden = spans_from_starts(starts, span_len)
    for b in range(50):
        union = {t + i for t in starts[b].nonzero()[:, 0].tolist() for i in range(span_len) if t + i < T}
        assert set(hidden[b].nonzero()[:, 0].tolist()) == union


def test_spans_from_starts_leaves_its_input_as_it_was():
    starts = torch.tensor([[True, False, False]])
    spans_from_starts(starts, 2)
    assert starts.tolist() == [[True, False, False]]


# ----------------------------------------------------------------------------------------------------------- hide_codes

@pytest.fixture
def codes(generator):
    return torch.randint(16, (2, 4, 7), generator=generator)  # an odd number of frames


@pytest.fixture
def hidden():
    return torch.tensor([[1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1, 0]]).bool()


@pytest.mark.parametrize("stage", range(4))
def test_hide_codes_shows_all_codebooks_below_the_stage(stage, codes, hidden):
    assert hide_codes(codes, stage, hidden, MASK)[:, :stage].equal(codes[:, :stage])


@pytest.mark.parametrize("stage", range(4))
def test_hide_codes_hides_all_codebooks_above_the_stage(stage, codes, hidden):
    assert (hide_codes(codes, stage, hidden, MASK)[:, stage + 1:] == MASK).all()


@pytest.mark.parametrize("stage", range(4))
def test_hide_codes_hides_the_stage_only_where_asked(stage, codes, hidden):
    seen = hide_codes(codes, stage, hidden, MASK)[:, stage]
    assert (seen[hidden] == MASK).all()
    assert seen[~hidden].equal(codes[:, stage][~hidden])


def test_hide_codes_does_not_modify_its_input(codes, hidden):
    before = codes.clone()
    hide_codes(codes, 1, hidden, MASK)
    assert codes.equal(before)


def test_hide_codes_works_with_one_codebook(codes, hidden):
    assert hide_codes(codes[:, :1], 0, hidden, MASK).shape == (2, 1, 7)


# ------------------------------------------------------------------------------------------- restricted_attention_mask

@pytest.mark.parametrize("T, context", [(1, 0), (1, 5), (7, 2), (50, 5), (6, 5), (7, 5)])
def test_restricted_attention_mask_is_a_band(T, context):
    mask = restricted_attention_mask(T, context)
    assert mask.shape == (T, T) and mask.dtype == torch.bool
    for query in range(T):
        for key in range(T):
            assert mask[query, key].item() == (-context <= query - key <= context)


def test_restricted_attention_mask_allows_eleven_frames_around_the_middle():
    assert restricted_attention_mask(100, 5).sum(dim=1)[50] == 11


def test_restricted_attention_mask_is_symmetric():
    mask = restricted_attention_mask(31, 4)
    assert mask.equal(mask.T)


def test_restricted_attention_mask_with_context_0_sees_only_itself():
    assert restricted_attention_mask(9, 0).equal(torch.eye(9, dtype=torch.bool))


def test_restricted_attention_mask_with_a_wide_context_sees_all():
    assert restricted_attention_mask(9, 8).all() and restricted_attention_mask(9, 100).all()
    assert not restricted_attention_mask(9, 7).all()


# ------------------------------------------------------------------------- causal_attention_mask, hybrid_attention_mask

@pytest.mark.parametrize("S", [1, 2, 7, 50])
def test_causal_attention_mask_shows_each_position_itself_and_its_past(S):
    assert causal_attention_mask(S, S).equal(torch.ones(S, S).tril().bool())


def test_causal_attention_mask_of_the_last_queries_is_its_last_rows():
    for n in range(1, 10):
        assert causal_attention_mask(n, 9).equal(causal_attention_mask(9, 9)[-n:])


def test_hybrid_attention_mask_is_causal_where_all_is_prompt():
    for stage in range(4):
        assert hybrid_attention_mask(9, 9, stage, 2).equal(causal_attention_mask(9, 9))


def test_hybrid_attention_mask_without_a_prompt_is_that_of_magnet():
    """At stage 0 all to all; later the band of Fig. 8, and what the delay adds to it."""
    assert hybrid_attention_mask(9, 0, 0, 2).all() and hybrid_attention_mask(9, 0, 3, -1).all()
    band = hybrid_attention_mask(30, 0, 1, 5)
    assert (band & ~band.T).sum() == 30 - 6, "one position more to the left than to the right"
    assert (band & band.T).equal(restricted_attention_mask(30, 5))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("context", [0, 1, 5])
def test_hybrid_attention_mask_holds_the_frames_of_the_restricted_context_and_no_more(stage, context):
    """A query at frame f of the stage's codebook sees frames f - context .. f + context of every codebook up to it."""
    T, K, f = 40, 4, 20
    frames = delay_codes(torch.arange(T).expand(1, K, T), MASK)[0, :stage + 1]  # the frame at each position, (k, S)
    wanted = ((frames - f).abs() <= context).any(dim=0)
    assert hybrid_attention_mask(T + K, 3, stage, context)[f + stage + 1].equal(wanted)


@pytest.mark.parametrize("stage, context", [(0, 5), (2, 3), (3, -1)])
def test_hybrid_attention_mask_takes_a_prompt_for_each_row(stage, context):
    prompts = torch.tensor([1, 4, 12])
    masks = hybrid_attention_mask(12, prompts, stage, context)
    assert masks.shape == (3, 12, 12)
    for mask, prompt in zip(masks, prompts.tolist(), strict=True):
        assert mask.equal(hybrid_attention_mask(12, prompt, stage, context))
        assert mask.any(dim=1).all() and not mask[:prompt].triu(1).any()


# ------------------------------------------------------------------------------------------- delay_codes, undelay_codes

@pytest.mark.parametrize("K", [1, 2, 4, 9])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_undelay_codes_gives_back_what_was_delayed(K, T, generator):
    codes = torch.randint(16, (2, K, T), generator=generator)
    delayed = delay_codes(codes, MASK)
    assert delayed.shape == (2, K, T + K)
    assert undelay_codes(delayed).equal(codes)


def test_delay_codes_begins_each_codebook_one_position_later_and_fills_the_rest(codes):
    delayed = delay_codes(codes, MASK)
    for k in range(4):
        assert delayed[:, k, k + 1:k + 8].equal(codes[:, k])
        assert (delayed[:, k, :k + 1] == MASK).all() and (delayed[:, k, k + 8:] == MASK).all()
