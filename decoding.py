"""Decoding: from a text to codes in a few parallel steps [Sec. 3.3, Sec. 3.4, Fig. 4].

For each codebook in turn MAGNeT starts with everything hidden and runs s steps. A step predicts all hidden tokens at
once and keeps the spans it is surest of; the least probable spans are hidden again and predicted anew. Small pure
functions, one per idea, come first; `generate` strings them together. Decoding from left to right is in
`autoregressive.py`; windows, gaps and the command line are in `sample.py`.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from cli import option
from masking import cosine_schedule, hide_codes

PAPER_STEPS = (20, 10, 10, 10)  # for K codebooks: 20, and 10 for each later one
FIXED = -1e4  # added to a span's score for what must stay as it is; far below any score that a probability gives
NEUTRAL = {"max": 1.0, "prod": 0.0}  # the score of a token that has no say in its span


@dataclass
class SamplingConfig:
    """How to decode; the defaults are the paper's."""

    decoding_steps: tuple[int, ...] = option(PAPER_STEPS, "steps for each codebook")
    temperature: float = option(3.0, "softmax temperature, annealed linearly to --temperature-end")
    temperature_end: float = option(0.0, "the temperature of the last step")
    span_noise: float = option(0.0, "noise in the ranking of spans, as in MaskGIT; 0: none, as in the paper")
    top_p: float = option(0.9, "nucleus: the most probable tokens that hold this much probability; 1 keeps all")
    top_k: int = option(0, "keep only the k most probable tokens; 0 keeps all")
    guidance_start: float = option(10.0, "classifier-free guidance when all is hidden")
    guidance_end: float = option(1.0, "classifier-free guidance when nothing is hidden")
    span_arrangement: str = option("nonoverlap", "where spans may lie", ("nonoverlap", "stride1"))
    span_scoring: str = option("max", "a span's probability: of its best token, or the product", ("max", "prod"))
    schedule: str = option("paper", "mask rates as in the paper or as in the released code", ("paper", "released"))
    greedy: bool = option(False, "take the most probable token instead of sampling")
    ar_guidance: float = option(3.0, "autoregressive and hybrid models, from left to right: guidance")
    ar_top_k: int = option(250, "the same: keep only the k most probable tokens; 0 keeps all")
    ar_temperature: float = option(1.0, "the same: softmax temperature")
    hybrid_seconds: float = option(1.0, "hybrid models: seconds to write from left to right before the rest")

    def __post_init__(self):
        if not self.decoding_steps or min(self.decoding_steps) < 1:
            raise ValueError(f"decoding_steps must be positive, one for each codebook, not {self.decoding_steps}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        for name in ("top_k", "temperature", "temperature_end", "span_noise", "ar_top_k", "ar_temperature",
                     "hybrid_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be zero or positive, not {getattr(self, name)}")
        if not all(map(math.isfinite, (self.guidance_start, self.guidance_end, self.ar_guidance))):
            raise ValueError(f"guidance must be finite, not {self.guidance_start} -> {self.guidance_end}, or "
                             f"{self.ar_guidance} from left to right")
        for field in fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be {' or '.join(choices)}, not {value!r}")


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


def annealed_temperature(step, steps, start, end=0.0):
    """[Sec. 3.3] Linear from just below `start` to `end` at the last step, with a floor that keeps softmax finite."""
    return max(end + (start - end) * (steps - 1 - step) / steps, 1e-2)


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


def with_noise(confidence, noise, generator=None):
    """Confidences (B, T) in a new order: by log p + noise * Gumbel, as ranks from 1 / T (least) to 1.

    Deviation: MaskGIT's; the paper ranks spans by confidence alone, which puts off whatever is uncertain, such as where
    a note begins, until everything around it is decided. Much noise makes the order random.
    """
    gumbel = -torch.empty_like(confidence).exponential_(generator=generator).log()
    noisy = confidence.clamp(min=torch.finfo(confidence.dtype).tiny).log() + noise * gumbel
    return (noisy.argsort(dim=1).argsort(dim=1) + 1) / confidence.shape[1]


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


# ------------------------------------------------------------------------------------------------------------- decoding

def guided_logits(model, seen, stage, prepared, scale):
    """[Sec. 3.3] Classifier-free guidance: uncond + scale * (cond - uncond), (B, T, card).

    seen: (B, K, T) with mask tokens; prepared: `model.prepare_text` of B prompts followed by B null conditions, or
    None for no text. Both halves run as one batch; where the scale makes one irrelevant it is skipped.
    """
    if prepared is None:
        return model(seen, stage)
    if scale == 0:
        return model(seen, stage, prepared=[keys_values[:, len(seen):] for keys_values in prepared])
    if math.isclose(scale, 1, abs_tol=1e-6):
        return model(seen, stage, prepared=[keys_values[:, :len(seen)] for keys_values in prepared])
    cond, uncond = model(seen.repeat(2, 1, 1), stage, prepared=prepared).chunk(2)
    return uncond + scale * (cond - uncond)


def with_null_condition(text, text_mask, negative=None):
    """[Sec. 3.3] B prompts, then as many null conditions, which are all zero, or `negative` ones (text, mask) instead.

    text: (B, N, D), text_mask: (B, N), those of `negative` with 1 or B rows -> (2 B, N', D), (2 B, N').
    """
    null, null_mask = negative or (text * 0, text_mask * 0)
    N = max(text.shape[1], null.shape[1])
    null, null_mask = null.to(text).expand(len(text), -1, -1), null_mask.to(text_mask).expand(len(text), -1)
    return (torch.cat([F.pad(x, (0, 0, 0, N - x.shape[1])) for x in (text, null)]),
            torch.cat([F.pad(x, (0, N - x.shape[1])) for x in (text_mask, null_mask)]))


def prepare_both(model, text, text_mask, negative=None):
    """`prepare_text` of the prompts, then of as many null conditions: what `guided_logits` wants. None for no text."""
    if text is None:
        return None
    device = model.out_norm.weight.device
    return model.prepare_text(*with_null_condition(text.to(device), text_mask.to(device), negative))


def check_arguments(model, objectives, text, n_frames, audio_prompt, given=None):
    """The audio prompt (B, K, P) that decoding starts from, empty for None, with mask tokens where it is not `given`.

    ValueError if the model was not trained for one of `objectives`, or the other arguments do not fit it.
    """
    K = model.config.n_codebooks
    if model.config.objective not in objectives:
        raise ValueError(f"the model's objective is {model.config.objective}; this decoding wants "
                         f"{' or '.join(objectives)}")
    if n_frames < 1:
        raise ValueError(f"n_frames must be at least 1, not {n_frames}")
    if audio_prompt is None:
        audio_prompt = torch.empty(1 if text is None else len(text), K, 0, dtype=torch.long)
    B, P = audio_prompt.shape[0], audio_prompt.shape[2]
    if audio_prompt.shape[1] != K or P > n_frames or (text is not None and len(text) != B):
        raise ValueError(f"audio_prompt has shape {tuple(audio_prompt.shape)}; want as many rows as prompts, "
                         f"{K} codebooks and at most {n_frames} frames")
    if given is None:
        given = torch.arange(n_frames) < P
    if given.shape != (n_frames,) or given[P:].any():
        raise ValueError(f"given must be {n_frames} booleans, False beyond the {P} frames of audio_prompt")
    device = model.out_norm.weight.device
    audio_prompt, given = audio_prompt.to(device), given[:P].to(device)
    kept = audio_prompt[:, :, given]
    if kept.numel() and not 0 <= kept.min() <= kept.max() < model.config.card:
        raise ValueError(f"audio_prompt must hold codes from 0 to {model.config.card - 1}")
    return audio_prompt.masked_fill(~given, model.mask_id)


def rescoring(rescorer, weight, text, text_mask):
    """[Sec. 3.4, Eq. 5] A function that mixes another model's probabilities into the confidence; None at weight 0.

    rescorer: anything with `score_codes(codes, stage, text, text_mask)` -> (B, T), the probability of each token. It
    must know the same codes and texts as the model that decodes.
    Deviation: as in Fig. 4 the weight is the rescorer's and only the ranking of spans changes; in Eq. 5 it is MAGNeT's.
    The two are mixed as they are, MAGNeT's tempered and guided, the rescorer's at temperature 1 and with the text; the
    rescorer sees mask tokens in the codebooks that are yet to be decoded. The paper says nothing of either.
    """
    if not 0 <= weight <= 1 or (weight and rescorer is None):
        raise ValueError(f"rescorer_weight must be between 0 and 1, and 0 without a rescorer, not {weight}")
    if weight == 0:
        return None

    def rescore(confidence, codes, stage):
        prompts = (None, None) if text is None else (text.to(codes.device), text_mask.to(codes.device))
        scores = rescorer.score_codes(codes, stage, *prompts).to(confidence)
        if scores.shape != confidence.shape:
            raise ValueError(f"score_codes of the rescorer gave {tuple(scores.shape)} for {tuple(confidence.shape)} "
                             "tokens")
        return torch.lerp(confidence, scores, weight)
    return rescore


def decode_stage(model, codes, stage, given, prepared, config, generator=None, on_step=None, rescore=None):
    """[Sec. 3.3, Fig. 4] Fill in codebook `stage`: codes (B, K, T) -> new tokens (B, T).

    given: (T,) bool, True at the frames whose tokens stay. Only hidden positions are ever sampled. rescore: see
    `rescoring`.
    """
    steps, released = config.decoding_steps[stage], config.schedule == "released"
    codes, prompt = codes.clone(), codes
    fixed, confidence = given.expand(len(codes), -1), None  # (B, T)
    for step in range(0 if given.all() else steps):
        rate = mask_rate(step, steps, config.schedule)
        hidden = ~fixed  # at first all that is not given
        if step > 0:
            if config.span_noise:
                confidence = with_noise(confidence, config.span_noise, generator)
            hidden = spans_to_hide(confidence, fixed, rate, given, model.config.span_len, config)
            # Deviation: with stride1 the released code may hide again, and so sample again, what was fixed.
            hidden = hidden & ~(given if released else fixed)
        seen = hide_codes(codes, stage, hidden, model.mask_id)
        if released:  # it shows the upper codebooks of the audio prompt, which training always hides
            seen = torch.where(given, prompt, seen)
        scale = guidance_scale(rate, config.guidance_start, config.guidance_end)
        logits = guided_logits(model, seen, stage, prepared, scale)  # (B, T, card)
        temperature = annealed_temperature(step, steps, config.temperature, config.temperature_end)
        probs = torch.softmax(logits / temperature, dim=-1)
        if config.greedy:
            tokens = logits.argmax(dim=-1)[hidden]  # (M,), the M hidden positions
        else:
            kept = nucleus(probs[hidden], config.top_p, config.top_k)  # (M, card)
            tokens = torch.multinomial(kept, 1, generator=generator)[:, 0]
        codes[:, stage] = codes[:, stage].masked_scatter(hidden, tokens)
        confidence = probs.amax(dim=-1)  # (B, T); what a token that is not hidden counts for in its span
        confidence = confidence.masked_scatter(hidden, probs[hidden].gather(1, tokens[:, None]))
        if rescore is not None:
            confidence = rescore(confidence, codes, stage)
        fixed = ~hidden
        if on_step is not None:
            on_step(stage=stage, step=step, codes=codes.clone(), hidden=hidden, confidence=confidence)
    return codes[:, stage]


def decode_stages(model, codes, *arguments):
    """[Sec. 3.3] Fill in what is hidden in codes (B, K, T), codebook after codebook, in place."""
    for stage in range(codes.shape[1]):
        given = codes[0, stage] != model.mask_id  # the same frames in every row
        codes[:, stage] = decode_stage(model, codes, stage, given, *arguments)
    return codes


@torch.inference_mode()
def generate(model, text, text_mask, n_frames, config=None, audio_prompt=None, generator=None, on_step=None,
             given=None, negative=None, rescorer=None, rescorer_weight=0.0):
    """[Sec. 3.3, Fig. 4] Generate codes (B, K, T) of exactly `n_frames` frames, codebook after codebook.

    text: (B, N, text_dim) from the text encoder and text_mask (B, N), or None and None for music without a prompt;
    audio_prompt: codes (B, K, P), P <= T, which the result begins with; generator: a `torch.Generator` on the model's
    device (the same seed and device give the same codes); on_step(stage, step, codes, hidden, confidence) is called
    after every decoding step; given: (T,) bool, which of the T frames of audio_prompt to keep (all, by default: with a
    gap in the middle this is inpainting); negative: (text, text_mask) of 1 or B rows in place of the null condition;
    rescorer, rescorer_weight: see `rescoring`. Raises ValueError where an argument does not fit the model.
    """
    config = fit_steps(config or SamplingConfig(), model.config.n_codebooks)
    audio_prompt = check_arguments(model, ("magnet",), text, n_frames, audio_prompt, given)
    codes = F.pad(audio_prompt, (0, n_frames - audio_prompt.shape[2]), value=model.mask_id)
    return decode_stages(model, codes, prepare_both(model, text, text_mask, negative), config, generator, on_step,
                         rescoring(rescorer, rescorer_weight, text, text_mask))
