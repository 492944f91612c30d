"""Decoding: from a text to codes, in a few parallel steps [Sec. 3.3, Sec. 3.4, Fig. 4], and on to a WAV file.

For each codebook in turn MAGNeT starts with everything hidden and runs s steps. A step predicts all hidden tokens at
once and keeps the spans it is surest of; the least probable spans are hidden again and predicted anew. Read from top to
bottom: schedule, guidance, drawing tokens, choosing spans, rescoring, one stage; decoding from left to right; all kinds
of models; the command line.

    python sample.py "a slow deep flute plays a rising melody, with drums"
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from encodec_wrap import load_codec
from masking import cosine_schedule, delay_codes, hybrid_attention_mask, mask_codes, undelay
from model import Cache, load_model
from support.audio import save_audio
from support.cli import Config, Parser, add_flags, from_flags, option, pick_device, pick_dtype, run, say
from support.hub import make_config
from support.request import Request, known_codes, plan_clips, say_settings, windows
from t5_encoder import T5Encoder

BATCH = 16  # clips that are decoded together


@dataclass
class SamplingConfig(Config):
    """How to decode: as the paper, autoregressively as MusicGen. As released, `stride1` always scores by product."""

    decoding_steps: tuple[int, ...] = option((20, 10), "steps by codebook, the last for the rest", low=1, high=9999)
    temperature: float = option(3.0, "softmax temperature, annealed to zero", low=0, high=1e4)
    top_p: float = option(0.9, "nucleus: the most probable tokens with this much probability; 1: all", above=0, high=1)
    top_k: int = option(0, "keep only the k most probable tokens; 0 keeps all", low=0, high=1 << 20)
    guidance_start: float = option(10.0, "classifier-free guidance when all is hidden", low=-1e4, high=1e4)
    guidance_end: float = option(1.0, "classifier-free guidance when nothing is hidden", low=-1e4, high=1e4)
    span_arrangement: str = option("nonoverlap", "where spans may lie", ("nonoverlap", "stride1"))
    span_scoring: str = option("max", "a span's probability: of its best token, or the product", ("max", "prod"))
    schedule: str = option("paper", "as in the paper, or token by token as released", ("paper", "released"))
    greedy: bool = option(False, "take the most probable token instead of sampling")
    rescorer_weight: float = option(0.5, "with --rescorer: the weight of its probabilities", low=0, high=1)
    ar_guidance: float = option(3.0, "autoregressive and hybrid models: guidance", low=-1e4, high=1e4)
    ar_top_k: int = option(250, "the same: keep only the k most probable tokens; 0 keeps all", low=0, high=1 << 20)
    ar_temperature: float = option(1.0, "the same: softmax temperature", low=0, high=1e4)
    hybrid_seconds: float = option(1.0, "hybrid models: seconds to write from left to right before the rest", low=0)


# --------------------------------------------------------------------------------------------------------- the schedule

def mask_rate(step, steps, schedule="paper"):
    """[Eq. 3] The share of spans hidden at decoding step 0..steps-1: cos(pi/2 * step / steps), from 1 downwards.

    Deviation: "released" spaces the steps so that the last one is at rate 0 (where one span is still hidden).
    """
    return float(cosine_schedule(torch.linspace(0, 1, steps)[step] if schedule == "released" else step / steps))


def guidance_scale(rate, start, end):
    """[Eq. 6] Annealed guidance: lambda = rate * start + (1 - rate) * end, strong while much is hidden.

    >>> guidance_scale(0.5, 10, 1)
    5.5
    """
    return rate * start + (1 - rate) * end


def annealed_temperature(step, steps, start):
    """[Sec. 3.3] start * (steps - 1 - step) / steps, with a floor of 0.01: one step alone is all but greedy."""
    return max(start * (steps - 1 - step) / steps, 1e-2)


# ------------------------------------------------------------------------------------------------------------- guidance

def with_negative(text, text_mask, negative):
    """B prompts, then as many negative ones in place of the null condition.

    text: (B, L, text_dim), text_mask: (B, L), those of `negative` with 1 or B rows -> (2B, L', text_dim), (2B, L').
    """
    other, other_mask = (x.to(text.device).expand(len(text), *x.shape[1:]) for x in negative)
    L = max(text.shape[1], other.shape[1])
    return (torch.cat([F.pad(x, (0, 0, 0, L - x.shape[1])) for x in (text, other)]),
            torch.cat([F.pad(x, (0, L - x.shape[1])) for x in (text_mask, other_mask)]))


def guided_logits(model, codes, stage, text, text_mask, scale, mask=None, cache=None):
    """[Sec. 3.3, Eq. 6] Classifier-free guidance: uncond + scale * (cond - uncond), shaped as the model's logits.

    codes: (B, K, T) with mask tokens; text, text_mask: of B prompts, the null condition is none at all, or of 2B, from
    `with_negative`. Both halves run as one batch; where the scale makes one of them irrelevant it is skipped. Without a
    text, the unguided logits of the null condition. ValueError if the logits are not finite.
    """
    B = len(codes)
    if text is None or scale in (0, 1):
        half = slice(B) if scale == 1 else slice(B, None)
        text, text_mask = (None, None) if text is None or not len(text[half]) else (text[half], text_mask[half])
        logits = model(codes, stage, text, text_mask, mask, cache)
    else:
        cond, uncond = model(codes.repeat(2, 1, 1), stage, text, text_mask, mask, cache).chunk(2)
        logits = torch.lerp(uncond, cond, scale)  # (1 - scale) * uncond + scale * cond, in one go
    if not (logits.sum().isfinite() or logits.isfinite().all()):  # the sum is the faster, and mostly enough
        raise ValueError("the model's logits are not finite: its weights are damaged, or want --dtype fp32")
    return logits


# ------------------------------------------------------------------------------------------------------ drawing a token

def clip_streams(seed, clips):
    """One stream of random numbers for each clip, by its number: what a clip draws depends on (seed, number) alone."""
    return [np.random.default_rng((seed, clip)) for clip in clips]


def nucleus(probs, top_p, top_k=0):
    """[Sec. 3.3] Cut probabilities (..., card) to the smallest set of top tokens that holds `top_p`; not renormalised.

    The most probable token always stays. top_k > 0 keeps at most that many. What ties with the last one stays as well.

    >>> nucleus(torch.tensor([0.5, 0.3, 0.2]), 0.7)
    tensor([0.5000, 0.3000, 0.0000])
    """
    on_cpu = probs.device.type == "cpu"  # where numpy sorts some five times faster than torch
    top = torch.from_numpy(-np.sort(-probs.detach().numpy())) if on_cpu else probs.sort(dim=-1, descending=True).values
    is_kept = top.cumsum(dim=-1) - top < top_p  # always the first, before which there is nothing
    n_kept = is_kept.sum(dim=-1, keepdim=True).clamp(max=top_k or probs.shape[-1])
    return probs.masked_fill(probs < top.gather(-1, n_kept - 1), 0)


def draw(weights, uniform):
    """One token for each row of weights (..., card), in proportion to them: uniform (...) in [0, 1) -> (...) long.

    The first token of a weight above zero whose cumulative weight exceeds `uniform` times the whole.

    >>> draw(torch.tensor([[0.5, 0.3, 0.0, 0.2]] * 3), torch.tensor([0.4, 0.6, 0.9]))
    tensor([0, 1, 3])
    """
    total = weights.cumsum(dim=-1)
    reached = (total > uniform[..., None] * total[..., -1:]) & (weights > 0)
    # If the product was rounded up to the whole, none is reached: the most probable token stands in.
    return torch.where(reached.any(dim=-1), reached.int().argmax(dim=-1), weights.argmax(dim=-1))


def draw_tokens(logits, temperature, top_p, top_k, greedy, uniform):
    """[Sec. 3.3] Tokens for logits (..., card): tempered, cut to the nucleus, drawn with uniform (...); (...) long."""
    if greedy or temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / max(temperature, 1e-2), dim=-1)
    return draw(nucleus(probs, top_p, top_k) if top_p < 1 or top_k else probs, uniform)


def draw_uniform(streams, n, device):
    """n numbers in [0, 1) from the stream of each of B clips: (B, n) float32."""
    return torch.from_numpy(np.stack([stream.random(n, dtype=np.float32) for stream in streams])).to(device)


# ------------------------------------------------------------------------------------------------------- choosing spans

def log_odds(logits, tokens):
    """log p / (1 - p) of tokens (...) under softmax(logits) (..., card): orders tokens as their probability p does.

    Unlike p it does not round to 1 for all sure tokens alike, so that ranks never tie for want of digits.

    >>> log_odds(torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor(0))
    tensor(0.)
    """
    others = logits.scatter(-1, tokens[..., None], -torch.inf).logsumexp(dim=-1)
    return logits.gather(-1, tokens[..., None])[..., 0] - others


def span_confidence(tokens, span_len, stride, scoring):
    """[Sec. 3.3] How probable each span is: as its most probable token ("max"), or as the product of all ("prod").

    tokens: (B, T) `log_odds`; gives (B, n) for spans of `span_len` frames, one every `stride` frames: of "max" the log
    odds, of "prod" -log(-log p), which rises with p too. Where the spans tile the frames the last may be shorter.

    >>> span_confidence(torch.tensor([[-2.0, 1.0, 0.5, -1.0]]), 3, 3, "max")
    tensor([[ 1., -1.]])
    """
    if scoring == "prod":  # log(-log p) of each token: log(softplus(-z)), which is -z where softplus would underflow
        tokens = torch.where(tokens > 15, -tokens, F.softplus(-tokens).log())
    if stride == span_len:
        tokens = F.pad(tokens, (0, -tokens.shape[1] % span_len), value=-torch.inf)  # adds nothing to either score
    spans = tokens.unfold(1, span_len, stride)  # (B, n, span_len)
    return spans.amax(dim=2) if scoring == "max" else -spans.logsumexp(dim=2)


def hide_nonoverlapping(tokens, fixed, n_spans, span_len, scoring):
    """[Sec. 3.3] Hide the `n_spans` least probable of the spans that tile the frames: (B, T) bool.

    tokens: (B, T) `log_odds`; fixed: (B, T), True where a token stays. A span is open if any of its tokens is not
    fixed; all its tokens count for its probability. Spans that are not open rank last: where the paper gives their
    score, 1 - p, minus infinity, their confidence is plus infinity here.
    Deviation: where T is no multiple of `span_len` the last span is shorter; the released code drops those frames.
    """
    spans = span_confidence(tokens, span_len, span_len, scoring)  # (B, n)
    is_open = F.pad(~fixed, (0, -fixed.shape[1] % span_len)).unfold(1, span_len, span_len).any(dim=2)
    chosen = spans.masked_fill(~is_open, torch.inf).topk(n_spans, dim=1, largest=False).indices
    hidden = torch.zeros_like(is_open).scatter(1, chosen, True)
    return hidden.repeat_interleave(span_len, dim=1)[:, :fixed.shape[1]]


def hide_stride1(tokens, fixed, n_frames, span_len, scoring):
    """[Sec. 3.3] Hide the least probable spans, which may overlap, about `n_frames` frames in all: (B, T) bool.

    A span with more fixed tokens ranks behind all with fewer; they do not count for its probability. Deviation: the
    paper's spans do not overlap; the released code offers this and its authors call it better.
    """
    T, span_len = tokens.shape[1], min(span_len, tokens.shape[1])
    tokens = tokens.masked_fill(fixed, -torch.inf if scoring == "max" else torch.inf)  # neither best nor a factor
    order = span_confidence(tokens, span_len, 1, scoring).argsort(dim=1)  # (B, T - l + 1), least probable first
    n_fixed = fixed.int().unfold(1, span_len, 1).sum(dim=2)
    order = order.gather(1, n_fixed.gather(1, order).argsort(dim=1, stable=True))
    # A frame is hidden by the first u spans if the best-ranked span that covers it is one of them: entry < u.
    entry = F.pad(order.argsort(dim=1), (span_len - 1, span_len - 1), value=T).unfold(1, span_len, 1).amin(dim=2)
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


def spans_to_hide(tokens, fixed, rate, given, span_len, config):
    """[Sec. 3.3] Choose what to hide again at mask rate `rate`: (B, T) bool, always at least one span.

    tokens: (B, T) `log_odds`; fixed: (B, T), True where a token stays; given: (T,), True at the frames that were there
    before decoding: the rate is a share of the others.
    """
    if config.span_arrangement == "stride1":
        scoring = "prod" if config.schedule == "released" else config.span_scoring
        return hide_stride1(tokens, fixed, int(rate * int((~given).sum())), span_len, scoring)
    n_spans = int(F.pad(~given, (0, -len(given) % span_len)).view(-1, span_len).any(dim=1).sum())
    return hide_nonoverlapping(tokens, fixed, max(int(rate * n_spans), 1), span_len, config.span_scoring)


# ------------------------------------------------------------------------------------------------ decoding in parallel

def rescored(tokens, scores, weight):
    """[Sec. 3.4, Eq. 5] Mix in another model's probabilities: (1 - weight) * p + weight * scores, as log odds (B, T).

    MAGNeT's probabilities are tempered and guided, the rescorer's are at temperature 1 and with the text; it sees mask
    tokens in the codebooks that are yet to be decoded. The paper says nothing of either. Deviation: as in Fig. 4 the
    weight is the rescorer's and only the ranking of spans changes; in Eq. 5 it is MAGNeT's.
    """
    if not scores.isfinite().all():
        raise ValueError("the rescorer's probabilities are not finite: its weights are damaged, or want --dtype fp32")
    p = torch.lerp(tokens.sigmoid(), scores, weight)
    other = torch.lerp((-tokens).sigmoid(), 1 - scores, weight)  # 1 - p, without the loss of digits
    return p.log() - other.clamp(min=1e-38).log()


def decode_stage(model, codes, stage, text, text_mask, config, streams, rescorer=None, prompt=None, on_step=None):
    """[Sec. 3.3, Fig. 4] Fill in codebook `stage` of codes (B, K, T), where it holds mask tokens: its codes (B, T).

    prompt: of a hybrid, its delayed prompt (B, K, positions), the start included; the rest is as for `generate`.
    """
    steps = config.decoding_steps[min(stage, len(config.decoding_steps) - 1)]
    released, before = config.schedule == "released", codes
    given = codes[0, stage] != model.mask_id  # (T,), the same frames in every clip
    codes, fixed, confidence = codes.clone(), given.expand(len(codes), -1), None
    for step in range(0 if given.all() else steps):
        rate = mask_rate(step, steps, config.schedule)
        hidden = ~fixed  # (B, T); at first all that was not given
        if step > 0:  # hide the least probable spans again
            hidden = spans_to_hide(confidence, fixed, rate, given, model.config.span_len, config)
            # Deviation: with stride1 the released code may hide again, and so sample again, what was fixed.
            hidden = hidden & ~(given if released else fixed)
        inputs = mask_codes(codes, stage, hidden, model.mask_id)
        if released:  # Deviation: as released, upper codebooks are shown where frames are given; training hides them
            inputs = torch.where(given, before, inputs)
        scale = guidance_scale(rate, config.guidance_start, config.guidance_end)
        if prompt is None:
            logits = guided_logits(model, inputs, stage, text, text_mask, scale)  # (B, T, card)
        else:  # [App. D] behind a prompt; a position of the delayed codes predicts the next one
            delayed = torch.cat([prompt, delay_codes(inputs, model.mask_id)[:, :, prompt.shape[2]:]], dim=2)
            mask = hybrid_attention_mask(delayed.shape[2], prompt.shape[2] - 1, stage, model.config.context)
            logits = guided_logits(model, delayed, stage, text, text_mask, scale, mask)
            logits = logits[:, stage:stage + codes.shape[2]]
        temperature = annealed_temperature(step, steps, config.temperature)
        uniform = draw_uniform(streams, codes.shape[2], codes.device)
        drawn = draw_tokens(logits, temperature, config.top_p, config.top_k, config.greedy, uniform)  # (B, T)
        codes[:, stage] = torch.where(hidden, drawn, codes[:, stage])  # only hidden positions change
        confidence = log_odds(logits / temperature, drawn)  # (B, T), before the nucleus; fixed tokens count as drawn
        if rescorer is not None:
            B = len(codes)
            scores = rescorer.score_codes(codes, stage, *((text[:B], text_mask[:B]) if text is not None else ()))
            confidence = rescored(confidence, scores, config.rescorer_weight)
        fixed = ~hidden
        if on_step is not None:
            on_step(stage=stage, step=step, codes=codes.clone(), hidden=hidden, confidence=confidence.sigmoid())
    return codes[:, stage]


# ---------------------------------------------------------------------------- autoregressively, and every kind of model

def decode_autoregressively(model, codes, text, text_mask, n_positions, config, streams, on_step=None):
    """[Eq. 1, App. D] Write the mask tokens of codes (B, K, T) from left to right, in the first `n_positions` delayed
    positions. The given ones are read in one pass; then a step reads the one written last, all before it is cached.
    """
    given = codes[0, 0] != model.mask_id  # (T,)
    is_open = delay_codes((~given).expand(1, codes.shape[1], -1), False)  # (1, K, T + K)
    delayed, cache = delay_codes(codes, model.mask_id), [Cache(n_positions) for _ in model.blocks]
    for position in range(int(given.sum()) + 1, n_positions):
        unread = delayed[:, :, cache[0].filled:position]
        logits = guided_logits(model, unread, None, text, text_mask, config.ar_guidance, cache=cache)[:, :, -1]
        uniform = draw_uniform(streams, logits.shape[1], codes.device)  # (B, K)
        tokens = draw_tokens(logits, config.ar_temperature, 1.0, config.ar_top_k, config.greedy, uniform)
        delayed[:, :, position] = torch.where(is_open[:, :, position], tokens, delayed[:, :, position])
        if on_step is not None:
            on_step(position=position, codes=undelay(delayed))
    return undelay(delayed)


@torch.inference_mode()
def generate(model, text, text_mask, codes, config=None, streams=None, negative=None, rescorer=None, on_step=None,
             frame_rate=50.0):
    """[Sec. 3.3, Fig. 4; Sec. 3.5, App. D] Fill in the mask tokens of codes (B, K, T), as the model was trained to: in
    parallel, codebook after codebook; or from left to right; or so for the first `hybrid_seconds`, then in parallel.

    text: (B, L, text_dim) from the text encoder and text_mask (B, L) bool, or None and None for no prompt; codes: long,
    masked in the same frames of all clips and codebooks; streams: from `clip_streams`; negative: (text, text_mask) of 1
    or B rows in place of the null condition; rescorer: its `score_codes(codes, stage, text, text_mask)` gives the
    probability of each token (B, T); on_step(stage, step, codes, hidden, confidence), or (position, codes) from left to
    right, is called after each step; frame_rate: of the codec, in Hz. ValueError: an argument does not fit the model.
    """
    config, (B, K, T), kind = config or SamplingConfig(), codes.shape, model.config.objective
    check_arguments(model, text, codes, config, rescorer)
    codes, streams = codes.to(model.out_norm.weight.device, copy=True), streams or clip_streams(0, range(B))
    prompt, whole = None, T - T % model.config.span_len
    if kind == "magnet" and config.schedule == "released" and config.span_arrangement == "nonoverlap" and 0 < whole < T:
        # Deviation: the released code drops the frames after the last whole span; here they are filled in at the end.
        codes[:, :, :whole] = generate(model, text, text_mask, codes[:, :, :whole], config, streams, negative, rescorer,
                                       on_step)
        config, on_step = replace(config, decoding_steps=(1,)), None
    if text is not None:
        text, text_mask = text.to(codes.device), text_mask.to(codes.device).bool()
        text, text_mask = (text, text_mask) if negative is None else with_negative(text, text_mask, negative)
    if kind != "magnet":
        n_given = int((codes[0, 0] != model.mask_id).sum())
        n_prompt = T if kind == "ar" else max(round(min(config.hybrid_seconds * frame_rate, T)), n_given)
        n_positions = 1 + n_prompt if n_prompt < T else T + K  # codebook k of the prompt is k frames shorter
        codes = decode_autoregressively(model, codes, text, text_mask, n_positions, config, streams, on_step)
        prompt = delay_codes(codes, model.mask_id)[:, :, :n_positions]
    for stage in range(K if kind != "ar" else 0):
        codes[:, stage] = decode_stage(model, codes, stage, text, text_mask, config, streams, rescorer, prompt, on_step)
    return codes


def check_arguments(model, text, codes, config, rescorer):
    """ValueError if what `generate` is asked for does not fit the model."""
    kind, K, masked = model.config.objective, model.config.n_codebooks, codes == model.mask_id
    if codes.dim() != 3 or codes.shape[1] != K or codes.shape[2] < 1 or text is not None and len(text) != len(codes):
        raise ValueError(f"codes have shape {tuple(codes.shape)}; want a row for each text, {K} codebooks, some frames")
    if codes.min() < 0 or codes.max() > model.mask_id or not masked.equal(masked[:1, :1].expand_as(masked)):
        raise ValueError(f"codes must be 0 to {model.mask_id}, which masks the same frames in all clips and codebooks")
    if kind != "magnet" and masked[0, 0].int().diff().lt(0).any():
        raise ValueError(f"only a MAGNeT can fill in a gap (--inpaint); this model's objective is {kind}")
    if rescorer is not None and kind == "ar":
        raise ValueError("only parallel decoding can be rescored (--rescorer); this model's objective is ar")
    if len(config.decoding_steps) > max(K, 2):
        raise ValueError(f"decoding_steps must hold at most {K} numbers, one per codebook, not {config.decoding_steps}")


# --------------------------------------------------------------------------------------------------------- command line

def main():
    parser = Parser(description="Make music from a text prompt.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to play; "" for no condition')
    add_flags(parser, Request, SamplingConfig)
    args = parser.parse_args()
    request, _ = from_flags(args, Request()), from_flags(args, SamplingConfig())  # faults are told before all loading
    clips, device = plan_clips(request, args.prompts), pick_device(request.device)
    dtype = pick_dtype(request.dtype, device)
    model, companions = load_model(request.model, device, dtype)
    config = from_flags(args, make_config(SamplingConfig, companions.sampling, request.model))  # flags go first
    codec = load_codec(request.codec or companions.codec, model.config.n_codebooks, device)
    encoder = T5Encoder.from_pretrained(request.text_encoder or companions.text_encoder)
    companions.check(codec, encoder)
    rescorer = None
    if request.rescorer is not None and config.rescorer_weight > 0:
        rescorer, needs = load_model(request.rescorer, device, dtype)
        needs.check(codec, encoder, f"--rescorer {request.rescorer}")
    start = time.perf_counter()
    seconds, parts = request.seconds or model.config.seconds, [slice(None)]
    known, n_samples = known_codes(request, codec, seconds, model.mask_id)
    check_arguments(model, None, known, config, rescorer)
    if seconds > model.config.seconds or request.inpaint or request.overlap:  # longer than the training clips
        parts = windows(known[0, 0] != model.mask_id, model.config.seconds, request.overlap, codec.frame_rate)
    negative = None if request.negative_prompt is None else encoder.encode_text([request.negative_prompt])
    batches = [clips[i:i + BATCH] for i in range(0, len(clips), BATCH)]
    texts = [encoder.encode_text([clip.prompt for clip in batch]) for batch in batches]
    del encoder  # its memory is wanted
    steps = (config.decoding_steps + config.decoding_steps[-1:] * codec.n_codebooks)[:codec.n_codebooks]
    n_steps = len(batches) * len(parts) * sum(steps) if model.config.objective == "magnet" else None
    with tqdm(total=n_steps, unit="step") as bar:
        for batch, (text, text_mask) in zip(batches, texts, strict=True):
            codes = known.repeat(len(batch), 1, 1)
            streams = clip_streams(request.seed, [clip.number for clip in batch])
            for part in parts:
                codes[:, :, part] = generate(model, text, text_mask, codes[:, :, part], config, streams, negative,
                                             rescorer, lambda **_: bar.update(), codec.frame_rate)
            for clip, row in zip(batch, codes, strict=True):
                save_audio(clip.path, codec.decode(row[None])[..., :n_samples], codec.sample_rate)
                say(f"wrote {clip.path}  {clip.prompt}  (again: --seed {request.seed} --only {clip.number})")
    say_settings(config, companions.sampling)
    elapsed, total = time.perf_counter() - start, n_samples / codec.sample_rate * len(clips)
    say(f"{model}\n{elapsed:.1f} s on {device} for {total:g} s of audio: real-time factor {elapsed / total:.2f}")


if __name__ == "__main__":
    run(main)
