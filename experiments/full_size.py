"""A model of full size with random weights, laid out like a published one, run end to end: memory and seconds.

    python -m experiments.full_size /tmp/magnet --steps 20 10 10 10
    python -m experiments.full_size /tmp/magnet --train="--train-blocks 4 --checkpoint-blocks"

Writes what the hub's repositories hold (state_dict.bin, compression_state_dict.bin, encodec_32khz/, t5-base/) into a
folder, runs `sample.py --model` on it in a process of its own, or fine-tunes it there for two steps of one clip, and
prints that process's peak memory and its seconds. The music is noise, the work is that of the published model of the
same shape.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch

import encodec_wrap
from encodec_wrap import CODEC_FILE, REPOSITORY, Codec, CodecConfig
from experiments.export import write_audiocraft_codec, write_model
from model import MAGNeT, ModelConfig
from sample import SamplingConfig
from support.cli import say
from support.files import rename, save_whole
from t5_encoder import T5Config, T5Encoder
from toy.train_text import save_pretrained

ROOT = Path(__file__).parent.parent
SPIECE = ROOT / "tests" / "data" / "t5_spiece.model"
SIZES = {"small": dict(dim=1024, n_heads=16, n_layers=24), "medium": dict(dim=1536, n_heads=24, n_layers=48)}
T5 = {"t5-base": T5Config(32128, 768, 64, 3072, 12, 12), "t5-large": T5Config(32128, 1024, 64, 4096, 24, 16)}
CODEC_32KHZ = CodecConfig(
    sample_rate=32_000, ratios=(8, 5, 4, 4), codebook_size=2048, dimension=128, n_filters=64, lstm=2)
CODEC_16KHZ = replace(CODEC_32KHZ, sample_rate=16_000, ratios=(8, 5, 4, 2))


def write_codec(codec, folder):
    """Write a 32 kHz codec in the layout of Hugging Face."""
    c, state = codec.config, codec.model.state_dict()
    save_whole({rename(name, encodec_wrap.TENSOR_NAMES): tensor for name, tensor in state.items()},
               folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({
        "sampling_rate": c.sample_rate, "upsampling_ratios": c.ratios, "num_lstm_layers": c.lstm,
        "use_causal_conv": c.causal, "use_conv_shortcut": not c.true_skip, "pad_mode": c.pad_mode, "normalize": False}))


def write_all(args, folder):
    """Write a model with random weights, its codec and its text encoder, with T5's own tokenizer."""
    torch.manual_seed(0)
    text_encoder = "t5-large" if args.sounds else "t5-base"
    shape = SIZES[args.size] | ({"objective": "ar", "context": -1} if args.autoregressive else {})
    model = MAGNeT(ModelConfig(card=2048, text_dim=T5[text_encoder].d_model, seconds=args.clip, **shape))
    codec = Codec(CODEC_16KHZ if args.sounds else CODEC_32KHZ)
    sampling = SamplingConfig(decoding_steps=(60, 10) if args.clip >= 30 else (20, 10))
    if args.sounds:
        sampling = replace(sampling, temperature=3.5, top_p=0.8, guidance_start=20.0)
    write_model(model, folder, text_encoder, sampling, codec.sample_rate, codec.frame_rate)
    if args.sounds:
        write_audiocraft_codec(codec, folder)
    else:
        save_whole({"pretrained": REPOSITORY}, folder / CODEC_FILE)
        write_codec(codec, folder / "encodec_32khz")
    save_pretrained(T5Encoder(T5[text_encoder], SPIECE), folder / text_encoder)


def write_clip(folder, seconds):
    """Write a clip of noise with a caption, a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * 32_000))
    soundfile.write(folder / "noise.wav", noise, 32_000)
    (folder / "noise.txt").write_text("80s driving pop with heavy drums")


def main():
    parser = argparse.ArgumentParser(description="peak memory and seconds of a full-size model with random weights")
    parser.add_argument("folder", type=Path, help="where to write the weights (1.6 GB for small); they are used again")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--clip", type=float, default=10.0, choices=(10.0, 30.0), help="seconds of a training clip")
    parser.add_argument("--sounds", action="store_true", help="a sound-effect model: codec at 16 kHz, t5-large")
    parser.add_argument("--autoregressive", action="store_true", help="a MusicGen")
    parser.add_argument("--seconds", type=float, help="length to make (default: that of the training clips)")
    parser.add_argument("--steps", type=int, nargs=4, default=[20, 10, 10, 10], help="decoding steps")
    parser.add_argument("--train", help="fine-tune in place of sampling, with these flags of train.py")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    kind = "musicgen" if args.autoregressive else f"{'audio-' * args.sounds}magnet"
    folder = args.folder / f"{kind}-{args.size}-{args.clip:g}secs"
    if not any(folder.glob("t5-*/pytorch_model.bin")):
        write_all(args, folder)
        # Begin anew: the peak memory of a child counts what its parent held when it was started.
        os.execv(sys.executable, [sys.executable, "-m", "experiments.full_size", *sys.argv[1:]])
    command = [ROOT / "sample.py", "80s driving pop with heavy drums", "--model", folder, "--out", folder / "out.wav",
               "--decoding-steps", *map(str, args.steps), "--seconds", str(args.seconds or args.clip)]
    if args.train is not None:
        write_clip(folder / "data", args.clip)
        shutil.rmtree(folder / "run", ignore_errors=True)
        command = [ROOT / "train.py", "--init-from", folder, "--data", folder / "data", "--out", folder / "run",
                   "--cache", folder / "cache", *"--batch-size 1 --steps 2 --sample-every 0".split(),
                   *shlex.split(args.train)]
    start = time.perf_counter()
    subprocess.run([sys.executable, *command, "--dtype", args.dtype, "--device", "cpu"], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    say(f"peak memory {peak / 2**30:.2f} GiB, {time.perf_counter() - start:.0f} s from start to end, of which "
        f"{used.ru_utime + used.ru_stime:.0f} CPU seconds on {args.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
