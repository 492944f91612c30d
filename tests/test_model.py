"""The transformer and the reading of its weights: the claims of model.py.

`data/magnet_tiny_*` is a small random model in the published layout and what the released code computed with it.
"""

import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA

from masking import hide_codes, restricted_attention_mask
from model import (
    TOY_MODELS,
    MAGNeT,
    ModelConfig,
    SelfAttention,
    attention,
    audiocraft_config,
    load_audiocraft,
    load_model,
    local_attention,
    positions,
)


def random_codes(model, B=2, T=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.card, (B, model.config.n_codebooks, T), generator=generator)


def random_text(model, B=2, N=3, seed=0):
    return torch.randn(B, N, model.config.text_dim, generator=torch.Generator().manual_seed(seed))


def dense_attention(q, k, v, context):
    """Attention written out: softmax(q k' / sqrt(D)) v, with -inf outside the band."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    outside = ~restricted_attention_mask(q.shape[2], context)
    return scores.masked_fill(outside, -math.inf).softmax(dim=-1) @ v


# ------------------------------------------------------------------------------------------- as the released code does

@pytest.mark.parametrize("stage", range(4))
def test_forward_gives_the_released_logits_with_a_text(stage, magnet_tiny, golden):
    logits = magnet_tiny(golden["stages"][stage]["input"], stage, golden["text_embeddings"], golden["text_mask"])
    torch.testing.assert_close(logits, golden["stages"][stage]["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", range(4))
def test_forward_gives_the_released_logits_without_a_text(stage, magnet_tiny, golden):
    logits = magnet_tiny(golden["stages"][stage]["input"], stage)
    torch.testing.assert_close(logits, golden["stages"][stage]["logits_null"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", range(4))
def test_forward_and_hide_codes_give_the_released_loss(stage, magnet_tiny, golden):
    """The paper's objective: cross-entropy on the hidden tokens of one codebook."""
    codes, expected = golden["codes"], golden["stages"][stage]
    seen = hide_codes(codes, stage, expected["masked"], magnet_tiny.mask_id)
    assert seen.equal(expected["input"])
    logits = magnet_tiny(seen, stage, golden["text_embeddings"], golden["text_mask"])
    loss = F.cross_entropy(logits[expected["masked"]], codes[:, stage][expected["masked"]])
    torch.testing.assert_close(loss, expected["masked_cross_entropy"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_by_hand_equals_the_fused_kernel_in_single_precision(dtype, masked, generator):
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, requires_grad=True) for n in (20, 30, 30))
    may_attend = torch.rand(20, 30, generator=generator) < 0.5 if masked else None
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)
    half = attention(q.to(dtype), k.to(dtype), v.to(dtype), may_attend)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=2e-2, rtol=2e-2)
    probe = torch.randn(exact.shape, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(half, (q, k, v), probe.to(dtype)),
                            torch.autograd.grad(exact, (q, k, v), probe), strict=True):
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=4e-2)


# ------------------------------------------------------------------------------------------------------ local attention

@pytest.mark.parametrize("context", [0, 1, 5, 31, 32, 33, 100])
def test_local_attention_equals_dense_masked_attention(context, generator):
    """For T = 1..200, values and gradients."""
    q, k, v, weight = torch.randn(4, 2, 2, 200, 4, generator=generator)
    for T in range(1, 201):
        ours, theirs = ([x[:, :, :T].clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
        out, expected = local_attention(*ours, context), dense_attention(*theirs, context)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0, msg=lambda text, T=T: f"T = {T}: {text}")
        gradients = torch.autograd.grad((out * weight[:, :, :T]).sum(), ours)
        wanted = torch.autograd.grad((expected * weight[:, :, :T]).sum(), theirs)
        torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=0, msg=lambda text, T=T: f"T = {T}: {text}")


@pytest.fixture
def attention_calls(monkeypatch):
    """What PyTorch's attention is asked for: a list of (number of scores, mask)."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        calls.append((q.shape[:-1].numel() * k.shape[-2], attn_mask))
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def test_restricted_attention_costs_a_multiple_of_frames_times_context(attention_calls):
    """It never asks for the 3000 x 3000 scores of full attention."""
    SelfAttention(ModelConfig(dim=8, n_heads=1))(torch.zeros(1, 3000, 8), 5)
    assert 3000 * 11 <= sum(scores for scores, _ in attention_calls) <= 3000 * (32 + 2 * 5) * 1.05


@pytest.mark.parametrize("T, context", [(1, 0), (7, 0), (33, 0), (50, 5), (193, 5), (101, 100)])
def test_local_attention_never_masks_a_whole_row(T, context, attention_calls):
    """Softmax over nothing is NaN in some versions and on some devices."""
    local_attention(*torch.zeros(3, 1, 1, T, 4), context)
    assert all(mask.any(dim=-1).all() for _, mask in attention_calls)


@pytest.mark.parametrize("context", [0, 1, 5, 40])
def test_self_attention_is_restricted_for_every_number_of_frames(context, generator):
    """Whichever of its ways it takes: the lengths cover both sides of every switch between them."""
    torch.manual_seed(0)
    attention = SelfAttention(ModelConfig(dim=8, n_heads=2))
    for T in sorted({1, 2, context + 1, context + 2, 31, 33, 2 * context + 32, 2 * context + 33, 150}):
        x = torch.randn(2, T, 8, generator=generator)
        q, k, v = (y.view(2, T, 2, 4).transpose(1, 2) for y in attention.qkv(x).chunk(3, dim=-1))
        expected = attention.out(dense_attention(q, k, v, context).transpose(1, 2).reshape(2, T, 8))
        torch.testing.assert_close(attention(x, context), expected, atol=1e-5, rtol=0)


def test_self_attention_without_a_context_attends_everywhere(generator):
    torch.manual_seed(0)
    attention, x = SelfAttention(ModelConfig(dim=8, n_heads=2)), torch.randn(2, 50, 8, generator=generator)
    torch.testing.assert_close(attention(x), attention(x, context=49))


# ------------------------------------------------------------------------------------ which frames reach which [Fig. 8]

def frames_that_reach(model, frame, stage, T):
    """The gradient probe: back-propagate from the logits of one frame; the input frames that get a gradient."""
    reached = []
    for table in model.emb:
        table.register_forward_hook(lambda table, args, out: out.retain_grad() or reached.append(out))
    model(random_codes(model, B=1, T=T), stage, random_text(model, B=1))[0, frame].square().sum().backward()
    return sorted({t for out in reached for t in out.grad[0].abs().sum(dim=1).nonzero()[:, 0].tolist()})


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("T, frame", [(101, 50), (101, 0), (101, 100), (25, 7), (1, 0)])
def test_later_stages_see_only_their_context_in_every_layer(n_layers, stage, T, frame, make_magnet):
    model = make_magnet(n_layers=n_layers, context=5)
    reach = 5 * n_layers
    expected = list(range(max(frame - reach, 0), min(frame + reach, T - 1) + 1))
    assert frames_that_reach(model, frame, stage, T) == expected


@pytest.mark.parametrize("frame", [0, 50, 100])
def test_the_first_stage_sees_every_frame(frame, make_magnet):
    assert frames_that_reach(make_magnet(n_layers=1), frame, 0, 101) == list(range(101))


def test_later_stages_see_every_frame_with_context_minus_1(make_magnet):
    assert frames_that_reach(make_magnet(n_layers=1, context=-1), 20, 3, 101) == list(range(101))


def test_context_0_sees_only_its_own_frame(make_magnet):
    assert frames_that_reach(make_magnet(n_layers=2, context=0), 20, 1, 50) == [20]


@pytest.mark.parametrize("stage", range(4))
def test_hidden_and_later_tokens_cannot_leak(stage, make_magnet):
    model = make_magnet()
    codes, other = random_codes(model, seed=0), random_codes(model, seed=1)
    hidden = torch.arange(20) % 3 == 0
    other[:, :stage] = codes[:, :stage]
    other[:, stage] = torch.where(hidden, other[:, stage], codes[:, stage])
    logits = (model(hide_codes(x, stage, hidden.expand(2, -1), model.mask_id), stage) for x in (codes, other))
    torch.testing.assert_close(*logits, atol=0, rtol=0)


@pytest.mark.parametrize("codebook", range(4))
def test_every_visible_codebook_changes_the_logits(codebook, make_magnet):
    model = make_magnet()
    codes = random_codes(model)
    other = codes.clone()
    other[:, codebook] = (other[:, codebook] + 1) % model.config.card
    assert not torch.allclose(model(codes, 3), model(other, 3), atol=1e-3)


def test_frames_know_where_they_are(make_magnet):
    model = make_magnet()
    codes = torch.full((1, 4, 50), model.mask_id)
    assert len(model(codes, 0)[0].round(decimals=4).unique(dim=0)) == 50


def test_positions_begin_with_the_cosines():
    """At frame 0 every cosine is 1, every sine 0; the fastest pair turns by 1 radian a frame, the slowest by 1e-4."""
    table = positions(3, 8, "cpu")
    assert table[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert table[2, 0].item() == pytest.approx(math.cos(2)) and table[2, 4].item() == pytest.approx(math.sin(2))
    assert table[2, 7].item() == pytest.approx(2e-4)


# ------------------------------------------------------------------------------------------------------------- the text

def test_the_text_changes_the_logits_of_its_own_row_only(make_magnet):
    model = make_magnet()
    codes, text = random_codes(model), random_text(model)
    other = text.clone()
    other[1] += 1
    before, after = model(codes, 0, text), model(codes, 0, other)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_a_text_mask_of_zeros_is_the_null_condition_exactly(magnet_tiny, golden):
    codes, text = golden["stages"][0]["input"], golden["text_embeddings"]
    null = magnet_tiny(codes, 0)
    assert magnet_tiny(codes, 0, text, torch.zeros(2, 7)).equal(null)
    assert magnet_tiny(codes, 0, torch.zeros_like(text), torch.zeros(2, 7).bool()).equal(null)


def test_no_text_mask_means_that_every_token_counts(make_magnet):
    model = make_magnet()
    codes, text = random_codes(model), random_text(model)
    assert model(codes, 0, text).equal(model(codes, 0, text, torch.ones(2, 3)))


def test_what_is_written_in_padding_does_not_matter(magnet_tiny, golden):
    codes, text, mask = golden["codes"], golden["text_embeddings"], golden["text_mask"]
    noisy = torch.where(mask[..., None] == 1, text, 100.0)
    assert magnet_tiny(codes, 0, noisy, mask).equal(magnet_tiny(codes, 0, text, mask))


def test_padding_takes_part_in_the_attention_as_released(magnet_tiny, golden):
    """Zero keys get a share of the attention: padding a text to be longer weakens it."""
    codes, text, mask = golden["codes"], golden["text_embeddings"], golden["text_mask"]
    longer = magnet_tiny(codes, 0, F.pad(text, (0, 0, 0, 9)), F.pad(mask, (0, 9)))
    assert not torch.allclose(longer, magnet_tiny(codes, 0, text, mask), atol=1e-3)


def test_prepare_text_once_serves_all_stages(make_magnet):
    model = make_magnet()
    codes, text, mask = random_codes(model), random_text(model), torch.tensor([[1, 1, 1], [1, 0, 0]])
    prepared = model.prepare_text(text, mask)
    for stage in range(4):
        assert model(codes, stage, prepared=prepared).equal(model(codes, stage, text, mask))


def test_prepare_text_refuses_another_text_encoders_width(make_magnet):
    model = make_magnet()
    with pytest.raises(ValueError, match="9 wide; this model wants 8"):
        model(random_codes(model), 0, torch.zeros(2, 3, 9))


# ----------------------------------------------------------------------------------------------- what it must survive

@pytest.mark.parametrize("stage", [-1, 4])
def test_forward_refuses_a_stage_that_does_not_exist(stage, make_magnet):
    model = make_magnet()
    with pytest.raises(ValueError, match=f"stage must be between 0 and 3, not {stage}"):
        model(random_codes(model), stage)


@pytest.mark.parametrize("K", [3, 5])
def test_forward_refuses_another_number_of_codebooks(K, make_magnet):
    with pytest.raises(ValueError, match=f"codes have {K} codebooks; this model has 4"):
        make_magnet()(torch.zeros(1, K, 9, dtype=torch.long), 0)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("B, T", [(1, 1), (1, 2), (3, 7), (1, 43), (2, 101)])
def test_forward_gives_logits_for_any_batch_and_length(B, T, stage, make_magnet):
    model = make_magnet()
    logits = model(random_codes(model, B, T), stage, random_text(model, B))
    assert logits.shape == (B, T, 16) and logits.isfinite().all()


def test_one_codebook_is_enough(make_magnet):
    model = make_magnet(n_codebooks=1)
    assert model(random_codes(model), 0).shape == (2, 20, 16)


@pytest.mark.parametrize("stage", [0, 2])
def test_rows_of_a_batch_do_not_mix(stage, make_magnet):
    model = make_magnet()
    codes, text = random_codes(model, B=3), random_text(model, B=3)
    together = model(codes, stage, text)
    for b in range(3):
        alone = model(codes[b:b + 1], stage, text[b:b + 1])
        torch.testing.assert_close(together[b:b + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 20, 101])
def test_half_precision_gives_finite_float32_logits(dtype, T, make_magnet):
    model = make_magnet().to(dtype)
    for stage in range(4):
        logits = model(random_codes(model, T=T), stage, random_text(model), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool())
        assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_single(dtype, make_magnet):
    model = make_magnet()
    codes, text, mask = random_codes(model, T=60), random_text(model), torch.ones(2, 3).bool()
    single = model(codes, 1, text, mask)
    torch.testing.assert_close(model.to(dtype)(codes, 1, text, mask), single, atol=0.1, rtol=0)


@pytest.mark.parametrize("T", [1, 20, 101])
def test_no_gradient_is_nan_and_all_weights_learn(T, make_magnet):
    model = make_magnet()
    codes, text = random_codes(model, T=T), random_text(model)
    sum(model(codes, stage, text, torch.ones(2, 3)).square().sum() for stage in range(4)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name


def test_dropout_acts_in_training_only(make_magnet):
    model = make_magnet(dropout=0.5)
    codes = random_codes(model)
    assert model(codes, 0).equal(model(codes, 0))
    model.train()
    assert not model(codes, 0).equal(model(codes, 0))


def test_new_weights_are_drawn_with_the_scale_of_their_inputs():
    torch.manual_seed(0)
    model = MAGNeT(ModelConfig(dim=64, n_heads=4, n_layers=1, ffn_mult=4))
    for layer, fan_in in ((model.emb[0], 64), (model.heads[0], 64), (model.blocks[0].linear2, 256)):
        weight = layer.weight
        assert weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
        assert weight.abs().max() <= 3 / math.sqrt(fan_in) + 1e-6
    assert (model.text_proj.bias == 0).all()


def test_n_params_counts_every_weight(magnet_tiny):
    published = torch.load(DATA / "magnet_tiny_state_dict.bin", weights_only=True)["best_state"]
    assert magnet_tiny.n_params() == sum(tensor.numel() for tensor in published.values())


def test_repr_tells_the_shape_of_the_model(make_magnet):
    text = repr(make_magnet())
    for fact in ("2 layers", "32 wide", "2 heads", "4 codebooks", "16 entries", "spans of 3", "5 frames of context"):
        assert fact in text
    assert "full attention" in repr(make_magnet(context=-1))


@pytest.mark.parametrize("fields", [{"dim": 30, "n_heads": 4}, {"dim": 9, "n_heads": 3}, {"dim": 2, "n_heads": 1}])
def test_model_config_refuses_a_width_that_heads_or_positions_cannot_share(fields):
    with pytest.raises(ValueError, match="dim must be"):
        ModelConfig(**fields)


# --------------------------------------------------------------------------------------------------- published weights

@pytest.fixture
def published():
    return torch.load(DATA / "magnet_tiny_state_dict.bin", weights_only=True)


def save_as(content, path):
    torch.save(content, path)
    return path


def test_load_audiocraft_reads_the_settings(magnet_tiny):
    assert magnet_tiny.config == ModelConfig(n_codebooks=4, card=64, dim=64, n_heads=4, n_layers=3, ffn_mult=4,
                                             text_dim=32, context=5, span_len=3, seconds=1.0)
    assert magnet_tiny.mask_id == 64


def test_load_audiocraft_gives_a_float32_model_for_use(published, tmp_path):
    """Published weights are float16."""
    published["best_state"] = {name: tensor.half() for name, tensor in published["best_state"].items()}
    model = load_audiocraft(save_as(published, tmp_path / "state_dict.bin"))
    assert not model.training
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in model.parameters())


def test_load_audiocraft_takes_the_folder_of_the_file(published, tmp_path, magnet_tiny):
    save_as(published, tmp_path / "state_dict.bin")
    assert load_audiocraft(tmp_path).out_norm.weight.equal(magnet_tiny.out_norm.weight)


@pytest.mark.parametrize("theirs, ours", [("transformer.layers.2.linear1.weight", "blocks.2.linear1.weight"),
                                          ("linears.3.weight", "heads.3.weight"),
                                          ("out_norm.bias", "out_norm.bias"),
                                          ("transformer.layers.0.cross_attention.in_proj_weight", "cross_attn.kv")])
def test_load_audiocraft_names_a_missing_tensor(theirs, ours, published, tmp_path):
    del published["best_state"][theirs]
    with pytest.raises(ValueError, match=f"broken.bin: tensor .*{ours}.* is missing"):
        load_audiocraft(save_as(published, tmp_path / "broken.bin"))


def test_load_audiocraft_names_an_unexpected_tensor(published, tmp_path):
    published["best_state"]["transformer.layers.3.norm1.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"broken.bin: tensor blocks.3.norm1.bias is unexpected"):
        load_audiocraft(save_as(published, tmp_path / "broken.bin"))


def test_load_audiocraft_names_a_misshapen_tensor(published, tmp_path):
    published["best_state"]["emb.1.weight"] = torch.zeros(64, 64)
    with pytest.raises(ValueError, match=r"broken.bin: tensor emb.1.weight has shape \(64, 64\), want \(65, 64\)"):
        load_audiocraft(save_as(published, tmp_path / "broken.bin"))


def test_load_audiocraft_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere.bin: no such file"):
        load_audiocraft(tmp_path / "nowhere.bin")


def test_load_audiocraft_refuses_a_setting_that_is_missing(published, tmp_path):
    published["xp.cfg"] = published["xp.cfg"].replace("subcodes_context", "something_else")
    with pytest.raises(ValueError, match="broken.bin: not a published MAGNeT.*subcodes_context"):
        load_audiocraft(save_as(published, tmp_path / "broken.bin"))


def test_audiocraft_config_raises_key_error_for_a_missing_setting(published):
    with pytest.raises(KeyError, match="segment_duration"):
        audiocraft_config(published["xp.cfg"].replace("dataset:", "data:"), 32)


# ------------------------------------------------------------------------------------------------------ checkpoints

def checkpoint_of(model):
    return {"model_config": dataclasses.asdict(model.config), "ema": model.state_dict(), "codec": "toy",
            "text_encoder": "t5-small", "codec_id": "c0", "text_encoder_id": "e0"}


def test_load_model_gives_back_what_was_saved(make_magnet, tmp_path):
    model = make_magnet(context=7)
    loaded, names = load_model(save_as(checkpoint_of(model), tmp_path / "checkpoint.pt"))
    assert names == {"codec": "toy", "text_encoder": "t5-small", "codec_id": "c0", "text_encoder_id": "e0"}
    assert loaded.config == model.config and not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert loaded(random_codes(model), 1, random_text(model)).equal(model(random_codes(model), 1, random_text(model)))


def test_load_model_takes_the_folder_of_a_training_run(make_magnet, tmp_path):
    save_as(checkpoint_of(make_magnet()), tmp_path / "checkpoint.pt")
    assert load_model(tmp_path)[0].config == load_model(str(tmp_path))[0].config == make_magnet().config


def test_load_model_finds_the_toy_model(make_magnet, tmp_path, monkeypatch):
    path = save_as(checkpoint_of(make_magnet(context=9)), tmp_path / "magnet.pt")
    monkeypatch.setitem(TOY_MODELS, "toy", path)
    assert load_model("toy")[0].config.context == 9


def test_load_model_names_an_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'my-model': want a training run"):
        load_model("my-model")


@pytest.mark.parametrize("key", ["model_config", "ema", "codec", "text_encoder"])
def test_load_model_names_what_a_checkpoint_lacks(key, make_magnet, tmp_path):
    content = checkpoint_of(make_magnet())
    del content[key]
    with pytest.raises(ValueError, match=f"checkpoint.pt: .*lacks {key}"):
        load_model(save_as(content, tmp_path / "checkpoint.pt"))


def test_load_model_refuses_the_config_of_another_version(make_magnet, tmp_path):
    content = checkpoint_of(make_magnet())
    content["model_config"]["n_experts"] = 8
    with pytest.raises(ValueError, match="checkpoint.pt: .*n_experts"):
        load_model(save_as(content, tmp_path / "checkpoint.pt"))


def test_load_model_names_a_tensor_that_does_not_fit(make_magnet, tmp_path):
    content = checkpoint_of(make_magnet())
    content["model_config"]["n_layers"] = 3
    with pytest.raises(ValueError, match=r"checkpoint.pt: tensor blocks.2\S* is missing"):
        load_model(save_as(content, tmp_path / "checkpoint.pt"))


LOADERS = pytest.mark.parametrize("load", [load_model, load_audiocraft])


@LOADERS
@pytest.mark.parametrize("content", [b"", b"RIFF not a checkpoint", b"PK\x03\x04 nor a zip file"])
def test_loading_refuses_a_foreign_file(load, content, tmp_path):
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="foreign.bin: cannot be read as a checkpoint"):
        load(path)


@LOADERS
def test_loading_refuses_a_truncated_file(load, tmp_path):
    path = tmp_path / "cut.bin"
    path.write_bytes((DATA / "magnet_tiny_state_dict.bin").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.bin: cannot be read as a checkpoint"):
        load(path)


@LOADERS
@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_loading_refuses_a_checkpoint_of_something_else(load, content, tmp_path):
    with pytest.raises(ValueError, match="other.bin: is not such a checkpoint"):
        load(save_as(content, tmp_path / "other.bin"))


def pickle_as(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


class Touch:
    """Unpickled carelessly, this makes a file: harmless proof that code was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@LOADERS
@pytest.mark.parametrize("save", [save_as, pickle_as])
def test_loading_never_runs_code_from_a_file(load, save, tmp_path):
    path = save({"best_state": Touch(tmp_path / "proof"), "model_config": {}}, tmp_path / "code.bin")
    with pytest.raises(ValueError, match="code.bin"):
        load(path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("change", [
    {"model_config": {"dim": 100, "n_heads": 7}}, {"model_config": {"n_heads": 0}}, {"model_config": {"card": -5}},
    {"ema": None}, {"ema": [1]}, {"ema": {"out_norm.bias": 3}},
], ids=str)
def test_load_model_names_the_file_whatever_is_wrong_inside(change, make_magnet, tmp_path):
    model = make_magnet()
    torch.save(checkpoint_of(model) | change, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_text_without_a_mask_works_in_half_precision(dtype, make_magnet):
    model = make_magnet().to(dtype)
    codes = torch.zeros(1, 4, 5, dtype=torch.long)
    assert model(codes, 0, torch.randn(1, 3, 8)).isfinite().all()


def test_text_len_makes_a_prompt_independent_of_its_companions(make_magnet):
    """Padding takes part in the attention: without a common width, a longer companion would change the logits."""
    short, codes = torch.randn(1, 3, 8), torch.zeros(1, 4, 5, dtype=torch.long)
    wide, mask = F.pad(short, (0, 0, 0, 4)), torch.tensor([[1.0] * 3 + [0.0] * 4])
    for text_len, equal in ((0, False), (8, True)):
        model = make_magnet(text_len=text_len)
        alone, beside = model(codes, 0, short, torch.ones(1, 3)), model(codes, 0, wide, mask)
        assert torch.allclose(alone, beside, atol=1e-6) is equal
