"""What is hidden, and who may attend to whom: the claims of masking.py.

Read in the order of the module: the cosine schedule, how many spans, which spans, what the model is shown, then the
attention masks (restricted, causal, hybrid) and the delay pattern. Small masks are drawn as text, one row a line: "x"
is True (hidden, or may attend) and "." False. At the end the mask rates of `data/span_rates.pt`, which another program
computed.
"""

import itertools
import math

import pytest
import torch
from conftest import DATA, drawn

from masking import (
    causal_attention_mask,
    cosine_schedule,
    delay_codes,
    expected_mask_rate,
    hybrid_attention_mask,
    mask_codes,
    restricted_attention_mask,
    span_mask,
    spans_for_mask_rate,
    spans_from_starts,
    undelay,
)

MASK = 99  # a mask id that no code has
CODES = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])  # K = 3, T = 3


def test_cosine_schedule_hides_all_at_first_and_nothing_at_last():
    times, gamma = (0, 1 / 3, 1 / 2, 1), pytest.approx([1, math.sqrt(3 / 4), math.sqrt(1 / 2), 0])
    assert [cosine_schedule(t) for t in times] == gamma, "the share to hide is cos(pi t / 2), not sin, not 1 - t"
    assert cosine_schedule(torch.tensor(times, dtype=torch.float64)).tolist() == gamma, "of a tensor"


def test_expected_mask_rate_equals_the_binomials():
    """2 starts among 5 frames, spans of 3: a frame is covered by 3 of the starts. C(2, 2) of the C(5, 2) = 10 pairs
    avoid them, so that 1 - 1/10 of the frames are hidden. C(1500, 750) has 450 digits: nothing overflows."""
    assert expected_mask_rate(2, 5, 3).item() == pytest.approx(0.9)
    for T, span_len in (*itertools.product(range(1, 10), range(1, 6)), (1500, 3)):
        wanted = [1 - math.comb(max(T - span_len, 0), u) / math.comb(T, u) for u in range(T + 1)]
        rates = expected_mask_rate(torch.arange(T + 1), T, span_len)
        assert rates.tolist() == pytest.approx(wanted, abs=1e-12), f"0 to {T} spans of {span_len} among {T} frames"


def test_spans_for_mask_rate_takes_the_nearest_rate_and_at_least_one_span():
    """Of T = 5 frames, 1, 2 and 3 spans of 3 hide 0.6, 0.9 and 1.0; in a shorter clip one span hides all."""
    rates, spans = [0.0, 0.59, 0.61, 0.76, 0.94, 0.96, 1.0], [1, 1, 1, 2, 2, 3, 3]
    assert [spans_for_mask_rate(rate, 5, 3) for rate in rates] == spans
    together = spans_for_mask_rate(torch.tensor(rates), 5, 3)
    assert together.dtype == torch.long and together.tolist() == spans, "of a tensor"
    assert [spans_for_mask_rate(rate, T, 3) for T in (1, 2) for rate in (0.0, 0.5, 1.0)] == [1] * 6


def test_spans_from_starts_hides_span_len_frames_from_every_start_and_cuts_the_last():
    starts = torch.tensor([[1, 0, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]]).bool()
    assert drawn(spans_from_starts(starts, 3)) == ["xxx.xxxx.x", "........xx"], "overlaps join; no span wraps around"
    assert drawn(spans_from_starts(starts, 1)) == drawn(starts), "a span of 1 is its start"
    assert drawn(spans_from_starts(starts[:, :1], 3)) == ["x", "."], "T = 1, shorter than a span"
    assert starts.sum() == 5, "the input has been changed"


def test_span_mask_hides_whole_spans_from_any_frame_up_to_the_last_and_not_single_tokens(generator):
    """One span in 10 frames: ten places, two of which are cut by the end. Of several every run is at least 3 long."""
    rows = set(drawn(span_mask(torch.ones(500, dtype=torch.long), 10, 3, generator)))
    assert rows == {("." * start + "xxx" + "." * 10)[:10] for start in range(10)}
    for row in drawn(span_mask(torch.full((100,), 5), 50, 3, generator)):
        inner = [run for run in row.split(".")[:-1] if run]
        assert all(len(run) >= 3 for run in inner), f"spans of 3 were asked for: {row}"


def test_span_mask_draws_every_start_equally_often_and_without_replacement(generator):
    share = span_mask(torch.full((20_000,), 3), 10, 1, generator).float().mean(dim=0)
    torch.testing.assert_close(share, torch.full((10,), 0.3), atol=0.02, rtol=0)
    for T in (1, 9):
        counts = torch.arange(1, T + 1)
        assert span_mask(counts, T, 1, generator).sum(dim=1).equal(counts), "u spans of one frame hide u frames"


def test_mask_codes_shows_the_codebooks_below_the_stage_and_hides_those_above():
    """Frames 0 and 2 are hidden: in the codebook of the stage, and in no other."""
    for stage, shown in ((0, [[99, 2, 99], [99] * 3, [99] * 3]), (1, [[1, 2, 3], [99, 5, 99], [99] * 3]),
                         (2, [[1, 2, 3], [4, 5, 6], [99, 8, 99]])):
        assert mask_codes(CODES, stage, torch.tensor([[True, False, True]]), MASK).tolist() == [shown], f"stage {stage}"


def test_restricted_attention_mask_is_a_band_with_context_on_both_sides():
    assert drawn(restricted_attention_mask(6, 2)) == ["xxx...", "xxxx..", "xxxxx.", ".xxxxx", "..xxxx", "...xxx"]
    assert restricted_attention_mask(100, 5)[50].sum() == 11, "5 frames on each side, and the frame itself"
    assert drawn(restricted_attention_mask(2, 0)) == ["x.", ".x"] and drawn(restricted_attention_mask(1, 5)) == ["x"]


def test_causal_attention_mask_shows_each_position_itself_and_its_past():
    assert drawn(causal_attention_mask(4, 4)) == ["x...", "xx..", "xxx.", "xxxx"]
    for n in range(1, 4):
        assert drawn(causal_attention_mask(n, 4)) == drawn(causal_attention_mask(4, 4))[-n:], "the last n queries"


def test_hybrid_attention_mask_is_causal_inside_the_prompt_and_full_after_it_at_the_first_stage():
    """Positions 0 and 1 predict the prompt of 2 frames, which stands at positions 1 and 2."""
    assert drawn(hybrid_attention_mask(5, 2, stage=0, context=1)[0]) == ["x....", "xx...", "xxxxx", "xxxxx", "xxxxx"]


def test_hybrid_attention_mask_holds_the_frames_around_a_token_in_its_own_codebooks_delay():
    """The query of frame f of codebook k stands at position f + k and sees that codebook's frames f - 5 .. f + 5, those
    of a prompt too, which here has 3 frames."""
    T, K = 40, 4
    for stage, f in itertools.product((1, 2, 3), (5, 20, 34)):
        frames = delay_codes(torch.arange(T).expand(1, K, T), 10**6)[0, stage]  # the codebook's frame at each position
        assert hybrid_attention_mask(T + K, 3, stage, 5)[0, f + stage].equal((frames - f).abs() <= 5), (stage, f)


def test_hybrid_attention_mask_takes_a_prompt_and_a_stage_for_each_clip_and_leaves_no_query_without_a_key():
    """Softmax over nothing is not a number; the last position has no next one."""
    prompts, stages = (0, 1, 4, 11, 12), (1, 0, 2, 2, 1)
    for context in (0, 1, 5, -1):
        masks = hybrid_attention_mask(12, torch.tensor(prompts), torch.tensor(stages), context)
        assert masks.any(dim=2).all(), f"context {context}"
        for mask, n_prompt, stage in zip(masks, prompts, stages, strict=True):
            assert drawn(mask) == drawn(hybrid_attention_mask(12, n_prompt, stage, context)[0]), (n_prompt, stage)


@pytest.mark.of("delay_codes", "undelay")
def test_delay_codes_begins_each_codebook_one_position_after_the_one_before_and_undelay_takes_it_back():
    """Position 0 is the start: nothing is known there, not even of the first codebook."""
    assert delay_codes(CODES, 0).tolist() == [[[0, 1, 2, 3, 0, 0], [0, 0, 4, 5, 6, 0], [0, 0, 0, 7, 8, 9]]]
    for K, T in ((1, 1), (4, 1), (1, 5), (4, 7)):
        codes = torch.arange(2 * K * T).view(2, K, T)
        delayed = delay_codes(codes, MASK)
        assert delayed.shape == (2, K, T + K) and undelay(delayed).equal(codes), f"K = {K}, T = {T}"


def test_undelay_with_shift_minus_1_reads_where_the_logits_of_a_token_stand():
    """A position predicts the next one: the number at slot p is p, so that the token at slot p reads p - 1."""
    slots = torch.arange(6).expand(1, 3, 6)  # K = 3, T = 3
    assert undelay(slots, shift=-1).tolist() == [[[0, 1, 2], [1, 2, 3], [2, 3, 4]]]


def test_expected_mask_rate_agrees_with_the_reference_and_is_near_the_exact_rate():
    """`exact_clipped_rate` counts that the first frames lie in fewer spans, which the paper's formula forgets."""
    for row in torch.load(DATA / "span_rates.pt", weights_only=True):
        rate = expected_mask_rate(row["u"], row["T"], row["span_len"]).item()
        assert abs(rate - row["paper_rate"]) < 1e-12, row
        assert -1e-9 <= rate - row["exact_clipped_rate"] < (row["span_len"] - 1) / (3 * row["T"]) + 1e-9, row
