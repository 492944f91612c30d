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
import math
import os
import sys
import textwrap
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from study import MODULES, ROOT, is_ours
from study.exercises import find, progress
from study.mine import begun, plant

sys.dont_write_bytecode = True
RANDOM = ("span_mask",)  # what differs from ours for one input may be right all the same


def drawn(mask):
    """A mask as text, one row a line: "x" is True, "." False."""
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def draw(value):
    """A value as a docstring would draw it, in a few lines."""
    if isinstance(value, torch.Tensor):
        if value.numel() <= 200 and value.dtype == torch.bool and value.dim() == 2:
            return "\n".join(drawn(value))
        has_range = value.numel() and value.dtype != torch.bool and value.isfinite().all()
        span = f", from {value.min().item():.4g} to {value.max().item():.4g}" if has_range else ""
        return str(value) if value.numel() <= 200 else f"{value.dtype} {tuple(value.shape)}{span}"
    if callable(value) or isinstance(value, torch.Generator | list) and len(str(value)) > 100:
        return f"a {type(value).__name__}"
    return textwrap.shorten(str(value), 300)


def block(label, text):
    """Lines under a label: `put in      n_frames = 10`."""
    return textwrap.indent(text, " " * 16).replace(" " * 16, f"    {label:12}", 1)


def my_line(error, folder):
    """An exception in words: the line of mine where it arose, or where ours stopped on what mine gave."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if folder and Path(frame.filename).parent == Path(folder)]
    where = (mine or [frame for frame in frames if is_ours(frame.filename)] or frames)[-1]
    return block("your line" if mine else "stopped in",
                 f"{Path(where.filename).name}, line {where.lineno}:  {linecache.getline(*where[:2]).strip()}\n"
                 f"{type(error).__name__}: {textwrap.shorten(str(error), 400)}")


def keep(value):
    """A copy that later changes do not reach; modules and functions stay what they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator().set_state(value.get_state())
    try:
        return copy.deepcopy(value) if isinstance(value, list | tuple | dict) else value
    except (TypeError, RuntimeError):
        return value


@dataclass
class Recorder:
    """Wraps mine so that its last 100 calls are kept: (arguments, what came out, what it raised)."""

    ours: object = None
    calls: list = field(default_factory=list)

    def wrap(self, mine, ours):
        self.ours = ours

        @functools.wraps(mine)
        def recorded(*args, **more):
            try:
                bound = inspect.signature(ours).bind(*args, **more).arguments
            except TypeError:
                bound = {}  # ours does not take these arguments: nothing to compare
            call = [{name: keep(value) for name, value in bound.items()}, None, None]
            self.calls = self.calls[-99:] + [call]
            try:
                result = mine(*args, **more)
            except Exception as error:
                call[2] = error
                raise
            call[1] = keep(result)
            return result

        return recorded

    def first_difference(self):
        """(arguments, what came out, what ours gives) of the first call where these differ, or None."""
        for arguments, out, _ in self.calls if self.ours and self.ours.__name__ not in RANDOM else ():
            try:
                wanted = self.ours(**{name: keep(value) for name, value in arguments.items()})
                torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
            except AssertionError:
                return arguments, out, wanted
            except Exception:
                continue  # what it was given lives no more, such as a model that a hook has changed


@dataclass
class Failure:
    """A claim that does not hold: its words, and the lines that explain it."""

    claim: str
    told: str
    is_reference: bool = False


def run_examples(function, examples, folder=None):
    """[Failure or None] for examples; a later one may go on with the names of an earlier one."""
    names, results = {}, []
    for module in (*MODULES, function.module):
        names |= vars(importlib.import_module(module))
    names |= {"drawn": drawn, "torch": torch, "F": torch.nn.functional, "math": math}
    for claim, code in examples:
        put, told = "", None
        for example in doctest.DocTestParser().get_examples(code):
            put, out = put + example.source, io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(example.source, "<example>", "single"), names)
            except Exception as error:
                told = my_line(error, folder)
                break
            if not doctest.OutputChecker().check_output(example.want, out.getvalue(), doctest.NORMALIZE_WHITESPACE):
                told = block("came out", out.getvalue().rstrip()) + "\n" + block("expected", example.want.rstrip())
                break
        results.append(Failure(claim, block("put in", put.rstrip()) + "\n" + told) if told else None)
    return results


class Collector:
    """A pytest plugin: which tests hold, and why the others do not, by the calls of mine in them."""

    def __init__(self, recorder, folder, function, tests):
        self.recorder, self.folder, self.name, self.tests = recorder, folder, function.node.name, tests
        self.results, self.broken = {}, None

    def pytest_runtest_setup(self, item):
        self.recorder.calls.clear()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        name = f"tests/{item.path.name}::{item.originalname}"
        if report.failed and not self.results.get(name):
            test, case = self.tests[name], getattr(item, "callspec", None)
            claim = test.name.removeprefix("test_").replace(self.name, "\0").replace("_", " ").replace("\0", self.name)
            self.results[name] = Failure(claim + (f"  [{case.id}]" if case else ""),
                                         self.tell(call.excinfo.value, test), test.is_reference)
        elif report.passed and report.when == "call":
            self.results.setdefault(name, None)

    def pytest_collectreport(self, report):
        self.broken = self.broken or (str(report.longrepr) if report.failed else None)

    def tell(self, error, test):
        """Why a test fails: an exception by its line; else the call that shows it, and what the test says."""
        lines = [block("", textwrap.fill(" ".join(test.docstring.split()), 96))] if test.docstring else []
        if test.is_reference:
            lines.append(block("", "(a reference: numbers that another program computed)"))
        if not isinstance(error, AssertionError) or any(raised is error for _, _, raised in self.recorder.calls):
            return "\n".join([*lines, my_line(error, self.folder)])
        message, is_said, _ = str(error).partition("\nassert ")
        if found := self.recorder.first_difference():
            arguments, out, wanted = found
            put = [f"{name} = " + draw(value).replace("\n", "\n" + " " * (len(name) + 3))
                   for name, value in arguments.items()]
            lines += [block("put in", "\n".join(put)), block("came out", draw(out)), block("expected", draw(wanted))]
        if is_said or not found:
            message = message.replace("Extra items in the left set:", "came out, and should not:").replace(
                "Extra items in the right set:", "never came out, and should:")
            lines.append(block("in short", "\n".join(message.splitlines()[:9])))
        return "\n".join(lines)


def run_claims(function, examples, recorder=None, folder=None, stop=False):
    """Run the claims about a function -> [Failure or None]; with `stop`, to the first that fails."""
    results = run_examples(function, examples, folder)
    if not function.tests or stop and any(results):
        return results
    tests = {test.id: test for test in sorted(function.tests, key=lambda test: test.is_reference)}
    collector, here = Collector(recorder or Recorder(), folder, function, tests), os.getcwd()
    os.chdir(ROOT)
    try:
        code = pytest.main([*tests, "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir",
                            str(ROOT), "-c", str(ROOT / "pyproject.toml"), *["-x"] * stop], [collector])
    finally:
        os.chdir(here)
    if code == 2 and not collector.broken:
        raise KeyboardInterrupt
    if code > 1:
        raise ValueError(f"the tests could not be run: {str(collector.broken)[-400:]}")
    return results + [collector.results[name] for name in tests if name in collector.results]


def check(exercise, folder):
    """Run an exercise's claims with mine in place of ours, print the first that fails, keep how many hold -> done?"""
    recorder, text = Recorder(), (Path(folder) / f"{exercise.name}.py").read_text(encoding="utf-8")
    restore = plant(folder, [exercise], recorder.wrap)
    try:
        results = run_claims(exercise.function, exercise.examples, recorder, Path(folder))
    finally:
        restore()
    failures = [failure for failure in results if failure]
    held = len(results) - len(failures)
    progress(folder, exercise.name, held=held, of=len(results), text=text)
    print(f"{exercise.name}: {held} of {len(results)} claims hold" + (
        f"; the first that does not:\n\n  {failures[0].claim}\n\n{failures[0].told}\n" if failures else "."))
    return not failures


def check_all(names, folder):
    """Check the exercises named, or all that are begun."""
    chosen = [find(name) for name in names] or begun(folder)
    if not chosen:
        raise ValueError(f"nothing is begun in {folder}: python -m study start cosine_schedule")
    return all([check(exercise, folder) for exercise in chosen])
