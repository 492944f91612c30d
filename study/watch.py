"""One decode as a page for the browser: every step as a picture and as a sound, in one file that needs no network.

    python -m study watch "a slow deep flute" --out decode.html      # the flags are those of sample.py
"""

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import soundfile

import sample
from encodec_wrap import load_codec
from model import load_model
from study import ROOT
from support.cli import Parser, add_flags, from_flags, pick_device, pick_dtype, say
from support.files import whole_file
from support.request import Request, known_codes, plan_clips
from t5_encoder import T5Encoder

SOUND_BYTES = 2_700_000  # of all sounds together, before they are written as text, which takes a third more


def told(step, config, K, T):
    """A step as the page wants it: numbers for the curves, who is hidden and how sure, of the one clip."""
    if "position" in step:  # from left to right: codebook k of frame f is written at position f + k + 1
        return {"position": step["position"], "rate": 1 - min(step["position"], T + K) / (T + K),
                "temperature": config.ar_temperature, "guidance": config.ar_guidance}
    stage, number = step["stage"], step["step"]
    steps = config.decoding_steps[min(stage, len(config.decoding_steps) - 1)]
    rate = sample.mask_rate(number, steps, config.schedule)
    return {"stage": stage, "step": number, "steps": steps, "rate": rate,
            "temperature": sample.annealed_temperature(number, steps, config.temperature),
            "guidance": sample.guidance_scale(rate, config.guidance_start, config.guidance_end),
            "hidden": "".join("x" if x else "." for x in step["hidden"][0].tolist()),
            "confidence": base64.b64encode(bytes((step["confidence"][0] * 255).round().int().tolist())).decode()}


def candidate(step, K):
    """The codes of a step that can be heard: (1, codebooks, frames), without a mask token."""
    if "stage" in step:
        return step["codes"][:, :step["stage"] + 1]  # later codebooks are still hidden
    return step["codes"][:, :, :max(step["position"] - K + 1, 0)]  # the frames of which all codebooks are written


def ogg(wav, sample_rate):
    """Audio (S,) -> the bytes of an OGG Vorbis file."""
    file, samples = io.BytesIO(), (wav / wav.abs().max().clamp(min=1)).cpu().numpy()
    with soundfile.SoundFile(file, "w", sample_rate, 1, format="OGG", subtype="VORBIS", compression_level=0.7) as out:
        for start in range(0, len(samples), 65_536):
            out.write(samples[start:start + 65_536])
    return file.getvalue()


def sounds(steps, codec, K):
    """{step: its sound}, and for each step the number of the one whose sound stands for it: all of them, or as many of
    them, evenly spaced back from the last, as fit."""
    heard, wanted = {}, [i for i, step in enumerate(steps) if candidate(step, K).numel()]
    for i in wanted[::-1][::math.ceil(len(wanted) / 60)][::-1]:  # from left to right there are many alike
        heard[i] = ogg(codec.decode(candidate(steps[i], K).clamp(max=codec.codebook_size - 1))[0, 0], codec.sample_rate)
    while sum(map(len, heard.values())) > SOUND_BYTES:
        heard = {i: heard[i] for i in [*heard][::-1][::2][::-1]}
    stands = [max((i for i in heard if i <= number), default=None) for number in range(len(steps))]
    return {i: "data:audio/ogg;base64," + base64.b64encode(data).decode() for i, data in heard.items()}, stands


def page(steps, config, codec, codes, prompt, title, mask_id):
    """The whole page as text."""
    K, T = codes.shape[1:]
    audio, stands = sounds(steps, codec, K)
    differs = {name: value for name, value in vars(config).items() if value != getattr(sample.SamplingConfig, name)}
    data = {"prompt": prompt, "title": title, "settings": differs, "K": K, "T": T, "frame_rate": codec.frame_rate,
            "given": "".join("x" if x else "." for x in (codes[0, 0] != mask_id).tolist()),
            "steps": [told(step, config, K, T) for step in steps], "audio": audio, "stands": stands}
    return (ROOT / "study/watch.html").read_text("utf-8").replace("/*DATA*/", json.dumps(data).replace("</", "<\\/"))


def watch(arguments, folder=None):
    """The command: decode one prompt and write its page."""
    parser = Parser(prog="python -m study watch", description="One decode as a page for the browser.")
    parser.add_argument("prompt", help='what to play; "" for no condition')
    parser.set_defaults(out="decode.html")
    add_flags(parser, Request, sample.SamplingConfig)
    args = parser.parse_args(arguments)
    request = from_flags(args, Request())
    if Path(request.out).suffix != ".html" or request.n > 1 or len(request.only or ()) > 1:
        raise ValueError(f"--out {request.out}: the page's name must end in .html, and --n and --only name one clip")
    clip, = plan_clips(replace(request, out=str(Path(request.out).with_suffix(".wav"))), [args.prompt])
    device = pick_device(request.device)
    dtype = pick_dtype(request.dtype, device)
    model, companions = load_model(request.model, device, dtype)
    config = from_flags(args, sample.SamplingConfig(**companions.sampling))
    codec = load_codec(request.codec or companions.codec, model.config.n_codebooks, device)
    encoder = T5Encoder.from_pretrained(request.text_encoder or companions.text_encoder)
    companions.check(codec, encoder)
    rescorer, needs = load_model(request.rescorer, device, dtype) if request.rescorer else (None, None)
    if needs:
        needs.check(codec, encoder, f"--rescorer {request.rescorer}")
    codes, _ = known_codes(request, codec, request.seconds or model.config.seconds, model.mask_id)
    if codes.shape[2] > math.ceil(model.config.seconds * codec.frame_rate):
        raise ValueError(f"watch shows one window: at most {model.config.seconds:g} s with this model")
    negative = None if request.negative_prompt is None else encoder.encode_text([request.negative_prompt])
    steps, streams = [], sample.clip_streams(request.seed, [clip.number])
    sample.generate(model, *encoder.encode_text([args.prompt]), codes, config, streams, negative, rescorer,
                    lambda **step: steps.append(step), codec.frame_rate)
    if not steps:
        raise ValueError("nothing is left to decode: all frames are given")
    text = page(steps, config, codec, codes, args.prompt, f"{request.model}, seed {request.seed}", model.mask_id)
    with whole_file(request.out) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    say(f"wrote {request.out}  {args.prompt}  ({len(steps)} steps, {len(text) / 1e6:.1f} MB; open it in a browser)")
