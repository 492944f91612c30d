"""Decoding: from a text prompt to codes in a few parallel steps, and from there to a WAV file [Sec. 3.3, Fig. 4].

For each codebook in turn MAGNeT starts with everything hidden and runs s steps. A step predicts all hidden tokens at
once and keeps the spans it is surest of; the least probable spans are hidden again and predicted anew. `generate`
strings together the small functions of `decoding.py`; `generate_windows` goes beyond the length of the training clips;
the command line is at the end. Left out here: rescoring and hybrid decoding.

    python sample.py "a slow deep flute plays a rising melody, with drums" --out flute.wav
    python sample.py "80s driving pop with heavy drums" --model facebook/magnet-small-10secs --out pop.wav
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import DTYPES, Parser, add_flags, check_same, from_flags, pick_device, pick_dtype, run
from decoding import (
    SamplingConfig,
    annealed_temperature,
    fit_steps,
    guidance_scale,
    mask_rate,
    nucleus,
    spans_to_hide,
)
from encodec_wrap import check_audio_path, load_audio, load_codec, save_audio
from masking import hide_codes
from model import load_model
from t5_encoder import T5Encoder

BATCH = 16  # clips that are decoded together


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


def decode_stage(model, codes, stage, given, prepared, config, generator=None, on_step=None):
    """[Sec. 3.3, Fig. 4] Fill in codebook `stage`: codes (B, K, T) -> new tokens (B, T).

    given: (T,) bool, True at the frames whose tokens stay. Only hidden positions are ever sampled.
    """
    steps, released = config.decoding_steps[stage], config.schedule == "released"
    codes, prompt = codes.clone(), codes
    fixed, confidence = given.expand(len(codes), -1), None  # (B, T)
    for step in range(0 if given.all() else steps):
        rate = mask_rate(step, steps, config.schedule)
        hidden = ~fixed  # at first all that is not given
        if step > 0:
            hidden = spans_to_hide(confidence, fixed, rate, given, model.config.span_len, config)
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
        fixed = ~hidden
        if on_step is not None:
            on_step(stage=stage, step=step, codes=codes.clone(), hidden=hidden, confidence=confidence)
    return codes[:, stage]


def with_null_condition(text, text_mask, negative=None):
    """[Sec. 3.3] B prompts, then as many null conditions, which are all zero, or `negative` ones (text, mask) instead.

    text: (B, N, D), text_mask: (B, N), those of `negative` with 1 or B rows -> (2 B, N', D), (2 B, N').
    """
    null, null_mask = negative or (text * 0, text_mask * 0)
    N = max(text.shape[1], null.shape[1])
    null, null_mask = null.to(text).expand(len(text), -1, -1), null_mask.to(text_mask).expand(len(text), -1)
    return (torch.cat([F.pad(x, (0, 0, 0, N - x.shape[1])) for x in (text, null)]),
            torch.cat([F.pad(x, (0, N - x.shape[1])) for x in (text_mask, null_mask)]))


@torch.inference_mode()
def generate(model, text, text_mask, n_frames, config=None, audio_prompt=None, generator=None, on_step=None,
             given=None, negative=None):
    """[Sec. 3.3, Fig. 4] Generate codes (B, K, T) of exactly `n_frames` frames, codebook after codebook.

    text: (B, N, text_dim) from the text encoder and text_mask (B, N), or None and None for music without a prompt;
    audio_prompt: codes (B, K, P), P <= T, which the result begins with; generator: a `torch.Generator` on the model's
    device (the same seed and device give the same codes); on_step(stage, step, codes, hidden, confidence) is called
    after every decoding step; given: (T,) bool, which of the T frames of audio_prompt to keep (all, by default: with a
    gap in the middle this is inpainting); negative: (text, text_mask) of 1 or B rows in place of the null condition.
    Raises ValueError where an argument does not fit the model.
    """
    K, device = model.config.n_codebooks, model.out_norm.weight.device
    config = fit_steps(config or SamplingConfig(), K)
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
    given = given.to(device)
    codes = torch.full((B, K, n_frames), model.mask_id, device=device)
    codes[:, :, :P] = audio_prompt
    kept = codes[:, :, given]
    if kept.numel() and not 0 <= kept.min() <= kept.max() < model.config.card:
        raise ValueError(f"audio_prompt must hold codes from 0 to {model.config.card - 1}")
    codes[:, :, ~given] = model.mask_id
    prepared = None
    if text is not None:
        prepared = model.prepare_text(*with_null_condition(text.to(device), text_mask.to(device), negative))
    for stage in range(K):
        codes[:, stage] = decode_stage(model, codes, stage, given, prepared, config, generator, on_step)
    return codes


def windows(given, size, overlap):
    """Where to put windows of `size` frames that fill in what is not `given` (T,): a list of first frames.

    Each begins `overlap` frames before the first frame still open, so that it continues what is there; the last is
    moved back to end with the clip. overlap < size.

    >>> windows(torch.zeros(25, dtype=torch.bool), 10, 4)
    [0, 6, 12, 15]
    """
    given, starts = given.clone(), []
    while not given.all():
        first = int(given.int().argmin())
        starts.append(max(0, min(first - overlap, len(given) - size)))
        given[starts[-1]:starts[-1] + size] = True
    return starts


@torch.inference_mode()
def generate_windows(model, text, text_mask, codes, given, size, overlap, config=None, generator=None, on_step=None,
                     negative=None):
    """Fill in the frames of `codes` (B, K, T) that are not `given` (T,), in windows as long as the training clips.

    The end of one window is the audio prompt of the next; a gap is filled in sight of what is around it. `generate`
    explains the other arguments. Deviation: the paper generates single clips.
    """
    codes, given = codes.clone(), given.clone()
    for start in windows(given, size, overlap):
        part = slice(start, start + size)
        known = codes[:, :, part]
        codes[:, :, part] = generate(
            model, text, text_mask, known.shape[2], config, known, generator, on_step, given[part], negative)
        given[part] = True
    return codes


# --------------------------------------------------------------------------------------------------------- command line

def output_paths(out, count):
    """One path is used as it is; several become out-1.wav, out-2.wav, ..."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def parse_args(defaults=None):
    """The command line; `defaults` go before those of `SamplingConfig`: they are a published model's own."""
    parser = Parser(description="Make music from a text prompt.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to play; "" for no condition')
    parser.add_argument("--out", type=Path, default=Path("out.wav"), help="file to write; several get numbers")
    parser.add_argument("--model", default="toy", help="toy, the folder of a training run, a checkpoint file, or a "
                        "published model: its name such as facebook/magnet-small-10secs, or the folder of its files")
    parser.add_argument("--seconds", type=float, help="length in all (default: that of the training clips); "
                        "what is longer than those is generated in windows")
    parser.add_argument("--overlap", type=float, help="how many seconds of one window the next continues "
                        "(default: a third of a training clip)")
    parser.add_argument("--n", type=int, default=1, help="variations of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of the model; auto: fp32 on a CPU")
    parser.add_argument("--negative-prompt", help="what not to play: replaces the null condition of the guidance")
    parser.add_argument("--audio-prompt", type=Path, help="audio file to continue")
    parser.add_argument("--inpaint", type=Path, help="audio file in which to play something else, --from S --to S")
    parser.add_argument("--from", dest="gap_start", type=float, metavar="S", help="second at which the gap begins")
    parser.add_argument("--to", dest="gap_end", type=float, metavar="S", help="second at which the gap ends")
    add_flags(parser, SamplingConfig)
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args()


def check_args(args):
    """ValueError for flags that are wrong whatever the model."""
    from_flags(args, SamplingConfig)
    check_audio_path(args.out)
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds must be above 0 and at most 3600, not {args.seconds:g}")
    if args.n < 1:
        raise ValueError(f"--n must be at least 1, not {args.n}")
    gap = (args.inpaint, args.gap_start, args.gap_end)
    if any(x is not None for x in gap) and (any(x is None for x in gap) or args.audio_prompt or args.seconds):
        raise ValueError("--inpaint, --from and --to go together, without --audio-prompt and --seconds")


def load_all(args, device):
    """The model with its own sampling settings, codec and text encoder that the flags ask for."""
    model, names = load_model(args.model, device, pick_dtype(args.dtype, device))
    config = from_flags(parse_args(names.get("sampling")), SamplingConfig)  # once more, on the model's defaults
    config = fit_steps(config, model.config.n_codebooks)
    codec = load_codec(names["codec"], model.config.n_codebooks, device)
    if codec.codebook_size < model.config.card:
        raise ValueError(f"{names['codec']} has {codec.codebook_size} codes per codebook, {args.model} wants "
                         f"{model.config.card}")
    encoder = T5Encoder.from_pretrained(names["text_encoder"])
    check_same(names, codec, encoder)
    return model, config, codec, encoder


def read_given(args, codec, seconds, device):
    """What is there before decoding: codes (1, K, T), which of their frames are given (T,), and the samples in all."""
    source = args.inpaint or args.audio_prompt
    known = torch.empty(1, codec.n_codebooks, 0, dtype=torch.long, device=device)
    if source is not None:
        wav = load_audio(source, codec.sample_rate)
        known = codec.encode(wav[None].to(device))  # (1, K, P)
    if args.inpaint is not None:
        length = wav.shape[1] / codec.sample_rate
        if not 0 <= args.gap_start < args.gap_end <= length + 0.005:
            raise ValueError(f"want --from before --to within the {length:g} s of {source}")
        first, end = args.gap_start * codec.frame_rate, args.gap_end * codec.frame_rate
        frame = torch.arange(known.shape[2], device=device)
        return known, (frame < math.floor(first + 1e-6)) | (frame >= math.ceil(end - 1e-6)), wav.shape[1]
    samples = max(1, round(seconds * codec.sample_rate))
    n_frames, P = math.ceil(samples / codec.hop_length), known.shape[2]
    if P >= n_frames:
        raise ValueError(f"--audio-prompt {source} is {P / codec.frame_rate:g} s long; want less than {seconds:g} s")
    return F.pad(known, (0, n_frames - P)), torch.arange(n_frames, device=device) < P, samples


def window_size(args, model, codec, n_frames):
    """The frames of a window and of the overlap of two."""
    clip = model.config.seconds
    overlap = clip / 3 if args.overlap is None else args.overlap
    if not 0 <= overlap < clip:
        raise ValueError(f"--overlap must be at least 0 and less than the {clip:g} s of a window, not {overlap:g}")
    size = math.ceil(clip * codec.frame_rate)
    if n_frames > size:
        print(f"longer than a training clip ({clip:g} s): made in windows, each continuing {overlap:g} s of the last")
    return size, min(round(overlap * codec.frame_rate), size - 1)


def encode_prompts(encoder, prompts, negative_prompt):
    """Text and mask of every batch of prompts, and those of the negative prompt or None."""
    batches, more = [], [] if negative_prompt is None else [negative_prompt]
    for i in range(0, len(prompts), BATCH):
        text, mask = encoder.encode_text(prompts[i:i + BATCH] + more)
        n = len(text) - len(more)
        batches.append((text[:n], mask[:n], (text[n:], mask[n:]) if more else None))
    return batches


def main():
    args = parse_args()
    check_args(args)
    device = pick_device(args.device)
    model, config, codec, encoder = load_all(args, device)
    known, given, samples = read_given(args, codec, args.seconds or model.config.seconds, device)
    print(model)
    size, overlap = window_size(args, model, codec, len(given))
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    paths = output_paths(args.out, len(prompts))
    generator = torch.Generator(device).manual_seed(args.seed)
    start = time.perf_counter()
    batches = encode_prompts(encoder, prompts, args.negative_prompt)
    del encoder  # its memory is wanted: T5 has done its part
    n_steps = sum(config.decoding_steps) * len(windows(given, size, overlap)) * len(batches)
    written = iter(paths)
    with tqdm(total=n_steps, unit="step") as bar:
        for text, text_mask, negative in batches:
            codes = generate_windows(model, text, text_mask, known.expand(len(text), -1, -1), given, size, overlap,
                                     config, generator, lambda **_: bar.update(), negative)
            for row in codes:
                save_audio(next(written), codec.decode(row[None])[..., :samples], codec.sample_rate)
    elapsed = time.perf_counter() - start
    for path, prompt in zip(paths, prompts, strict=True):
        print(f"wrote {path}  {prompt}")
    total = samples / codec.sample_rate * len(prompts)
    print(f"{elapsed:.1f} s on {device} for {total:g} s of audio: real-time factor {elapsed / total:.2f}")


if __name__ == "__main__":
    run(main)
