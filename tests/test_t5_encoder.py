"""What the T5 text encoder promises. Nothing here touches the network.

`data/t5_tiny_*` and `data/t5v1_1_tiny_*` are small random encoders with the hidden states that an independent
implementation gave for them; `data/t5_spiece.model` is T5's own SentencePiece model (Apache-2.0), and
`data/t5_token_ids.json` what an independent implementation made of some captions with it.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_safetensors

import t5_encoder
from t5_encoder import RMSNorm, T5Config, T5Encoder, Tokenizer, relative_buckets

DATA = Path(__file__).parent / "data"
SPIECE = DATA / "t5_spiece.model"
CAPTIONS = ["80s electronic track with a groovy bass", "", "smooth jazz", " \n\t", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SPIECE)


@pytest.fixture
def encoder(tokenizer):
    """A small random encoder with T5's own tokenizer."""
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(32000, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4))
    encoder.tokenizer = tokenizer
    return encoder


def published_tensors(name="t5_tiny"):
    return torch.load(DATA / f"{name}_pytorch_model.bin", weights_only=True)


def load_golden(name):
    golden = torch.load(DATA / f"{name}_forward.pt", weights_only=True)
    return golden["input_ids"], golden["attention_mask"].bool(), golden["last_hidden_state"]


# Parity with the reference


@pytest.mark.parametrize("name", ["t5_tiny", "t5v1_1_tiny"], ids=["v1_0", "v1_1"])
def test_encoder_matches_reference(name):
    input_ids, mask, expected = load_golden(name)
    with torch.no_grad():
        hidden = T5Encoder.from_pretrained(DATA / f"{name}_pytorch_model.bin")(input_ids, mask)
    torch.testing.assert_close(hidden[mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["t5_tiny", "t5v1_1_tiny"], ids=["v1_0", "v1_1"])
def test_config_inferred_from_shapes_equals_the_published_one(name, tmp_path):
    shutil.copy(DATA / f"{name}_pytorch_model.bin", tmp_path / "pytorch_model.bin")
    inferred = T5Encoder.from_pretrained(tmp_path).config
    published = torch.load(DATA / f"{name}_forward.pt", weights_only=True)["config"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert T5Encoder.from_pretrained(tmp_path).config == inferred


# Relative positions


def test_relative_buckets_are_symmetric_up_to_half():
    distance = torch.arange(1, 600)
    assert torch.equal(relative_buckets(distance), relative_buckets(-distance) + 16)


def test_relative_buckets_keep_near_distances_apart():
    assert relative_buckets(-torch.arange(8)).tolist() == list(range(8))


def test_relative_buckets_grow_logarithmically_then_stop():
    # Eight buckets cover 8..128, so that two of them are a factor of 2.
    edges = [math.ceil(8 * 16 ** (i / 8)) for i in range(8)]
    assert relative_buckets(-torch.tensor(edges)).tolist() == list(range(8, 16))
    assert relative_buckets(1 - torch.tensor(edges)).tolist() == list(range(7, 15))
    assert relative_buckets(torch.tensor([-128, -10**6, 10**6])).tolist() == [15, 15, 31]


def test_encoder_sees_distances_and_not_positions():
    # The same tokens, moved 20 places to the right behind padding, are encoded the same.
    encoder = T5Encoder.from_pretrained(DATA / "t5_tiny_pytorch_model.bin")
    ids = torch.randint(2, 128, (1, 30), generator=torch.Generator().manual_seed(0))
    moved = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        here = encoder(ids, torch.ones(1, 30))
        there = encoder(moved, moved > 0)
        backwards = encoder(ids.flip(1), torch.ones(1, 30)).flip(1)
    torch.testing.assert_close(there[:, 20:], here, atol=1e-4, rtol=0)
    assert (backwards - here).abs().max() > 0.1  # but order does matter


# Parts


def test_rms_norm_keeps_the_mean_and_drops_the_scale():
    norm = RMSNorm(4, 1e-6)
    x = torch.tensor([1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(norm(1e4 * x), x)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])).square().mean(), torch.tensor(1.0))


def test_initial_hidden_states_have_unit_scale():
    torch.manual_seed(0)
    for kind in ("relu", "gated-gelu"):
        encoder = T5Encoder(T5Config(500, 64, 16, 128, 4, 4, feed_forward_proj=kind))
        attention, feed_forward = [], []
        encoder.blocks[-1].attention.register_forward_hook(lambda m, i, y, seen=attention: seen.append(y.std()))
        encoder.blocks[-1].feed_forward.register_forward_hook(lambda m, i, y, seen=feed_forward: seen.append(y.std()))
        encoder(torch.randint(500, (4, 30)), torch.ones(4, 30))
        assert 0.1 < attention[0] < 2 and 0.1 < feed_forward[0] < 2


def test_initial_attention_scores_have_unit_scale_without_scaling():
    torch.manual_seed(0)
    attention = T5Encoder(T5Config(500, 64, 16, 128, 1, 1)).blocks[0].attention
    x = torch.randn(200, 64)
    assert 0.7 < (attention.q(x) @ attention.k(x).T).std() < 1.4


def test_every_parameter_is_trained(encoder):
    input_ids, mask = encoder.tokenizer(["a cheerful country song", "jazz"])
    encoder(input_ids, mask).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Tokenizer


def test_tokenizer_matches_reference_ids(tokenizer):
    for case in json.loads((DATA / "t5_token_ids.json").read_text(encoding="utf-8")):
        input_ids, mask = tokenizer([case["text"]])
        assert input_ids[0].tolist() == case["ids"], case["text"]
        assert mask.all()


def test_tokenizer_pads_with_0_where_the_mask_is_false(tokenizer):
    input_ids, mask = tokenizer(["smooth jazz", "smooth jazz with a saxophone solo", ""])
    assert input_ids.dtype == torch.long and mask.dtype == torch.bool
    assert torch.equal(mask, input_ids != 0)
    assert (input_ids[torch.arange(3), mask.sum(1) - 1] == 1).all()  # each text ends in EOS


def test_tokenizer_truncates_at_512_and_keeps_the_end(tokenizer):
    input_ids, mask = tokenizer(["music with " * 1000])
    assert input_ids.shape == mask.shape == (1, 512)
    assert input_ids[0].tolist() == [723, 28] * 255 + [723, 1]  # "music", "with", ..., EOS


@pytest.mark.parametrize("caption", ["a\0b", "\ud800 rock", "\u200b", "\U0001f3b8" * 3, "e\u0301", "\x07", "x" * 5000])
def test_tokenizer_takes_any_string(tokenizer, caption):
    input_ids, _ = tokenizer([caption])
    assert input_ids[0, -1] == 1 and 0 <= input_ids.min() and input_ids.max() < 32000


def test_tokenizer_rejects_a_bare_string_and_non_strings(tokenizer):
    for wrong in ("smooth jazz", ["jazz", 3]):
        with pytest.raises(TypeError, match="list of strings"):
            tokenizer(wrong)


def test_tokenizer_names_a_missing_or_foreign_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.model"):
        Tokenizer(tmp_path / "nowhere.model")
    for content in (b"", b"hello", SPIECE.read_bytes()[:1001]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"spiece\.model is not a (SentencePiece model|T5 tokenizer)"):
            Tokenizer(tmp_path / "spiece.model")


# encode_text


def test_encode_text_gives_shapes_types_and_no_gradient(encoder):
    embeddings, mask = encoder.encode_text(CAPTIONS)
    assert embeddings.shape == (5, mask.shape[1], 16) and embeddings.dtype == torch.float32
    assert mask.dtype == torch.bool and not embeddings.requires_grad


def test_encode_text_is_zero_exactly_where_masked(encoder):
    embeddings, mask = encoder.encode_text(CAPTIONS)
    assert torch.equal(embeddings.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("captions", [[""], ["", " \n"], [None], ["\0"], ["\u200b", "\u3000"]])
def test_encode_text_of_empty_captions_only_is_all_masked(encoder, captions):
    embeddings, mask = encoder.encode_text(captions)
    assert mask.shape[0] == len(captions) and mask.shape[1] >= 1
    assert not mask.any() and not embeddings.any()


def test_encode_text_does_not_depend_on_the_other_captions(encoder):
    embeddings, mask = encoder.encode_text(CAPTIONS + ["music with " * 300])
    for row, caption in enumerate(CAPTIONS):
        alone, alone_mask = encoder.encode_text([caption])
        torch.testing.assert_close(embeddings[row][mask[row]], alone[0][alone_mask[0]], atol=1e-5, rtol=0)


def test_encode_text_needs_a_tokenizer_and_says_where(tmp_path):
    shutil.copy(DATA / "t5_tiny_pytorch_model.bin", tmp_path / "pytorch_model.bin")
    encoder = T5Encoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        encoder.encode_text(["jazz"])
    assert str(tmp_path / "spiece.model") in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_finite_in_any_dtype(encoder, dtype):
    largest = []
    for block in encoder.blocks:
        block.feed_forward.wo.weight.data.mul_(3e4)  # past what fp16 holds, as in large T5 models
        block.feed_forward.register_forward_hook(lambda m, i, y: largest.append(y.abs().max()))
    encoder.to(dtype)
    embeddings, _ = encoder.encode_text(CAPTIONS)
    assert max(largest) > 65504
    assert embeddings.dtype == torch.float32 and embeddings.isfinite().all()
    nothing = encoder(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    assert torch.equal(nothing, torch.zeros(2, 3, 16))


def test_autocast_does_not_change_the_result(encoder):
    expected, _ = encoder.encode_text(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, _ = encoder.encode_text(CAPTIONS)
    assert torch.equal(embeddings, expected)


# Weights


def test_decoder_and_head_are_ignored():
    tensors = published_tensors()
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3), "lm_head.weight": torch.zeros(2, 2)}
    plain, full = T5Encoder.from_state_dict(tensors), T5Encoder.from_state_dict(tensors | extra)
    assert plain.config == full.config and plain.state_dict().keys() == full.state_dict().keys()


@pytest.mark.parametrize("name", [n for n in published_tensors() if "embed_tokens" not in n and "block.1" not in n])
def test_missing_tensor_is_named(name):
    tensors = published_tensors()
    del tensors[name], tensors["encoder.embed_tokens.weight"]
    with pytest.raises(ValueError, match="my file") as error:
        T5Encoder.from_state_dict(tensors, source="my file")
    # Without the feed-forward's input its kind is unknown too, but the message still says which tensor.
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["encoder.final_layer_norm.weight", "encoder.block.1.layer.0.SelfAttention.o.weight"])
def test_misshapen_tensor_is_named(name):
    tensors = published_tensors()
    tensors[name] = tensors[name][:-1]
    with pytest.raises(ValueError, match="my file") as error:
        T5Encoder.from_state_dict(tensors, source="my file")
    assert name in str(error.value)


def test_unexpected_encoder_tensor_is_named():
    tensors = published_tensors()
    config = dataclasses.replace(T5Encoder.from_state_dict(tensors).config, num_layers=2)
    with pytest.raises(ValueError, match=r"encoder\.block\.2"):
        T5Encoder.from_state_dict(tensors, config)


def test_saved_half_precision_folder_loads_as_float32(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "toy", dtype=torch.float16)
    stored = torch.load(tmp_path / "toy" / "pytorch_model.bin", weights_only=True)
    assert stored["shared.weight"].dtype == torch.float16
    loaded = T5Encoder.from_pretrained(tmp_path / "toy")
    assert loaded.config == encoder.config
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.encode_text(CAPTIONS), encoder.encode_text(CAPTIONS), atol=0.02, rtol=0)


def test_saved_folder_gives_the_same_encoder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    expected, _ = encoder.encode_text(CAPTIONS)
    embeddings, _ = T5Encoder.from_pretrained(tmp_path).encode_text(CAPTIONS)
    assert torch.equal(embeddings, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin", "spiece.model"]


def test_tokenizer_too_large_for_the_encoder_is_an_error(tmp_path):
    shutil.copy(DATA / "t5_tiny_pytorch_model.bin", tmp_path / "pytorch_model.bin")
    shutil.copy(SPIECE, tmp_path / "spiece.model")
    with pytest.raises(ValueError, match="32000 pieces.* 128 only"):
        T5Encoder.from_pretrained(tmp_path)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_file_that_is_not_a_state_dict_is_refused_and_never_run(tmp_path):
    weights, victim = tmp_path / "pytorch_model.bin", tmp_path / "written_by_the_file"
    whole = (DATA / "t5_tiny_pytorch_model.bin").read_bytes()
    for content in (b"", b"not weights", whole[: len(whole) // 2]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            T5Encoder.from_pretrained(tmp_path)
    for thing in ({"shared.weight": RunsCode(victim)}, [torch.zeros(2)], {"model": {"a": torch.zeros(2)}}, {}):
        torch.save(thing, weights)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin") as error:
            T5Encoder.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    assert not victim.exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"d_model": "wide"}', '{"feed_forward_proj": "swish"}'])
def test_bad_config_file_is_named(tmp_path, text):
    shutil.copy(DATA / "t5_tiny_pytorch_model.bin", tmp_path / "pytorch_model.bin")
    good = torch.load(DATA / "t5_tiny_forward.pt", weights_only=True)["config"]
    text = json.dumps(good | json.loads(text)) if ":" in text else text
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the config of a T5 encoder"):
        T5Encoder.from_pretrained(tmp_path)


def test_folder_without_weights_says_which_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is missing"):
        T5Encoder.from_pretrained(tmp_path)


# Published names


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="t5-smal.* t5-small, t5-base, google/flan-t5-small"):
        T5Encoder.from_pretrained("t5-smal")


def test_offline_error_names_files_and_folder(offline):
    with pytest.raises(ConnectionError) as error:
        T5Encoder.from_pretrained("google/flan-t5-small")
    message = str(error.value)
    for file in ("model.safetensors", "pytorch_model.bin", "spiece.model"):
        assert f"google/flan-t5-small/resolve/main/{file}" in message
    assert str(offline / "google--flan-t5-small") in message and "\n" not in message


def test_published_files_are_fetched_once(encoder, local_hub, monkeypatch):
    encoder.save_pretrained(local_hub.folder / "google-t5/t5-small")
    monkeypatch.setitem(t5_encoder.PUBLISHED, "t5-small", encoder.config)
    for _ in range(2):
        embeddings, _ = T5Encoder.from_pretrained("t5-small").encode_text(CAPTIONS)
    assert torch.equal(embeddings, encoder.encode_text(CAPTIONS)[0])
    assert local_hub.served == [("google-t5/t5-small/pytorch_model.bin", 0), ("google-t5/t5-small/spiece.model", 0)]


def test_files_put_by_hand_are_used_without_a_network(encoder, offline, monkeypatch):
    monkeypatch.setitem(t5_encoder.PUBLISHED, "t5-base", encoder.config)
    encoder.save_pretrained(offline / "google-t5--t5-base")
    assert T5Encoder.from_pretrained("t5-base").tokenizer is not None


@pytest.mark.parametrize("left_out", ["shared.weight", "encoder.embed_tokens.weight"])
def test_safetensors_give_the_same_encoder(left_out, tmp_path):
    """They hold a tensor that has two names under one of them only."""
    tensors = published_tensors()
    expected = T5Encoder.from_state_dict(tensors)
    del tensors[left_out]
    write_safetensors(tensors, tmp_path / "model.safetensors")
    encoder = T5Encoder.from_pretrained(tmp_path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


@pytest.mark.parametrize("name, millions", [("t5-small", 35.3), ("t5-base", 109.6), ("google/flan-t5-small", 35.3)])
def test_published_configs_have_the_published_size(name, millions):
    with torch.device("meta"):
        encoder = T5Encoder(t5_encoder.PUBLISHED[name])
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions
