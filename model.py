"""The MAGNeT transformer, written out [Sec. 2, Sec. 3.2], and the reader for its and MusicGen's published weights.

One pre-norm transformer serves all codebook levels ("stages"): the first attends everywhere, the later ones only to a
few frames on either side. The same class is the autoregressive model and the hybrid one: they are given other masks.
It leaves out everything that only large-scale training needs, and the text encoder: its input is T5's output, projected
here to the model's width.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hub
from hub import check_tensors, dequantized, load_strictly
from masking import causal_attention_mask, delay_codes, hide_codes, restricted_attention_mask

OBJECTIVES = ("magnet", "ar", "hybrid")


@dataclass
class ModelConfig:
    """The shape of the network, and what of its training decoding must know."""

    n_codebooks: int = 4  # K
    card: int = 256  # entries per codebook; the mask token gets the id `card`
    dim: int = 192  # C, the width
    n_heads: int = 6
    n_layers: int = 6
    ffn_mult: int = 4  # hidden width of the feed-forward layers / dim
    text_dim: int = 64  # width of T5's output
    text_len: int = 0  # texts are padded to at least so many tokens
    context: int = 5  # frames that stages after the first may see on each side; -1: all
    span_len: int = 3  # frames per span of the training masks
    seconds: float = 4.0  # length of the training clips
    dropout: float = 0.0
    objective: str = "magnet"  # or ar (autoregressive) or hybrid; these two read codebooks through `delay_codes`

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        for name in ("n_codebooks", "card", "dim", "n_heads", "n_layers", "ffn_mult", "text_dim", "span_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim % 2 or self.dim < 4:
            raise ValueError(f"dim must be even, at least 4 and a multiple of n_heads = {self.n_heads}, not {self.dim}")


def attention(q, k, v, may_attend=None):
    """softmax(q k^T / sqrt(D)) v, where `may_attend` (broadcast to (..., T, S)) is True; every row has such a place.

    q: (..., T, D); k, v: (..., S, D). By hand when training on a CPU in half precision, where torch's fused kernel is
    several times slower on sequences of a few hundred (`python -m experiments.bench`); else by that kernel.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
    if may_attend is not None:
        scores = scores.masked_fill(~may_attend, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def local_attention(q, k, v, context):
    """[Sec. 3.2] Attention within `context` frames on each side, in O(T * context) memory and time.

    q, k, v: (B, H, T, D); gives (B, H, T, D). The frames are cut into blocks; a block's queries see the keys of the
    block and of `context` frames before and after it, which holds the whole window of each of them.
    Deviation: without xformers the released code loses this mask and attends causally.
    """
    B, H, T, D = q.shape
    block = max(32, context)
    n = math.ceil(T / block)
    width = block + 2 * context
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    q = F.pad(q, (0, 0, 0, n * block - T)).view(B * H, n, block, D)
    k, v = (F.pad(x, (0, 0, context, n * block - T + context)).unfold(1, width, block).transpose(2, 3) for x in (k, v))
    query = torch.arange(n * block, device=q.device).view(n, block, 1)  # the frame that each place stands for
    key = torch.arange(n, device=q.device).view(n, 1, 1) * block + torch.arange(width, device=q.device) - context
    exists = (key >= 0) & (key < T) | (query >= T)  # padded queries may see padding: no row is ever empty
    may_attend = ((query - key).abs() <= context) & exists  # (n, block, width)
    out = attention(q, k, v, may_attend)  # (B * H, n, block, D)
    return out.reshape(B, H, n * block, D)[:, :, :T]


class Cache:
    """The keys and values that one block has computed so far, with room for `length` positions [Eq. 1]."""

    def __init__(self, length):
        self.length, self.filled, self.stored = length, 0, None

    def append(self, keys_values):
        """(2, B, H, T, D) of the next T positions -> those of all positions so far."""
        *shape, T, D = keys_values.shape
        if self.stored is None:
            self.stored = keys_values.new_empty(*shape, self.length, D)
        self.stored[..., self.filled:self.filled + T, :] = keys_values
        self.filled += T
        return self.stored[..., :self.filled, :]


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases: full, within a local context, as a mask says, or with a cache."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, context=None, mask=None, cache=None):
        """x (B, T, C) -> (B, T, C); `context` in frames, None for full attention; or `mask` (T, T) or (B, T, T) bool.

        With a `cache` the frames are those that follow the ones in it, and see those and what is before themselves.
        """
        B, T, C = x.shape
        q, k, v = qkv = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(qkv[1:])
            mask = causal_attention_mask(T, k.shape[2]).to(x.device) if T > 1 else None
        if mask is not None:
            out = attention(q, k, v, mask if mask.dim() == 2 else mask[:, None])
        elif context is None or T <= context + 1:
            out = attention(q, k, v)
        elif T <= 2 * context + 32:  # one block would hold everything
            out = attention(q, k, v, restricted_attention_mask(T, context).to(x.device))
        else:
            out = local_attention(q, k, v, context)
        return self.out(out.transpose(1, 2).reshape(B, T, C))


class CrossAttention(nn.Module):
    """Multi-head attention from the frames to the text, without biases and, as released, without a key mask."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def keys_values(self, text):
        """Projected text (B, N, C) -> keys and values (2, B, H, N, D): all that decoding needs of the text."""
        B, N, _ = text.shape
        return self.kv(text).view(B, N, 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_values):
        """x (B, T, C), keys_values (2, B, H, N, D) -> (B, T, C)."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        out = attention(q, *keys_values)
        return self.out(out.transpose(1, 2).reshape(B, T, C))


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

    def forward(self, x, keys_values, context=None, mask=None, cache=None):
        x = x + self.dropout(self.self_attn(self.norm1(x), context, mask, cache))
        if keys_values is not None:
            x = x + self.dropout(self.cross_attn(self.norm_cross(x), keys_values))
        return x + self.dropout(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


def positions(n_frames, dim, device, start=0):
    """Sinusoidal position embedding, cosines first: (T, C) float32, phase = pos / 10000 ** (j / (C / 2 - 1))."""
    rate = 10_000 ** (-torch.arange(dim // 2, device=device) / (dim // 2 - 1))
    phase = torch.arange(start, start + n_frames, device=device)[:, None] * rate  # (T, C / 2)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class MAGNeT(nn.Module):
    """[Sec. 3.1] Codes with hidden places in, logits of one codebook out; or of all, each position's own head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.card
        self.text_proj = nn.Linear(config.text_dim, config.dim)
        self.emb = nn.ModuleList(nn.Embedding(config.card + 1, config.dim) for _ in range(config.n_codebooks))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.out_norm = nn.LayerNorm(config.dim)
        self.heads = nn.ModuleList(nn.Linear(config.dim, config.card, bias=False) for _ in range(config.n_codebooks))
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 1 / math.sqrt(self.config.dim if isinstance(module, nn.Embedding) else module.in_features)
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def prepare_text(self, text, text_mask):
        """Project the text and compute every block's keys and values, once per prompt.

        text: (B, N, text_dim), T5's output; text_mask: (B, N), zero at padding. Padded positions take part in the
        attention as zero keys and values, as released; a row whose mask is all zero is the null condition, and its
        cross-attention output is exactly zero. Gives a list of (2, B, H, N, D), for `forward`'s `prepared`.

        Deviation: `config.text_len` pads every text to one width, so that a prompt's music does not depend on how long
        the other prompts of its batch are; published models have text_len = 0.
        """
        if text.shape[-1] != self.config.text_dim:
            raise ValueError(f"the text embeddings are {text.shape[-1]} wide; this model wants {self.config.text_dim}")
        missing = max(0, self.config.text_len - text.shape[1])
        text, text_mask = F.pad(text, (0, 0, 0, missing)), F.pad(text_mask, (0, missing))
        dtype = self.text_proj.weight.dtype
        projected = self.text_proj(text.to(dtype)) * text_mask[..., None].to(dtype)  # (B, N, C)
        return [block.cross_attn.keys_values(projected) for block in self.blocks]

    def forward(self, codes, stage, text=None, text_mask=None, prepared=None, mask=None, cache=None):
        """Logits of codebook `stage` at every frame: (B, T, card) float32; of all codebooks, (B, K, T, card), if None.

        codes: (B, K, T) long with mask tokens in place (see `masking.hide_codes`); stage: 0-based codebook;
        text: (B, N, text_dim) and text_mask: (B, N); text=None is the null condition. `prepared`, from
        `prepare_text`, stands in for text and text_mask. Who attends to whom: all at stage 0, and later those in the
        restricted context; or as `mask` says, (T, T) or (B, T, T) bool, True = may attend; or causally, where `cache`,
        one `Cache` per block, holds the frames before these.
        """
        if codes.shape[1] != self.config.n_codebooks:
            raise ValueError(f"codes have {codes.shape[1]} codebooks; this model has {self.config.n_codebooks}")
        if stage is not None and not 0 <= stage < self.config.n_codebooks:
            raise ValueError(f"stage must be between 0 and {self.config.n_codebooks - 1}, not {stage}")
        if text is not None:
            prepared = self.prepare_text(text, torch.ones_like(text[..., 0]) if text_mask is None else text_mask)
        context = self.config.context if stage and self.config.context >= 0 else None
        start = cache[0].filled if cache else 0
        x = sum(emb(codes[:, k]) for k, emb in enumerate(self.emb))  # (B, T, C)
        x = x + positions(codes.shape[2], self.config.dim, x.device, start).to(x.dtype)
        mask = mask.to(x.device) if mask is not None else None
        for i, block in enumerate(self.blocks):
            x = block(x, prepared[i] if prepared is not None else None, context, mask, cache[i] if cache else None)
        x = self.out_norm(x)
        if stage is None:
            return torch.stack([head(x) for head in self.heads], dim=1).float()  # (B, K, T, card)
        return self.heads[stage](x).float()  # (B, T, card)

    def score_codes(self, codes, stage, text=None, text_mask=None):
        """[Sec. 3.4] The probability of every token of codebook `stage`, given the others: (B, T).

        codes: (B, K, T); those of later codebooks may be mask tokens. An autoregressive or hybrid model is
        teacher-forced over all of them in one pass; a MAGNeT takes two, in which it is shown every other span in turn.
        """
        T = codes.shape[2]
        if self.config.objective == "magnet":
            odd = torch.arange(T, device=codes.device) // self.config.span_len % 2 == 1
            even_hidden, odd_hidden = (self(hide_codes(codes, stage, hidden, self.mask_id), stage, text, text_mask)
                                       for hidden in (~odd, odd))
            logits = torch.where(odd[:, None], odd_hidden, even_hidden)
        else:
            delayed, mask = delay_codes(codes, self.mask_id), causal_attention_mask(*[T + codes.shape[1]] * 2)
            logits = self(delayed, stage, text, text_mask, mask=mask)[:, stage:stage + T]  # each predicts what follows
        return torch.softmax(logits, dim=-1).gather(2, codes[:, stage, :, None])[..., 0]

    def n_params(self):
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def __repr__(self):
        c = self.config
        reach = "full attention" if c.context < 0 else f"{c.context} frames of context after stage 0"
        kind = {"magnet": "", "ar": "autoregressive", "hybrid": "hybrid, "}[c.objective]
        kind += f"spans of {c.span_len}, {reach}" if c.objective != "ar" else ""
        return (f"MAGNeT({self.n_params() / 1e6:.1f}M parameters: {c.n_layers} layers x {c.dim} wide,"
                f" {c.n_heads} heads, {c.n_codebooks} codebooks x {c.card} entries, {kind})")


# ------------------------------------------------------------------------------------------------------------- weights

TOY_MODELS = {name: Path(__file__).parent / "toy" / "weights" / file for name, file in (
    ("toy", "magnet.pt"), ("toy-ar", "ar.pt"), ("toy-hybrid", "hybrid.pt"))}


def read_checkpoint(path, keys=(), mmap=False):
    """A dictionary written by torch.save, read without running code in it; ValueError names a file that is not one."""
    try:
        content = hub.read_torch(path, mmap)
    except Exception as error:  # torch.load has no one type for "not a checkpoint"
        raise ValueError(f"{path}: cannot be read as a checkpoint; it is damaged or something else") from error
    return with_keys(content, keys, path)


def with_keys(content, keys, path):
    """`content`, if it is a dictionary with these keys; else a ValueError that says what the file lacks."""
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path}: is not such a checkpoint (it lacks {', '.join(missing)})")
    return content


def load_model(name_or_path, device="cpu", dtype=torch.float32):
    """Load a model: one of `TOY_MODELS`, a training run, a checkpoint file, or a published one by hub name or place.

    Gives (MAGNeT in eval mode, of type `dtype`, {"codec": name, "text_encoder": name}), and beside the names what
    `cli.check_same` compares, and the "sampling" settings that the model wants. A training run gives its averaged
    weights. ValueError names an unknown model or a damaged file; ConnectionError where a download failed.
    """
    path = TOY_MODELS.get(str(name_or_path), Path(name_or_path))
    if not path.exists() and str(name_or_path) in hub.MODELS:
        path = hub.fetch_published(str(name_or_path))
    if path.is_dir():
        path = path / (hub.MODEL_FILES[0] if (path / hub.MODEL_FILES[0]).is_file() else "checkpoint.pt")
    if not path.is_file():
        raise ValueError(f"unknown model {str(name_or_path)!r}: want a training run's folder or a checkpoint "
                         f"file, a published state_dict.bin or its folder, or {', '.join((*TOY_MODELS, *hub.MODELS))}")
    content = read_checkpoint(path, mmap=True)
    if isinstance(content, dict) and "best_state" in content:
        return from_audiocraft(content, path, device, dtype), hub.published_names(content["xp.cfg"], path.parent)
    with_keys(content, ("model_config", "ema", "codec", "text_encoder", "codec_id", "text_encoder_id"), path)
    try:
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            model = MAGNeT(ModelConfig(**content["model_config"]))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: its model_config is not one of this version ({error})") from error
    state = dequantized(check_tensors(content["ema"], path), check_tensors(content.get("scales", {}), path))
    load_strictly(model, state, path, dtype, device)
    kept = ("codec", "text_encoder", "codec_id", "text_encoder_id", "sampling")
    return model.eval().requires_grad_(False), {key: content[key] for key in kept if key in content}


def audiocraft_config(text, text_dim):
    """The `ModelConfig` that a published model's YAML text describes. Raises KeyError if something is missing."""
    settings = hub.read_yaml(text)

    def number(name):
        return int(settings[f"transformer_lm.{name}"])

    if settings.get("transformer_lm.causal") == "true":  # a MusicGen, which has neither spans nor a restricted context
        delays = re.findall(r"\d+", settings.get("codebooks_pattern.delay.delays", ""))
        if [int(delay) for delay in delays] != list(range(number("n_q"))):
            raise ValueError("its codebooks are not delayed by one frame each")
        more = {"objective": "ar", "context": -1}
    else:
        span_len = settings.get("masking.span_len") or settings["transformer_lm.span_len"]
        more = {"context": number("subcodes_context"), "span_len": int(span_len)}
    return ModelConfig(
        n_codebooks=number("n_q"), card=number("card"), dim=number("dim"), n_heads=number("num_heads"),
        n_layers=number("num_layers"), ffn_mult=number("hidden_scale"), text_dim=text_dim,
        seconds=float(settings["dataset.segment_duration"]), **more)


PUBLISHED_NAMES = (  # AudioCraft's name -> ours
    ("condition_provider.conditioners.description.output_proj", "text_proj"),
    ("transformer.layers", "blocks"), ("cross_attention.out_proj", "cross_attn.out"),
    ("self_attn.in_proj_weight", "self_attn.qkv.weight"), ("self_attn.out_proj", "self_attn.out"),
    ("linears", "heads"),
)


def from_published_names(state):
    """Rename AudioCraft's tensors to ours; its cross-attention stacks q, k and v, ours keeps q and kv apart."""
    ours = {}
    for name, tensor in state.items():
        for theirs, mine in PUBLISHED_NAMES:
            name = name.replace(theirs, mine)
        if name.endswith("cross_attention.in_proj_weight"):
            prefix = name.replace("cross_attention.in_proj_weight", "cross_attn")
            ours[f"{prefix}.q.weight"], ours[f"{prefix}.kv.weight"] = tensor.tensor_split([tensor.shape[0] // 3])
        else:
            ours[name] = tensor
    return ours


def load_audiocraft(path, device="cpu", dtype=torch.float32):
    """Read a published MAGNeT or MusicGen (`state_dict.bin`, or its folder) into a `MAGNeT` in eval mode.

    Raises ValueError naming the file when it is missing, is neither of them, or does not fit its own settings.
    """
    path = Path(path)
    path = path / hub.MODEL_FILES[0] if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file (want a published state_dict.bin)")
    return from_audiocraft(read_checkpoint(path, mmap=True), path, device, dtype)


def from_audiocraft(content, path, device, dtype):
    """The model in what was read from a published `state_dict.bin`."""
    with_keys(content, ("best_state", "xp.cfg"), path)
    try:
        state = from_published_names(content["best_state"])
        config = audiocraft_config(content["xp.cfg"], state["text_proj.weight"].shape[1])
        with torch.device("meta"):
            model = MAGNeT(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: not a published MAGNeT or MusicGen ({type(error).__name__}: {error})") from error
    load_strictly(model, state, path, dtype, device)
    return model.eval().requires_grad_(False)
