"""A T5 text encoder, written out: captions in, one embedding per text token out.

[Sec. 2] MAGNeT is conditioned on text through a frozen, pre-trained T5 encoder (Raffel et al., 2020, "Exploring the
Limits of Transfer Learning"); the transformer cross-attends to its output. The published music models use t5-base, the
sound-effect models t5-large; v1.0 (ReLU) and v1.1 / Flan (gated GELU) are both here.

    encoder = T5Encoder.from_pretrained("t5-base")
    embeddings, mask = encoder.encode_text(["80s electronic track", ""])  # (2, L, 768), (2, L)

What sets T5 apart from the transformer of 2017: no position embeddings but a learned bias on the attention scores that
depends on the distance alone; RMSNorm before each sub-layer; no bias terms; attention scores that are not scaled.

Letters: B batch, L text tokens, C width, H heads, D width of a head. Left out: the decoder, the language-model head and
dropout (the encoder is frozen in use).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from support.cli import Config, option
from support.files import NoInit, load_strictly, read_checkpoint
from support.hub import WEIGHTS, fetch, make_config

TOY_ENCODER = Path(__file__).parent / "toy" / "weights" / "text"
SHIPPED = {"toy": TOY_ENCODER, "tunes": TOY_ENCODER.parent / "tunes" / "text"}
CONFIG, TOKENIZER = "config.json", "spiece.model"  # the files of an encoder's folder, beside its weights
PAD_ID, EOS_ID, MAX_TOKENS = 0, 1, 512
REPOSITORIES = {name: f"{'google' if name.startswith('flan') else 'google-t5'}/{name}" for name in (
    "t5-small", "t5-base", "t5-large", "flan-t5-small", "flan-t5-base", "flan-t5-large")}
TENSOR_NAMES = (  # ours -> published, see `support.files.rename`
    ("embed.", "shared."),
    ("relative_bias.", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
    ("blocks.", "encoder.block."),
    (".attention.", ".layer.0.SelfAttention."), (".attention_norm.", ".layer.0.layer_norm."),
    (".feed_forward.", ".layer.1.DenseReluDense."), (".feed_forward_norm.", ".layer.1.layer_norm."),
    ("final_norm.", "encoder.final_layer_norm."),
)


@dataclass(frozen=True)
class T5Config(Config):
    """The shape of an encoder, under the names that published `config.json` files use."""

    vocab_size: int = option(help="entries of the embedding table", low=2, high=1_000_000)
    d_model: int = option(help="width C of the residual stream", low=1, high=16_384)
    d_kv: int = option(help="width D of one head; H * D need not equal C", low=1, high=1024)
    d_ff: int = option(help="width inside the feed-forward", low=1, high=131_072)
    num_layers: int = option(help="blocks", low=1, high=128)
    num_heads: int = option(help="heads H", low=1, high=256)
    relative_attention_num_buckets: int = option(32, "distances told apart", low=4, high=128)
    relative_attention_max_distance: int = option(128, "from where on distances are one", low=64, high=1_000_000)
    layer_norm_epsilon: float = option(1e-6, "added to the mean square", above=0, high=1)
    feed_forward_proj: str = option("relu", "kind of feed-forward", choices=("relu", "gated-gelu"))


def relative_buckets(distance, num_buckets=32, max_distance=128):
    """Sort signed distances (key position - query position) into the buckets that share one learned bias.

    Half of the buckets serve keys at or before the query, half those after it. In each half, the first half holds one
    distance each, the others grow logarithmically up to `max_distance`, and everything farther falls in the last.

    distance: any shape, long. Returns the same shape, long, in [0, num_buckets).

    >>> relative_buckets(torch.tensor([-1000, -20, -3, 0, 3, 20, 1000])).tolist()
    [15, 10, 3, 0, 19, 26, 31]
    """
    half = num_buckets // 2
    exact = half // 2
    far = distance.abs()
    octaves = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, coarse) + half * (distance > 0).long()


class RMSNorm(nn.RMSNorm):
    """(..., C) -> (..., C): divide by the root mean square over the width; no mean is subtracted, no bias added.

    torch's own class holds the weight (C,) and eps; what it computes is written out here.
    """

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Self-attention with scores q . k + bias: the usual 1 / sqrt(D) is folded into the initial weights of q."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x, bias):
        """x (B, L, C), bias (B, H, L, L) -> (B, L, C)."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, L, H * D)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, L, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, D)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, L, C)


class FeedForward(nn.Module):
    """(B, L, C) -> (B, L, C). v1.0: wo(relu(wi(x))). v1.1: wo(gelu(wi_0(x)) * wi_1(x)), with GELU's tanh form."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        if self.gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)))


class Block(nn.Module):
    """x += Attention(norm(x)); x += FeedForward(norm(x)). x is (B, L, C), bias (B, H, L, L)."""

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
    """[Sec. 2] The text encoder. New ones have T5's random weights; `from_pretrained` reads trained ones.

    `tokenizer` is T5's SentencePiece model or None; `encode_text` needs it, `forward` does not. ValueError: the file
    `tokenizer_path` is there and is no such model, or has more pieces than the encoder has embeddings.
    """

    def __init__(self, config, tokenizer_path=None):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        for name, weight in self.named_parameters():  # as T5 is initialised; the norms' weights stay 1
            if name.endswith(".q.weight"):
                nn.init.normal_(weight, std=(config.d_model * config.d_kv) ** -0.5)
            elif "norm" not in name and name != "embed.weight":
                nn.init.normal_(weight, std=(weight.shape[1] if "blocks" in name else config.d_model) ** -0.5)
        self.tokenizer, self.tokenizer_path = None, Path(tokenizer_path or TOKENIZER)
        if tokenizer_path and self.tokenizer_path.is_file():
            try:
                self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
            except (RuntimeError, OSError) as error:
                raise ValueError(f"{tokenizer_path}: is not a SentencePiece model") from error
            if (self.tokenizer.pad_id(), self.tokenizer.eos_id()) != (PAD_ID, EOS_ID):
                raise ValueError(f"{tokenizer_path}: is not T5's: pad_id must be {PAD_ID}, eos_id {EOS_ID}")
            if self.tokenizer.vocab_size() > config.vocab_size:
                raise ValueError(f"{tokenizer_path}: has {self.tokenizer.vocab_size()} pieces, but the encoder has "
                                 f"embeddings for {config.vocab_size} only")

    def forward(self, input_ids, attention_mask):
        """Encode token ids (B, L) long; attention_mask (B, L) is True (or 1) at tokens, False at padding.

        Returns (B, L, C) float32, zero at padding. Trains like any module.
        """
        attention_mask = attention_mask.bool()
        # On the CPU, since the logarithm may round differently elsewhere and so move a distance to the next bucket.
        position = torch.arange(input_ids.shape[1], device="cpu")
        distance = position[None, :] - position[:, None]  # (L queries, L keys)
        buckets = relative_buckets(distance, self.config.relative_attention_num_buckets,
                                   self.config.relative_attention_max_distance).to(input_ids.device)
        with torch.autocast(input_ids.device.type, enabled=False):  # large T5 models pass fp16's largest number
            bias = self.relative_bias(buckets).permute(2, 0, 1)  # (H, L, L)
            # Finite, not -inf: a row with nothing to attend to then gives an average rather than NaN.
            bias = bias.masked_fill(~attention_mask[:, None, None, :], -1e9)  # (B, H, L, L)
            x = self.embed(input_ids)  # (B, L, C)
            for block in self.blocks:
                x = block(x, bias)
            return self.final_norm(x).masked_fill(~attention_mask[..., None], 0.0)  # (B, L, C)

    def tokenize(self, captions):
        """A list of B captions -> input_ids (B, L) long and attention_mask (B, L) bool, True at tokens.

        Each row is pieces, EOS, padding. The empty caption and None have a row of False; L >= 1 even so. TypeError if
        `captions` are not strings, FileNotFoundError if the encoder came without its tokenizer.
        Deviation: a text of more than 512 tokens is cut and ends in EOS; the released code does not cut it.
        """
        if isinstance(captions, str) or not all(isinstance(caption, (str, type(None))) for caption in captions):
            raise TypeError(f"captions must be a list of strings, not {captions!r:.80}")
        if self.tokenizer is None:
            raise FileNotFoundError(f"{self.tokenizer_path}: is missing; T5's SentencePiece model must be there")
        rows = [self.tokenizer.encode(caption or "")[:MAX_TOKENS - 1] + [EOS_ID] for caption in captions]
        width = max(map(len, rows), default=1)
        input_ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) if caption else 0 for row, caption in zip(rows, captions, strict=True)],
                               dtype=torch.long)
        return input_ids.view(-1, width), torch.arange(width) < lengths[:, None]  # (B, L), (B, L)

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions (a list of B strings) -> embeddings (B, L, C) float32 and mask (B, L) bool, True at tokens.

        The empty caption (or None) is the null condition: a row of False, embeddings of zero. White space alone is not:
        it conditions on EOS, as in the released code. A caption's result does not depend on the others in the batch,
        but for its padding. FileNotFoundError if the encoder came without its tokenizer.
        """
        input_ids, mask = (tensor.to(self.embed.weight.device) for tensor in self.tokenize(captions))
        return self(input_ids, mask), mask

    @classmethod
    def from_pretrained(cls, path_or_name):
        """Load an encoder, in float32 and on the CPU, with its tokenizer where there is one.

        path_or_name: a folder with `config.json`, `model.safetensors` or `pytorch_model.bin` (or the index of their
        parts) and `spiece.model`; a weight file in such a folder; "toy"; or a name of the family, with or without
        "google-t5/" or "google/", whose files are downloaded on first use. A local path goes before these.

        ValueError: unknown name, or a file that is damaged or does not fit; FileNotFoundError: a folder that lacks a
        file; ConnectionError: a download failed. Each names the file.
        """
        name = str(path_or_name)
        path, repository = SHIPPED.get(name, Path(name)), REPOSITORIES.get(name.split("/")[-1])
        if not path.exists():
            if repository is None or name not in (repository, repository.split("/")[-1]):
                raise ValueError(f"text encoder {name!r} is no local path, nor toy, tunes, {', '.join(REPOSITORIES)}")
            path = fetch(repository, WEIGHTS, CONFIG, TOKENIZER)
        folder = path if path.is_dir() else path.parent
        weights = next((folder / name for name in WEIGHTS.split("|") if (folder / name).is_file()), None)
        weights = path if path.is_file() else weights
        if weights is None or not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder}: a text encoder's folder must hold {CONFIG} and "
                                    f"{' or '.join(WEIGHTS.split('|')[::2])}")
        state = {name: tensor for name, tensor in read_checkpoint(weights).items()
                 if name.startswith(("shared.", "encoder."))}  # the decoder and the language-model head are not used
        same = state.pop("encoder.embed_tokens.weight", None)  # shared.weight once more; one of them may be left out
        if same is not None:
            state.setdefault("shared.weight", same)
        with torch.device("meta"), NoInit():  # weights that are replaced at once need neither memory nor a start
            encoder = cls(make_config(T5Config, read_checkpoint(folder / CONFIG), folder / CONFIG), folder / TOKENIZER)
        load_strictly(encoder, state, weights, torch.float32, names=TENSOR_NAMES)
        return encoder
