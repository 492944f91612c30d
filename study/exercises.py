"""The exercises of `exercises.md`: their templates, hints and examples, and how far you are."""

import ast
import json
import re
import textwrap
from typing import NamedTuple

from study import ROOT
from study.paper import Function, functions
from support.cli import say


class Exercise(NamedTuple):
    """name: also of the file in my/; examples: [claim, a doctest]; hints: three."""

    name: str
    function: Function
    place: str
    examples: list
    hints: list


def read_book():
    """exercises.md -> {name: Exercise}; those without hints are no exercises, but claims about a function."""
    book, text = {}, (ROOT / "study" / "exercises.md").read_text(encoding="utf-8")
    section = r"^## (\w+): ([\w.]+)(?: \[([^]]+)\])?\n\n(.*?)\n(?=\n##? |\Z)"
    for name, function, place, content in re.findall(section, text, re.MULTILINE | re.DOTALL):
        claims, hints, function = [], [], functions()[function]
        for block in content.split("\n\n"):
            if block.startswith("    "):
                claims[-1][1] += textwrap.dedent(block) + "\n\n"
            elif block.startswith("1. "):
                hints += [line[3:] for line in block.splitlines()]
            else:
                claims.append([block.rstrip(":"), ""])
        book[name] = Exercise(name, function, function.place or place, claims, hints)
    return book


BOOK = read_book()
EXERCISES = {name: exercise for name, exercise in BOOK.items() if exercise.hints}
EXAMPLES = {str(exercise.function): exercise.examples for exercise in BOOK.values()}


def chosen(names):
    """The exercises of these names."""
    if unknown := [name for name in names if name not in EXERCISES]:
        raise ValueError(f"there is no exercise {unknown[0]!r}; python -m study lists them")
    if not names:
        raise ValueError("which exercise? python -m study lists them")
    return [EXERCISES[name] for name in names]


def source(function):
    """The source of a function: its lines, without the indentation of a class."""
    lines = (ROOT / f"{function.module}.py").read_text(encoding="utf-8").splitlines()
    first = min([function.node.lineno, *(mark.lineno for mark in function.node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1:function.node.end_lineno]))


def template(exercise):
    """What `start` writes: what may be imported, the signature, the docstring with an example; no solution."""
    function, found = exercise.function, functions()
    owner = found.get(f"{function.module}.{function.name.rpartition('.')[0]}", function)  # of a method, its class
    used = {node.id for node in ast.walk(function.node) if isinstance(node, ast.Name)}
    docstring = function.docstring or owner.docstring
    if ">>>" not in docstring:
        claim, code = exercise.examples[0]
        docstring = f"{docstring}\n\n{claim}:\n\n{code}".strip()
    head = source(function).splitlines()[
        :function.node.body[0].lineno - function.node.lineno + len(function.node.decorator_list)]
    lines = [f'"""{exercise.name} [{exercise.place}]; then: python -m study check {exercise.name}"""', "",
             "import math", "import torch", "import torch.nn.functional as F",
             *(f"from {other.module} import {other.name}" for other in found.values()
               if other.name in used and other is not function)]
    if owner is not function:  # what `self` has
        init = textwrap.indent(source(found[f"{owner}.__init__"]), "#     ", lambda line: True)
        lines += ["", f"# A method of {owner}, whose __init__ is ours:", init]
    lines += ["", "", *head, '    """' + textwrap.indent(docstring, "    ").strip(), '    """',
              f'    raise NotImplementedError("{exercise.name} is yours to write")', ""]
    return "\n".join(lines)


def start(names, folder):
    """Write the templates; never over a file that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for exercise in chosen(names):
        text, path = template(exercise), folder / f"{exercise.name}.py"
        if path.exists():
            raise ValueError(f"{path} is there already, and stays as it is")
        path.write_text(text, encoding="utf-8", newline="\n")
        say(f"{path} is yours to fill in; then: python -m study check {exercise.name}")


def progress(folder, name=None, **news):
    """{name: what is known of it}, kept in the folder; of an exercise, `news` is added first."""
    path = folder / "progress.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name:
        known.setdefault(name, {}).update(news)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def state(exercise, folder):
    """How far you are with it, in words."""
    path, known = folder / f"{exercise.name}.py", progress(folder).get(exercise.name, {})
    if not path.is_file() or "of" not in known:
        return "begun" if path.is_file() else "not begun"
    words = "done" if known["held"] == known["of"] else f"{known['held']} of {known['of']} claims hold"
    return words if known["text"] == path.read_text(encoding="utf-8") else f"{words}, but changed since"


def hint(names, folder):
    """One more hint each time; after the last, the last again."""
    for exercise in chosen(names):
        given = min(progress(folder).get(exercise.name, {}).get("hints", 0), 2)
        say(textwrap.fill(f"Hint {given + 1} of 3: {exercise.hints[given]}", 100))
        progress(folder, exercise.name, hints=given + 1)


def show(names, folder):
    for exercise in chosen(names):
        say(source(exercise.function))


def listing(names, folder):
    say("The exercises, in reading order; study/README.md leads through them.\n")
    for number, exercise in enumerate(EXERCISES.values(), start=1):
        say(f"{number:3}  {exercise.name:26} {exercise.place:22} {state(exercise, folder)}")
