"""What the source says about itself: functions, the paper's places in their docstrings, and the tests of each.

Read with `ast`; nothing is imported. A test speaks of the function with which its name begins, `test_<function>_...`,
in the file named after its module, or of those that its marker `@pytest.mark.of("function", ...)` names.
"""

import ast
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from study import MODULES, ROOT

TAG = re.compile(r"\[((?:Sec|Eq|Fig|App|Table)\.? [^\]]+)\]")


@dataclass
class Function:
    """A function, method or class of one of the six modules; `name` is dotted for a method."""

    module: str
    name: str
    node: ast.AST
    docstring: str
    tests: list = field(default_factory=list)

    @property
    def place(self):
        """Where the paper has it, as the docstring says at its head: "Sec. 3.2, Fig. 8", or ""."""
        tag = TAG.match(self.docstring)
        return tag[1] if tag else ""

    def __str__(self):
        return f"{self.module}.{self.name}"


class Test(NamedTuple):
    """A test function: its id for pytest, its docstring, whether it holds ours against numbers of other programs."""

    id: str
    name: str
    docstring: str
    is_reference: bool


def snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@lru_cache
def functions(root=ROOT):
    """{"module.name": Function} in the order of the source, with the tests that speak of each."""
    found = {}
    for module in MODULES:
        tree = ast.parse((root / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                members = node.body if isinstance(node, ast.ClassDef) else []
                for one in (node, *(m for m in members if isinstance(m, ast.FunctionDef))):
                    name = one.name if one is node else f"{node.name}.{one.name}"
                    found[f"{module}.{name}"] = Function(module, name, one, ast.get_docstring(one) or "")
    for module in MODULES:
        for test, marked in tests_in(root, module):
            for function in subjects(found, module, test, marked):
                function.tests.append(test)
    for name, function in found.items():  # what is said of a module of the network is said of its forward pass
        if name.endswith(".forward"):
            function.tests[:0] = [test for test in found[name.removesuffix(".forward")].tests
                                  if test not in function.tests]
    return found


def tests_in(root, module):
    """The tests of a module's file, and the names in the marker `of` of each."""
    path = root / "tests" / f"test_{module}.py"
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [mark for mark in node.decorator_list if getattr(getattr(mark, "func", 0), "attr", "") == "of"]
            is_reference = re.search(r"\bDATA\b|golden|_tiny\b|published\(", "\n".join(
                lines[node.lineno - 1:node.end_lineno])) is not None
            yield (Test(f"tests/{path.name}::{node.name}", node.name, ast.get_docstring(node) or "", is_reference),
                   [arg.value for mark in marks for arg in mark.args])


def subjects(found, module, test, marked):
    """The functions that a test speaks of: those of its marker, else the one whose name is the longest beginning."""
    if marked:
        names = [name if name in found else f"{module}.{name}" for name in marked]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{test.id}: its marker names {missing[0]}, which is no function")
        return [found[name] for name in names]
    best = {}
    for function in found.values():
        owner, _, method = function.name.rpartition(".")
        for name in {snake(function.name.replace(".", "_")), snake(method)} if owner else {snake(function.name)}:
            if f"{test.name}_".startswith(f"test_{name}_") and function.module == module:
                best[len(name)] = function  # of a method name that several classes have, the last class is meant
    return [best[max(best)]] if best else []
