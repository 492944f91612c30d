"""The transformer and the reading of its weights: the claims of model.py.

Read in the order of the module: attention, local attention, who reaches whom [Fig. 8], the text and the null
condition, embeddings, heads and first weights, the key-value cache, `score_codes`, loading; `positions` and the block
are exercises, whose claims are in study/exercises.md. At the end the logits of the official code for
`data/magnet_tiny_*` and `data/musicgen_tiny_*`, small random models in the published layout.
"""

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, RunsCode, drawn, random_codes, random_text

from masking import causal_attention_mask, delay_codes, mask_codes, restricted_attention_mask, undelay
from model import Cache, attention, load_model, local_attention, positions, text_attention_mask
from support.files import Companions

PUBLISHED = torch.load(DATA / "magnet_tiny_state_dict.bin", weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_weighs_values_by_the_softmax_of_scaled_products(dtype):
    """q k / sqrt(D) is ln 3 for the first key and 0 for the second (D = 4): weights 3/4 and 1/4. In half precision, and
    with gradients, on a CPU the formula itself is run, else the fused kernel: both must give this."""
    q = torch.tensor([[2 * math.log(3), 0, 0, 0]], dtype=dtype, requires_grad=True)
    k, v = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).to(dtype), torch.tensor([[4, 0, 0, 0], [0, 4, 8, 0]]).to(dtype)
    for may_attend, wanted in ((None, [3, 1, 2, 0]), ([[True, False]], [4, 0, 0, 0]), ([[False, True]], [0, 4, 8, 0])):
        out = attention(q, k, v, None if may_attend is None else torch.tensor(may_attend))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), torch.tensor([wanted]).float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("context", [0, 1, 5, 33, 100, 10**9])
def test_local_attention_is_attention_within_the_band(context, generator):
    """Values and gradients, for lengths around those of its blocks of 32 frames or more, and a band that is wider."""
    for T in (1, 2, 5, 6, 7, 31, 32, 33, 65, 101):
        q, k, v, weight = torch.randn(4, 2, 2, T, 4, generator=generator)
        results = []
        for attend in (lambda *x: local_attention(*x, context),
                       lambda *x, T=T: attention(*x, restricted_attention_mask(T, context))):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attend(*inputs)
            results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
        for name, ours, wanted in zip(("values", "dq", "dk", "dv"), *results, strict=True):
            assert (ours - wanted).abs().max() < 1e-5, f"T = {T}: {name} differ, a query sees too much or too little"


def test_local_attention_never_holds_a_tensor_of_frames_times_frames(make_magnet):
    """60 s at 50 Hz, 5 frames of context: scores or a mask of all pairs would be 3000 * 3000 = 9,000,000 numbers.
    What is kept for the gradients is looked at, of the function and of a model at a stage after the first."""
    T, model = 3000, make_magnet(n_layers=1, n_heads=1, dim=4, ffn_mult=1, card=2)
    q, k, v = torch.zeros(3, 1, 1, T, 2).requires_grad_()
    for call in (lambda: local_attention(q, k, v, 5), lambda: model(random_codes(model, B=1, T=T), 1)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()), id):
            call()
        assert max(sizes) <= 60 * T, f"a tensor of {max(sizes)} numbers: memory should grow as T * context, not T * T"


def frames_that_reach(model, frame, stage, T):
    """[Fig. 8] The input frames that get a gradient when the logits of one frame are back-propagated."""
    reached = []
    for table in model.emb:
        table.register_forward_hook(lambda table, args, out: out.retain_grad() or reached.append(out))
    model(random_codes(model, B=1, T=T), stage)[0, frame].square().sum().backward()
    return sorted({t for out in reached for t in out.grad[0].abs().sum(dim=1).nonzero()[:, 0].tolist()})


@pytest.mark.of("MAGNeT.forward")
def test_the_first_stage_sees_every_frame_and_later_ones_five_more_on_each_side_in_every_layer(make_magnet):
    assert frames_that_reach(make_magnet(n_layers=1), 0, 0, 61) == list(range(61)), "only stages > 0 are restricted"
    for n_layers, stage, frame in ((1, 1, 0), (1, 3, 30), (3, 1, 30), (3, 3, 60)):
        wanted = list(range(max(frame - 5 * n_layers, 0), min(frame + 5 * n_layers, 60) + 1))
        assert frames_that_reach(make_magnet(n_layers=n_layers), frame, stage, 61) == wanted, f"stage {stage}"
    assert frames_that_reach(make_magnet(context=-1), 20, 3, 40) == list(range(40)), "context -1"
    assert frames_that_reach(make_magnet(context=0), 20, 3, 40) == [20], "context 0"


# ---------------------------------------------------------------------------------------- the text, the null condition

def test_text_attention_mask_shows_a_clip_its_own_tokens_and_padding_up_to_text_len():
    """Texts of 3, 1 and 0 tokens, in a batch padded to 5. A text without tokens is the null condition."""
    tokens = torch.arange(5) < torch.tensor([[3], [1], [0]])
    assert drawn(text_attention_mask(tokens, 0)[:, 0, 0]) == ["xxx..", "x....", "xxxxx"]
    assert drawn(text_attention_mask(tokens, 2)[:, 0, 0]) == ["xxx..", "xx...", "xxxxx"]
    assert text_attention_mask(tokens, 5) is None, "every clip attends to everything: no mask, the faster kernel"


@pytest.mark.parametrize("text_len", [0, 32])
@pytest.mark.of("text_attention_mask")
def test_a_clips_logits_do_not_depend_on_its_neighbours_or_on_what_is_written_in_padding(text_len, make_magnet):
    """Alone, first or last of two, beside a text of 512 tokens. Measured: they differ by at most 1.2e-6; those of
    `magnet_tiny`, whose logits are up to 14, by 9e-6; those of the shipped model not at all."""
    model = make_magnet(text_len=text_len)
    (text, mask), (long, full) = random_text(model, 1), random_text(model, 1, 512, seed=1)
    codes = random_codes(model, B=1)
    alone, padding = model(codes, 0, text, mask), 512 - text.shape[1]
    texts, masks = [F.pad(text, (0, 0, 0, padding), value=100), long], [F.pad(mask, (0, padding)), full]
    for place in (0, 1):
        both = model(codes.repeat(2, 1, 1), 0, torch.cat(texts), torch.cat(masks))
        assert (both[place] - alone[0]).abs().max() < 1e-5, f"as number {place} of 2 it is other music"
        texts.reverse(), masks.reverse()
    assert (both[0] - both[1]).abs().max() > 1e-2, "the two texts should make a difference"


@pytest.mark.parametrize("text_len", [0, 9])
@pytest.mark.of("MAGNeT.forward", "CrossAttention")
def test_the_null_condition_is_all_zero_whatever_the_text_and_the_projections_bias(text_len, make_magnet):
    """A row without a token adds exactly nothing to the residual stream: neither the empty caption's embedding, nor
    the bias of the projection, which is not zero once it is trained."""
    model = make_magnet(text_len=text_len)
    torch.nn.init.ones_(model.text_proj.bias)
    codes, (text, mask) = random_codes(model), random_text(model)
    mask[1] = False
    logits, null = model(codes, 0, text, mask), model(codes, 0)
    assert logits[1].equal(null[1]), "something of a text comes through the null condition"
    assert not torch.allclose(logits[0], null[0], atol=1e-3), "the other row has a text"


# ------------------------------------------------------------------------------------- embeddings, heads, the beginning

@pytest.mark.of("MAGNeT.forward")
def test_inputs_are_the_sum_of_one_embedding_per_codebook_and_the_position(make_magnet):
    """Table k is filled with 10 ** k: the sum over four codebooks is 1111 (their mean 278, the first table alone 4)."""
    model, inputs = make_magnet(), []
    for k, table in enumerate(model.emb):
        assert table.weight.shape == (17, 32), "16 entries and the mask token"
        torch.nn.init.constant_(table.weight, 10**k)
    model.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    model(random_codes(model), 0)
    torch.testing.assert_close(inputs[0] - positions(20, 32, "cpu"), torch.full((2, 20, 32), 1111.0), atol=1e-3, rtol=0)


@pytest.mark.of("MAGNeT.forward")
def test_each_codebook_has_its_own_head(make_magnet):
    """The last norm gives ones, head k sums them up to k: the logits of stage k are k."""
    model, codes = make_magnet(), random_codes(make_magnet())
    torch.nn.init.zeros_(model.out_norm.weight), torch.nn.init.ones_(model.out_norm.bias)
    for k, head in enumerate(model.heads):
        torch.nn.init.constant_(head.weight, k / 32)
    assert [model(codes, stage).mean().item() for stage in range(4)] == pytest.approx([0, 1, 2, 3])
    assert model(codes, None).mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 1, 2, 3]), "all stages at once"


@pytest.mark.of("Block")
def test_every_layer_norm_divides_by_the_root_of_the_variance_and_1e_5(make_magnet):
    """Of inputs of +-0.001 (variance 1e-6) that makes 0.001 / sqrt(1.1e-5) = 0.3015; other eps give 0.03 or 0.995."""
    norms = [module for module in make_magnet().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1, "three in each of the two blocks, and the last"
    for norm in norms:
        assert norm(torch.tensor([0.001, -0.001] * 16))[0].item() == pytest.approx(0.30151, abs=1e-4)


@pytest.mark.of("MAGNeT")
def test_all_weights_start_at_the_scale_of_their_inputs_and_learn(make_magnet):
    model = make_magnet(dim=64, card=64)
    for layer, fan_in in ((model.emb[0], 64), (model.heads[0], 64), (model.blocks[0].linear2, 256)):
        assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    for T in (1, 20):
        model.zero_grad()
        sum(model(random_codes(model, T), k, *random_text(model)).square().sum() for k in range(4)).backward()
        for name, weight in model.named_parameters():
            assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name


@pytest.mark.of("MAGNeT")
def test_repr_says_what_kind_of_model_it_is(make_magnet):
    for words, fields in (("2 layers x 32 wide, 2 heads", {}), ("spans of 3, 5 frames of context", {}),
                          ("full attention", {"context": -1}), ("autoregressive", {"objective": "ar"})):
        assert words in repr(make_magnet(**fields))


@pytest.mark.of("MAGNeT.forward")
def test_codes_a_stage_or_a_text_of_another_model_are_refused(make_magnet):
    for fields, stage in (({"n_codebooks": 3}, 0), ({}, 4), ({"text_dim": 9}, 0)):
        other = make_magnet(**fields)
        with pytest.raises(ValueError, match="this model"):
            make_magnet()(random_codes(other), stage, *random_text(other))


@pytest.mark.parametrize("parts", [[1] * 12, [7, 1, 4], [12]], ids=str)
@pytest.mark.of("Cache.append")
def test_reading_with_a_cache_gives_the_logits_of_one_causal_pass(parts, make_magnet):
    model = make_magnet(objective="ar")
    codes, text = random_codes(model, T=12), random_text(model)
    cache = [Cache(12) for _ in model.blocks]
    logits = torch.cat([model(part, None, *text, cache=cache) for part in codes.split(parts, dim=2)], dim=2)
    torch.testing.assert_close(logits, model(codes, None, *text, mask=causal_attention_mask(12, 12)), atol=1e-5, rtol=0)


def test_score_codes_is_a_probability_which_the_token_itself_does_not_change(make_magnet):
    """Frame 3 of codebook 1 is given each of the 16 values in turn: their probabilities add up to 1."""
    model = make_magnet(objective="ar")
    codes = random_codes(model, B=1, T=6).repeat(16, 1, 1)
    codes[:, 1, 3] = torch.arange(16)
    scores = model.score_codes(codes, 1)  # (16, 6)
    assert scores[:, 3].sum().item() == pytest.approx(1, abs=1e-5)
    assert (scores[:, :3] - scores[:1, :3]).abs().max() < 1e-6, "earlier tokens do not know it"
    assert (scores[:, 4:] - scores[:1, 4:]).abs().max() > 1e-4, "later ones do"


def test_score_codes_of_codebook_1_knows_what_the_delay_has_written_before(make_magnet):
    """Frame 4 of codebook 1 stands at position 6. What stands before it: codebook 0 up to frame 4, codebook 1 up to
    frame 3, codebook 2 up to frame 2, codebook 3 up to frame 1."""
    model = make_magnet(objective="ar")
    codes = random_codes(model, T=8, B=1)
    for level, last in enumerate((4, 3, 2, 1)):
        changed = codes.repeat(8, 1, 1)  # clip i differs in frame i
        changed[range(8), level, range(8)] = (codes[0, level] + 1) % 16
        changes = (model.score_codes(changed, 1) - model.score_codes(codes, 1))[:, 4].abs() > 1e-6
        if level == 1:
            changes[4] = False  # the token itself
        assert drawn(changes[None]) == ["x" * (last + 1) + "." * (7 - last)], f"the frames of codebook {level}"


def test_load_model_gives_back_what_was_saved(make_magnet, tmp_path):
    model = make_magnet(context=7)
    inputs, path = (random_codes(model), 1, *random_text(model)), tmp_path / "checkpoint.pt"
    torch.save({"model_config": dataclasses.asdict(model.config), "ema": model.state_dict(), "codec": "toy",
                "text_encoder": "t5-small", "codec_id": "c0", "text_encoder_id": "e0",
                "sampling": {"top_p": 0.8}}, path)
    for name in (path, tmp_path, str(tmp_path)):  # the file, or the folder of a training run
        loaded, companions = load_model(name)
        assert loaded.config == model.config and loaded(*inputs).equal(model(*inputs))
        assert companions == Companions("toy", "t5-small", "c0", "e0", sampling={"top_p": 0.8})
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


def test_load_model_keeps_weights_of_the_type_asked_for_in_their_file(tmp_path):
    """One copy in memory: q and kv are two parts of one published tensor. Another type is converted."""
    half = {name: tensor.half() for name, tensor in PUBLISHED["best_state"].items()}
    torch.save(PUBLISHED | {"best_state": half}, tmp_path / "state_dict.bin")
    models = (load_model(tmp_path, dtype=dtype)[0] for dtype in (torch.float16, torch.float32))
    half, single = (model.blocks[0].cross_attn for model in models)
    assert half.q.weight.untyped_storage().data_ptr() == half.kv.weight.untyped_storage().data_ptr()
    assert single.q.weight.dtype == torch.float32 and single.q.weight.equal(half.q.weight.float())


def test_load_model_finds_codec_and_text_encoder_that_lie_beside_it(tmp_path):
    folder = tmp_path / "model"
    for place in ("encodec_32khz", "model/t5-base"):
        (tmp_path / place).mkdir(parents=True)
    torch.save(PUBLISHED, folder / "state_dict.bin")
    found = load_model(folder)[1]
    assert (found.codec, found.text_encoder) == (str(tmp_path / "encodec_32khz"), str(folder / "t5-base"))
    for file in ("compression_state_dict.bin", "spiece.model"):
        (folder / file).touch()
    found = load_model(folder)[1]
    assert (found.codec, found.text_encoder) == (str(folder / "compression_state_dict.bin"), str(folder))


def without(name):
    """A published file without one of its tensors."""
    return PUBLISHED | {"best_state": {key: x for key, x in PUBLISHED["best_state"].items() if key != name}}


BAD_FILES = {  # name: (content, what the message says)
    "a tensor too few": (without("linears.3.weight"), "tensor heads.3.weight is missing"),
    "no text attention": (without("transformer.layers.0.cross_attention.in_proj_weight"),
                          "tensor blocks.0.cross_attn.kv.weight is missing"),
    "a setting too few": (PUBLISHED | {"xp.cfg": PUBLISHED["xp.cfg"].replace("subcodes_context", "other")},
                          "it lacks 'transformer_lm.subcodes_context'"),
    "a text encoder": (torch.load(DATA / "t5_tiny_pytorch_model.bin", weights_only=True), "it lacks 'model_config'"),
    "a config of another version": ({"model_config": {"n_experts": 8}, "ema": {}}, "'n_experts'"),
    "code": ({"best_state": RunsCode(), "xp.cfg": ""}, "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_model_names_the_file_and_what_is_wrong_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = BAD_FILES[kind]
    torch.save(content, tmp_path / "state_dict.bin")
    with pytest.raises(ValueError, match=rf"state_dict\.bin: .*{words}") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["state_dict.bin"]


# ------------------------------------------------------------------------------------------- against the official code

@pytest.mark.parametrize("stage", range(4))
def test_forward_gives_the_official_logits_and_loss(stage, magnet_tiny, golden):
    """With the text, with the null condition, and the cross-entropy of the hidden tokens."""
    text, wanted = (golden["text_embeddings"], golden["text_mask"]), golden["stages"][stage]
    inputs, hidden = mask_codes(golden["codes"], stage, wanted["masked"], magnet_tiny.mask_id), wanted["masked"]
    logits, null = magnet_tiny(inputs, stage, *text), magnet_tiny(inputs, stage)
    loss = F.cross_entropy(logits[hidden], golden["codes"][:, stage][hidden])
    assert inputs.equal(wanted["input"])
    for ours, name in ((logits, "logits"), (null, "logits_null"), (loss, "masked_cross_entropy")):
        torch.testing.assert_close(ours, wanted[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.of("MAGNeT.forward")
def test_logits_in_half_precision_are_within_two_percent_of_the_official_ones(dtype, golden):
    model = load_model(DATA / "magnet_tiny_state_dict.bin", dtype=dtype)[0]
    model.config.text_len = 7
    for stage, wanted in enumerate(golden["stages"]):
        logits = model(wanted["input"], stage, golden["text_embeddings"], golden["text_mask"])
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        assert (logits - wanted["logits"]).norm() < 0.02 * wanted["logits"].norm()


def test_forward_gives_musicgens_logits_where_they_are_defined(musicgen_tiny, musicgen_golden):
    golden = musicgen_golden
    delayed, there = delay_codes(golden["codes"], musicgen_tiny.mask_id), golden["logits_mask"]
    logits = musicgen_tiny(delayed, None, golden["text_embeddings"], golden["text_mask"],
                           mask=causal_attention_mask(44, 44))
    assert there.sum() == 2 * (40 + 39 + 38 + 37), "the last k frames of codebook k have none"
    torch.testing.assert_close(undelay(logits, shift=-1)[there], golden["logits"][there], atol=1e-4, rtol=0)
