"""The paper map: every numbered part of the paper (`paper.md`), the functions that hold it, their tests, or why not.

A function's part stands in brackets at the head of its docstring. A test speaks of the function with which its name
begins, `test_<function>_...`, in the file named after its module, or of those that its marker names,
`@pytest.mark.of("function", ...)`. `--write` writes the README's two blocks, `--check` says what is stale or missing.
"""

import ast
import re
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from study import MODULES, ROOT
from support.cli import say


@dataclass
class Function:
    """A function, method or class of one of the six modules; `name` is dotted for a method."""

    module: str
    name: str
    node: ast.AST
    tests: list = field(default_factory=list)

    @property
    def docstring(self):
        return ast.get_docstring(self.node) or ""

    @property
    def place(self):
        """Where the paper has it, as the docstring says at its head: "Sec. 3.2, Fig. 8", or ""."""
        tag = re.match(r"\[((?:Sec|Eq|Fig|App|Table)\.? [^\]]+)\]", self.docstring)
        return tag[1] if tag else ""

    def __str__(self):
        return f"{self.module}.{self.name}"


class Test(NamedTuple):
    """A test function: its id for pytest, its docstring, whether it holds ours against numbers of other programs."""

    id: str
    name: str
    docstring: str
    is_reference: bool


@lru_cache
def functions():
    """{"module.name": Function} in the order of the source, with the tests that speak of each."""
    found = {}
    for module in MODULES:
        for node in ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body:
            for one in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
                if isinstance(one, ast.FunctionDef | ast.ClassDef):
                    name = one.name if one is node else f"{node.name}.{one.name}"
                    found[f"{module}.{name}"] = Function(module, name, one)
    for module in MODULES:
        for test, marked in tests_in(module):
            for function in subjects(found, module, test, marked):
                function.tests.append(test)
    for name, function in found.items():  # what is said of a module of the network is said of its forward pass
        if name.endswith(".forward"):
            function.tests[:0] = [test for test in found[name.removesuffix(".forward")].tests
                                  if test not in function.tests]
    return found


def tests_in(module):
    """The tests of a module's file, and the names in the marker `of` of each."""
    path = ROOT / "tests" / f"test_{module}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [mark for mark in node.decorator_list if "mark.of(" in ast.unparse(mark)]
            is_reference = bool(re.search(r"\bDATA\b|golden|_tiny\b|published\(", ast.unparse([node.args, *node.body])))
            yield (Test(f"tests/{path.name}::{node.name}", node.name, ast.get_docstring(node) or "", is_reference),
                   [arg.value for mark in marks for arg in mark.args])


def subjects(found, module, test, marked):
    """The functions that a test speaks of: those of its marker, else the one whose name is the longest beginning."""
    if marked:
        names = [name if name in found else f"{module}.{name}" for name in marked]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{test.id}: its marker names {missing[0]}, which is no function")
        return [found[name] for name in names]
    known = {re.sub(r"[._]", "", name).lower(): one  # of a method that several classes have, the last is meant
             for one in found.values() if one.module == module for name in (one.name, one.node.name)}
    beginnings = accumulate(test.name.split("_")[1:])
    return [known[name] for name in beginnings if name in known][-1:]


def parts():
    """{part: (what it says, where it is if it is no function)}."""
    rows = (ROOT / "study" / "paper.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| ")][1:]
    return {part: (words, reason) for part, words, reason in rows}


def by_part(found):
    """{part: its functions}, from the tags in docstrings."""
    table = {part: [] for part in parts()}
    for function in found.values():
        for part in re.split(r"[,;] *", function.place) if function.place else ():
            table.setdefault(part, []).append(function)
    return table


def tests_of(tagged, found):
    """The tests of functions; of a class also those of its methods."""
    same = [other for function in tagged for name, other in found.items() if f"{name}.".startswith(f"{function}.")]
    return list({test.id: test for other in same for test in other.tests}.values())


def faults(found):
    """What is wrong with the tags: one line each."""
    lines, known = [], parts()
    for part, tagged in by_part(found).items():
        if part not in known:
            lines += [f"{one}: its docstring's [{part}] is no part of the paper (study/paper.md)" for one in tagged]
        elif bool(tagged) == bool(known[part][1]):
            lines.append(f"{part}: study/paper.md says why it is not here if, and only if, no docstring has this tag")
    return lines + [f"{function}: has the tag [{function.place}] and no test, named or marked as study/paper.py says"
                    for function in found.values() if function.place and not tests_of([function], found)]


def table(found):
    """The README's table: one row a part, with the first four functions and the first test."""
    rows = ["| paper | function | test |", "|---|---|---|"]
    for part, tagged in by_part(found).items():
        words, reason = parts()[part]
        own = tuple(f"test_{function.node.name.lower()}_" for function in tagged)
        tests = sorted(tests_of(tagged, found), key=lambda test: (test.is_reference, not test.name.startswith(own)))
        names = ", ".join(f"`{function}`" for function in tagged[:4]) + ", ..." * (len(tagged) > 4)
        rows.append(f"| {part}: {words} | {names or reason} | {f'`{tests[0].name}`' if tests else ''} |")
    return "\n".join(rows)


def deviations(found):
    """The README's list: every `Deviation:` of the six modules, to the end of its line or paragraph, with its place."""
    lines = []
    for module in MODULES:
        source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
        for match in re.finditer(r'(#[^\n]*)?Deviation:((?(1)[^\n]*|.*?(?=\n\s*\n|""")))', source, re.DOTALL):
            number = source.count("\n", 0, match.start(2)) + 1
            inside = [f for f in found.values() if f.module == module and f.node.lineno <= number <= f.node.end_lineno]
            lines.append(f"- `{inside[-1] if inside else f'{module}.py'}`: {' '.join(match[2].split())}")
    return "\n".join(textwrap.fill(line, 140, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def replaced(text, name, block):
    """A page with its block `name` made new."""
    text, n = re.subn(rf"(<!-- {name}: .*?-->\n).*?(\n<!-- end -->)", lambda match: match[1] + block + match[2], text,
                      flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"the page wants one block <!-- {name}: ... --> to <!-- end -->")
    return text


def written(text, found):
    """The README with its two blocks made new."""
    return replaced(replaced(text, "paper map", table(found)), "deviations", deviations(found))


def paper_map(flags, folder=None):
    """Print the map; or write the README's blocks; or check them. ValueError has one line for each fault."""
    found, readme = functions(), ROOT / "README.md"
    if wrong := faults(found):
        raise ValueError("\n".join(wrong))
    text = readme.read_text(encoding="utf-8")
    if "--write" in flags:
        readme.write_text(written(text, found), encoding="utf-8", newline="\n")
    elif "--check" in flags:
        if written(text, found) != text:
            raise ValueError("README.md: its paper map or list of deviations is stale: python -m study map --write")
    else:
        for part, tagged in by_part(found).items():
            say(f"\n{part}: {' - '.join(filter(None, parts()[part]))}")
            for function in tagged:
                say("\n        ".join([f"    {function}  ({function.module}.py, line {function.node.lineno})",
                                       *(test.id for test in tests_of([function], found))]))
