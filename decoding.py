"""How to decode, and its small functions: schedules, the nucleus, and which spans to hide again [Sec. 3.3].

Pure functions on numbers and tensors, no model; `sample.py` strings them together. The spans hidden again are the least
probable, either of those that tile the frames, as in the paper, or of all there are, as the released code offers too.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from cli import option
from masking import cosine_schedule

PAPER_STEPS = (20, 10, 10, 10)  # for K codebooks: 20, and 10 for each later one
FIXED = -1e4  # added to a span's score for what must stay as it is; far below any score that a probability gives
NEUTRAL = {"max": 1.0, "prod": 0.0}  # the score of a token that has no say in its span


@dataclass
class SamplingConfig:
    """How to decode; the defaults are the paper's."""

    decoding_steps: tuple[int, ...] = option(PAPER_STEPS, "steps for each codebook")
    temperature: float = option(3.0, "softmax temperature, annealed linearly to zero")
    top_p: float = option(0.9, "nucleus: the most probable tokens that hold this much probability; 1 keeps all")
    top_k: int = option(0, "keep only the k most probable tokens; 0 keeps all")
    guidance_start: float = option(10.0, "classifier-free guidance when all is hidden")
    guidance_end: float = option(1.0, "classifier-free guidance when nothing is hidden")
    span_arrangement: str = option("nonoverlap", "where spans may lie", ("nonoverlap", "stride1"))
    span_scoring: str = option("max", "a span's probability: of its best token, or the product", ("max", "prod"))
    schedule: str = option("paper", "mask rates as in the paper or as in the released code", ("paper", "released"))
    greedy: bool = option(False, "take the most probable token instead of sampling")

    def __post_init__(self):
        if not self.decoding_steps or min(self.decoding_steps) < 1:
            raise ValueError(f"decoding_steps must be positive, one for each codebook, not {self.decoding_steps}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (keep all) or positive, not {self.top_k}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be zero or positive, not {self.temperature}")
        if not (math.isfinite(self.guidance_start) and math.isfinite(self.guidance_end)):
            raise ValueError(f"guidance must be finite, not {self.guidance_start} -> {self.guidance_end}")
        if self.span_arrangement not in ("nonoverlap", "stride1"):
            raise ValueError(f"span_arrangement must be nonoverlap or stride1, not {self.span_arrangement!r}")
        if self.span_scoring not in ("max", "prod"):
            raise ValueError(f"span_scoring must be max or prod, not {self.span_scoring!r}")
        if self.schedule not in ("paper", "released"):
            raise ValueError(f"schedule must be paper or released, not {self.schedule!r}")


def fit_steps(config, n_codebooks):
    """The config with one number of decoding steps per codebook; the default fits any K, else ValueError."""
    if config.decoding_steps == PAPER_STEPS:
        return replace(config, decoding_steps=(20,) + (10,) * (n_codebooks - 1))
    if len(config.decoding_steps) != n_codebooks:
        raise ValueError(f"decoding_steps must hold {n_codebooks} numbers, one per codebook: {config.decoding_steps}")
    return config


def mask_rate(step, steps, schedule="paper"):
    """[Eq. 3] The share of spans hidden at decoding step 0..steps-1: cos(pi/2 * step / steps), from 1 downwards.

    Deviation: "released" spaces the steps so that the last one is at rate 0 (where one span is still hidden).
    """
    if schedule == "released":
        return cosine_schedule(torch.linspace(0, 1, steps)[step])
    return cosine_schedule(step / steps)


def guidance_scale(rate, start, end):
    """[Eq. 6] Annealed guidance: lambda = rate * start + (1 - rate) * end, strong while much is hidden."""
    return float(rate) * start + (1 - float(rate)) * end


def annealed_temperature(step, steps, temperature):
    """[Sec. 3.3] Linear from temperature * (steps - 1) / steps to zero, with a floor that keeps softmax finite."""
    return max(temperature * (steps - 1 - step) / steps, 1e-2)


def nucleus(probs, top_p, top_k=0):
    """[Sec. 3.3] Cut probabilities (..., card) to the smallest set of top tokens that holds `top_p`; not renormalised.

    The most probable token always stays. top_k > 0 keeps at most that many.

    >>> nucleus(torch.tensor([0.5, 0.3, 0.2]), 0.7)
    tensor([0.5000, 0.3000, 0.0000])
    """
    top, order = probs.sort(dim=-1, descending=True)
    cut = top.cumsum(dim=-1) - top >= top_p
    cut[..., 0] = False
    if top_k:
        cut[..., top_k:] = True
    return torch.zeros_like(probs).scatter(-1, order, top.masked_fill(cut, 0))


def token_scores(confidence, scoring):
    """[Sec. 3.3] How improbable each token is, from its probability: 1 - p for "max" scoring, -log p for "prod"."""
    if scoring == "max":
        return 1 - confidence
    return -confidence.clamp(min=torch.finfo(confidence.dtype).tiny).log()


def span_scores(tokens, span_len, stride, scoring):
    """[Sec. 3.3] How improbable each span is: as its most probable token ("max"), or as the product ("prod").

    tokens: (B, T) `token_scores`; gives (B, n), for spans of `span_len` frames that start every `stride` frames. Where
    the spans tile the frames (stride = span_len) the last may be shorter.

    >>> span_scores(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 3, 3, "max")
    tensor([[0.1000, 0.3000]])
    """
    if stride == span_len:
        tokens = F.pad(tokens, (0, -tokens.shape[1] % span_len), value=NEUTRAL[scoring])
    spans = tokens.unfold(1, span_len, stride)  # (B, n, span_len)
    return spans.amin(dim=2) if scoring == "max" else spans.sum(dim=2)


def hide_nonoverlapping(tokens, fixed, n_spans, span_len, scoring):
    """[Sec. 3.3] Hide the `n_spans` least probable of the spans that tile the frames: (B, T) bool.

    tokens: (B, T) `token_scores`; fixed: (B, T), True where a token stays. A span whose tokens all stay is not chosen.
    Deviation: where T is no multiple of `span_len` the last span is shorter; the released code drops those frames.
    """
    scores = span_scores(tokens, span_len, span_len, scoring)  # (B, n)
    is_open = F.pad(~fixed, (0, -fixed.shape[1] % span_len)).unfold(1, span_len, span_len).any(dim=2)
    chosen = scores.masked_fill(~is_open, FIXED).topk(n_spans, dim=1).indices
    hidden = torch.zeros_like(is_open).scatter(1, chosen, True)
    return hidden.repeat_interleave(span_len, dim=1)[:, :fixed.shape[1]]


def hide_stride1(tokens, fixed, n_frames, span_len, scoring):
    """[Sec. 3.3] Hide the least probable spans, which may overlap, about `n_frames` frames in all: (B, T) bool.

    Deviation: the paper's spans do not overlap; the released code offers this and its authors call it better.
    """
    T = tokens.shape[1]
    span_len = min(span_len, T)
    scores = span_scores(tokens.masked_fill(fixed, NEUTRAL[scoring]), span_len, 1, scoring)  # (B, T - l + 1)
    scores = scores + FIXED * fixed.unfold(1, span_len, 1).sum(dim=2)
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 is the least probable span
    # A frame is hidden by the first u spans if the best-ranked span that covers it is among them: entry < u.
    entry = F.pad(rank, (span_len - 1, span_len - 1), value=T).unfold(1, span_len, 1).amin(dim=2)  # (B, T)
    return torch.stack([row < bisect_spans(row, max(n_frames, span_len), span_len) for row in entry])


def bisect_spans(entry, n_frames, span_len):
    """How many spans u hide about `n_frames` frames, if u spans hide those with entry < u; bisection, as released."""
    low, high = n_frames // span_len, n_frames - span_len + 1
    u = tried = round((low + high) / 2)
    while low < u < high:
        tried = u
        low, high = (low, u) if (entry < u).sum() > n_frames else (u, high)
        u = round((low + high) / 2)
    return tried


def spans_to_hide(confidence, fixed, rate, given, span_len, config):
    """[Sec. 3.3] Choose what to hide again at mask rate `rate`: (B, T) bool, always at least one span.

    confidence: (B, T), the probability of each token; fixed: (B, T), True where a token stays; given: (T,), True at the
    frames that stayed from the start; config: a `SamplingConfig`.
    """
    tokens = token_scores(confidence, config.span_scoring)
    if config.span_arrangement == "stride1":
        n_frames = int((~given).sum())
        return hide_stride1(tokens, fixed, max(int(rate * n_frames), 1), span_len, config.span_scoring)
    # The rate counts the spans that were open at first: those with a frame that was not given.
    n_spans = int(F.pad(~given, (0, -len(given) % span_len)).view(-1, span_len).any(dim=1).sum())
    return hide_nonoverlapping(tokens, fixed, max(int(rate * n_spans), 1), span_len, config.span_scoring)
