"""What each objective shows the network and what it asks: the claims of objectives.py (the masked one: test_train.py).

The gradient probe: back-propagate from one answer, and see which positions of the input get a gradient.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoregressive import Continuation, generate_autoregressive
from data import Clips
from masking import causal_attention_mask, delay_codes, hide_codes, hybrid_attention_mask
from model import MAGNeT
from objectives import (
    LOSSES,
    draw_hidden,
    draw_step,
    hybrid_counted,
    hybrid_cross_entropy,
    masked_cross_entropy,
    next_token_cross_entropy,
    validate,
)
from sample import SamplingConfig, generate_hybrid
from train import TrainConfig

T, K = 20, 4
S = T + K
ALL = torch.ones(2, T, dtype=torch.bool)


class Probe(MAGNeT):
    """A model whose embedded input can be asked for its gradient afterwards: `reached(row)` lists the positions."""

    def forward(self, codes, *args, **kwargs):
        self.embedded = []
        hooks = [table.register_forward_hook(lambda table, args, out: out.retain_grad() or self.embedded.append(out))
                 for table in self.emb]
        logits = super().forward(codes, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return logits

    def reached(self, row=0):
        return sorted({p for out in self.embedded for p in out.grad[row].abs().sum(dim=1).nonzero()[:, 0].tolist()})


@pytest.fixture
def codes(generator):
    return torch.randint(16, (2, K, T), generator=generator)


def only(shape, *place):
    counted = torch.zeros(shape)
    counted[place] = 1
    return counted


# --------------------------------------------------------------------------------------------------- who may see whom

@pytest.mark.parametrize("k, frame", [(0, 0), (0, 10), (3, 0), (3, 10), (3, T - 1)])
def test_the_autoregressive_loss_of_a_frame_has_no_gradient_to_any_later_input(k, frame, codes, make_magnet):
    """Nor to its own: it is read off the position before the one that shows it. To all earlier ones it has."""
    model = make_magnet(kind=Probe, objective="ar", n_layers=3)
    next_token_cross_entropy(model, codes, only((2, K, T), 0, k, frame).bool(), None, None).backward()
    assert model.reached() == list(range(frame + k + 1)), "the token itself is at position frame + k + 1"
    assert model.reached(row=1) == []


def probe_hybrid(model, codes, stage, prompt, codebook, position):
    hidden, prompts = torch.ones(2, S, dtype=torch.bool), torch.full((2,), prompt)
    counted = only((2, K, S), 0, codebook, position)
    hybrid_cross_entropy(model, codes, stage, hidden, prompts, counted, None, None).backward()
    return model.reached()


@pytest.mark.parametrize("stage", range(K))
@pytest.mark.parametrize("position", [0, 4, 9])
def test_prompt_positions_of_a_hybrid_see_no_later_position(stage, position, codes, make_magnet):
    model = make_magnet(kind=Probe, objective="hybrid", n_layers=3, context=2)
    assert probe_hybrid(model, codes, stage, 10, 0, position) == list(range(position + 1))


@pytest.mark.parametrize("position", [10, 15, T])
def test_masked_positions_of_a_hybrid_see_the_prompt_and_each_other(position, codes, make_magnet):
    model = make_magnet(kind=Probe, objective="hybrid", n_layers=1, context=2)
    assert probe_hybrid(model, codes, 0, 10, 0, position) == list(range(S))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("position", [10, 11, 16])
def test_later_stages_of_a_hybrid_see_nothing_outside_their_delayed_window(stage, position, codes, make_magnet):
    model = make_magnet(kind=Probe, objective="hybrid", n_layers=1, context=2)
    assert probe_hybrid(model, codes, stage, 10, stage, position) == list(range(position - 2 - stage, position + 3))


@pytest.mark.parametrize("stage", [1, 3])
def test_far_from_the_prompt_a_hybrid_sees_only_its_window_in_every_layer(stage, codes, make_magnet):
    model = make_magnet(kind=Probe, objective="hybrid", n_layers=2, context=1)
    reach = 2 * (1 + stage)
    assert probe_hybrid(model, codes, stage, 2, stage, 16) == list(range(16 - reach, 16 + 2 + 1))


# ---------------------------------------------------------------------------------------------- what is shown and asked

def test_the_hybrid_objective_with_a_prompt_of_everything_is_the_autoregressive_one(codes, make_magnet):
    model = make_magnet(objective="hybrid")
    prompt, hidden = torch.full((2,), S), torch.ones(2, S, dtype=torch.bool)
    counted = hybrid_counted(ALL, K, 1, hidden, prompt)
    hybrid = hybrid_cross_entropy(model, codes, 1, hidden, prompt, counted, None, None)
    alone = next_token_cross_entropy(model, codes, ALL[:, None].expand(-1, K, -1), None, None)
    torch.testing.assert_close(hybrid, alone / K)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_hybrid_objective_after_the_prompt_is_magnets_behind_it(stage, codes, make_magnet):
    model, prompt = make_magnet(objective="hybrid"), torch.full((2,), 8)
    hidden_frames = (torch.arange(T) % 3 > 0).expand(2, T)
    hidden = delay_codes(hidden_frames[:, None].expand(-1, K, -1), False)[:, stage]
    counted = hybrid_counted(ALL, K, stage, hidden, prompt)
    counted[:, :, :8] = 0
    loss = hybrid_cross_entropy(model, codes, stage, hidden, prompt, counted, None, None)
    behind = Continuation(model, delay_codes(codes, model.mask_id)[:, :, :8])
    after = hidden_frames & (torch.arange(T) + stage + 1 >= 8)
    torch.testing.assert_close(loss, masked_cross_entropy(behind, codes, stage, after, after, None, None))


def test_hybrid_counted_asks_each_position_once_and_no_padding():
    valid = (torch.arange(T) < torch.tensor([[T], [12]]))
    hidden, prompt = torch.arange(S).expand(2, S) % 2 == 0, torch.tensor([9, 4])
    counted = hybrid_counted(valid, K, 2, hidden, prompt)
    for row, (p, frames) in enumerate([(9, T), (4, 12)]):
        for k in range(K):
            for position in range(S):
                target = position + 1 if position < p else position  # a prompt position is asked for what follows
                exists = 0 <= target - k - 1 < frames
                weight = 1 / K if position < p else float(k == 2 and position % 2 == 0)
                assert counted[row, k, position] == weight * exists


def test_the_hybrid_loss_shows_nothing_hidden_and_no_later_codebook_after_the_prompt(codes, make_magnet):
    model, seen, hidden = make_magnet(objective="hybrid"), [], torch.arange(S).expand(2, S) % 2 == 0
    for table in model.emb:
        table.register_forward_hook(lambda table, args, out: seen.append(args[0]))
    prompt = torch.tensor([5, 9])
    hybrid_cross_entropy(model, codes, 1, hidden, prompt, hybrid_counted(ALL, K, 1, hidden, prompt), None, None)
    delayed, seen = delay_codes(codes, 16), torch.stack(seen, dim=1)
    for row, p in enumerate((5, 9)):
        assert seen[row, :, :p].equal(delayed[row, :, :p])
        assert seen[row, :, p:].equal(hide_codes(delayed, 1, hidden, 16)[row, :, p:])


def test_each_token_is_asked_of_the_position_before_its_own_by_its_own_head(codes, make_magnet):
    """Against a sum written out: codebook k's frame f is read off position f + k by head k."""
    model = make_magnet(objective="ar")
    logits = model(delay_codes(codes, 16), None, mask=causal_attention_mask(S, S)).log_softmax(dim=-1)
    by_hand = -sum(logits[b, k, f + k, codes[b, k, f]] for b in range(2) for k in range(K) for f in range(T))
    loss = next_token_cross_entropy(model, codes, ALL[:, None].expand(-1, K, -1), None, None)
    torch.testing.assert_close(loss, by_hand)


# ------------------------------------------------------------------------------------------------- drawing, validating

@pytest.fixture
def clips(generator):
    text = [torch.randn(n, 8, generator=generator).half() for n in (3, 0, 5)]
    codes = torch.randint(16, (12, K, T), generator=generator).to(torch.int16)
    return Clips(codes, torch.tensor([T] * 8 + [9] * 4), text, torch.arange(12) % 3)


def test_draw_step_draws_prompts_of_every_length_from_the_start_alone_to_everything(clips, generator):
    config = TrainConfig(objective="hybrid", batch_size=2000)
    _, _, task = draw_step(clips, K, config, generator)
    assert set(task["prompt"].tolist()) == set(range(1, S + 1))
    assert task["prompt"].float().mean().item() == pytest.approx((S + 1) / 2, abs=1)


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_draw_step_fits_the_loss_of_its_objective_and_counts_no_padding(objective, clips, generator, make_magnet):
    model, config = make_magnet(objective=objective), TrainConfig(objective=objective, batch_size=6)
    rows, _, task = draw_step(clips, K, config, generator)
    codes, text, text_mask = clips.batch(rows)
    loss = LOSSES[objective](model, codes=codes, text=text, text_mask=text_mask, **task)
    assert loss.isfinite() and loss > 0
    counted = task["counted"][..., -1] if objective == "hybrid" else task["counted"][:, -1]
    assert not counted[clips.n_frames[rows] == 9][:, -T + 9:].any(), "the last eleven frames are padding"


def test_draw_step_hides_the_later_codebooks_of_some_clips_from_an_autoregressive_model(clips, generator):
    config = TrainConfig(objective="ar", batch_size=2000, codebook_dropout=0.5)
    _, _, task = draw_step(clips, K, config, generator)
    shown = task["shown"][..., 0]  # (B, K)
    assert shown[:, 0].all() and (shown[:, 1:] <= shown[:, :-1]).all(), "always the first ones"
    assert (~shown[:, 3]).float().mean().item() == pytest.approx(0.5 * 3 / 4, abs=0.05)
    assert not (task["counted"] & ~task["shown"]).any(), "what is hidden is not asked for"


def test_an_autoregressive_model_does_not_see_the_codebooks_that_are_not_shown(make_magnet):
    model, codes = make_magnet(objective="ar"), torch.randint(16, (2, K, T))
    shown = torch.tensor([[True, True, False, False], [True] * 4])[..., None]  # (B, K, 1)
    counted = shown & ALL[:, None]

    def loss(codes):
        return next_token_cross_entropy(model, codes, counted, None, None, shown)
    other = codes.clone()
    other[0, 2:] = (other[0, 2:] + 1) % 16
    assert loss(other).equal(loss(codes))
    other[0, 1] = (other[0, 1] + 1) % 16
    assert not loss(other).equal(loss(codes))


@pytest.mark.parametrize("objective, kinds", [("ar", ["ar"]), ("hybrid", [0.25, 0.5, 0.75, 1.0, "ar"])])
def test_validate_measures_what_the_model_was_trained_for(objective, kinds, clips, make_magnet):
    model = make_magnet(objective=objective)
    first = validate(model, clips, "cpu", nullcontext)
    assert first == validate(model, clips, "cpu", nullcontext)
    assert list(first) == list(range(K)) and all(list(row) == kinds for row in first.values())
    for head in model.heads:
        nn.init.zeros_(head.weight)
    chance = torch.tensor([list(row.values()) for row in validate(model, clips, "cpu", nullcontext).values()])
    torch.testing.assert_close(chance, torch.full_like(chance, 16).log())


# ------------------------------------------------------------------------------------------------------- does it learn?

def learn_by_heart(model, loss_of, steps):
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(step).backward()
        optimiser.step()


@pytest.fixture
def pair(generator):
    """Two clips (2, 2, 16) and their texts."""
    return (torch.randint(16, (2, 2, 16), generator=generator), torch.randn(2, 3, 8, generator=generator),
            torch.ones(2, 3))


def test_an_autoregressive_model_can_learn_two_clips_by_heart_and_generate_them(pair, make_magnet):
    codes, text, mask = pair
    model = make_magnet(objective="ar", n_codebooks=2)
    counted = torch.ones(2, 2, 16, dtype=torch.bool)
    learn_by_heart(model, lambda _: next_token_cross_entropy(model, codes, counted, text, mask) / counted.sum(), 150)
    assert generate_autoregressive(model, text, mask, 16, guidance=1.0, greedy=True).equal(codes)
    assert generate_autoregressive(model, text.flip(0), mask, 16, guidance=1.0, greedy=True).equal(codes.flip(0))


def test_a_hybrid_model_can_learn_two_clips_by_heart_and_generate_them_in_every_way(pair, make_magnet, generator):
    """From left to right, in parallel, and first the one, then the other."""
    codes, text, mask = (x.repeat_interleave(8, dim=0) for x in pair)
    model = make_magnet(objective="hybrid", n_codebooks=2, dim=64)
    valid = torch.ones(16, 16, dtype=torch.bool)

    def loss_of(step):
        stage, hidden = step % 2, draw_hidden(16, 18, 3, generator)
        prompt = torch.randint(1, 19, (16,), generator=generator)
        counted = hybrid_counted(valid, 2, stage, hidden, prompt)
        return hybrid_cross_entropy(model, codes, stage, hidden, prompt, counted, text, mask) / counted.sum()

    learn_by_heart(model, loss_of, 300)
    codes, text, mask = pair
    config = SamplingConfig(decoding_steps=(8, 4), guidance_start=1.0, ar_guidance=1.0, greedy=True)
    assert generate_autoregressive(model, text, mask, 16, guidance=1.0, greedy=True).equal(codes)
    for prompt_seconds in (0.0, 0.1, 0.2):
        assert generate_hybrid(model, text, mask, 16, prompt_seconds, config).equal(codes)


# ---------------------------------------------------------------------------------------------------------- score_codes

@pytest.mark.parametrize("objective", ["ar", "hybrid"])
@pytest.mark.parametrize("stage", [0, 3])
def test_score_codes_of_a_causal_model_is_the_probability_in_its_loss(objective, stage, codes, make_magnet):
    model, text = make_magnet(objective=objective), torch.randn(2, 3, 8)
    scores = model.score_codes(codes, stage, text, torch.ones(2, 3))
    assert scores.shape == (2, T) and 0 < scores.min() and scores.max() < 1
    counted = ALL[:, None] & (torch.arange(K) == stage)[:, None]
    loss = next_token_cross_entropy(model, codes, counted, text, torch.ones(2, 3))
    torch.testing.assert_close(-scores.log().sum(), loss)


@pytest.mark.parametrize("stage", [0, 3])
def test_score_codes_of_a_magnet_never_sees_the_token_that_it_scores(stage, codes, make_magnet):
    model = make_magnet()
    spans = torch.arange(T) // 3 % 2 == 1
    logits = [model(hide_codes(codes, stage, hidden.expand(2, T), 16), stage) for hidden in (~spans, spans)]
    for frame in range(T):
        probs = F.softmax(logits[int(spans[frame])][:, frame], dim=-1)
        expected = probs.gather(1, codes[:, stage, frame, None])[:, 0]
        torch.testing.assert_close(model.score_codes(codes, stage)[:, frame], expected)


def test_hybrid_mask_is_what_the_hybrid_loss_attends_with(codes, make_magnet):
    """The forward pass of the loss is given the picture from masking.py."""
    model, calls = make_magnet(objective="hybrid", context=2), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["mask"]), with_kwargs=True)
    prompt, hidden = torch.tensor([3, 8]), torch.ones(2, S).bool()
    hybrid_cross_entropy(model, codes, 2, hidden, prompt, hybrid_counted(ALL, K, 2, hidden, prompt), None, None)
    assert calls[0].equal(hybrid_attention_mask(S, prompt, 2, 2))
