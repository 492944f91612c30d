"""The claims about one function, run with yours in place of ours; the first that fails, told in words.

First its examples (`exercises.md`, the docstring's own), then its tests, those against numbers of other programs last.
Every call of yours is recorded: where ours gives something else for the same input, that call is shown.
"""

import copy
import doctest
import functools
import importlib
import inspect
import linecache
import os
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from study import MODULES, ROOT
from study.code import functions
from study.exercises import EXERCISES, digest, progress
from study.mine import begun, plant

sys.dont_write_bytecode = True
RANDOM = ("span_mask",)  # whose output for an input may differ from ours and be right all the same


# ------------------------------------------------------------------------------------------------------------- drawing

def drawn(mask):
    """A mask as text, one row a line: "x" is True, "." False."""
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def draw(value):
    """A value as a docstring would draw it, in a few lines."""
    if isinstance(value, torch.Tensor):
        shape, small = tuple(value.shape), value.numel() <= 200
        if small and value.dtype == torch.bool and value.dim() == 2:
            return "\n".join(drawn(value))
        if small and value.dim() <= 3:
            text = str(value.detach().int() if value.dtype == torch.bool else value.detach()).replace("tensor(", "")
            return text.rstrip(")").replace(",\n" + " " * 7, ",\n") + f"   {shape}"
        has_range = value.numel() and value.dtype != torch.bool and value.isfinite().all()
        span = f", from {value.min().item():.4g} to {value.max().item():.4g}" if has_range else ""
        return f"{str(value.dtype).replace('torch.', '')} {shape}{span}"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, torch.Generator | list) and not (isinstance(value, list) and len(str(value)) < 100):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__}" if callable(value) else textwrap.shorten(str(value), 300)


def block(label, text, width=12):
    """Lines under a label: `put in      n_frames = 10`."""
    return textwrap.indent(text, " " * (width + 4)).replace(" " * (width + 4), f"    {label:{width}}", 1)


# ----------------------------------------------------------------------------------------------------- recorded calls

@dataclass
class Call:
    """One call of mine: its arguments before it ran, what it gave or raised, and what ours gives (None: not asked)."""

    arguments: dict
    out: object = None
    error: Exception = None


@dataclass
class Recorder:
    """Wraps mine so that every call is kept; `ours` is asked later, and only of calls of a claim that failed."""

    ours: object = None
    calls: list = field(default_factory=list)

    def wrap(self, exercise, mine, ours):
        self.ours = ours

        @functools.wraps(mine)
        def recorded(*args, **more):
            call = Call({})
            try:
                bound = inspect.signature(ours).bind(*args, **more)
                call.arguments = {name: keep(value) for name, value in bound.arguments.items()}
            except TypeError:
                pass  # ours would not take these arguments: nothing to show
            self.calls = self.calls[-99:] + [call]
            try:
                call.out = keep(result := mine(*args, **more))
                return result
            except Exception as error:
                call.error = error
                raise

        return recorded

    def first_difference(self):
        """(the first call for which ours gives something else, what ours gives), or the last call and None."""
        for call in self.calls:
            try:
                with torch.random.fork_rng(devices=[]):
                    wanted = self.ours(**{name: keep(value) for name, value in call.arguments.items()})
            except Exception:
                continue
            if not same(call.out, wanted):
                return call, wanted
        return (self.calls[-1] if self.calls else None), None


def keep(value):
    """A copy that later changes do not reach; modules and functions stay what they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator().set_state(value.get_state())
    if isinstance(value, list | tuple | dict):
        try:
            return copy.deepcopy(value)
        except Exception:
            return value
    return value


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.double(), b.double(), 1e-4, 1e-5, True)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return True


# ------------------------------------------------------------------------------------------------------- running claims

@dataclass
class Failure:
    """A claim that does not hold: its words, and the lines that explain it."""

    claim: str
    told: str
    is_reference: bool = False


class Examples(doctest.DocTestRunner):
    """Runs one claim's example; `failed` is (example, what came out, exception information)."""

    def __init__(self):
        super().__init__(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        self.failed = None

    def report_failure(self, out, test, example, got):
        self.failed = self.failed or (example, got, None)

    def report_unexpected_exception(self, out, test, example, info):
        self.failed = self.failed or (example, "", info)


def run_examples(function, examples, folder=None):
    """[(claim, Failure or None)] for the claims of an exercise that are examples."""
    names = {}
    for module in (*MODULES, function.module):
        names.update(vars(importlib.import_module(module)))
    names |= {"drawn": drawn, "torch": torch, "F": torch.nn.functional, "math": importlib.import_module("math")}
    results = []
    for claim, code in examples:
        runner = Examples()
        test = doctest.DocTestParser().get_doctest(code, names, claim, None, 0)
        runner.run(test, out=lambda text: None, clear_globs=False)
        names |= test.globs  # a later claim may go on with the names of an earlier one
        failure = None
        if runner.failed:
            example, got, info = runner.failed
            before = "".join(e.source for e in test.examples[:test.examples.index(example) + 1])
            told = [block("put in", before.rstrip())]
            told += [my_line(info[1], folder)] if info else [
                block("came out", got.rstrip()), block("expected", example.want.rstrip())]
            failure = Failure(claim, "\n".join(told))
        results.append((claim, failure))
    return results


def my_line(error, folder):
    """An exception in words: the line of mine where it arose, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if folder and Path(frame.filename).parent == Path(folder)]
    where = mine[-1] if mine else next((f for f in reversed(frames) if str(ROOT) in f.filename), frames[-1])
    who = "your line" if mine else "stopped in"
    line = linecache.getline(where.filename, where.lineno).strip()
    return block(who, f"{Path(where.filename).name}, line {where.lineno}:  {line}\n"
                      f"{type(error).__name__}: {textwrap.shorten(str(error), 400)}")


class Collector:
    """A pytest plugin: counts claims, and explains the first that fails by the calls of mine in it."""

    def __init__(self, recorder, folder, tests):
        self.recorder, self.folder, self.tests = recorder, folder, tests
        self.results, self.broken = {}, None

    def pytest_runtest_setup(self, item):
        self.recorder.calls.clear()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        name = f"tests/{item.path.name}::{item.originalname}"
        if report.failed and not self.results.get(name):
            test = self.tests[name]
            self.results[name] = Failure(words(test, item), self.tell(call.excinfo, test), test.is_reference)
        elif report.passed and report.when == "call":
            self.results.setdefault(name, None)

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = self.broken or str(report.longrepr)

    def tell(self, info, test):
        """Why a test fails: an exception of mine by its line; else in words, and the call that shows it."""
        lines, error = [], info.value
        if test.docstring:
            lines.append(block("", textwrap.fill(" ".join(test.docstring.split()), 96)))
        if test.is_reference:
            lines.append(block("", "(a reference: numbers that another program computed)"))
        if not isinstance(error, AssertionError) or any(call.error is error for call in self.recorder.calls):
            return "\n".join([*lines, my_line(error, self.folder)])
        call, wanted = self.recorder.first_difference()
        if call and call.arguments and self.recorder.ours.__name__ not in RANDOM and wanted is not None:
            put = "\n".join(f"{name} = {indented(draw(value), name)}" for name, value in call.arguments.items())
            lines += [block("put in", put), block("came out", draw(call.out)), block("expected", draw(wanted))]
        message, _, rest = str(error).partition("\nassert ")
        if rest:
            lines.append(block("in short", message))
        elif wanted is None or not call or self.recorder.ours.__name__ in RANDOM:
            text = re.sub(r"Extra items in the left set:", "came out, and should not:", str(error))
            text = re.sub(r"Extra items in the right set:", "never came out, and should:", text)
            lines.append(block("asserted", "\n".join(text.splitlines()[:9])))
        return "\n".join(lines)


def indented(text, name):
    return text.replace("\n", "\n" + " " * (len(name) + 3))


def words(test, item=None):
    """A test's name as a sentence: test_span_mask_hides_... -> "span_mask hides ...", and its case."""
    subject = max((f.node.name for f in functions().values() if f"{test.name}_".startswith(f"test_{f.node.name}_")),
                  key=len, default="")
    text = f"{subject} {test.name[len(subject) + 6 if subject else 5:].replace('_', ' ')}".strip()
    case = getattr(item, "callspec", None)
    return text + (f"  [{case.id}]" if case else "")


def run_claims(function, examples, recorder=None, folder=None, stop=False):
    """Run the claims about a function -> [(claim, Failure or None)]; with `stop`, to the first that fails."""
    results = run_examples(function, examples, folder)
    if stop and any(failure for _, failure in results):
        return results
    tests = {test.id: test for test in sorted(function.tests, key=lambda test: test.is_reference)}
    collector = Collector(recorder or Recorder(), folder, tests)
    if tests:
        arguments = [*tests, "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:doctest", "-o", "addopts=",
                     "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *(["-x"] if stop else [])]
        here = os.getcwd()
        os.chdir(ROOT)
        try:
            code = pytest.main(arguments, plugins=[collector])
        finally:
            os.chdir(here)
        if collector.broken or code not in (0, 1):
            raise KeyboardInterrupt if code == 2 and not collector.broken else ValueError(
                f"the tests could not be run: {(collector.broken or 'pytest ended with ' + str(code))[-400:]}")
        results += [(words(tests[name]), failure) for name, failure in sorted(
            collector.results.items(), key=lambda pair: list(tests).index(pair[0]))]
    return results


def check(exercise, folder):
    """Run an exercise's claims with mine in place of ours, print the first that fails, keep how many hold -> done?"""
    recorder = Recorder()
    restore = plant(folder, [exercise], recorder.wrap)
    try:
        results = run_claims(exercise.function, exercise.examples, recorder, Path(folder))
    finally:
        restore()
    held = sum(failure is None for _, failure in results)
    progress(folder, exercise, held=held, of=len(results), digest=digest(exercise, folder))
    print(f"{exercise.name}: {held} of {len(results)} claims hold" + ("." if held == len(results) else
                                                                      "; the first that does not:"))
    first = next((failure for _, failure in results if failure), None)
    if first:
        print(f"\n  {first.claim}\n\n{first.told}\n")
    return first is None


def check_all(names, folder):
    """Check the exercises named, or all that are begun."""
    chosen = [EXERCISES[name] for name in names] or begun(folder)
    if not chosen:
        raise ValueError(f"nothing is begun in {folder}: python -m study start {next(iter(EXERCISES))}")
    return all([check(exercise, folder) for exercise in chosen])
