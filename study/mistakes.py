"""The classic mistakes of `mistakes.md`, one change each: which claim catches it, and what it costs.

`python -m study mistakes` plants each in a process of its own and runs the claims about its function, to the first that
fails. `python -m study cost` lets the toy model play with it, with the flags of toy/evaluate.py. It keeps results
in runs/cost, those of other flags apart, so that it can be stopped and go on; `--write` puts them into study/README.md.
"""

import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import types
from typing import NamedTuple

import torch

from study import ROOT
from study.paper import functions, replaced
from support.cli import run, say

RIGHT, AGAIN, FOLDER = "the right code", "the right code, other random numbers", ROOT / "runs" / "cost"
DECODING = r"sample\.(?!rescored|decode_autoreg)|model\.MAGNeT\.forward|masking\.(cosine_schedule|mask_codes)"
FORK, PAGE = multiprocessing.get_context("fork"), ROOT / "study" / "README.md"


class Mistake(NamedTuple):
    """name, function in which it is made, the text that is replaced (once in it), by what, the idea in a sentence."""

    name: str
    function: str
    old: str
    new: str
    idea: str


def read_mistakes():
    """mistakes.md -> {name: Mistake}."""
    text, found = (ROOT / "study" / "mistakes.md").read_text(encoding="utf-8"), {}
    for name, function, idea, change in re.findall(
            r"^## (.+)\n\n`([\w.]+)`: (.+)\.\n\n```diff\n((?:[+-].*\n)+)```", text, re.MULTILINE):
        old, new = ("\n".join(line[1:] for line in change.splitlines() if line[0] == sign) for sign in "-+")
        found[name] = Mistake(name, function, old, new, idea)
    return found


def planted(mistake):
    """The text of the module with the mistake in it. ValueError if what it changes is not in the function once."""
    function = functions()[mistake.function]
    lines = (ROOT / f"{function.module}.py").read_text(encoding="utf-8").splitlines(keepends=True)
    first, last = function.node.body[bool(function.docstring)].lineno - 1, function.node.end_lineno
    body = "".join(lines[first:last])
    if body.count(mistake.old) != 1:
        raise ValueError(f"mistake {mistake.name!r}: {mistake.old!r} stands {body.count(mistake.old)} times in "
                         f"{mistake.function}; it must stand there once")
    return "".join([*lines[:first], body.replace(mistake.old, mistake.new), *lines[last:]])


def plant(mistake):
    """Import the module with the mistake in it, before anything else imports it."""
    name, text = mistake.function.partition(".")[0], planted(mistake)
    sys.modules[name] = module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    exec(compile(text, module.__file__, "exec"), vars(module))


def first_failure(mistake):
    """Plant a mistake and run its function's claims -> the first that does not hold, or None."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    plant(mistake)
    from study.check import run_claims  # which imports the modules
    failures = filter(None, run_claims(functions()[mistake.function], stop=True))
    return next((failure.claim for failure in failures), None)


def leave_signals():
    """Ctrl-C is for the parent, which ends these processes without a word of theirs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def mistakes(names, folder=None):
    """Plant the mistakes named, or all, two at a time; print which claim catches each -> exit code."""
    known, caught = read_mistakes(), 0
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no mistake {unknown[0]!r}; study/mistakes.md lists them")
    chosen = [known[name] for name in names or known]
    torch.set_num_threads(1)
    with FORK.Pool(2, leave_signals, maxtasksperchild=1) as pool:
        for mistake, claim in zip(chosen, pool.imap(first_failure, chosen), strict=True):
            caught += claim is not None
            say(f"{'caught' if claim else 'NOT CAUGHT'}  {mistake.name} ({mistake.function}): {mistake.idea}\n"
                f"        by: {claim or 'no claim'}")
    say(f"{caught} of {len(chosen)} mistakes caught")
    return int(caught < len(chosen))


def evaluate(mistake, flags):
    """Run toy/evaluate.py with the mistake in place, if there is one."""
    if mistake:
        plant(mistake)
    from toy import evaluate
    sys.argv = ["toy/evaluate.py", "--n", "100", "--swaps", "0", "--samples-only", *flags]
    run(evaluate.main)


def measure(name, path, flags):
    """Let toy/evaluate.py measure the code with one mistake in it, unless it has done so -> exit code, if it fails."""
    if not path.is_file():
        more = ["--json", f"{path}.new", *flags, *["--seed", "1000"] * (name == AGAIN)]
        process = FORK.Process(target=evaluate, args=(read_mistakes().get(name), more))
        process.start()
        process.join()
        return process.exitcode or os.replace(f"{path}.new", path)


def row(name, result, right):
    """A row of the table; the difference is that of the same clips played by the right code."""
    whole = len(right["adherence"]["model, seen"]) - 1  # the attributes; "overall" stands beside them
    shares, wanted = ([int(n) / whole for part in r["right"].values() for n in part] for r in (result, right))
    points = [100 * (a - b) for a, b in zip(shares, wanted, strict=True)]
    mean, reach = statistics.mean(points), 1.96 * statistics.stdev(points) / len(points) ** 0.5
    difference = f"{mean:+.1f} ({mean - reach:+.1f} to {mean + reach:+.1f})" if name != RIGHT else ""
    return (f"| {name} | {statistics.mean(shares):.1%} | {difference} | {result['frechet']['model']:.0f} | "
            f"{result['diversity']['samples of one prompt']:.1f} |")


def cost(flags, folder=None):
    """Measure what is not measured yet and print its row; --write also puts the table of all that is into the page."""
    flags, write = [flag for flag in flags if flag != "--write"], "--write" in flags
    kept = FOLDER / (re.sub(r"[^\w.-]+", "_", " ".join(flags)).strip("-") or "own settings")
    kept.mkdir(parents=True, exist_ok=True)
    names = [RIGHT, *(name for name, mistake in read_mistakes().items() if re.match(DECODING, mistake.function)), AGAIN]
    for name in names:
        if code := measure(name, kept / f"{name}.json", flags):
            return code
        results = {path.stem: json.loads(path.read_text("utf-8"))
                   for path in (kept / f"{name}.json" for name in names) if path.is_file()}
        rows = ["| code | attributes as asked | difference, in points (95%) | Frechet distance | diversity |",
                "|---|---|---|---|---|", *(row(name, result, results[RIGHT]) for name, result in results.items())]
        if write:
            PAGE.write_text(replaced(PAGE.read_text("utf-8"), "cost", "\n".join(rows)), "utf-8", newline="\n")
        say("\n".join([*rows[:2] * (name == RIGHT), row(name, results[name], results[RIGHT])]))
