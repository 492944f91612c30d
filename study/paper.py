"""The paper map: every numbered part of the paper, the functions that hold it, their tests, and what is not here.

`python -m study map` prints it; `--write` writes the README's table and its list of deviations, between two comments
each; `--check` says what is stale or missing, and is part of `make lint`.
"""

import ast
import re
import textwrap

from study import MODULES, ROOT
from study.code import functions, parts_of

PARTS = {  # part: (what it says, in our own words; why it is not here, if it is not)
    "Sec. 2": ("audio as K parallel streams of codes (EnCodec), text as T5's output, one transformer between them", ""),
    "Eq. 1": ("an autoregressive model: each token given those before it", ""),
    "Eq. 2": ("the same, written as a mask over what may be seen", ""),
    "Sec. 3.1": ("masked modelling: hide spans of one codebook, show those below it, predict what is hidden", ""),
    "Eq. 3": ("the cosine schedule: how much is hidden at a time or at a decoding step", ""),
    "Eq. 4": ("the product over the decoding steps, and so the loss on what is hidden", ""),
    "Eq. 7": ("the union of spans of l frames from drawn starts", ""),
    "App. C": ("how many spans give a mask rate, with overlaps counted", ""),
    "Sec. 3.2": ("codebooks after the first attend to a few frames only", ""),
    "Fig. 8": ("the picture of that attention mask: a band", ""),
    "Sec. 3.3": ("decoding: hide the least probable spans, sample, keep, again; nucleus and temperature", ""),
    "Fig. 1": ("a drawing of one decoding run", "not here, because Fig. 4 says the same in code; "
                                                "`python -m study watch` draws a run of yours"),
    "Fig. 4": ("decoding, written as code", ""),
    "Eq. 6": ("guidance annealed with the mask rate", ""),
    "Sec. 3.4": ("rescoring: another model's opinion of the candidate counts", ""),
    "Eq. 5": ("the convex combination of the two models' probabilities", ""),
    "Sec. 3.5": ("a hybrid writes the first seconds from left to right and the rest in parallel", ""),
    "App. D": ("how the hybrid is trained: delayed codes, a prompt, MAGNeT's objective behind it", ""),
    "Fig. 7": ("the picture of the hybrid's input and attention", ""),
    "Sec. 4": ("the recipe: AdamW, warm-up and cosine, averaged weights, dropped texts", ""),
    "Table 1": ("quality and speed beside other systems", "not here, because it needs the published weights and "
                                                          "their test sets"),
    "Table 2": ("span length by restricted context", "not a function: `python -m experiments.ablations`, at toy scale"),
}
LEARNED = ("Sec", "Eq", "Fig", "App", "Table")


def by_part(found):
    """{part: its functions}, from the tags in docstrings."""
    table = {part: [] for part in PARTS}
    for function in found.values():
        for part in parts_of(function.place):
            table.setdefault(part, []).append(function)
    return table


def tests_of(function, found):
    """The tests of a function; of a class also those of its methods."""
    same = [other for name, other in found.items() if name == str(function) or name.startswith(f"{function}.")]
    return list({test.id: test for other in same for test in other.tests}.values())


def faults(found):
    """What is wrong with the tags: one line each."""
    lines = []
    for part, tagged in by_part(found).items():
        for function in tagged:
            if part not in PARTS:
                lines.append(f"{function}: the docstring's [{part}] is no part of the paper (study/paper.py)")
        if part in PARTS and bool(tagged) == bool(PARTS[part][1]):
            lines.append(f"{part}: " + ("has functions, and a reason why it is not here" if tagged else
                                        "no docstring has this tag, and no reason says why"))
    for module in MODULES:
        head = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")))
        for part in re.findall(rf"(?:{'|'.join(LEARNED)})\.? [A-Z]?[\d.]*\d|App\. [A-Z]", head.split("\n\n")[0]):
            if part not in PARTS:
                lines.append(f"{module}.py: {part} is no part of the paper (study/paper.py)")
    lines += [f"{function}: has the tag [{function.place}] and no test; name one test_{function.name}_... or mark it "
              f'@pytest.mark.of("{function.name}")'
              for function in found.values() if function.place and not tests_of(function, found)]
    return lines


def table(found):
    """The README's table: one row a part."""
    rows = ["| paper | function | test |", "|---|---|---|"]
    for part, tagged in by_part(found).items():
        words, reason = PARTS[part]
        tests = list({test.id: test for function in tagged for test in tests_of(function, found)}.values())
        first = next((test for test in tests if not test.is_reference), tests[0] if tests else None)
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        names = ", ".join(f"`{function}`" for function in tagged[:4]) + (", ..." if len(tagged) > 4 else "")
        rows.append(f"| {part}: {words} | {names or reason} | {f'`{first.name}`{more}' if first else ''} |")
    return "\n".join(rows)


def deviations(found):
    """The README's list: every line `Deviation:` of the six modules, with the function in which it stands."""
    lines = []
    for module in MODULES:
        source = (ROOT / f"{module}.py").read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(source, start=1):
            if "Deviation:" not in line:
                continue
            text = [line.partition("Deviation:")[2]]
            for following in source[number:]:  # to the end of the paragraph; a comment is one line
                if "#" in line or not following.strip() or following.strip() == '"""':
                    break
                text.append(following)
            inside = [f for f in found.values() if f.module == module and f.node.lineno <= number <= f.node.end_lineno]
            said = " ".join(" ".join(text).replace('"""', "").split())
            lines.append(f"- `{inside[-1] if inside else f'{module}.py'}`: {said}")
    return "\n".join(textwrap.fill(line, 140, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def written(text, found):
    """The README with its two blocks made new."""
    for name, block in (("paper map", table(found)), ("deviations", deviations(found))):
        text, n = re.subn(rf"(<!-- {name}: .*?-->\n).*?(\n<!-- end -->)",
                          lambda match, block=block: match[1] + block + match[2], text, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"README.md: wants one block <!-- {name}: ... --> to <!-- end -->")
    return text


def paper_map(write=False, check=False):
    """Print the map, or write the README's blocks, or raise ValueError that says what is wrong with them."""
    found, readme = functions(), ROOT / "README.md"
    wrong, text = faults(found), readme.read_text(encoding="utf-8")
    new = written(text, found)
    if write:
        readme.write_text(new, encoding="utf-8", newline="\n")
    elif check and new != text:
        wrong.append("README.md: its paper map or list of deviations is stale: python -m study map --write")
    if wrong:
        raise ValueError("\n".join(wrong))
    if not write and not check:
        for part, tagged in by_part(found).items():
            words, reason = PARTS[part]
            print(f"\n{part}: {words}{'' if tagged else f' - {reason}'}")
            for function in tagged:
                print(f"    {function}  ({function.module}.py, line {function.node.lineno})")
                for test in tests_of(function, found):
                    print(f"        {test.id}")
