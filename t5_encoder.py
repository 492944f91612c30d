"""A T5 text encoder, written out: captions in, one embedding per text token out.

[Sec. 2] MAGNeT is conditioned on text through a frozen, pre-trained T5 encoder (Raffel et al., 2020, "Exploring the
Limits of Transfer Learning"); the transformer cross-attends to its output. `T5Encoder.from_pretrained("t5-base")`
is what the published MAGNeT models expect; v1.0 (ReLU) and v1.1 / Flan (gated GELU) are both here.

    encoder = T5Encoder.from_pretrained("t5-base")
    embeddings, mask = encoder.encode_text(["80s electronic track", ""])  # (2, N, 768), (2, N)

What sets T5 apart from the transformer of 2017: no position embeddings but a learned bias on attention scores that
depends on the distance alone; RMSNorm before each sub-layer; no bias terms; attention scores that are not scaled.

Left out: the decoder, the language-model head, dropout (the encoder is frozen in use), special tokens spelled out in
a caption ("</s>" is read as plain text), and caption clean-up.
"""

import io
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

import hub

TOY_ENCODER = Path(__file__).parent / "toy" / "weights" / "text"
WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE = "pytorch_model.bin", "config.json", "spiece.model"
PAD_ID, EOS_ID, MAX_TOKENS = 0, 1, 512


@dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder, under the names that published `config.json` files use."""

    vocab_size: int
    d_model: int  # width of the residual stream
    d_kv: int  # width of one head; num_heads * d_kv need not equal d_model
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-gelu"

    def __post_init__(self):
        if min(self.vocab_size, self.d_model, self.d_kv, self.d_ff, self.num_layers, self.num_heads) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if not 4 <= self.relative_attention_num_buckets < 4 * self.relative_attention_max_distance:
            raise ValueError("relative_attention_num_buckets must be at least 4 and below 4 * max_distance")
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj must be 'relu' or 'gated-gelu', got {self.feed_forward_proj!r}")


PUBLISHED = {
    "t5-small": T5Config(32128, 512, 64, 2048, 6, 8),
    "t5-base": T5Config(32128, 768, 64, 3072, 12, 12),
    "google/flan-t5-small": T5Config(32128, 512, 64, 1024, 8, 6, feed_forward_proj="gated-gelu"),
}


def relative_buckets(distance, num_buckets=32, max_distance=128):
    """Sort signed distances (key position - query position) into the buckets that share one learned bias.

    Half of the buckets serve keys at or before the query, half those after it. In each half, the first half holds one
    distance each, the others grow logarithmically up to `max_distance`, and everything farther falls in the last.
    With 32 buckets: -3 -> 3, 0 -> 0, 3 -> 19, -1000 -> 15.

    distance: any shape, long. Returns the same shape, long, in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    far = distance.abs()
    octaves = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, coarse) + half * (distance > 0).long()


class Linear(nn.Module):
    """y = W x, in float32 whatever type W is stored in.

    T5's feed-forward passes fp16's largest number (65504): a half-precision encoder saves memory, not arithmetic.
    """

    def __init__(self, d_in, d_out, std=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) * (std or d_in**-0.5))

    def forward(self, x):
        return F.linear(x, self.weight.float())  # (..., d_in) -> (..., d_out)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the width: no mean is subtracted, no bias added. x is float32."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight.float()


class Attention(nn.Module):
    """Self-attention with scores q . k + bias: the usual 1 / sqrt(d_kv) is folded into the init of q."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = Linear(config.d_model, inner, std=(config.d_model * config.d_kv) ** -0.5)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)

    def forward(self, x, bias):
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, N, H * d_kv)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, N, d_kv)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, N, d_kv)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, N, D)


class FeedForward(nn.Module):
    """v1.0: wo(relu(wi(x))). v1.1 and Flan: wo(gelu(wi_0(x)) * wi_1(x)), with GELU's tanh approximation."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff)
            self.wi_1 = Linear(config.d_model, config.d_ff)
        else:
            self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        if self.gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(self, x, bias):
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class T5Encoder(nn.Module):
    """[Sec. 2] The text encoder. New ones have T5's random init; `from_pretrained` reads weights.

    `tokenizer` is a `Tokenizer` or None; `encode_text` needs it, `forward` does not.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.tokenizer_path = Path(TOKENIZER_FILE)  # where it was looked for: named if it is needed and missing
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.relative_bias.weight, std=config.d_model**-0.5)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def attention_bias(self, attention_mask):
        """What is added to the scores of every block: attention_mask (B, N), True = may be seen -> (B, H, N, N)."""
        # On the CPU, since the logarithm may round differently elsewhere and so move a distance to the next bucket.
        position = torch.arange(attention_mask.shape[1], device="cpu")
        distance = position[None, :] - position[:, None]  # (N queries, N keys)
        config = self.config
        n, far = config.relative_attention_num_buckets, config.relative_attention_max_distance
        bias = self.relative_bias(relative_buckets(distance, n, far).to(attention_mask.device)).float()  # (N, N, H)
        # Finite, not -inf: a row with nothing to attend to then gives an average rather than NaN.
        return bias.permute(2, 0, 1).masked_fill(~attention_mask[:, None, None, :], -1e9)

    def forward(self, input_ids, attention_mask):
        """Encode token ids (B, N) long; attention_mask (B, N) is True (or 1) at tokens, False at padding.

        Returns (B, N, D) float32, whatever the type of the weights; zero at padding. Trains like any module.
        """
        attention_mask = attention_mask.bool()
        with torch.autocast(input_ids.device.type, enabled=False):  # float32 here too: see Linear
            bias = self.attention_bias(attention_mask)  # (B, H, N, N)
            x = self.embed(input_ids).float()  # (B, N, D)
            for block in self.blocks:
                x = block(x, bias)
            return self.final_norm(x).masked_fill(~attention_mask[..., None], 0.0)  # (B, N, D)

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions (a list of B strings) -> embeddings (B, N, D) float32 and mask (B, N) bool, True at tokens.

        An empty caption (or None, or white space) has a row of False and embeddings of zero: it is the unconditional
        case. N >= 1 even so. A caption's result does not depend on the others in the batch, but for its padding.
        FileNotFoundError if the encoder came without its tokenizer.
        """
        if self.tokenizer is None:
            raise FileNotFoundError(f"no tokenizer: {self.tokenizer_path} is missing; put T5's SentencePiece model "
                                    "there or set encoder.tokenizer = Tokenizer(path)")
        input_ids, mask = self.tokenizer(captions)
        mask &= mask.sum(dim=1, keepdim=True) > 1  # a row that holds EOS alone has no text
        device = self.embed.weight.device
        mask = mask.to(device)
        return self(input_ids.to(device), mask), mask

    @classmethod
    def from_pretrained(cls, path_or_name):
        """Load an encoder, in float32 and on the CPU, with its tokenizer where there is one.

        path_or_name: a folder with `model.safetensors` or `pytorch_model.bin` (and `spiece.model`, `config.json` if it
        has them), a weight file, "toy", or a name in `PUBLISHED`, whose files are downloaded on first use. A local path
        wins over these.

        ValueError: unknown name, or a file that is corrupt or does not fit; FileNotFoundError: a folder without
        weights; ConnectionError: a download failed. Each names the file.
        """
        name, config = str(path_or_name), None
        path = TOY_ENCODER if name == "toy" else Path(name)
        if not path.exists():
            if name not in PUBLISHED:
                raise ValueError(f"text encoder {name!r} is neither a local path nor toy, {', '.join(PUBLISHED)}")
            repository, config = hub.T5_REPOSITORIES.get(name, name), PUBLISHED[name]
            hub.fetch({repository: hub.T5_FILES})
            path = hub.cache_folder(repository)
        weights = hub.weights_file(path) if path.is_dir() else path
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing: a text encoder's folder must hold it (or {hub.WEIGHTS[0]})")
        if config is None and (weights.parent / CONFIG_FILE).is_file():
            config = read_config(weights.parent / CONFIG_FILE)
        encoder = cls.from_state_dict(hub.read_state_dict(weights), config, source=str(weights))
        encoder.tokenizer_path = weights.parent / TOKENIZER_FILE
        if encoder.tokenizer_path.is_file():
            encoder.tokenizer = Tokenizer(encoder.tokenizer_path)
            if encoder.tokenizer.vocab_size > encoder.config.vocab_size:
                raise ValueError(f"{encoder.tokenizer_path} has {encoder.tokenizer.vocab_size} pieces, "
                                 f"but {weights} has embeddings for {encoder.config.vocab_size} only")
        return encoder

    @classmethod
    def from_state_dict(cls, state_dict, config=None, source="state dict"):
        """Build an encoder from tensors under their published names; float32, config inferred where None.

        Decoder and language-model head are ignored; an encoder tensor that is missing, misshapen or one too many is a
        ValueError that names it and `source`.
        """
        tensors = {name: t for name, t in state_dict.items() if name.startswith(("shared.", "encoder."))}
        same = tensors.pop("encoder.embed_tokens.weight", None)  # shared.weight once more; one of them may be left out
        if same is not None:
            tensors.setdefault("shared.weight", same)
        config = config or infer_config(tensors, source)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            encoder = cls(config)
        weights = {}
        for name, parameter in encoder.named_parameters():
            tensor = tensors.pop(published_name(name), None)
            if tensor is None:
                raise ValueError(f"{source}: tensor {published_name(name)} is missing")
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise ValueError(f"{source}: tensor {published_name(name)} is {tensor.dtype} {tuple(tensor.shape)}, "
                                 f"expected floating point {tuple(parameter.shape)}")
            weights[name] = tensor.float()
        if tensors:
            raise ValueError(f"{source}: tensor {min(tensors)} has no place in {config}")
        encoder.load_state_dict(weights, assign=True)
        return encoder

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write a folder that `from_pretrained` reads; each file is complete or absent. dtype: of the tensors."""
        weights = io.BytesIO()
        torch.save({published_name(name): t.to("cpu", dtype) for name, t in self.state_dict().items()}, weights)
        files = {CONFIG_FILE: json.dumps(asdict(self.config), indent=2).encode(), WEIGHTS_FILE: weights.getvalue()}
        if self.tokenizer is not None:
            files[TOKENIZER_FILE] = self.tokenizer.model.serialized_model_proto()
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = Path(folder, name + ".tmp")
            temporary.write_bytes(content)
            os.replace(temporary, Path(folder, name))


class Tokenizer:
    """Captions to token ids with a T5 SentencePiece model (pad 0, end of sequence 1)."""

    def __init__(self, path):
        """FileNotFoundError or ValueError, naming the file, where it is missing or is not such a model."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer {path} is missing")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error
        self.vocab_size = self.model.vocab_size()
        if (self.model.pad_id(), self.model.eos_id()) != (PAD_ID, EOS_ID):
            raise ValueError(f"{path} is not a T5 tokenizer: it must have pad_id {PAD_ID} and eos_id {EOS_ID}")

    def __call__(self, captions):
        """A list of B captions -> input_ids (B, N) long and attention_mask (B, N) bool, False at padding.

        Each row is pieces, EOS, padding; a text of more than 512 tokens is cut and still ends in EOS. None is read as
        the empty caption, which is EOS alone.
        """
        if isinstance(captions, str) or not all(isinstance(c, (str, type(None))) for c in captions):
            raise TypeError(f"captions must be a list of strings, got {captions!r:.80}")
        rows = []
        for caption in captions:
            # Half of a surrogate pair cannot be encoded and would be an error; NUL would be read as an unknown word.
            text = (caption or "").replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
            rows.append(self.model.encode(text)[: MAX_TOKENS - 1] + [EOS_ID])
        width = max(map(len, rows), default=1)
        input_ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        return input_ids.view(-1, width), torch.arange(width) < lengths[:, None]  # (B, N), (B, N)


def published_name(name):
    """The name that published state dicts have for one of ours:

    blocks.3.attention.q.weight -> encoder.block.3.layer.0.SelfAttention.q.weight
    """
    for ours, theirs in (
        ("embed.", "shared."),
        ("relative_bias.", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
        ("blocks.", "encoder.block."),
        (".attention.", ".layer.0.SelfAttention."),
        (".attention_norm.", ".layer.0.layer_norm."),
        (".feed_forward.", ".layer.1.DenseReluDense."),
        (".feed_forward_norm.", ".layer.1.layer_norm."),
        ("final_norm.", "encoder.final_layer_norm."),
    ):
        name = name.replace(ours, theirs)
    return name


def infer_config(tensors, source="state dict"):
    """The config that the shapes of published tensors imply. ValueError names the tensor if one needed is missing."""

    def shape(name):
        name = published_name(name)
        if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
            raise ValueError(f"{source}: tensor {name} is missing or is not a matrix; is this a T5 encoder?")
        return tensors[name].shape

    vocab_size, d_model = shape("embed.weight")
    num_buckets, num_heads = shape("relative_bias.weight")
    gated = published_name("blocks.0.feed_forward.wi_0.weight") in tensors
    d_ff, _ = shape("blocks.0.feed_forward.wi_0.weight" if gated else "blocks.0.feed_forward.wi.weight")
    inner, _ = shape("blocks.0.attention.q.weight")
    num_layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.block.")})
    return T5Config(
        vocab_size, d_model, max(inner // num_heads, 1), d_ff, num_layers, num_heads, num_buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )


def read_config(path):
    """A published `config.json` -> T5Config; keys that an encoder has no use for are ignored. ValueError names it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return T5Config(**{field.name: values[field.name] for field in fields(T5Config) if field.name in values})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a T5 encoder: {error}") from error
