"""What a mistake in decoding costs: the shipped model with it planted, by the judge of the toy world.

    python -m study cost [NAME ...]      # 100 prompts each; about a minute each on two cores
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from study.mistakes import find, repository_with
from support.cli import say

DECODING = (  # mistakes that change what the shipped model plays; "" is none
    "", "schedule a step ahead", "guidance backwards", "guidance by the step", "a text as null condition",
    "hot to the end", "a step too hot", "temperature after the nucleus", "nucleus too small", "the surest hidden",
    "fixed spans scored again", "weakest token of a span", "nothing is kept", "confidence without temperature",
    "later codebooks shown", "earlier codebooks hidden", "first stage restricted", "text mask as key mask")
MEASURE = """
import json
from sample import SamplingConfig
from model import load_model
from support.cli import pick_device
from toy.evaluate import evaluate
config = SamplingConfig(**load_model("toy")[1].sampling)
print(json.dumps(evaluate("toy", config, pick_device("cpu"), n=100, floors=False, losses=False, repeated=4)))
"""


def cost(names):
    """Print a row for each mistake: share of the attributes that are heard, Frechet distance, diversity."""
    say("| mistake | right, seen pairs | right, unseen pairs | Frechet distance | diversity |\n|---|---|---|---|---|")
    for name in names or DECODING:
        with tempfile.TemporaryDirectory(prefix="magnet mistake ") as folder:
            root = repository_with(find(name) if name else None, Path(folder) / "repository")
            ended = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, env={
                **os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"})
        if ended.returncode:
            raise ValueError(f"{name or 'without a mistake'}: could not be measured: {ended.stderr[-300:]}")
        result = json.loads(ended.stdout.splitlines()[-1])
        right = [f"{result['adherence'][f'model, {kind}']['overall']['share']:.1%}" for kind in ("seen", "unseen")]
        say(f"| {name or '(none)'} | {' | '.join(right)} | {result['frechet']['model']:.0f} | "
            f"{result['diversity']['samples of one prompt']:.1f} |")
