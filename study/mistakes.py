"""The classic mistakes of `mistakes.md`: one change each, which the claims about its function must catch.

`python -m study mistakes` plants each in a copy of the repository, in a temporary folder, and runs the claims about the
function in which it stands: its examples first, then its tests, to the first that fails.
"""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from study import ROOT, is_ours
from study.code import functions
from support.cli import say


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


def planted(mistake, root):
    """The text of the file with the mistake in it. ValueError if the line it changes is not there, or not once."""
    function = functions(root)[mistake.function]
    path = root / f"{function.module}.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    first, last = function.node.body[bool(function.docstring)].lineno - 1, function.node.end_lineno
    body = "".join(lines[first:last])
    if body.count(mistake.old) != 1:
        raise ValueError(f"mistake {mistake.name!r}: {mistake.old!r} stands {body.count(mistake.old)} times in "
                         f"{mistake.function}; it must stand there once")
    return path, "".join(lines[:first]) + body.replace(mistake.old, mistake.new) + "".join(lines[last:])


def copy_with(mistake, folder):
    """A copy of the repository inside `folder`, with the mistake in it if there is one -> where it is."""
    root = Path(folder).resolve() / "repository"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "my", "runs", "cache"))
    if mistake:
        path, text = planted(mistake, root)
        path.write_text(text, encoding="utf-8")
    return root


def try_one(mistake, inside):
    """Plant a mistake in a copy and run its function's claims -> (the first that fails, or None; is it a reference)."""
    with tempfile.TemporaryDirectory(dir=inside) as folder:
        root = copy_with(mistake, folder)
        for name, module in list(sys.modules.items()):
            if is_ours(getattr(module, "__file__", "")):
                del sys.modules[name]
        sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        os.chdir(root)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        from study import check, code, exercises  # those of the copy
        function = code.functions()[mistake.function]
        results = check.run_claims(function, exercises.examples_of(function), stop=True)
        os.chdir(ROOT)
        return next(((f.claim, f.is_reference) for f in results if f), (None, False))


def leave_signals():
    """Ctrl-C is for the parent, which ends these processes without a word of theirs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def plant_all(names, processes=2):
    """Plant the mistakes named, or all, two at a time; print which claim catches each -> exit code."""
    known = read_mistakes()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no mistake {unknown[0]!r}; study/mistakes.md lists them")
    chosen = [known[name] for name in names or known]
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    import torch

    import train  # noqa: F401  (what is imported before the fork need not be imported by each)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    start, missed, references = time.perf_counter(), [], 0
    with (tempfile.TemporaryDirectory(prefix="magnet mistakes ") as inside,  # gone also after Ctrl-C
          multiprocessing.get_context(kind).Pool(processes, leave_signals, maxtasksperchild=1) as pool):
        results = pool.imap(partial(try_one, inside=inside), chosen, chunksize=1)
        for mistake, (claim, is_reference) in zip(chosen, results, strict=True):
            missed += [mistake.name] if claim is None else []
            references += is_reference
            say(f"{'caught' if claim else 'NOT CAUGHT'}  {mistake.name} ({mistake.function}): {mistake.idea}"
                + f"\n        {'by the reference' if is_reference else 'by'}: {claim}" * (claim is not None))
        pool.close()
        pool.join()
    say(f"{len(chosen) - len(missed)} of {len(chosen)} mistakes caught in {time.perf_counter() - start:.0f} s, "
        f"{references} of them by a reference only")
    return 1 if missed else 0
