"""The MAGNeT transformer, written out [Sec. 2, Sec. 3.2], and the reader of its and MusicGen's published weights.

One pre-norm transformer serves all codebook levels ("stages"): the first attends everywhere, the later ones only to a
few frames on either side. The same class is the autoregressive model and the hybrid one, with other attention masks.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from masking import causal_attention_mask, delay_codes, undelay
from support.audiocraft import read_settings
from support.cli import Config, option
from support.files import Companions, NoInit, load_strictly, located, read_checkpoint, rename
from support.hub import beside, fetch

OBJECTIVES = ("magnet", "ar", "hybrid")

@dataclass
class ModelConfig(Config):
    """The shape of the network, and what decoding must know of its training."""

    n_codebooks: int = option(4, "K", low=1, high=64)
    card: int = option(256, "entries per codebook; the mask token gets the id `card`", low=1, high=1 << 20)
    dim: int = option(192, "C, the width", low=4, high=1 << 16)
    n_heads: int = option(6, "H", low=1, high=1 << 10)
    n_layers: int = option(6, "blocks", low=1, high=1 << 10)
    ffn_mult: int = option(4, "hidden width of the feed-forward layers / dim", low=1, high=64)
    text_dim: int = option(64, "width of T5's output", low=1, high=1 << 16)
    text_len: int = option(0, "every text attends as if padded to at least so many tokens", low=0, high=1 << 14)
    context: int = option(5, "frames that stages after the first see on each side; -1: all", low=-1, high=1 << 20)
    span_len: int = option(3, "frames per span of the training masks", low=1, high=1 << 20)
    seconds: float = option(4.0, "length of the training clips", above=0, high=3600)
    dropout: float = option(0.0, "dropout inside the blocks", low=0, high=1)
    objective: str = option("magnet", "masked, autoregressive or hybrid", OBJECTIVES)  # the last two delay codebooks


# ------------------------------------------------------------------------------------------------------------ attention

def attention(q, k, v, may_attend=None):
    """[Sec. 2] softmax(q k^T / sqrt(D)) v over the keys where `may_attend` is True; every query must have one.

    q: (..., T, D); k, v: (..., keys, D); may_attend: bool, broadcast to (..., T, keys). The last three lines are the
    formula; torch's fused kernel is faster, but not when a CPU trains in 16 bits, and errs on MPS for few queries.
    """
    slow = q.device.type == "cpu" and q.dtype != torch.float32 and torch.is_grad_enabled()
    if not slow and (q.device.type != "mps" or q.shape[-2] > 8):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
    scores = scores if may_attend is None else scores.masked_fill(~may_attend, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def local_attention(q, k, v, context):
    """[Sec. 3.2, Fig. 8] Attention within `context` frames on each side, in O(T * context) memory and time.

    q, k, v: (B, H, T, D); gives (B, H, T, D). The frames are cut into blocks; a block's queries see the keys of the
    block and of `context` frames before and after it, which holds the whole window of each of them.
    Deviation: without xformers the released code loses this mask and attends causally.
    """
    B, H, T, D = q.shape
    context = min(context, T)
    block = max(32, context)
    n = math.ceil(T / block)
    width = block + 2 * context
    q = F.pad(q, (0, 0, 0, n * block - T)).reshape(B * H, n, block, D)
    k, v = (F.pad(x, (0, 0, context, n * block - T + context)).reshape(B * H, -1, D) for x in (k, v))
    k, v = (x.unfold(1, width, block).transpose(2, 3) for x in (k, v))  # (B * H, n, width, D)
    query = torch.arange(n * block, device=q.device).view(n, block, 1)  # the frame that each place stands for
    key = torch.arange(n, device=q.device).view(n, 1, 1) * block + torch.arange(width, device=q.device) - context
    exists = (key >= 0) & (key < T) | (query >= T)  # padded queries may see padding: no row is ever empty
    may_attend = ((query - key).abs() <= context) & exists  # (n, block, width)
    out = attention(q, k, v, may_attend[None])  # (B * H, n, block, D); torch's kernel wants a mask of 4 dimensions
    return out.reshape(B, H, n * block, D)[:, :, :T]


class Cache:
    """[Eq. 1] What one block keeps while decoding autoregressively: keys and values of the positions so far, with room
    for `length` of them, and those of the text."""

    def __init__(self, length):
        self.length, self.filled, self.stored, self.text = length, 0, None, None

    def append(self, keys_values):
        """(2, B, H, T, D) of the next T positions -> those of all positions so far."""
        *shape, T, D = keys_values.shape
        if self.stored is None:
            self.stored = keys_values.new_empty(*shape, self.length, D)
        self.stored[..., self.filled:self.filled + T, :] = keys_values
        self.filled += T
        return self.stored[..., :self.filled, :]


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, mask=None, context=None, cache=None):
        """x (B, T, C) -> (B, T, C). mask: (..., T, keys) bool, None = all attend to all. At the restricted stages
        `context` is given, in frames: local attention. With a `cache` the frames are those that follow the ones in it.
        """
        B, T, C = x.shape
        q, k, v = qkv = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(qkv[1:])
        out = attention(q, k, v, mask) if context is None else local_attention(q, k, v, context)
        return self.out(out.transpose(1, 2).reshape(B, T, C))


class CrossAttention(nn.Module):
    """[Sec. 2] Multi-head attention from the frames to the text, without biases."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, text, mask=None, cache=None):
        """x (B, T, C), projected text (B, L, C), mask (B, 1, 1, L) bool or None -> (B, T, C)."""
        B, T, C = x.shape
        keys_values = cache and cache.text
        if keys_values is None:
            keys_values = self.kv(text).view(B, -1, 2, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)
        if cache:
            cache.text = keys_values  # (2, B, H, L, D)
        q = self.q(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        return self.out(attention(q, *keys_values, mask).transpose(1, 2).reshape(B, T, C))


def text_attention_mask(text_mask, text_len):
    """Which text positions a clip attends to: (B, L) bool, True at tokens -> (B, 1, 1, L) bool, None where it is all.

    They are its own tokens, and padding up to `text_len`: padded positions take part as zero keys and values, as
    released. The null condition has only zeros to attend to, which give zero. Deviation: the released code pads every
    text to the longest of its batch, and so changes the music of the others.
    """
    L = text_mask.shape[1]
    n_tokens = text_mask.sum(dim=1, keepdim=True)  # (B, 1)
    width = torch.where(n_tokens > 0, n_tokens.clamp(min=text_len), L)
    mask = torch.arange(L, device=width.device) < width  # (B, L)
    return None if mask.all() else mask[:, None, None]


# ---------------------------------------------------------------------------------------------------------- transformer

class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm_cross, self.norm2 = (nn.LayerNorm(config.dim) for _ in range(3))
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.linear1 = nn.Linear(config.dim, config.ffn_mult * config.dim, bias=False)
        self.linear2 = nn.Linear(config.ffn_mult * config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, text=None, text_mask=None, mask=None, context=None, cache=None):
        """x: (B, T, C), the rest as in `SelfAttention`, `CrossAttention`; clips without a row of `text` have the null
        condition, whose cross-attention is zero."""
        x = x + self.dropout(self.self_attn(self.norm1(x), mask, context, cache))
        if text is not None:
            x, null = x.tensor_split([len(text)])
            x = torch.cat([x + self.dropout(self.cross_attn(self.norm_cross(x), text, text_mask, cache)), null])
        return x + self.dropout(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


def positions(n_frames, dim, device, start=0):
    """Sinusoidal position embedding, cosines first: (T, C) float32, phase = pos / 10000 ** (j / (C / 2 - 1)).

    >>> positions(2, 4, "cpu").round(decimals=2)
    tensor([[1.0000, 1.0000, 0.0000, 0.0000],
            [0.5400, 1.0000, 0.8400, 0.0000]])
    """
    rate = 10_000 ** (-torch.arange(dim // 2, device=device) / (dim // 2 - 1))
    phase = torch.arange(start, start + n_frames, device=device)[:, None] * rate  # (T, C / 2)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class MAGNeT(nn.Module):
    """[Sec. 3.1] Codes with masked places in, logits of one codebook out; or of all, each from its own head."""

    def __init__(self, config):
        super().__init__()
        if config.dim % config.n_heads or config.dim % 2:
            raise ValueError(f"dim must be even and a multiple of n_heads = {config.n_heads}, not {config.dim}")
        self.config, self.mask_id = config, config.card
        self.text_proj = nn.Linear(config.text_dim, config.dim)
        self.emb = nn.ModuleList(nn.Embedding(config.card + 1, config.dim) for _ in range(config.n_codebooks))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.out_norm = nn.LayerNorm(config.dim)
        self.heads = nn.ModuleList(nn.Linear(config.dim, config.card, bias=False) for _ in range(config.n_codebooks))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 1 / math.sqrt(config.dim if isinstance(module, nn.Embedding) else module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        nn.init.zeros_(self.text_proj.bias)

    def forward(self, codes, stage, text=None, text_mask=None, mask=None, cache=None):
        """Logits of codebook `stage` at every frame: (B, T, card) float32; of all codebooks, (B, K, T, card), if None.

        codes: (B, K, T) long, mask tokens in place (`masking.mask_codes`); stage: 0-based codebook; text: (B or less,
        L, text_dim), T5's output, and text_mask bool, True at tokens: clips without a row, or without a token in it,
        have the null condition. Who attends to whom: all to all at stage 0, later those within the restricted context;
        or as `mask` says, (T, T) or (B, T, T) bool, True = may attend; or causally, where `cache`, one `Cache` per
        block, holds the positions before these.
        """
        B, K, T = codes.shape
        if K != self.config.n_codebooks or not (stage is None or 0 <= stage < K):
            raise ValueError(f"codes of {K} codebooks at stage {stage}; this model has {self.config.n_codebooks}")
        start, context, may_read = cache[0].filled if cache else 0, None, None
        if cache and T > 1:
            mask = causal_attention_mask(T, start + T)
        elif mask is None and stage and self.config.context >= 0:
            context = self.config.context
        if mask is not None:
            mask = mask.to(codes.device).view(-1, 1, *mask.shape[-2:])  # (1 or B, 1, T, keys): alike in every head
        if text is not None:
            if text.shape[-1] != self.config.text_dim:
                raise ValueError(f"text embeddings are {text.shape[-1]} wide; this model wants {self.config.text_dim}")
            missing = max(0, self.config.text_len - text.shape[1])
            text, text_mask = F.pad(text, (0, 0, 0, missing)), F.pad(text_mask.bool(), (0, missing))
            text = self.text_proj(text.to(self.text_proj.weight.dtype)) * text_mask[..., None]  # (B, L, C)
            may_read = text_attention_mask(text_mask, self.config.text_len)
        x = sum(emb(codes[:, k]) for k, emb in enumerate(self.emb))  # (B, T, C)
        x = x + positions(T, self.config.dim, x.device, start).to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, text, may_read, mask, context, cache[i] if cache else None)
        x = self.out_norm(x)
        if stage is None:
            return torch.stack([head(x) for head in self.heads], dim=1).float()  # (B, K, T, card)
        return self.heads[stage](x).float()  # (B, T, card)

    def score_codes(self, codes, stage, text=None, text_mask=None):
        """[Sec. 3.4] The probability of every token of codebook `stage`, in one teacher-forced pass: (B, T).

        codes: (B, K, T); those of later codebooks may be mask tokens. For autoregressive and hybrid models.
        """
        if self.config.objective == "magnet":
            raise ValueError("a MAGNeT cannot rescore: want an autoregressive or hybrid model")
        delayed = delay_codes(codes, self.mask_id)  # (B, K, T + K)
        logits = self(delayed, None, text, text_mask, mask=causal_attention_mask(*[delayed.shape[2]] * 2))
        probs = undelay(logits, shift=-1)[:, stage].softmax(dim=-1)  # (B, T, card)
        return probs.gather(2, codes[:, stage, :, None])[..., 0]

    def __repr__(self):
        c, millions = self.config, sum(p.numel() for p in self.parameters()) / 1e6
        reach = "full attention" if c.context < 0 else f"{c.context} frames of context after stage 0"
        kind = {"ar": "autoregressive", "hybrid": "hybrid, ", "magnet": ""}[c.objective]
        kind += f"spans of {c.span_len}, {reach}" if c.objective != "ar" else ""
        return (f"MAGNeT({millions:.1f}M parameters: {c.n_layers} layers x {c.dim} wide, {c.n_heads} heads, "
                f"{c.n_codebooks} codebooks x {c.card} entries, {kind})")


# ------------------------------------------------------------------------------------------------------------- weights

TOY_MODELS = {"toy": "magnet.pt", "toy-ar": "ar.pt", "toy-hybrid": "hybrid.pt", "tunes": "tunes/magnet.pt",
              "tunes-ar": "tunes/ar.pt"}  # files in toy/weights
PUBLISHED_MODELS = tuple(f"facebook/{name}" for name in (
    "magnet-small-10secs", "magnet-medium-10secs", "magnet-small-30secs", "magnet-medium-30secs", "audio-magnet-small",
    "audio-magnet-medium", "musicgen-small", "musicgen-medium", "musicgen-large"))
TENSOR_NAMES = (  # ours -> AudioCraft's, see `support.files.rename`
    ("text_proj", "condition_provider.conditioners.description.output_proj"), ("blocks", "transformer.layers"),
    ("cross_attn.out", "cross_attention.out_proj"), ("self_attn.qkv.weight", "self_attn.in_proj_weight"),
    ("self_attn.out", "self_attn.out_proj"), ("heads", "linears"), ("cross_attn.q.", "cross_attention.in_proj_"))


def load_model(name_or_path, device="cpu", dtype=torch.float32):
    """Load one of `TOY_MODELS`, a training run (its EMA weights), a checkpoint file, or a published model by its name
    or folder. Gives the MAGNeT, in eval mode and of type `dtype`, and its `Companions`.
    ValueError names an unknown model or a file that is damaged or does not fit; ConnectionError: a download failed.
    """
    name = str(name_or_path)
    path = Path(__file__).parent / "toy" / "weights" / TOY_MODELS[name] if name in TOY_MODELS else Path(name)
    if not path.exists() and name in PUBLISHED_MODELS:
        path = fetch(name, "state_dict.bin", "compression_state_dict.bin")
    if path.is_dir():
        path = path / ("state_dict.bin" if (path / "state_dict.bin").is_file() else "checkpoint.pt")
    if not path.is_file():
        raise ValueError(f"unknown model {name!r}: want a training run's folder, a checkpoint file, a published "
                         f"state_dict.bin or its folder, or one of {', '.join((*TOY_MODELS, *PUBLISHED_MODELS))}")
    content = read_checkpoint(path)
    try:
        if "best_state" in content:
            config, state, companions = read_audiocraft(content, path)
        else:
            config, state = ModelConfig(**content["model_config"]), content["ema"]
            known = {key: content[key] for key in vars(Companions("", "")) if key in content}
            companions = Companions(**(known if name in TOY_MODELS else located(known, path.parent)))
        with torch.device("meta"), NoInit():
            model = MAGNeT(config)
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: is not the checkpoint of a MAGNeT ({what})") from error
    load_strictly(model, state, path, dtype, device, content.get("scales"))
    return model.eval().requires_grad_(False), companions


def read_audiocraft(content, path):
    """What a published `state_dict.bin` holds: (ModelConfig, state dict with our names, Companions)."""
    fields, sampling, text_encoder = read_settings(content["xp.cfg"], path)
    ours = [(published, name) for name, published in TENSOR_NAMES]
    state = {rename(name, ours): tensor for name, tensor in content["best_state"].items()}
    for name in [name for name in state if name.endswith("cross_attn.q.weight")]:  # q, k and v stacked: q is apart here
        state[name], state[name.replace(".q.", ".kv.")] = state[name].tensor_split([len(state[name]) // 3])
    folder, codec = path.parent, path.with_name("compression_state_dict.bin")
    return ModelConfig(text_dim=state["text_proj.weight"].shape[1], **fields), state, Companions(
        str(codec) if codec.is_file() else beside(folder, "facebook/encodec_32khz"),
        str(folder) if (folder / "spiece.model").is_file() else beside(folder, text_encoder), sampling=sampling)
