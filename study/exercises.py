"""The exercises: a path of 30 functions beside the paper, their templates, hints, examples, and how far you are.

`exercises.md` holds, for each, examples with a sentence of what they claim, and three hints.
"""

import ast
import hashlib
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from study import MODULES, ROOT
from study.code import Function, functions

PATH = {  # name: the function; those with a dot are methods
    **{name: f"masking.{name}" for name in (
        "cosine_schedule", "spans_from_starts", "span_mask", "expected_mask_rate", "spans_for_mask_rate",
        "mask_codes")},
    "masked_cross_entropy": "train.masked_cross_entropy",
    "positions": "model.positions", "attention": "model.attention",
    "restricted_attention_mask": "masking.restricted_attention_mask", "local_attention": "model.local_attention",
    "block": "model.Block.forward", "relative_buckets": "t5_encoder.relative_buckets",
    "t5_attention": "t5_encoder.Attention.forward", "t5_feed_forward": "t5_encoder.FeedForward.forward",
    "t5_block": "t5_encoder.Block.forward",
    **{name: f"sample.{name}" for name in (
        "guidance_scale", "guided_logits", "annealed_temperature", "nucleus", "draw", "span_confidence",
        "hide_nonoverlapping", "spans_to_hide", "decode_stage", "rescored")},
    "causal_attention_mask": "masking.causal_attention_mask", "delay_codes": "masking.delay_codes",
    "decode_autoregressively": "sample.decode_autoregressively",
    "hybrid_attention_mask": "masking.hybrid_attention_mask",
}
PLACES = {  # of those whose docstring has no tag
    "positions": "as released", "relative_buckets": "T5", "t5_attention": "T5", "t5_feed_forward": "T5",
    "t5_block": "T5", "draw": "Sec. 3.3", "block": "Sec. 2"}


@dataclass
class Exercise:
    """name: also of the file in my/; examples: (claim, lines of a doctest); hints: three."""

    name: str
    number: int
    function: Function
    examples: list
    hints: list

    @property
    def place(self):
        return self.function.place or PLACES[self.name]


def read_book():
    """exercises.md -> {name: ([(claim, doctest)], [hint])}."""
    book, text = {}, (ROOT / "study" / "exercises.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        claims, hints = [], []
        for block in body.strip("\n").split("\n\n"):
            if block.startswith("    "):
                claims[-1][1].append(textwrap.dedent(block) + "\n")
            elif block.startswith("1. "):
                hints += [line[3:] for line in block.splitlines()]
            else:
                claims.append((block.rstrip(":"), []))
        book[name] = [(claim, "\n".join(code)) for claim, code in claims], hints
    return book


def read_exercises():
    found, book = functions(), read_book()
    return {name: Exercise(name, number, found[target], *book.get(name, ([], [])))
            for number, (name, target) in enumerate(PATH.items(), start=1)}


EXERCISES = read_exercises()


def examples_of(name):
    """The examples about a function, exercise or not: of "module.name", from the book."""
    section = next((exercise for exercise, function in PATH.items() if function == name), name)
    return read_book().get(section, ([], []))[0]


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
    """What `start` writes: what may be imported, the signature, the docstring; no solution."""
    function, text = exercise.function, source(exercise.function)
    head = text.splitlines()[:function.node.body[0].lineno - function.node.lineno + len(function.node.decorator_list)]
    tree = ast.parse((ROOT / f"{function.module}.py").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(function.node) if isinstance(node, ast.Name)}
    lines = ["import math", "import torch", "import torch.nn.functional as F"]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = {function.module: [name for name in defined if name in used and name != function.name]}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in (*MODULES, "support.training"):
            imports[node.module] = [alias.name for alias in node.names if alias.name in used]
    lines += [f"from {module} import {', '.join(names)}" for module, names in imports.items() if names]
    owner = functions()[f"{function.module}.{function.name.rpartition('.')[0] or function.name}"]
    docstring, around = function.docstring or owner.docstring, ""
    if ">>>" not in docstring:
        claim, code = exercise.examples[0]
        docstring = f"{docstring}\n\n{claim}:\n\n{code}".strip()
    if owner is not function:  # a method: what `self` has
        around = f"\n\n# A method of {owner}, whose __init__ is ours:\n" + textwrap.indent(
            source(functions()[f"{owner}.__init__"]), "#     ", lambda line: True)
    return (f'"""Exercise {exercise.number} of {len(EXERCISES)}: {exercise.name} [{exercise.place}]. '
            f'Then: python -m study check {exercise.name}"""\n\n' + "\n".join(lines) + around + "\n\n\n"
            + "\n".join(head) + f'\n    """{textwrap.indent(docstring, "    ").strip()}\n    """\n    raise NotImplementedError("{exercise.name} is yours to write")\n')


def start(exercise, folder):
    """Write the template; never over a file that is there."""
    path = Path(folder) / f"{exercise.name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(template(exercise))
    except FileExistsError as error:
        raise ValueError(f"{path} is there already, and stays as it is") from error
    print(f"{path} is yours to fill in; then: python -m study check {exercise.name}")


# ------------------------------------------------------------------------------------------------------------- progress

def progress(folder, exercise=None, **news):
    """{name: what is known of it}, kept in the folder; of an exercise, `news` is added first."""
    path = Path(folder) / "progress.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if exercise:
        known.setdefault(exercise.name, {}).update(news)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def digest(exercise, folder):
    return hashlib.sha256((Path(folder) / f"{exercise.name}.py").read_bytes()).hexdigest()[:12]


def state(exercise, folder):
    """How far you are with it, in words."""
    if not (Path(folder) / f"{exercise.name}.py").is_file():
        return "not begun"
    known = progress(folder).get(exercise.name, {})
    if "of" not in known:
        return "begun"
    words = "done" if known["held"] == known["of"] else f"{known['held']} of {known['of']} claims hold"
    return words if known["digest"] == digest(exercise, folder) else f"{words}, but changed since"


def hint(exercise, folder):
    """One more hint each time; after the last, the last again."""
    given = min(progress(folder).get(exercise.name, {}).get("hints", 0), 2)
    print(textwrap.fill(f"Hint {given + 1} of 3: {exercise.hints[given]}", 100))
    progress(folder, exercise, hints=given + 1)
