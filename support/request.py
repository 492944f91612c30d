"""What the sample command is asked for: its flags, its output files, the audio it is given, and windows."""

import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

from support.audio import check_audio_path, load_audio
from support.cli import DTYPES, Config, option, say
from support.hub import make_config


@dataclass
class Request(Config):
    """What to make, and of what."""

    out: str = option("out.wav", "file to write (.wav, .flac or .ogg); several get numbers")
    model: str = option("toy", "toy, toy-ar, toy-hybrid, tunes, tunes-ar, a training run's folder, a checkpoint file, "
                               "or a published one: its name, facebook/magnet-small-10secs, or the folder of its files")
    codec: str = option(None, "the model's codec, where it is not at its old place")
    text_encoder: str = option(None, "the model's text encoder, where it is not at its old place")
    seconds: float = option(None, "length in all, longer than the training clips in windows (default: that of the "
                                  "training clips)", above=0, high=3600)
    overlap: float = option(None, "seconds of one window that the next continues (default: a third of it)", low=0)
    n: int = option(1, "variations of each prompt", low=1, high=10_000)
    only: tuple[int, ...] = option(None, "make only the clips of these numbers, counted from 1", low=1)
    seed: int = option(0, "of the random numbers; a clip's own stream follows from it and the clip's number", low=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "of the model; auto: what the device computes fastest", ("auto", *DTYPES))
    negative_prompt: str = option(None, "what not to play: replaces the null condition of the guidance")
    audio_prompt: str = option(None, "audio file to continue")
    inpaint: str = option(None, "audio file in which to play something else, --from S --to S")
    gap_start: float = option(None, "second at which the gap begins", low=0, flag="--from")
    gap_end: float = option(None, "second at which the gap ends", above=0, flag="--to")
    rescorer: str = option(None, "an autoregressive model, as --model, that rescores the ranking of spans")


Clip = namedtuple("Clip", "number prompt path")  # to make; number: from 1, its random numbers follow from seed and it


def plan_clips(request, prompts):
    """The clips to make: `n` of each prompt, in numbered files if there are several; or those that `only` names.
    ValueError or OSError, before anything is loaded, if they cannot be made or written."""
    gap = [x is not None for x in (request.inpaint, request.gap_start, request.gap_end)]
    if any(gap) and (not all(gap) or request.audio_prompt or request.seconds or request.gap_start >= request.gap_end):
        raise ValueError("--inpaint, --from and a later --to go together, without --audio-prompt and --seconds")
    out, count, clips = Path(request.out), len(prompts) * request.n, []
    for number in request.only or range(1, count + 1):
        if number > count and len(prompts) > 1:
            raise ValueError(f"--only {number}: there are {count} clips")
        prompt = prompts[(number - 1) // request.n] if len(prompts) > 1 else prompts[0]
        alone = count == 1 and request.only is None
        clips.append(Clip(number, prompt, out if alone else out.with_stem(f"{out.stem}-{number}")))
        check_audio_path(clips[-1].path)
    return clips


def say_settings(config, brought):
    """Print the settings that a model brings, a dictionary, which are used, and are not the defaults of `config`."""
    default, brought = vars(type(config)()), vars(make_config(type(config), brought, "model"))
    used = {name: value for name, value in vars(config).items() if brought[name] == value != default[name]}
    if used:
        texts = (f"{name.replace('_', '-')} {str(x).strip('()').replace(',', '')}" for name, x in used.items())
        say(f"settings of the model: {', '.join(texts)}")


def known_codes(request, codec, seconds, mask_id):
    """What is there before decoding: codes (1, K, T), masked where something is to be made, and the samples in all."""
    if request.inpaint is not None:
        wav = load_audio(request.inpaint, codec.sample_rate)
        codes, frame = codec.encode(wav[None]), torch.arange(math.ceil(wav.shape[1] / codec.hop_length))
        if request.gap_end > wav.shape[1] / codec.sample_rate + 0.005:
            raise ValueError(f"--to {request.gap_end:g}: {request.inpaint} has {wav.shape[1] / codec.sample_rate:g} s")
        gap = (frame >= math.floor(request.gap_start * codec.frame_rate + 1e-6)) & (
            frame < math.ceil(request.gap_end * codec.frame_rate - 1e-6))
        return codes.masked_fill(gap.to(codes.device), mask_id), wav.shape[1]
    n_samples = max(1, round(seconds * codec.sample_rate))
    codes = torch.full((1, codec.n_codebooks, math.ceil(n_samples / codec.hop_length)), mask_id)
    if request.audio_prompt is not None:
        wav = load_audio(request.audio_prompt, codec.sample_rate, max_seconds=seconds + 1)
        if wav.shape[1] >= n_samples:
            raise ValueError(f"--audio-prompt {request.audio_prompt} is not shorter than the {seconds:g} s to make")
        given = codec.encode(wav[None])
        codes[:, :, :given.shape[2]] = given[:, :, :codes.shape[2]]
    return codes, n_samples


def windows(given, seconds, overlap=None, frame_rate=1):
    """Windows of `seconds`, as the training clips are, that fill in what is not `given` (T,): slices of frames. Each
    begins `overlap` seconds (a third of a window, if None) before the first frame still open, so that it continues what
    is there; the last is moved back to end with the clip. A gap that fits is in the middle of its window."""
    overlap = seconds / 3 if overlap is None else overlap
    if not overlap < seconds:
        raise ValueError(f"--overlap must be less than the {seconds:g} s of a window, not {overlap:g}")
    size = math.ceil(round(seconds * frame_rate, 6))
    overlap = min(round(overlap * frame_rate), size - 1)
    given, slices = given.clone(), []
    while not given.all():
        first = int(given.int().argmin())
        gap = int((~given[first:]).int().cumprod(dim=0).sum())
        before = (size - gap) // 2 if first + gap < len(given) and overlap + gap <= size else overlap
        start = max(0, min(first - before, len(given) - size))
        slices.append(slice(start, start + size))
        given[slices[-1]] = True
    if len(slices) > 1:
        say(f"made in {len(slices)} windows of {seconds:g} s that overlap by {overlap / frame_rate:g} s")
    return slices
