"""From a text prompt to a WAV file: the command line, and what goes beyond single clips.

A model decodes as it was trained to: in parallel (`decoding.py`), from left to right, or both (`autoregressive.py`).
Longer pieces are made in windows as long as the training clips, and gaps are filled in sight of what is around them.

    python sample.py "a slow deep flute plays a rising melody, with drums" --out flute.wav
    python sample.py "80s driving pop with heavy drums" --model facebook/magnet-small-10secs --out pop.wav
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from autoregressive import generate_autoregressive, generate_hybrid
from cli import DTYPES, Parser, add_flags, check_same, from_flags, identities, pick_device, pick_dtype, run
from decoding import SamplingConfig, fit_steps, generate
from encodec_wrap import check_audio_path, load_audio, load_codec, save_audio
from model import load_model
from t5_encoder import T5Encoder

BATCH = 16  # clips that are decoded together


def check_kind(model, has_gap, rescored):
    """ValueError if the model is asked for what only decoding in parallel can do."""
    if has_gap and model.config.objective != "magnet":
        raise ValueError("only a MAGNeT can fill in a gap (--inpaint); this model's objective is "
                         f"{model.config.objective}")
    if rescored and model.config.objective == "ar":
        raise ValueError("only parallel decoding can be rescored (--rescorer); this model's objective is ar")


def generate_as_trained(model, text, text_mask, n_frames, config, audio_prompt=None, generator=None, on_step=None,
                        given=None, negative=None, frame_rate=50.0, **rescorer):
    """Generate codes (B, K, T) as the model was trained to: in parallel, from left to right, or both.

    See `decoding.generate` for the arguments (rescorer: its last two); frame_rate: the codec's.
    """
    clip = (model, text, text_mask, n_frames)
    if model.config.objective == "magnet":
        return generate(*clip, config, audio_prompt, generator, on_step, given, negative, **rescorer)
    check_kind(model, given is not None and given.int().diff().gt(0).any(), rescorer.get("rescorer_weight"))
    if given is not None:
        audio_prompt = audio_prompt[:, :, :int(given.sum())]
    more = (audio_prompt, generator, on_step, negative)
    if model.config.objective == "hybrid":
        return generate_hybrid(*clip, config.hybrid_seconds, config, *more, **rescorer, frame_rate=frame_rate)
    return generate_autoregressive(*clip, config.ar_guidance, config.ar_top_k, config.ar_temperature, config.greedy,
                                   *more)


def windows(given, size, overlap):
    """Where to put windows of `size` frames that fill in what is not `given` (T,): a list of first frames.

    Each begins `overlap` frames before the first frame still open, so that it continues what is there; the last is
    moved back to end with the clip. A gap that fits is put in the middle of its window, in sight of both sides.
    overlap < size.

    >>> windows(torch.zeros(25, dtype=torch.bool), 10, 4)
    [0, 6, 12, 15]
    >>> windows((torch.arange(25) < 12) | (torch.arange(25) >= 16), 10, 4)
    [9]
    """
    given, starts = given.clone(), []
    while not given.all():
        first = int(given.int().argmin())
        gap = int((~given[first:]).int().cumprod(dim=0).sum())
        before = (size - gap) // 2 if first + gap < len(given) and overlap + gap <= size else overlap
        starts.append(max(0, min(first - before, len(given) - size)))
        given[starts[-1]:starts[-1] + size] = True
    return starts


@torch.inference_mode()
def generate_windows(model, text, text_mask, codes, given, size, overlap, config=None, generator=None, on_step=None,
                     **more):
    """Fill in the frames of `codes` (B, K, T) that are not `given` (T,), in windows as long as the training clips.

    The end of one window is the audio prompt of the next; a gap is filled in sight of what is around it. The other
    arguments are those of `generate_as_trained`. Deviation: the paper generates single clips.
    """
    codes, given = codes.clone(), given.clone()
    for start in windows(given, size, overlap):
        part = slice(start, start + size)
        known = codes[:, :, part]
        codes[:, :, part] = generate_as_trained(model, text, text_mask, known.shape[2], config or SamplingConfig(),
                                                known, generator, on_step, given[part], **more)
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
    parser.add_argument("--model", default="toy", help="toy, toy-ar, toy-hybrid, a training run's folder, "
                        "a checkpoint file, or a published model: its name such as facebook/magnet-small-10secs, or "
                        "the folder of its files")
    parser.add_argument("--seconds", type=float, help="length in all (default: that of the training clips); "
                        "what is longer than those is generated in windows")
    parser.add_argument("--overlap", type=float, help="how many seconds of one window the next continues "
                        "(default: a third of a training clip)")
    parser.add_argument("--n", type=int, default=1, help="variations of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES),
                        help="of the model; auto: what the device computes fastest")
    parser.add_argument("--negative-prompt", help="what not to play: replaces the null condition of the guidance")
    parser.add_argument("--audio-prompt", type=Path, help="audio file to continue")
    parser.add_argument("--inpaint", type=Path, help="audio file in which to play something else, --from S --to S")
    parser.add_argument("--from", dest="gap_start", type=float, metavar="S", help="second at which the gap begins")
    parser.add_argument("--to", dest="gap_end", type=float, metavar="S", help="second at which the gap ends")
    parser.add_argument("--rescorer", help="another model, as --model, whose opinion counts when spans are ranked")
    parser.add_argument("--rescorer-weight", type=float, default=0.5, help="of its opinion, 0 to 1 (default: 0.5)")
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
    for path in filter(None, (args.inpaint, args.audio_prompt)):
        if not path.is_file():
            raise ValueError(f"{path}: no such audio file")
    if not 0 <= args.rescorer_weight <= 1:
        raise ValueError(f"--rescorer-weight must be between 0 and 1, not {args.rescorer_weight:g}")


def load_all(args, device):
    """The model with its own sampling settings, codec and text encoder that the flags ask for."""
    model, names = load_model(args.model, device, pick_dtype(args.dtype, device))
    check_kind(model, args.inpaint, args.rescorer and args.rescorer_weight)
    config = from_flags(parse_args(names.get("sampling")), SamplingConfig)  # once more, on the model's defaults
    config = fit_steps(config, model.config.n_codebooks)
    codec = load_codec(names["codec"], model.config.n_codebooks, device)
    if codec.codebook_size < model.config.card:
        raise ValueError(f"{names['codec']} has {codec.codebook_size} codes per codebook, {args.model} wants "
                         f"{model.config.card}")
    encoder = T5Encoder.from_pretrained(names["text_encoder"])
    check_same(names, codec, encoder)
    rescorer = load_rescorer(args.rescorer, args.rescorer_weight, codec, encoder, device, args.dtype)
    return model, config, codec, encoder, rescorer


def load_rescorer(name, weight, codec, encoder, device, dtype="auto"):
    """The arguments of `generate` for the rescorer called `name`, or None; ValueError if it reads other codes or texts
    than those of codec and text encoder."""
    if name is None or weight == 0:
        return {}
    rescorer, names = load_model(name, device, pick_dtype(dtype, device))
    K = rescorer.config.n_codebooks
    if "codec_id" not in names:  # a published model does not say which weights those are
        names |= identities(load_codec(names["codec"], K, device), T5Encoder.from_pretrained(names["text_encoder"]))
    mine = identities(codec, encoder)
    if K != codec.n_codebooks or any(names[key] != mine[key] for key in mine):
        raise ValueError(f"--rescorer {name}: has another codec or text encoder than --model")
    return {"rescorer": rescorer, "rescorer_weight": weight}


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
    size = math.ceil(round(clip * codec.sample_rate) / codec.hop_length)
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
    model, config, codec, encoder, rescorer = load_all(args, device)
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
    with tqdm(total=n_steps if model.config.objective == "magnet" else None, unit="step") as bar:
        for text, text_mask, negative in batches:
            codes = generate_windows(model, text, text_mask, known.expand(len(text), -1, -1), given, size, overlap,
                                     config, generator, lambda **_: bar.update(), negative=negative,
                                     frame_rate=codec.frame_rate, **rescorer)
            for row in codes:
                save_audio(next(written), codec.decode(row[None])[..., :samples], codec.sample_rate)
    elapsed = time.perf_counter() - start
    for path, prompt in zip(paths, prompts, strict=True):
        print(f"wrote {path}  {prompt}")
    total = samples / codec.sample_rate * len(prompts)
    print(f"{elapsed:.1f} s on {device} for {total:g} s of audio: real-time factor {elapsed / total:.2f}")


if __name__ == "__main__":
    run(main)
