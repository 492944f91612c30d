"""Decoding from left to right, and hybrid decoding: the claims of autoregressive.py.

`data/musicgen_tiny_*` is a small random model in MusicGen's published layout and what the released code gives.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA

import autoregressive
import sample
from autoregressive import UNKNOWN, Continuation, draw_tokens, generate_autoregressive
from masking import causal_attention_mask, delay_codes, hide_codes
from model import Cache, load_audiocraft
from sample import SamplingConfig, generate, generate_as_trained, generate_hybrid

STEPS = (4, 3, 2, 2)


def random_text(model, B=2, N=3):
    return torch.randn(B, N, model.config.text_dim, generator=torch.Generator().manual_seed(1)), torch.ones(B, N).bool()


def random_codes(model, T, B=2):
    K = model.config.n_codebooks
    return torch.randint(model.config.card, (B, K, T), generator=torch.Generator().manual_seed(2))


def teacher_forced(model, codes, *text):
    """Logits (B, K, S, card) of delayed codes in one pass, without a cache."""
    delayed = delay_codes(codes, model.mask_id)
    return model(delayed, None, *text, mask=causal_attention_mask(*[delayed.shape[2]] * 2))


# ------------------------------------------------------------------------------------------- as the released code does

def test_forward_gives_musicgens_logits(musicgen_tiny, musicgen_golden):
    golden = musicgen_golden
    logits = teacher_forced(musicgen_tiny, golden["codes"], golden["text_embeddings"], golden["text_mask"])
    aligned = torch.stack([logits[:, k, k:k + 40] for k in range(4)], dim=1)  # position f + k predicts frame f
    there = golden["logits_mask"]
    assert there.sum() == 2 * (40 + 39 + 38 + 37)
    torch.testing.assert_close(aligned[there], golden["logits"][there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("P, name", [(0, "greedy_cfg3"), (6, "greedy_cfg3_prompt6")])
def test_generate_autoregressive_repeats_musicgen_token_for_token(P, name, musicgen_tiny, musicgen_golden):
    golden = musicgen_golden
    codes = generate_autoregressive(musicgen_tiny, golden["text_embeddings"], golden["text_mask"], 20, greedy=True,
                                    audio_prompt=golden["codes"][:, :, :P])
    assert codes.equal(golden[name])


def test_load_audiocraft_reads_musicgens_settings(musicgen_tiny):
    config = musicgen_tiny.config
    assert (config.objective, config.n_codebooks, config.card, config.seconds) == ("ar", 4, 64, 30)
    assert "autoregressive" in repr(musicgen_tiny)


@pytest.mark.parametrize("delays", ["[0, 0, 1, 1]", "[0, 1, 2]", "\n    - 0\n    - 2\n    - 1\n    - 3"])
def test_load_audiocraft_refuses_other_delays(delays, tmp_path):
    content = torch.load(DATA / "musicgen_tiny_state_dict.bin", weights_only=True)
    content["xp.cfg"] = content["xp.cfg"].replace("[0, 1, 2, 3]", delays)
    torch.save(content, tmp_path / "state_dict.bin")
    with pytest.raises(ValueError, match="state_dict.bin: .*not delayed by one frame each"):
        load_audiocraft(tmp_path)


def test_load_audiocraft_reads_delays_in_either_way_of_writing_yaml(tmp_path, musicgen_tiny):
    content = torch.load(DATA / "musicgen_tiny_state_dict.bin", weights_only=True)
    content["xp.cfg"] = content["xp.cfg"].replace("[0, 1, 2, 3]", "\n    - 0\n    - 1\n    - 2\n    - 3")
    torch.save(content, tmp_path / "state_dict.bin")
    assert load_audiocraft(tmp_path).config == musicgen_tiny.config


# ------------------------------------------------------------------------------------------------------------ the cache

@pytest.mark.parametrize("parts", [[24], [1] * 24, [7, 1, 1, 10, 5], [1, 23]])
def test_reading_with_a_cache_gives_the_logits_of_one_pass(parts, make_magnet):
    model = make_magnet(objective="ar")
    codes, text = random_codes(model, 20), random_text(model)
    cache, logits = [Cache(24) for _ in model.blocks], []
    for part in delay_codes(codes, model.mask_id).split(parts, dim=2):
        logits.append(model(part, None, *text, cache=cache))
    torch.testing.assert_close(torch.cat(logits, dim=2), teacher_forced(model, codes, *text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("P", [0, 6])
def test_greedy_tokens_are_the_most_probable_ones_of_a_pass_without_a_cache(P, make_magnet):
    """Guidance included: each token of the result is what the whole result's own guided logits ask for."""
    model = make_magnet(objective="ar")
    text, prompt = random_text(model), random_codes(model, P)
    codes = generate_autoregressive(model, *text, 15, guidance=3.0, greedy=True, audio_prompt=prompt)
    cond, uncond = teacher_forced(model, codes, *text), teacher_forced(model, codes)
    best = (uncond + 3 * (cond - uncond)).argmax(dim=-1)  # (B, K, S)
    for k in range(4):
        assert best[:, k, k + P:k + 15].equal(codes[:, k, P:])


def test_every_step_runs_the_network_on_one_position(make_magnet, monkeypatch):
    """The prompt is read in one pass; then a step asks for one row of scores per head, as long as what came before."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        calls.append((q.shape[2], k.shape[2]))
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = make_magnet(objective="ar", n_layers=1)
    generate_autoregressive(model, None, None, 12, audio_prompt=random_codes(model, 5))
    assert calls == [(6, 6)] + [(1, n) for n in range(7, 16)]


# -------------------------------------------------------------------------------------------------------------- drawing

def test_draw_tokens_draws_in_proportion_from_the_top_k(generator):
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(20_000, 4)
    share = F.one_hot(draw_tokens(logits, 2, 1.0, generator=generator), 4).float().mean(dim=0)
    torch.testing.assert_close(share, torch.tensor([0.625, 0, 0.375, 0]), atol=0.02, rtol=0)
    share = F.one_hot(draw_tokens(logits, 0, 0.5, generator=generator), 4).float().mean(dim=0)
    torch.testing.assert_close(share, torch.tensor([0.25, 0.01, 0.09, 0.01]) / 0.36, atol=0.02, rtol=0)


def test_draw_tokens_of_the_top_1_or_at_next_to_no_temperature_is_greedy(generator):
    logits = torch.randn(2, 4, 16, generator=generator)
    for top_k, temperature, greedy in ((250, 0.0, False), (250, 1e-40, False), (1, 1.0, False), (250, 1.0, True)):
        assert draw_tokens(logits, top_k, temperature, greedy).equal(logits.argmax(dim=-1))


def test_generate_autoregressive_repeats_with_the_same_seed_only(make_magnet):
    model = make_magnet(objective="ar")
    text = random_text(model)
    first, again, other = (generate_autoregressive(model, *text, 20, generator=torch.Generator().manual_seed(seed))
                           for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("P, T", [(0, 1), (0, 7), (3, 7), (7, 7)])
def test_generate_autoregressive_continues_its_prompt_to_any_length(K, P, T, make_magnet):
    model = make_magnet(objective="ar", n_codebooks=K)
    prompt = random_codes(model, P)
    codes = generate_autoregressive(model, *random_text(model), T, audio_prompt=prompt)
    assert codes.shape == (2, K, T) and codes[:, :, :P].equal(prompt)
    assert 0 <= codes.min() and codes.max() < 16


def test_without_guidance_the_null_condition_is_not_run(make_magnet, monkeypatch):
    model, rows = make_magnet(objective="ar"), []
    model.out_norm.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for guidance, expected in ((3.0, 4), (1.0, 2), (0.0, 2)):
        rows.clear()
        generate_autoregressive(model, *random_text(model), 3, guidance=guidance)
        assert set(rows) == {expected}


# --------------------------------------------------------------------------------------------------------------- hybrid

def test_continuation_shows_the_prompt_whole_and_the_rest_as_magnet_does(make_magnet):
    model, seen = make_magnet(objective="hybrid"), []
    codes = random_codes(model, 10)
    hidden = torch.arange(10).expand(2, 10) >= 5
    delayed = delay_codes(codes, model.mask_id)
    behind = Continuation(model, delayed[:, :, :4])
    model.emb[3].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    logits = behind(hide_codes(codes, 1, hidden, model.mask_id), 1)
    assert logits.shape == (2, 10, 16)
    assert seen[0][:, :4].equal(delayed[:, 3, :4]) and (seen[0][:, 4:] == model.mask_id).all()


@pytest.mark.parametrize("P", [0, 4])
def test_generate_hybrid_begins_as_autoregressive_decoding_does(P, make_magnet):
    """Codebook k of the prompt is k frames shorter than the first; an audio prompt stays as it is."""
    model = make_magnet(objective="hybrid", context=3)
    text, given = random_text(model), random_codes(model, P)
    config = SamplingConfig(decoding_steps=STEPS, greedy=True)
    alone = generate_autoregressive(model, *text, 20, greedy=True, audio_prompt=given)
    codes = generate_hybrid(model, *text, 20, 0.2, config, given)  # 10 frames
    assert codes[:, :, :P].equal(given)
    for k in range(4):
        assert codes[:, k, :10 - k].equal(alone[:, k, :10 - k])
    assert 0 <= codes.min() and codes.max() < 16


@pytest.mark.parametrize("prompt_seconds", [0.0, 0.02, 0.1, 0.38, 0.4, 9.0, 1e308])
@pytest.mark.parametrize("K", [1, 3])
def test_generate_hybrid_works_with_any_prompt(prompt_seconds, K, make_magnet):
    model, config = make_magnet(objective="hybrid", n_codebooks=K), SamplingConfig(decoding_steps=STEPS[:K])
    codes = generate_hybrid(model, *random_text(model), 20, prompt_seconds, config)
    assert codes.shape == (2, K, 20) and 0 <= codes.min() and codes.max() < 16


def test_generate_hybrid_with_a_prompt_as_long_as_the_clip_is_autoregressive_decoding(make_magnet):
    model, config = make_magnet(objective="hybrid"), SamplingConfig(greedy=True)
    text = random_text(model)
    assert generate_hybrid(model, *text, 20, 0.4, config).equal(generate_autoregressive(model, *text, 20, greedy=True))


def test_an_audio_prompt_longer_than_the_prompt_of_a_hybrid_takes_its_place(make_magnet, monkeypatch):
    model, lengths, real = make_magnet(objective="hybrid"), [], autoregressive.Continuation
    monkeypatch.setattr(autoregressive, "Continuation",
                        lambda model, prompt: lengths.append(prompt.shape[2]) or real(model, prompt))
    for P in (0, 5, 12):
        generate_hybrid(model, None, None, 20, 0.2, SamplingConfig(decoding_steps=STEPS), random_codes(model, P, B=1))
    assert lengths == [11, 11, 13]  # frames, and the start


def test_a_hybrid_can_be_rescored(make_magnet):
    model, rescorer = make_magnet(objective="hybrid"), make_magnet(seed=1, objective="ar")
    alone, rescored = (generate_hybrid(model, *random_text(model), 40, 0.1, SamplingConfig(decoding_steps=(6, 4, 4, 4)),
                                       generator=torch.Generator().manual_seed(0), rescorer=rescorer,
                                       rescorer_weight=weight) for weight in (0.0, 0.9))
    assert not alone.equal(rescored) and alone[:, 0, :5].equal(rescored[:, 0, :5]), "the prompt is not rescored"


def test_generate_hybrid_repeats_with_the_same_seed_only(make_magnet):
    model = make_magnet(objective="hybrid")
    first, again, other = (generate_hybrid(model, *random_text(model), 20, 0.4, SamplingConfig(decoding_steps=STEPS),
                                           generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_generate_hybrid_counts_the_frames_of_its_codec(make_magnet):
    model, steps = make_magnet(objective="hybrid"), []
    for frame_rate in (50, 75):
        generate_hybrid(model, None, None, 20, 0.2, SamplingConfig(decoding_steps=(1, 1, 1, 1)), frame_rate=frame_rate,
                        on_step=lambda **step: steps.append(step))
    assert sum("position" in step for step in steps) == 10 + 15


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_rows_of_a_batch_are_written_as_if_alone(objective, make_magnet):
    """Each with its own text and audio prompt, guidance included."""
    config = SamplingConfig(decoding_steps=STEPS, greedy=True, hybrid_seconds=0.2)
    model = make_magnet(objective=objective)
    text, mask = random_text(model, B=3)
    codes, given = F.pad(random_codes(model, 4, B=3), (0, 16)), torch.arange(20) < 4
    parts = [slice(None), *(slice(row, row + 1) for row in range(3))]
    together, *alone = (generate_as_trained(model, text[part], mask[part], 20, config, codes[part], given=given)
                        for part in parts)
    assert together.equal(torch.cat(alone))


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_a_negative_prompt_changes_what_is_written(objective, make_magnet):
    config = SamplingConfig(decoding_steps=STEPS, greedy=True, hybrid_seconds=0.0)
    model = make_magnet(objective=objective)
    other = torch.randn(1, 5, model.config.text_dim), torch.ones(1, 5).bool()
    plain, steered = (generate_as_trained(model, *random_text(model), 20, config, negative=negative)
                      for negative in (None, other))
    assert not plain.equal(steered)


def test_generate_as_trained_hands_on_the_settings_of_each_way_of_decoding(make_magnet, monkeypatch):
    config = SamplingConfig(ar_guidance=2.0, ar_top_k=7, ar_temperature=0.5, hybrid_seconds=0.3)
    calls = []
    for name in ("generate_autoregressive", "generate_hybrid"):
        monkeypatch.setattr(sample, name, lambda *args, **more: calls.append((args[4:], more)))
    generate_as_trained(make_magnet(objective="ar"), None, None, 20, config)
    generate_as_trained(make_magnet(objective="hybrid"), None, None, 20, config, frame_rate=75, rescorer="r",
                        rescorer_weight=0.5)
    (ar, _), (hybrid, more) = calls
    assert ar[:4] == (2.0, 7, 0.5, False) and hybrid[:2] == (0.3, config)
    assert more == {"frame_rate": 75, "rescorer": "r", "rescorer_weight": 0.5}


# ------------------------------------------------------------------------------------------------------------ bad input

def test_every_decoding_refuses_a_model_that_was_trained_for_another(make_magnet):
    magnet, ar, hybrid = (make_magnet(objective=objective) for objective in ("magnet", "ar", "hybrid"))
    wrong = [(generate, ar), (generate, hybrid), (generate_autoregressive, magnet),
             (lambda *args: generate_hybrid(*args, 1.0), magnet), (lambda *args: generate_hybrid(*args, 1.0), ar)]
    for decode, model in wrong:
        with pytest.raises(ValueError, match=f"objective is {model.config.objective}; this decoding wants"):
            decode(model, None, None, 5)


@pytest.mark.parametrize("objective", ["magnet", "ar", "hybrid"])
def test_generate_as_trained_decodes_every_kind_of_model(objective, make_magnet):
    model, config = make_magnet(objective=objective), SamplingConfig(decoding_steps=STEPS, hybrid_seconds=0.1)
    assert generate_as_trained(model, *random_text(model), 20, config).shape == (2, 4, 20)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1},
                                   {"guidance": math.inf}])
def test_generate_autoregressive_names_what_is_out_of_range(wrong, make_magnet):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        generate_autoregressive(make_magnet(objective="ar"), None, None, 5, **wrong)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 11), (3, 4, 5)])
def test_generate_autoregressive_refuses_an_audio_prompt_that_does_not_fit(shape, make_magnet):
    model = make_magnet(objective="ar")
    with pytest.raises(ValueError, match="audio_prompt has shape"):
        generate_autoregressive(model, *random_text(model), 10, audio_prompt=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_generate_hybrid_refuses_a_prompt_of_impossible_length(seconds, make_magnet):
    with pytest.raises(ValueError, match="prompt_seconds must be"):
        generate_hybrid(make_magnet(objective="hybrid"), None, None, 10, seconds)


def test_generate_autoregressive_can_stop_early_and_leaves_the_rest_unknown(make_magnet):
    codes = generate_autoregressive(make_magnet(objective="ar"), None, None, 10, n_positions=5)
    for k in range(4):  # positions 1 to 4
        assert (codes[:, k, :4 - k] != UNKNOWN).all() and (codes[:, k, 4 - k:] == UNKNOWN).all()


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_only_a_magnet_fills_in_a_gap(objective, make_magnet):
    codes, given = torch.zeros(1, 4, 6, dtype=torch.long), torch.tensor([True, False, False, False, False, True])
    with pytest.raises(ValueError, match="only a MAGNeT can fill in a gap"):
        generate_as_trained(make_magnet(objective=objective), None, None, 6, SamplingConfig(), codes, given=given)


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_generate_as_trained_begins_with_the_frames_that_are_given(objective, make_magnet):
    model, codes = make_magnet(objective=objective), torch.randint(16, (2, 4, 9))
    made = generate_as_trained(model, *random_text(model), 20, SamplingConfig(decoding_steps=STEPS),
                               F.pad(codes, (0, 11)), given=torch.arange(20) < 9)
    assert made[:, :, :9].equal(codes) and made.shape == (2, 4, 20)
