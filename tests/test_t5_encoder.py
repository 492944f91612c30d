"""What the T5 text encoder promises. Nothing here touches the internet.

Read in this order: the buckets of relative distances; the network, whose parts are exercises (`python -m study`);
captions to token ids; captions to embeddings; reading weights, from folders and by name; at the end, parity with an
independent implementation, whose hidden states are in `data/t5_tiny_*` (v1.0) and `data/t5v1_1_tiny_*` (v1.1), and
whose token ids are in `data/t5_token_ids.json`. `data/t5_spiece.model` is T5's own SentencePiece model (Apache-2.0).
"""

import json
import math

import pytest
import torch
from conftest import DATA, lay

from support.files import fingerprint
from t5_encoder import REPOSITORIES, T5Config, T5Encoder, relative_buckets
from toy.train_text import save_pretrained

SPIECE = DATA / "t5_spiece.model"
CAPTIONS = ["80s electronic track with a groovy bass", "", "smooth jazz", " \n\t", None]
FILES = ("pytorch_model.bin", "config.json", "spiece.model")


@pytest.fixture
def encoder():
    """A small random encoder with T5's own tokenizer."""
    torch.manual_seed(0)
    return T5Encoder(T5Config(32_000, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4), SPIECE)


def published(name="t5_tiny"):
    """Tensors and settings of a small encoder, as they are published."""
    golden = torch.load(DATA / f"{name}_forward.pt", weights_only=True)
    return torch.load(DATA / f"{name}_pytorch_model.bin", weights_only=True), golden["config"]


def assert_same_weights(one, other):
    assert one.config == other.config and fingerprint(one) == fingerprint(other)


def test_relative_buckets_keep_near_distances_apart_then_grow_logarithmically_then_stop():
    """Eight buckets cover 8 to 128, so that two of them are a factor of 2. A key after its query has 16 more."""
    edges = [math.ceil(8 * 16 ** (i / 8)) for i in range(8)]
    assert relative_buckets(-torch.tensor([*range(8), *edges])).tolist() == list(range(16))
    assert relative_buckets(1 - torch.tensor(edges)).tolist() == list(range(7, 15)), "one before an edge"
    assert relative_buckets(torch.tensor([-128, -10**6, 10**6])).tolist() == [15, 15, 31]
    distance = torch.arange(1, 600)
    assert relative_buckets(distance).equal(relative_buckets(-distance) + 16)


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.of("T5Encoder")
def test_layers_of_new_weights_keep_the_scale_without_scaled_scores_and_all_are_trained(kind):
    torch.manual_seed(0)
    encoder, outputs = T5Encoder(T5Config(500, 64, 16, 128, num_layers=4, num_heads=4, feed_forward_proj=kind)), []
    attention, x = encoder.blocks[0].attention, torch.randn(200, 64)
    q, k = (y(x).view(200, 4, 16).transpose(0, 1) for y in (attention.q, attention.k))
    assert 0.7 < (q @ k.transpose(1, 2)).std() < 1.4, "the scores of a head"
    for layer in (encoder.blocks[-1].attention, encoder.blocks[-1].feed_forward):
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.std()))
    encoder(torch.arange(500).view(4, 125), torch.ones(4, 125)).square().mean().backward()
    assert all(0.1 < scale < 2 for scale in outputs)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in encoder.parameters())


def test_forward_computes_in_float32_under_autocast_where_fp16_would_overflow(encoder):
    largest = []
    for block in encoder.blocks:
        block.feed_forward.wo.weight.data.mul_(1e5)  # as large T5 models do
        block.feed_forward.register_forward_hook(lambda m, i, y: largest.append(y.abs().max()))
    expected, _ = encoder.encode_text(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, _ = encoder.encode_text(CAPTIONS)
    assert max(largest) > 65_504 and embeddings.isfinite().all() and torch.equal(embeddings, expected)


def test_tokenize_ends_each_caption_in_eos_and_pads_with_0_and_takes_any_text(encoder):
    captions = ["smooth jazz", "smooth jazz with a saxophone solo", " ", "a\0b", "\u200b", "\U0001f3b8" * 3, "e\u0301",
                "\x07", "x" * 5000]
    input_ids, mask = encoder.tokenize(captions)
    assert input_ids.dtype == torch.long and mask.dtype == torch.bool and mask.equal(input_ids != 0)
    assert input_ids.min() >= 0 and input_ids.max() < 32_000
    assert (input_ids[torch.arange(len(captions)), mask.sum(1) - 1] == 1).all()


def test_tokenize_cuts_at_512(encoder):
    input_ids, mask = encoder.tokenize(["music with " * 1000])
    assert input_ids[0].tolist() == [723, 28] * 255 + [723, 1] and mask.all(), '"music", "with", ..., EOS'


def test_encode_text_gives_embeddings_that_are_zero_exactly_where_masked_and_for_the_empty_caption(encoder):
    embeddings, mask = encoder.encode_text(CAPTIONS)
    assert embeddings.shape == (5, mask.shape[1], 16) and embeddings.dtype == torch.float32
    assert not embeddings.requires_grad and torch.equal(embeddings.abs().sum(-1) > 0, mask)
    assert mask.sum(1).tolist()[1:] == [0, 3, 1, 0], "none: the null condition; white space conditions on EOS alone"
    embeddings, mask = encoder.encode_text(["", None])
    assert mask.shape[1] >= 1 and not mask.any() and not embeddings.any()


def test_encode_text_does_not_depend_on_the_other_captions(encoder):
    embeddings, mask = encoder.encode_text([*CAPTIONS, "music with " * 300])
    for row, caption in enumerate(CAPTIONS):
        alone, alone_mask = encoder.encode_text([caption])
        torch.testing.assert_close(embeddings[row][mask[row]], alone[0][alone_mask[0]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("left_out", ["shared.weight", "encoder.embed_tokens.weight"])
def test_from_pretrained_reads_safetensors_and_indexed_parts_with_the_embedding_under_either_name(left_out, tmp_path):
    tensors, config = published()
    unused = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3), "lm_head.weight": torch.zeros(2, 2)}
    expected = T5Encoder.from_pretrained(lay(tmp_path / "bin", tensors | unused, config) / "pytorch_model.bin")
    del tensors[left_out]
    whole = lay(tmp_path / "whole", tensors, config, "model.safetensors")
    assert_same_weights(T5Encoder.from_pretrained(whole), expected)
    names, folder = sorted(tensors), tmp_path / "parts"
    for file, part in (("1.safetensors", names[:5]), ("2.safetensors", names[5:])):
        lay(folder, {name: tensors[name] for name in part}, config, file)
    index = {name: f"{1 + (name in names[5:])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same_weights(T5Encoder.from_pretrained(folder), expected)


def test_from_pretrained_reads_back_what_save_pretrained_wrote(encoder, tmp_path):
    save_pretrained(encoder, tmp_path / "whole")
    assert_same_weights(T5Encoder.from_pretrained(tmp_path / "whole"), encoder)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == set(FILES)
    save_pretrained(encoder, tmp_path / "half", torch.float16)
    half = T5Encoder.from_pretrained(tmp_path / "half")
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    torch.testing.assert_close(half.encode_text(CAPTIONS), encoder.encode_text(CAPTIONS), atol=0.02, rtol=0)


def test_from_pretrained_names_file_and_field_or_tensor_that_is_wrong(tmp_path):
    tensors, config = published()
    for field, value in {"d_model": "wide", "d_ff": 2**40, "num_layers": 0, "d_kv": True, "vocab_size": None,
                         "layer_norm_epsilon": math.nan, "feed_forward_proj": "swish"}.items():
        with pytest.raises(ValueError, match=rf"config\.json: {field} must be"):
            T5Encoder.from_pretrained(lay(tmp_path, tensors, config | {field: value}))
    del tensors["encoder.final_layer_norm.weight"]
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: tensor final_norm.* is missing"):
        T5Encoder.from_pretrained(lay(tmp_path, tensors, config))


def test_from_pretrained_names_a_tokenizer_that_is_missing_foreign_or_too_large(tmp_path):
    folder = lay(tmp_path, *published())
    with pytest.raises(FileNotFoundError, match=f"{folder}/spiece.model: is missing"):
        T5Encoder.from_pretrained(folder).encode_text(["jazz"])
    for content, words in ((b"", "is not"), (b"hello", "is not a Sent"), (SPIECE.read_bytes()[:1001], "is not"),
                           (SPIECE.read_bytes(), "has 32000 pieces.* 128 only")):
        (folder / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match=rf"spiece\.model: {words}"):
            T5Encoder.from_pretrained(folder)


def test_from_pretrained_says_which_files_a_folder_must_hold_and_which_names_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\.safetensors or pytorch_model\.bin"):
        T5Encoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5-smal.* t5-small, t5-base, t5-large, flan-t5-small"):
        T5Encoder.from_pretrained("t5-smal")


@pytest.mark.parametrize("name", ["t5-base", "flan-t5-small", "google-t5/t5-large", "google/flan-t5-base"])
def test_from_pretrained_fetches_a_published_name_once_with_the_shape_in_its_config(name, encoder, local_hub):
    repository = REPOSITORIES[name.split("/")[-1]]
    save_pretrained(encoder, local_hub.folder / repository)
    for _ in range(2):
        assert_same_weights(T5Encoder.from_pretrained(name), encoder)
    assert local_hub.served == [f"{repository}/{file}" for file in FILES]


def test_tokenize_matches_the_ids_of_the_reference(encoder):
    for case in json.loads((DATA / "t5_token_ids.json").read_text(encoding="utf-8")):
        assert encoder.tokenize([case["text"]])[0][0].tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("name", ["t5_tiny", "t5v1_1_tiny"], ids=["v1_0", "v1_1"])
def test_forward_matches_the_hidden_states_of_the_reference(name, tmp_path):
    golden = torch.load(DATA / f"{name}_forward.pt", weights_only=True)
    mask = golden["attention_mask"].bool()
    with torch.no_grad():
        hidden = T5Encoder.from_pretrained(lay(tmp_path, *published(name)))(golden["input_ids"], mask)
    torch.testing.assert_close(hidden[mask], golden["last_hidden_state"][mask], atol=1e-4, rtol=0)
