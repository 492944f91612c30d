"""A MAGNeT of full size with random weights, laid out like a published one, run end to end: memory and seconds.

    python -m experiments.full_size /tmp/magnet --steps 20 10 10 10

Writes what the hub's repositories hold (state_dict.bin, compression_state_dict.bin, encodec_32khz/, t5-base/) into a
folder, runs `sample.py --model` on it in a process of its own, and prints that process's peak memory and its seconds.
The music is noise, the work is that of the published model of the same shape.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import hub
from encodec_wrap import Codec, CodecConfig, hugging_face_name
from model import PUBLISHED_NAMES, MAGNeT, ModelConfig
from t5_encoder import PUBLISHED, T5Encoder, Tokenizer

ROOT = Path(__file__).parent.parent
SPIECE = ROOT / "tests" / "data" / "t5_spiece.model"
SIZES = {"small": dict(dim=1024, n_heads=16, n_layers=24), "medium": dict(dim=1536, n_heads=24, n_layers=48)}
CODEC_32KHZ = CodecConfig(
    sample_rate=32_000, ratios=(8, 5, 4, 4), codebook_size=2048, dimension=128, n_filters=64, lstm=2)
CODEC_16KHZ = replace(CODEC_32KHZ, sample_rate=16_000, ratios=(8, 5, 4, 2))
CODEC_SETTINGS = """\
sample_rate: {c.sample_rate}
encodec:
  renormalize: false
seanet:
  dimension: {c.dimension}
  n_filters: {c.n_filters}
  ratios: {ratios}
  lstm: {c.lstm}
  causal: false
  true_skip: true
  pad_mode: {c.pad_mode}
rvq:
  n_q: {c.n_codebooks}
  bins: {c.codebook_size}
"""
SETTINGS = """\
solver: magnet
sample_rate: {sample_rate}
channels: 1
lm_model: transformer_lm_magnet
dataset:
  segment_duration: {c.seconds:g}
transformer_lm:
  dim: {c.dim}
  num_heads: {c.n_heads}
  num_layers: {c.n_layers}
  hidden_scale: {c.ffn_mult}
  n_q: {c.n_codebooks}
  card: {c.card}
  subcodes_context: {c.context}
masking:
  span_len: {c.span_len}
conditioners:
  description:
    model: t5
    t5:
      name: t5-base
"""


def published_state(model, dtype):
    """The weights of a `MAGNeT` under AudioCraft's names: the inverse of `model.from_published_names`."""
    published, state = {}, model.state_dict()
    for name, tensor in state.items():
        if name.endswith("cross_attn.kv.weight"):
            continue
        if name.endswith("cross_attn.q.weight"):
            tensor = torch.cat([tensor, state[name.replace("attn.q", "attn.kv")]])
            name = name.replace("cross_attn.q.weight", "cross_attention.in_proj_weight")
        for theirs, ours in PUBLISHED_NAMES:
            name = name.replace(ours, theirs)
        published[name] = tensor.to(dtype)
    return published


def write_model(model, folder, dtype=torch.float16, sample_rate=32_000):
    """Write state_dict.bin, and the pointer to the 32 kHz codec."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS.format(c=model.config, sample_rate=sample_rate)
    torch.save({"best_state": published_state(model, dtype), "xp.cfg": settings, "version": "1.3.0", "exported": True},
               folder / hub.MODEL_FILES[0])
    torch.save({"pretrained": hub.CODEC}, folder / hub.MODEL_FILES[1])


def write_codec(codec, folder):
    """Write a 32 kHz codec in the layout of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    c, state = codec.config, codec.model.state_dict()
    torch.save({hugging_face_name(name): tensor for name, tensor in state.items()}, folder / hub.WEIGHTS[1])
    (folder / "config.json").write_text(json.dumps({
        "sampling_rate": c.sample_rate, "upsampling_ratios": c.ratios, "num_lstm_layers": c.lstm,
        "use_causal_conv": c.causal, "use_conv_shortcut": not c.true_skip, "pad_mode": c.pad_mode, "normalize": False}))


def write_audiocraft_codec(codec, folder):
    """Write a codec in AudioCraft's own layout, as the sound-effect models have one."""
    settings = CODEC_SETTINGS.format(c=codec.config, ratios=list(codec.config.ratios))
    torch.save({"best_state": codec.model.state_dict(), "xp.cfg": settings}, folder / hub.MODEL_FILES[1])


def write_text_encoder(config, folder):
    """Write a random T5 with T5's own tokenizer."""
    encoder = T5Encoder(config)
    encoder.tokenizer = Tokenizer(SPIECE)
    encoder.save_pretrained(folder)


def write_all(args, folder):
    """Write a model with random weights, its codec and its text encoder."""
    torch.manual_seed(0)
    model = MAGNeT(ModelConfig(card=2048, text_dim=768, seconds=args.clip, **SIZES[args.size]))
    if args.sounds:
        write_model(model, folder, sample_rate=CODEC_16KHZ.sample_rate)
        write_audiocraft_codec(Codec.from_config(CODEC_16KHZ), folder)
    else:
        write_model(model, folder)
        write_codec(Codec.from_config(CODEC_32KHZ), folder / "encodec_32khz")
    write_text_encoder(PUBLISHED["t5-base"], folder / "t5-base")


def main():
    parser = argparse.ArgumentParser(description="peak memory and seconds of a full-size model with random weights")
    parser.add_argument("folder", type=Path, help="where to write the weights (1.6 GB for small); they are used again")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--clip", type=float, default=10.0, help="length of the training clips in seconds: 10 or 30")
    parser.add_argument("--sounds", action="store_true", help="a sound-effect model: its codec runs at 16 kHz")
    parser.add_argument("--steps", type=int, nargs=4, default=[20, 10, 10, 10], help="decoding steps")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    folder = args.folder / f"{'audio-' * args.sounds}magnet-{args.size}-{args.clip:g}secs"
    if not (folder / "t5-base").is_dir():
        write_all(args, folder)
        # Begin anew: the peak memory of a child counts what its parent held when it was started.
        os.execv(sys.executable, [sys.executable, "-m", "experiments.full_size", *sys.argv[1:]])
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "sample.py", "80s driving pop with heavy drums", "--model", folder,
                    "--out", folder / "out.wav", "--dtype", args.dtype, "--device", "cpu",
                    "--decoding-steps", *map(str, args.steps)], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory {peak / 2**30:.2f} GiB, {time.perf_counter() - start:.0f} s from start to end, of which "
          f"{used.ru_utime + used.ru_stime:.0f} CPU seconds on {args.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
