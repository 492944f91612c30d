"""Decoding: from a text prompt to codes in a few parallel steps, and from there to a WAV file [Sec. 3.3, Fig. 4].

For each codebook in turn MAGNeT starts with everything hidden and runs s steps. A step predicts all hidden tokens at
once and keeps the spans it is surest of; the least probable spans are hidden again and predicted anew. Small pure
functions, one per idea, come first; `generate` strings them together, `generate_hybrid` begins with an autoregressive
prompt; the command line is at the end. Decoding from left to right is in `autoregressive.py`.

    python sample.py "a slow deep flute plays a rising melody, with drums" --out flute.wav
"""

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from autoregressive import (
    UNKNOWN,
    Continuation,
    check_arguments,
    generate_autoregressive,
    guided_logits,
    prepare_both,
)
from cli import Parser, add_flags, check_same, from_flags, option, pick_device, run
from encodec_wrap import check_audio_path, load_audio, load_codec, save_audio
from masking import cosine_schedule, delay_codes, hide_codes
from model import load_model
from t5_encoder import T5Encoder

PAPER_STEPS = (20, 10, 10, 10)  # for K codebooks: 20, and 10 for each later one
FIXED = -1e4  # added to a span's score for what must stay as it is; far below any score that a probability gives
NEUTRAL = {"max": 1.0, "prod": 0.0}  # the score of a token that has no say in its span
BATCH = 16  # clips that are decoded together


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
    ar_guidance: float = option(3.0, "autoregressive and hybrid models, from left to right: guidance")
    ar_top_k: int = option(250, "the same: keep only the k most probable tokens; 0 keeps all")
    ar_temperature: float = option(1.0, "the same: softmax temperature")
    hybrid_seconds: float = option(1.0, "hybrid models: seconds to write from left to right before the rest")

    def __post_init__(self):
        if not self.decoding_steps or min(self.decoding_steps) < 1:
            raise ValueError(f"decoding_steps must be positive, one for each codebook, not {self.decoding_steps}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        for name in ("top_k", "temperature", "ar_top_k", "ar_temperature", "hybrid_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be zero or positive, not {getattr(self, name)}")
        if not all(map(math.isfinite, (self.guidance_start, self.guidance_end, self.ar_guidance))):
            raise ValueError(f"guidance must be finite, not {self.guidance_start} -> {self.guidance_end}, or "
                             f"{self.ar_guidance} from left to right")
        for field in fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be {' or '.join(choices)}, not {value!r}")


# ------------------------------------------------------------------------------------------------------- one idea each

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


def spans_to_hide(confidence, fixed, rate, n_open, span_len, config):
    """[Sec. 3.3] Choose what to hide again at mask rate `rate`: (B, T) bool, always at least one span.

    confidence: (B, T), the probability of each token; fixed: (B, T), True where a token stays; n_open: how many frames
    were to be generated at first.
    """
    tokens = token_scores(confidence, config.span_scoring)
    if config.span_arrangement == "stride1":
        return hide_stride1(tokens, fixed, max(int(rate * n_open), 1), span_len, config.span_scoring)
    # Count the spans that were open at first: those which reach beyond the frames that were given.
    n_spans = math.ceil(fixed.shape[1] / span_len) - (fixed.shape[1] - n_open) // span_len
    return hide_nonoverlapping(tokens, fixed, max(int(rate * n_spans), 1), span_len, config.span_scoring)


def rescoring(rescorer, weight, text, text_mask):
    """[Sec. 3.4, Eq. 5] A function that mixes another model's probabilities into the confidence; None at weight 0.

    rescorer: anything with `score_codes(codes, stage, text, text_mask)` -> (B, T), the probability of each token.
    Deviation: as in Fig. 4 the weight is the rescorer's and only the ranking of spans changes; in Eq. 5 it is MAGNeT's.
    """
    if not 0 <= weight <= 1 or (weight and rescorer is None):
        raise ValueError(f"rescorer_weight must be between 0 and 1, and 0 without a rescorer, not {weight}")
    if weight == 0:
        return None
    return lambda confidence, codes, stage: torch.lerp(
        confidence, rescorer.score_codes(codes, stage, text, text_mask).to(confidence), weight)


# ------------------------------------------------------------------------------------------------------------- decoding

def decode_stage(model, codes, stage, given, prepared, config, generator=None, on_step=None, rescore=None):
    """[Sec. 3.3, Fig. 4] Fill in codebook `stage`: codes (B, K, T) -> new tokens (B, T).

    given: (T,) bool, True at the frames of the audio prompt, whose tokens stay. Only hidden positions are ever sampled.
    rescore: see `rescoring`.
    """
    steps, released = config.decoding_steps[stage], config.schedule == "released"
    codes, prompt = codes.clone(), codes
    fixed, confidence = given.expand(len(codes), -1), None  # (B, T)
    n_open = int((~given).sum())
    for step in range(steps if n_open else 0):
        rate = mask_rate(step, steps, config.schedule)
        hidden = ~fixed  # at first all that is not given
        if step > 0:
            hidden = spans_to_hide(confidence, fixed, rate, n_open, model.config.span_len, config)
            # Deviation: with stride1 the released code may hide again, and so sample again, what was fixed.
            hidden = hidden & ~(given if released else fixed)
        seen = hide_codes(codes, stage, hidden, model.mask_id)
        if released:  # it shows the upper codebooks of the audio prompt, which training always hides
            seen = torch.where(given, prompt, seen)
        scale = guidance_scale(rate, config.guidance_start, config.guidance_end)
        logits = guided_logits(model, seen, stage, prepared, scale)  # (B, T, card)
        probs = torch.softmax(logits / annealed_temperature(step, steps, config.temperature), dim=-1)
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


def fit_steps(config, n_codebooks):
    """The config with one number of decoding steps per codebook; the default fits any K, else ValueError."""
    if config.decoding_steps == PAPER_STEPS:
        return replace(config, decoding_steps=(20,) + (10,) * (n_codebooks - 1))
    if len(config.decoding_steps) != n_codebooks:
        raise ValueError(f"decoding_steps must hold {n_codebooks} numbers, one per codebook: {config.decoding_steps}")
    return config


def decode_stages(model, codes, *arguments):
    """[Sec. 3.3] Fill in what is hidden in codes (B, K, T), codebook after codebook, in place."""
    for stage in range(codes.shape[1]):
        given = codes[0, stage] != model.mask_id  # the same frames in every row
        codes[:, stage] = decode_stage(model, codes, stage, given, *arguments)
    return codes


@torch.inference_mode()
def generate(model, text, text_mask, n_frames, config=None, audio_prompt=None, generator=None, on_step=None,
             rescorer=None, rescorer_weight=0.0):
    """[Sec. 3.3, Fig. 4] Generate codes (B, K, T) of exactly `n_frames` frames, codebook after codebook.

    text: (B, N, text_dim) from the text encoder and text_mask (B, N), or None and None for music without a prompt;
    audio_prompt: codes (B, K, P), P <= T, which the result begins with; generator: a `torch.Generator` on the model's
    device (the same seed and device give the same codes); on_step(stage, step, codes, hidden, confidence) is called
    after every decoding step; rescorer, rescorer_weight: see `rescoring`. Raises ValueError where an argument does not
    fit the model.
    """
    config = fit_steps(config or SamplingConfig(), model.config.n_codebooks)
    audio_prompt = check_arguments(model, ("magnet",), text, n_frames, audio_prompt)
    codes = F.pad(audio_prompt, (0, n_frames - audio_prompt.shape[2]), value=model.mask_id)
    return decode_stages(model, codes, prepare_both(model, text, text_mask), config, generator, on_step,
                         rescoring(rescorer, rescorer_weight, text, text_mask))


@torch.inference_mode()
def generate_hybrid(model, text, text_mask, n_frames, prompt_seconds, config=None, audio_prompt=None, generator=None,
                    on_step=None, rescorer=None, rescorer_weight=0.0, frame_rate=50.0):
    """[App. D, Fig. 7] Write the first `prompt_seconds` from left to right and the rest in parallel: codes (B, K, T).

    frame_rate: the codec's; the audio prompt counts as a part of the prompt; the rest is as for `generate`. The prompt
    ends at one position of the delayed codes: codebook k of it is k frames shorter than the first, if not given.
    """
    if not 0 <= prompt_seconds < math.inf:
        raise ValueError(f"prompt_seconds must be zero or positive, not {prompt_seconds}")
    config = fit_steps(config or SamplingConfig(), model.config.n_codebooks)
    audio_prompt = check_arguments(model, ("hybrid",), text, n_frames, audio_prompt)
    n_prompt = max(round(prompt_seconds * frame_rate), audio_prompt.shape[2])
    n_positions = 1 + n_prompt if n_prompt < n_frames else n_frames + model.config.n_codebooks
    codes = generate_autoregressive(
        model, text, text_mask, n_frames, config.ar_guidance, config.ar_top_k, config.ar_temperature, config.greedy,
        audio_prompt, generator, on_step, n_positions)
    codes = codes.masked_fill(codes == UNKNOWN, model.mask_id)
    behind_prompt = Continuation(model, delay_codes(codes, model.mask_id)[:, :, :n_positions])
    return decode_stages(behind_prompt, codes, prepare_both(model, text, text_mask), config, generator, on_step,
                         rescoring(rescorer, rescorer_weight, text, text_mask))


def generate_as_trained(model, text, text_mask, n_frames, config, audio_prompt=None, generator=None, on_step=None,
                        rescorer=None, rescorer_weight=0.0, frame_rate=50.0):
    """Generate codes (B, K, T) as the model was trained to: in parallel, from left to right, or both."""
    clip, more = (model, text, text_mask, n_frames), (audio_prompt, generator, on_step)
    if model.config.objective == "magnet":
        return generate(*clip, config, *more, rescorer, rescorer_weight)
    if model.config.objective == "hybrid":
        return generate_hybrid(*clip, config.hybrid_seconds, config, *more, rescorer, rescorer_weight, frame_rate)
    if rescorer is not None:
        raise ValueError("only parallel decoding can be rescored; this model is autoregressive")
    return generate_autoregressive(*clip, config.ar_guidance, config.ar_top_k, config.ar_temperature, config.greedy,
                                   *more)


# --------------------------------------------------------------------------------------------------------- command line

def output_paths(out, count):
    """One path is used as it is; several become out-1.wav, out-2.wav, ..."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def parse_args():
    parser = Parser(description="Make music from a text prompt.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to play; "" for no condition')
    parser.add_argument("--out", type=Path, default=Path("out.wav"), help="file to write; several get numbers")
    parser.add_argument("--model", default="toy", help="toy, the folder of a training run, or a checkpoint file")
    parser.add_argument("--seconds", type=float, help="length in all (default: that of the training clips)")
    parser.add_argument("--n", type=int, default=1, help="variations of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--audio-prompt", type=Path, help="audio file to continue")
    parser.add_argument("--rescorer", help="another model, as --model, whose opinion counts when tokens are ranked")
    parser.add_argument("--rescorer-weight", type=float, default=0.5, help="of its opinion, 0 to 1 (default: 0.5)")
    add_flags(parser, SamplingConfig)
    return parser.parse_args()


def main():
    args = parse_args()
    config, device = from_flags(args, SamplingConfig), pick_device(args.device)
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds must be above 0 and at most 3600, not {args.seconds:g}")
    if args.n < 1:
        raise ValueError(f"--n must be at least 1, not {args.n}")
    check_audio_path(args.out)
    model, names = load_model(args.model, device)
    config = fit_steps(config, model.config.n_codebooks)
    codec = load_codec(names["codec"], model.config.n_codebooks, device)
    encoder = T5Encoder.from_pretrained(names["text_encoder"])
    check_same(names, codec, encoder)
    rescorer, weight = None, 0.0
    if args.rescorer is not None:
        (rescorer, theirs), weight = load_model(args.rescorer, device), args.rescorer_weight
        if any(theirs[key] != names[key] for key in ("codec_id", "text_encoder_id")):
            raise ValueError(f"--rescorer {args.rescorer}: has another codec or text encoder than --model {args.model}")
    seconds = args.seconds or model.config.seconds
    samples = max(1, round(seconds * codec.sample_rate))
    n_frames = math.ceil(samples / codec.hop_length)
    audio_prompt = None
    if args.audio_prompt is not None:
        audio_prompt = codec.encode(load_audio(args.audio_prompt, codec.sample_rate)[None].to(device))  # (1, K, P)
        if audio_prompt.shape[2] >= n_frames:
            length = audio_prompt.shape[2] / codec.frame_rate
            raise ValueError(f"--audio-prompt {args.audio_prompt} is {length:g} s long; want less than {seconds:g} s")
    print(model)
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    paths = output_paths(args.out, len(prompts))
    generator = torch.Generator(device).manual_seed(args.seed)
    start = time.perf_counter()
    in_all = sum(config.decoding_steps) * math.ceil(len(prompts) / BATCH)
    with tqdm(total=in_all if model.config.objective == "magnet" else None, unit="step") as bar:
        for i in range(0, len(prompts), BATCH):
            text, text_mask = encoder.encode_text(prompts[i:i + BATCH])
            given = None if audio_prompt is None else audio_prompt.expand(len(text), -1, -1)
            codes = generate_as_trained(model, text, text_mask, n_frames, config, given, generator,
                                        lambda **_: bar.update(), rescorer, weight, codec.frame_rate)
            wavs = codec.decode(codes)[..., :samples]
            for path, wav in zip(paths[i:i + BATCH], wavs, strict=True):
                save_audio(path, wav, codec.sample_rate)
    elapsed = time.perf_counter() - start
    for path, prompt in zip(paths, prompts, strict=True):
        print(f"wrote {path}  {prompt}")
    total = seconds * len(prompts)
    print(f"{elapsed:.1f} s on {device} for {total:g} s of audio: real-time factor {elapsed / total:.2f}")


if __name__ == "__main__":
    run(main)
