"""The MAGNeT transformer, written out [Sec. 2, Sec. 3.2], and the reader for its published weights.

One pre-norm transformer serves all codebook levels ("stages"): the first attends everywhere, the later ones only to a
few frames on either side. It leaves out everything that only large-scale training needs, and the text encoder: its
input is T5's output, projected here to the model's width.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hub
from hub import load_strictly
from masking import restricted_attention_mask


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

    def __post_init__(self):
        for name in ("n_codebooks", "card", "dim", "n_heads", "n_layers", "ffn_mult", "text_dim", "span_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim % 2 or self.dim < 4:
            raise ValueError(f"dim must be even, at least 4 and a multiple of n_heads = {self.n_heads}, not {self.dim}")


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
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)  # (B * H, n, block, D)
    return out.reshape(B, H, n * block, D)[:, :, :T]


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; full, or restricted to a local context."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, context=None):
        """x (B, T, C) -> (B, T, C); `context` in frames, None for full attention."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if context is None or T <= context + 1:
            out = F.scaled_dot_product_attention(q, k, v)
        elif T <= 2 * context + 32:  # one block would hold everything
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=restricted_attention_mask(T, context).to(x.device))
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
        out = F.scaled_dot_product_attention(q, *keys_values)
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

    def forward(self, x, context, keys_values):
        x = x + self.dropout(self.self_attn(self.norm1(x), context))
        if keys_values is not None:
            x = x + self.dropout(self.cross_attn(self.norm_cross(x), keys_values))
        return x + self.dropout(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


def positions(n_frames, dim, device):
    """Sinusoidal position embedding, cosines first: (T, C) float32, phase = pos / 10000 ** (j / (C / 2 - 1))."""
    rate = 10_000 ** (-torch.arange(dim // 2, device=device) / (dim // 2 - 1))
    phase = torch.arange(n_frames, device=device)[:, None] * rate  # (T, C / 2)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class MAGNeT(nn.Module):
    """[Sec. 3.1] Codes with hidden places in, logits of one codebook out."""

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

    def forward(self, codes, stage, text=None, text_mask=None, prepared=None):
        """Logits of codebook `stage` at every frame: (B, T, card) float32.

        codes: (B, K, T) long with mask tokens in place (see `masking.hide_codes`); stage: 0-based codebook;
        text: (B, N, text_dim) and text_mask: (B, N); text=None is the null condition. `prepared`, from
        `prepare_text`, stands in for text and text_mask.
        """
        if codes.shape[1] != self.config.n_codebooks:
            raise ValueError(f"codes have {codes.shape[1]} codebooks; this model has {self.config.n_codebooks}")
        if not 0 <= stage < self.config.n_codebooks:
            raise ValueError(f"stage must be between 0 and {self.config.n_codebooks - 1}, not {stage}")
        if text is not None:
            prepared = self.prepare_text(text, torch.ones_like(text[..., 0]) if text_mask is None else text_mask)
        context = None if stage == 0 or self.config.context < 0 else self.config.context
        x = sum(emb(codes[:, k]) for k, emb in enumerate(self.emb))  # (B, T, C)
        x = x + positions(codes.shape[2], self.config.dim, x.device).to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, context, prepared[i] if prepared is not None else None)
        return self.heads[stage](self.out_norm(x)).float()  # (B, T, card)

    def n_params(self):
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def __repr__(self):
        c = self.config
        reach = "full attention" if c.context < 0 else f"{c.context} frames of context after stage 0"
        return (f"MAGNeT({self.n_params() / 1e6:.1f}M parameters: {c.n_layers} layers x {c.dim} wide,"
                f" {c.n_heads} heads, {c.n_codebooks} codebooks x {c.card} entries, spans of {c.span_len}, {reach})")


# ------------------------------------------------------------------------------------------------------------- weights

TOY_MODEL = Path(__file__).parent / "toy" / "weights" / "magnet.pt"
MUSIC_SAMPLING = {"schedule": "released"}  # what differs from `sample.SamplingConfig` for published models
SOUND_SAMPLING = MUSIC_SAMPLING | {"temperature": 3.5, "top_p": 0.8, "guidance_start": 20.0, "guidance_end": 1.0}


def read_checkpoint(path, keys=(), mmap=False):
    """A dictionary written by torch.save, read without running code in it; ValueError names a file that is not one.

    mmap: leave the tensors in the file until they are used.
    """
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
    """Load a model: "toy", a training run, a checkpoint file, or a published one by hub name, local folder or file.

    Gives (MAGNeT in eval mode, of type `dtype`, {"codec": name, "text_encoder": name}), and beside the names what
    `cli.check_same` compares, or for a published model the "sampling" that it wants. A training run gives its averaged
    weights. Raises ValueError naming the file for an unknown model and for a damaged or foreign checkpoint,
    ConnectionError where a download failed.
    """
    path = TOY_MODEL if name_or_path == "toy" else Path(name_or_path)
    if not path.exists() and str(name_or_path) in hub.MODELS:
        path = fetch_published(str(name_or_path))
    if path.is_dir():
        path = path / (hub.MODEL_FILES[0] if (path / hub.MODEL_FILES[0]).is_file() else "checkpoint.pt")
    if not path.is_file():
        raise ValueError(f"unknown model {str(name_or_path)!r}: want toy, a training run's folder or a checkpoint "
                         f"file, a published state_dict.bin or its folder, or one of {', '.join(hub.MODELS)}")
    content = read_checkpoint(path, mmap=True)
    if isinstance(content, dict) and "best_state" in content:
        return from_audiocraft(content, path, device, dtype), published_names(content["xp.cfg"], path.parent)
    with_keys(content, ("model_config", "ema", "codec", "text_encoder", "codec_id", "text_encoder_id"), path)
    try:
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            model = MAGNeT(ModelConfig(**content["model_config"]))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: its model_config is not one of this version ({error})") from error
    load_strictly(model, content["ema"], path, dtype, device)
    kept = ("codec", "text_encoder", "codec_id", "text_encoder_id")
    return model.eval().requires_grad_(False), {key: content[key] for key in kept}


def fetch_published(name):
    """Download what is missing of a published model, of its codec and of its text encoder; gives the model's folder."""
    wanted = {name: hub.MODEL_FILES, hub.T5_REPOSITORIES["t5-base"]: hub.T5_FILES}
    if not name.startswith("facebook/audio-"):  # whose codec is among the model's own files
        wanted[hub.CODEC] = hub.CODEC_FILES
    hub.fetch(wanted)
    return hub.cache_folder(name)


def published_names(text, folder):
    """What a published model asks for, by its YAML text: {"codec", "text_encoder", "sampling"}; local files first."""
    settings, codec = hub.read_yaml(text), folder / hub.MODEL_FILES[1]
    is_music = settings.get("sample_rate", "32000") == "32000"
    encoder = hub.beside(folder, settings.get("conditioners.description.t5.name", "t5-base"))
    return {"codec": hub.beside(folder, hub.CODEC) if is_music and not codec.is_file() else str(codec),
            "text_encoder": str(folder) if (folder / hub.T5_FILES[1]).is_file() else encoder,
            "sampling": MUSIC_SAMPLING if is_music else SOUND_SAMPLING}


def audiocraft_config(text, text_dim):
    """The `ModelConfig` that a published model's YAML text describes. Raises KeyError if something is missing."""
    settings = hub.read_yaml(text)
    if settings.get("lm_model", "transformer_lm_magnet") != "transformer_lm_magnet":
        raise ValueError(f"its lm_model is {settings['lm_model']}")

    def number(name):
        return int(settings[f"transformer_lm.{name}"])

    span_len = settings.get("masking.span_len") or number("span_len")
    return ModelConfig(
        n_codebooks=number("n_q"), card=number("card"), dim=number("dim"), n_heads=number("num_heads"),
        n_layers=number("num_layers"), ffn_mult=number("hidden_scale"), text_dim=text_dim,
        context=number("subcodes_context"), span_len=int(span_len), seconds=float(settings["dataset.segment_duration"]))


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
    """Read a published MAGNeT (`state_dict.bin`, or the folder that holds it) into a `MAGNeT` in eval mode.

    Raises ValueError naming the file when it is missing, not a published MAGNeT, or does not fit its own settings.
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
    except (KeyError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: not a published MAGNeT ({type(error).__name__}: {error})") from error
    load_strictly(model, state, path, dtype, device)
    return model.eval().requires_grad_(False)
