"""What the mistakes of decoding cost: each is planted in a copy, where the toy model plays and is judged.

    python -m study cost --decoding-steps 10 2       # the flags are those of sample.py's decoding, and --n prompts

Each result is kept in runs/cost and not measured again, so the command can be stopped and goes on where it was. In the
end it writes the table of study/README.md, between two comments.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from model import load_model
from sample import SamplingConfig
from study import ROOT
from study.mistakes import copy_with, read_mistakes
from study.paper import replaced
from support.cli import Parser, add_flags, from_flags, pick_device, run, say
from support.files import whole_file
from toy.evaluate import evaluate

RIGHT, AGAIN, FOLDER = "the right code", "the right code, other random numbers", ROOT / "runs" / "cost"
DECODING = (  # the first are measured first
    "the surest hidden", "guidance backwards", "random ranking", "guidance never falls", "hot to the end",
    "temperature after the nucleus", "fixed spans scored again", "tokens ranked, not spans", "sine schedule",
    "linear schedule", "never restricted", "first stage restricted", "a text as null condition",
    "later codebooks shown", "guidance by the step", "earlier codebooks hidden", "nothing is kept",
    "confidence without temperature", "weakest token of a span", "schedule a step ahead", "rounded up",
    "nucleus too small", "a step too hot")


def measure(name, arguments):
    """What `toy.evaluate` says of the code with one mistake in it, in a process of its own; kept in a file."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix="magnet cost ") as inside:
            root = copy_with(read_mistakes().get(name), inside)
            seed = ["--seed", "1000"] if name == AGAIN else []
            subprocess.run([sys.executable, "-m", "study.cost", path, *arguments, *seed], cwd=root, check=True,
                           env={**os.environ, "PYTHONPATH": str(root)})
    return json.loads(path.read_text(encoding="utf-8"))


def row(name, result, right):
    """A row of the table: attributes played as asked and how many points fewer than by the right code, in the same
    clips; Frechet distance; distance between the samples of one prompt."""
    shares, wanted = (torch.tensor([int(n) for part in r["right"].values() for n in part]) / 5 for r in (result, right))
    lost = 100 * (shares - wanted)
    reach = 1.96 * lost.std() / len(lost) ** 0.5
    points = f"{lost.mean():+.1f} ({lost.mean() - reach:+.1f} to {lost.mean() + reach:+.1f})" if name != RIGHT else ""
    return (f"| {name} | {shares.mean():.1%} | {points} | {result['frechet']['model']:.0f} | "
            f"{result['diversity']['samples of one prompt']:.1f} |")


def cost(arguments):
    """Measure what is not measured yet, and write the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in (RIGHT, *DECODING, AGAIN):
        results[name] = measure(name, arguments)
        if [results[name][key] for key in ("sampling", "n_prompts")] != [
                results[RIGHT][key] for key in ("sampling", "n_prompts")]:
            raise ValueError(f"{FOLDER / name}.json was measured with other flags: remove it, or give them again")
        say(row(name, results[name], results[RIGHT]))
    rows = ["| mistake | attributes as asked | against the right code, points (95%) | Frechet distance | diversity |",
            "|---|---|---|---|---|", *(row(name, result, results[RIGHT]) for name, result in results.items())]
    page = ROOT / "study" / "README.md"
    page.write_text(replaced(page.read_text(encoding="utf-8"), "cost", "\n".join(rows)), encoding="utf-8", newline="\n")


def main():
    """Evaluate the code beside this file, with a mistake in it or not."""
    parser = Parser(prog="python -m study cost")
    parser.add_argument("file", type=Path)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser, SamplingConfig)
    args = parser.parse_args()
    config = from_flags(args, SamplingConfig(**load_model("toy")[1].sampling))
    result = evaluate("toy", config, pick_device("cpu"), args.n, floors=False, losses=False, seed=args.seed)
    with whole_file(args.file) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
