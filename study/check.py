"""The claims about one function, run with yours in place of ours; the first that fails, told in words.

First its examples (`exercises.md`), then its tests, those against numbers of other programs last. Every call of yours
is recorded: where ours gives something else for the same input, that call is shown.
"""

import contextlib
import copy
import doctest
import functools
import importlib
import inspect
import io
import linecache
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from study import MODULES, ROOT, is_ours
from study.exercises import EXAMPLES, chosen, progress
from study.mine import begun, plant
from support.cli import say

sys.dont_write_bytecode = True


def drawn(mask):
    """A mask as text, one row a line: "x" is True, "." False."""
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def draw(value):
    """A value as a docstring would draw it, in a few lines."""
    if not isinstance(value, torch.Tensor):
        return textwrap.shorten(str(value), 300)
    if value.numel() > 200:
        low, high = value.float().aminmax()
        return f"{value.dtype} {tuple(value.shape)}, from {low:.4g} to {high:.4g}"
    return "\n".join(drawn(value)) if value.dtype == torch.bool and value.dim() == 2 else str(value)


def block(label, text):
    """Lines under a label: `put in      n_frames = 10`."""
    return textwrap.indent(text, " " * 16).replace(" " * 16, f"    {label:12}", 1)


def lines_of_mine(error, folder):
    """The places in files of mine through which an exception went."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]


def stopped(error, folder):
    """An exception in words: the line of mine where it arose, or where ours, or an example, stopped on it."""
    mine, words = lines_of_mine(error, folder), f"{type(error).__name__}: {textwrap.shorten(str(error), 400)}"
    ours = [at for at in traceback.extract_tb(error.__traceback__) if is_ours(at.filename) and at.filename != __file__]
    for at in (mine or ours)[-1:]:
        words = f"{Path(at.filename).name}, line {at.lineno}:  {linecache.getline(*at[:2]).strip()}\n{words}"
    return block("your line" if mine else "stopped in" if ours else "stopped by", words)


def keep(value):
    """A copy that later changes do not reach; networks and functions stay what they are."""
    if isinstance(value, torch.nn.Module):
        return value
    try:
        return copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, RuntimeError):
        return value


class Failure(NamedTuple):
    """A claim that does not hold: its words, and the lines that explain it."""

    claim: str
    told: str


def run_examples(function, folder=None):
    """[Failure or None] for a function's examples; a later one may go on with the names of an earlier one."""
    modules = [importlib.import_module(module) for module in (*MODULES, function.module)]
    names = {name: value for module in modules for name, value in vars(module).items()}
    names, results = names | {"drawn": drawn}, []
    for claim, code in EXAMPLES.get(str(function), ()):
        put, told = "", None
        for example in doctest.DocTestParser().get_examples(code):
            put, out = put + example.source, io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(example.source, "<example>", "single"), names)
            except Exception as error:
                told = stopped(error, folder)
                break
            if not doctest.OutputChecker().check_output(example.want, out.getvalue(), doctest.NORMALIZE_WHITESPACE):
                told = block("came out", out.getvalue().rstrip()) + "\n" + block("expected", example.want.rstrip())
                break
        results.append(Failure(claim, block("put in", put.rstrip()) + "\n" + told) if told else None)
    return results


class Observer:
    """Sees the last 100 calls of mine, and, as a plugin of pytest, which tests hold: {id: Failure or None}."""

    def __init__(self, function, folder=None):
        self.name, self.folder, self.ours, self.calls, self.results = function.node.name, folder, None, [], {}
        self.tests = {test.id: test for test in sorted(function.tests, key=lambda test: test.is_reference)}

    def wrap(self, mine, ours):
        """Mine, with every call kept: what it was given, what came out."""
        self.ours = ours

        @functools.wraps(mine)
        def recorded(*args, **named):
            given = [keep(x) for x in args], {name: keep(x) for name, x in named.items()}
            result = mine(*args, **named)
            self.calls = [*self.calls[-99:], (given, keep(result))]
            return result
        return recorded

    def first_difference(self):
        """(arguments by name, what came out, what ours gives) of the first call where these differ, or None."""
        for (args, named), out in self.calls if self.name != "span_mask" else ():  # its random numbers may differ
            try:
                arguments = inspect.signature(self.ours).bind(*args, **named).arguments
                wanted = self.ours(**{name: keep(x) for name, x in arguments.items()})
                torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
            except AssertionError:
                return arguments, out, wanted
            except Exception:
                continue  # what it was given lives no more, such as a model that a hook has changed

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.when == "setup":
            self.calls.clear()
        name = f"tests/{item.path.name}::{item.originalname}"
        if report.failed and not self.results.get(name):
            test, case = self.tests[name], getattr(item, "callspec", None)
            claim = self.name.join(text.replace("_", " ") for text in test.name[len("test_"):].split(self.name))
            told = self.tell(call.excinfo.value, test)
            self.results[name] = Failure(claim + (f"  [{case.id}]" if case else ""), told)
        elif report.passed and report.when == "call":
            self.results.setdefault(name, None)

    def tell(self, error, test):
        """Why a test fails: an exception by its line; else the call that shows it, and what the test says."""
        lines = [block("", textwrap.fill(" ".join(test.docstring.split()), 96))] if test.docstring else []
        if test.is_reference:
            lines.append(block("", "(a reference: numbers that another program computed)"))
        if not isinstance(error, AssertionError) or lines_of_mine(error, self.folder):
            return "\n".join([*lines, stopped(error, self.folder)])
        message, is_said, _ = str(error).partition("\nassert ")
        if found := self.first_difference():
            arguments, out, wanted = found
            put = [f"{name} = " + draw(value).replace("\n", "\n" + " " * (len(name) + 3))
                   for name, value in arguments.items()]
            lines += [block("put in", "\n".join(put)), block("came out", draw(out)), block("expected", draw(wanted))]
        if is_said or not found:
            message = message.replace("Extra items in the left set:", "came out, and should not:").replace(
                "Extra items in the right set:", "never came out, and should:")
            lines.append(block("in short", "\n".join(message.splitlines()[:9])))
        return "\n".join(lines)


def run_claims(function, observer=None, stop=False):
    """Run the claims about a function -> [Failure or None]; with `stop`, to the first that fails."""
    observer = observer or Observer(function)
    results = run_examples(function, observer.folder)
    if not observer.tests or stop and any(results):
        return results
    flags = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "-c", str(ROOT / "pyproject.toml")]
    code = pytest.main([*(f"{ROOT}/{test}" for test in observer.tests), *flags, *["-x"] * stop], [observer])
    if code > 1:
        raise ValueError("the tests were stopped, or cannot be run: python -m pytest --mine my tests says why")
    return results + [observer.results[test] for test in observer.tests if test in observer.results]


def check(names, folder):
    """Run the claims of exercises, or of all that are begun; print the first that fails of each -> exit code."""
    exercises, failed = chosen(names) if names else begun(folder) or chosen(["cosine_schedule"]), 0
    if missing := [exercise.name for exercise in exercises if exercise not in begun(folder)]:
        raise ValueError(f"{missing[0]} is not begun in {folder}: python -m study start {missing[0]}")
    for exercise in exercises:
        observer, text = Observer(exercise.function, folder), (folder / f"{exercise.name}.py").read_text("utf-8")
        restore = plant(folder, [exercise], observer.wrap)
        try:
            results = run_claims(exercise.function, observer)
        finally:
            restore()
        failures = [failure for failure in results if failure]
        held, failed = len(results) - len(failures), failed + len(failures)
        progress(folder, exercise.name, held=held, of=len(results), text=text)
        say(f"{exercise.name}: {held} of {len(results)} claims hold" + (
            f"; the first that does not:\n\n  {failures[0].claim}\n\n{failures[0].told}\n" if failures else "."))
    return min(failed, 1)
