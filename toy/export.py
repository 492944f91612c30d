"""Shrink a training run to the one file that ships: config and averaged weights, in 8 bits each.

Sampling flags that are given are added to the model's own settings, which `sample.py` takes where it is told nothing
else; a run has those of what it began from.

The run's log goes beside it, and its validation is printed as a table: cross-entropy per codebook, in nats, mean over
the mask rates, and, for a hybrid, the next tokens.

    python -m toy.export runs/toy toy/weights/magnet.pt
"""

import csv
import shutil
from pathlib import Path

import torch

from sample import SamplingConfig
from support.cli import Parser, add_flags, from_flags, run, say
from support.files import located, portable, read_checkpoint, save_whole
from support.hub import make_config


def print_validation(log):
    """The validated steps of a log.csv, each codebook's values averaged over the mask rates."""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if any(row[name] for name in row if name.startswith("val_"))]
    codebooks = sorted({name.split("_")[1] for name in rows[0] if name.startswith("val_")}) if rows else []
    say("| steps | minutes |" + "".join(f" codebook {int(k) + 1} |" for k in codebooks))
    for row in rows:
        values = [[float(row[name]) for name in row if name.startswith(f"val_{k}_")] for k in codebooks]
        say(f"| {int(row['step']):,} | {float(row['seconds']) / 60:.0f} |"
            + "".join(f" {sum(v) / len(v):.2f} |" for v in values))


def quantized(state):
    """Matrices (rows, columns) in 8 bits, each row's largest weight being 127; all else in half precision.

    Gives ({name: int8 or float16}, {name: what the rows are to be multiplied by (rows, 1)}): see `load_strictly`.
    """
    scales = {name: tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
              for name, tensor in state.items() if tensor.dim() == 2}
    small = {name: (tensor / scales[name]).round().to(torch.int8) if name in scales else tensor.half()
             for name, tensor in state.items()}
    return small, scales


def main():
    parser = Parser(description="export a training run as a small model file")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    add_flags(parser, SamplingConfig)
    args = parser.parse_args()
    kept = ("config", "model_config", "codec", "text_encoder", "codec_id", "text_encoder_id", "step")
    content = read_checkpoint(args.run / "checkpoint.pt", (*kept, "ema"))
    small = portable(located({key: content[key] for key in kept}, args.run), args.out.parent)
    small["ema"], small["scales"] = quantized(content["ema"])
    default = vars(SamplingConfig())
    config = from_flags(args, make_config(SamplingConfig, content.get("sampling", {}), args.run))
    small["sampling"] = {k: v for k, v in vars(config).items() if v != default[k]}
    save_whole(small, args.out)
    log = args.run / "log.csv"
    if log.is_file():
        shutil.copyfile(log, args.out.with_suffix(".csv"))
        print_validation(log)
    say(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, step {content['step']}")


if __name__ == "__main__":
    run(main)
