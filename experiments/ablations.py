"""The paper's ablations at toy scale: every cell is trained, played and judged, and becomes a row of a CSV file.

`spans`     span length x restricted context, a training for each               [Tab. 2]
`guidance`  constant 1, 3 and 10 against annealing 10 -> 1                      [Sec. 3.3]
`steps`     decoding steps of the first codebook
`sampling`  temperature and nucleus
`order`     nonoverlap against stride1 spans, hidden by max or prod scores
`length`    frames per span in decoding, whatever the model was trained with

`spans` trains models of its own, from nothing or, with `--train-flags "--init-from toy"`, from the same weights; the
others decode with --model, and with its own settings but for those in question. A cell that the CSV holds is not
computed again, and a training that was cut goes on, so the same command finishes what was stopped.

    python -m experiments.ablations spans --steps 18000
    python -m experiments.ablations guidance steps sampling order length --model toy
    python -m experiments.ablations guidance steps sampling order length --data tunes --model runs/tunes --n 200
    python -m experiments.plots                                              # draws what the CSV files hold
"""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch

from model import load_model
from sample import SamplingConfig
from support.cli import Parser, pick_device, pick_dtype, run
from support.files import fingerprint, whole_file
from toy import WORLDS, world_of
from toy.evaluate import evaluate

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (100.0, -1.0)  # of `spans`: ms, negative: everywhere
SPANS_SAMPLING = SamplingConfig(guidance_start=3.0, guidance_end=1.0)  # weaker than the paper's, as suits toy models
KINDS = ("seen", "unseen")
SAMPLING_CELLS = {
    "guidance": {f"{a:g} -> {b:g}" if a != b else f"constant {a:g}": {"guidance_start": a, "guidance_end": b}
                 for a, b in ((1.0, 1.0), (3.0, 3.0), (10.0, 10.0), (3.0, 1.0), (10.0, 1.0))},
    "steps": {str(n): {"decoding_steps": (n, 10)} for n in (1, 2, 5, 10, 20, 40)},
    "sampling": {f"T {t:g}, p {p:g}": {"temperature": t, "top_p": p}
                 for t, p in ((0.0, 0.9), (1.0, 0.9), (3.0, 0.9), (5.0, 0.9), (3.0, 0.5), (3.0, 1.0))},
    "order": {f"{arrangement}, {scoring}": {"span_arrangement": arrangement, "span_scoring": scoring}
              for arrangement in ("nonoverlap", "stride1") for scoring in ("max", "prod")},
    "length": {f"span {n}": {"span_len": n} for n in (1, 2, 3, 5, 10)},
}
OWN = {"guidance": "3 -> 1", "steps": "20", "sampling": "T 3, p 0.9", "order": "nonoverlap, max",  # of what ships
       "length": "span 3", "spans": "span 3, context restricted"}


def columns_of(data):
    """The columns of a results file of the world `data`."""
    shares = [f"{name}_{kind}" for kind in KINDS for name in world_of(data).ATTRIBUTES]
    return ("experiment", "setting", "seed", "overall_seen", "overall_unseen", *shares, "frechet", "diversity",
            "val_1", "val_2", "val_3", "val_4", "n_prompts", "seconds", "model", "dtype", "steps", "hardware",
            "command", "right")  # the last: how many attributes are right in each clip, as one digit each


def file_of(experiment, data):
    """The name of the file that holds the results of an experiment: those of the toy world have no prefix."""
    return f"{'' if data == 'toy' else f'{data}-'}{experiment}.csv"


def hardware(device):
    """What computes, in words."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores, " \
        f"{platform.machine()}, torch {torch.__version__}"


def read_rows(path):
    """The rows of a CSV file of results; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_row(path, row, columns):
    """Write a results file anew with one row more, whole or not at all."""
    rows = [*read_rows(path), {name: f"{value:.4g}" if isinstance(value, float) else value
                               for name, value in row.items()}]
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def is_done(path, cell):
    """Whether a results file holds a cell: the same experiment, setting, seed, and all else that is named."""
    return any(all(row[name] == str(value) for name, value in cell.items()) for row in read_rows(path))


def measure(model, config, seed, args, span_len=None):
    """Play and judge: the measured columns of a row."""
    start = time.time()
    result = evaluate(model, config, pick_device(args.device), args.n, floors=False, losses=False, seed=seed,
                      cache=args.cache, repeated=2, data=args.data, judge=args.judge, span_len=span_len)
    shares = {kind: {name: case["share"] for name, case in result["adherence"][f"model, {kind}"].items()}
              for kind in KINDS}
    return {**{f"{name}_{kind}": share for kind in shares for name, share in shares[kind].items()},
            "frechet": result["frechet"]["model"], "diversity": result["diversity"]["samples of one prompt"],
            "seconds": time.time() - start, "right": "".join(result["right"][f"model, {kind}"] for kind in KINDS)}


def train_run(out, flags, args):
    """Train into folder `out`, from its checkpoint if it has one; gives the command."""
    command = [sys.executable, "train.py", "--out", str(out), "--device", args.device, "--cache", str(args.cache),
               "--sample-every", "0", "--val-every", str(args.steps), *flags]
    resumed = ["--resume"] if (out / "checkpoint.pt").is_file() else []
    subprocess.run([*command, *resumed], cwd=Path(__file__).parents[1], check=True)
    return shlex.join(["python", *command[1:]])


def last_losses(out):
    """Validation cross-entropy per codebook at the end of a run, mean over the mask rates."""
    row = read_rows(out / "log.csv")[-1]
    return {f"val_{k + 1}": mean(float(row[name]) for name in row if name.startswith(f"val_{k}_")) for k in range(4)}


def ablate_spans(args, common):
    path = RESULTS / file_of("spans", args.data)
    for seed, span_len, context in product(args.seeds, args.span_lengths, CONTEXTS):
        setting = f"span {span_len}, context {'restricted' if context >= 0 else 'full'}"
        cell = {"experiment": "spans", "setting": setting, "seed": seed, "n_prompts": args.n // 2 * 2,
                "steps": args.steps, "model": args.train_flags or "from nothing"}
        if is_done(path, cell):
            continue
        name = f"span{span_len}-context{context:g}-seed{seed}-steps{args.steps}-{args.data} {args.train_flags}"
        out = args.out / re.sub(r"[^\w.-]+", "_", name.strip())  # another for other flags
        flags = [*("--data", args.data, "--codec", args.data, "--text-encoder", args.data) * (args.data != "toy"),
                 "--span-len", span_len, "--context-ms", context, "--seed", seed, "--steps", args.steps,
                 *shlex.split(args.train_flags)]
        command = train_run(out, [str(flag) for flag in flags], args)
        add_row(path, {**cell, **last_losses(out), **measure(out, SPANS_SAMPLING, seed, args), **common,
                       "command": command}, columns_of(args.data))


def name_with_weights(name):
    """A model's name and the fingerprint of its weights, so that one trained anew is another."""
    return f"{name} {fingerprint(load_model(name)[0])[:8]}"


def ablate_sampling(experiment, args, common, measured):
    """measured: {(settings, frames per span, seed): columns} of the cells so far, since the model's own settings are a
    cell of several experiments."""
    path, (first, companions) = RESULTS / file_of(experiment, args.data), load_model(args.model)
    own, model = SamplingConfig(**companions.sampling), name_with_weights(args.model)
    for seed, (setting, changes) in product(args.seeds, SAMPLING_CELLS[experiment].items()):
        if args.settings and setting not in args.settings:
            continue
        cell = {"experiment": experiment, "setting": setting, "seed": seed, "n_prompts": args.n // 2 * 2,
                "model": model}
        if is_done(path, cell):
            continue
        span_len = changes.get("span_len", first.config.span_len)
        config = replace(own, **{name: value for name, value in changes.items() if name != "span_len"})
        if (key := (str(config), span_len, seed)) not in measured:
            measured[key] = measure(args.model, config, seed, args, span_len)
        add_row(path, {**cell, **measured[key], **common}, columns_of(args.data))


def main():
    parser = Parser(description="the paper's ablations at toy scale")
    parser.add_argument("experiments", nargs="+", choices=("spans", *SAMPLING_CELLS))
    parser.add_argument("--data", choices=WORLDS, default="toy", help="the world that is played and judged")
    parser.add_argument("--judge", help="a judge's file; default: the one that ships for the world")
    parser.add_argument("--model", default="toy", help="what all but `spans` decode with")
    parser.add_argument("--steps", type=int, default=18_000, help="training steps of each model of `spans`")
    parser.add_argument("--span-lengths", type=int, nargs="+", default=[1, 2, 3, 5, 10], help="frames, of `spans`")
    parser.add_argument("--train-flags", default="", help="more flags for train.py, as one string")
    parser.add_argument("--settings", nargs="+", choices=[cell for cells in SAMPLING_CELLS.values() for cell in cells],
                        help="only these cells, as the results name them; not of `spans`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--n", type=int, default=100, help="prompts per cell, half of them unseen pairs")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the trained models")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.n < 4:
        raise ValueError(f"--n must be at least 4, not {args.n}")
    device = pick_device(args.device)
    common = {"hardware": hardware(device), "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
              "command": shlex.join(["python", "-m", "experiments.ablations", *sys.argv[1:]])}
    measured = {}
    for experiment in args.experiments:
        if experiment == "spans":
            ablate_spans(args, common)
        else:
            ablate_sampling(experiment, args, common, measured)


if __name__ == "__main__":
    run(main)
