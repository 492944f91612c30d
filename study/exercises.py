"""The exercises of `exercises.md`: their templates, hints and examples, and how far you are."""

import ast
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from study import MODULES, ROOT
from study.code import Function, functions


@dataclass
class Exercise:
    """name: also of the file in my/; examples: (claim, lines of a doctest); hints: three. In reading order."""

    name: str
    function: Function
    place: str
    examples: list
    hints: list


def read_book():
    """exercises.md -> {name: Exercise}; those without hints are no exercises, but claims about a function."""
    book, text = {}, (ROOT / "study" / "exercises.md").read_text(encoding="utf-8")
    for section in re.split(r"^##? ", text, flags=re.MULTILINE):
        head = re.match(r"(\w+): ([\w.]+)(?: \[(.+)\])?\n", section)
        if not head:
            continue
        claims, hints, function = [], [], functions()[head[2]]
        for block in section[head.end():].strip("\n").split("\n\n"):
            if block.startswith("    "):
                claims[-1][1].append(textwrap.dedent(block) + "\n")
            elif block.startswith("1. "):
                hints += [line[3:] for line in block.splitlines()]
            else:
                claims.append((block.rstrip(":"), []))
        examples = [(claim, "\n".join(code)) for claim, code in claims]
        book[head[1]] = Exercise(head[1], function, function.place or head[3], examples, hints)
    return book


BOOK = read_book()
EXERCISES = {name: exercise for name, exercise in BOOK.items() if exercise.hints}


def examples_of(function):
    """The examples about a function, exercise or not."""
    return next((entry.examples for entry in BOOK.values() if entry.function is function), [])


def find(name):
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}; python -m study lists them")
    return EXERCISES[name]


def source(function):
    """The source of a function: its lines, without the indentation of a class."""
    lines = (ROOT / f"{function.module}.py").read_text(encoding="utf-8").splitlines()
    first = min([function.node.lineno, *(mark.lineno for mark in function.node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1:function.node.end_lineno]))


def template(exercise):
    """What `start` writes: what may be imported, the signature, the docstring with an example; no solution."""
    function = exercise.function
    owner = functions()[f"{function.module}.{function.name.rpartition('.')[0] or function.name}"]
    tree = ast.parse((ROOT / f"{function.module}.py").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(function.node) if isinstance(node, ast.Name)}
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = {function.module: [name for name in defined if name in used and name != function.name]}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in (*MODULES, "support.training"):
            imports[node.module] = [alias.name for alias in node.names if alias.name in used]
    docstring = function.docstring or owner.docstring
    if ">>>" not in docstring:
        claim, code = exercise.examples[0]
        docstring = f"{docstring}\n\n{claim}:\n\n{code}".strip()
    head = source(function).splitlines()[
        :function.node.body[0].lineno - function.node.lineno + len(function.node.decorator_list)]
    lines = [f'"""Exercise {[*EXERCISES].index(exercise.name) + 1} of {len(EXERCISES)}: {exercise.name} '
             f'[{exercise.place}]. Then: python -m study check {exercise.name}"""', "",
             "import math", "import torch", "import torch.nn.functional as F",
             *(f"from {module} import {', '.join(names)}" for module, names in imports.items() if names)]
    if owner is not function:  # a method: what `self` has
        lines += ["", f"# A method of {owner}, whose __init__ is ours:", textwrap.indent(
            source(functions()[f"{owner}.__init__"]), "#     ", lambda line: True)]
    lines += ["", "", *head, '    """' + textwrap.indent(docstring, "    ").strip(), '    """',
              f'    raise NotImplementedError("{exercise.name} is yours to write")', ""]
    return "\n".join(lines)


def start(name, folder):
    """Write the template; never over a file that is there."""
    text, path = template(find(name)), Path(folder) / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise ValueError(f"{path} is there already, and stays as it is") from error
    print(f"{path} is yours to fill in; then: python -m study check {name}")


def progress(folder, name=None, **news):
    """{name: what is known of it}, kept in the folder; of an exercise, `news` is added first."""
    path = Path(folder) / "progress.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name:
        known.setdefault(name, {}).update(news)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def state(exercise, folder):
    """How far you are with it, in words."""
    path, known = Path(folder) / f"{exercise.name}.py", progress(folder).get(exercise.name, {})
    if not path.is_file() or "of" not in known:
        return "begun" if path.is_file() else "not begun"
    words = "done" if known["held"] == known["of"] else f"{known['held']} of {known['of']} claims hold"
    return words if known["text"] == path.read_text(encoding="utf-8") else f"{words}, but changed since"


def hint(name, folder):
    """One more hint each time; after the last, the last again."""
    hints, given = find(name).hints, min(progress(folder).get(name, {}).get("hints", 0), 2)
    print(textwrap.fill(f"Hint {given + 1} of 3: {hints[given]}", 100))
    progress(folder, name, hints=given + 1)


def show(name, folder):
    print(source(find(name).function))
