"""The paper map: every numbered part of the paper (`paper.md`), the functions that hold it, their tests, or why not.

`python -m study map` prints it; `--write` writes the README's table and its list of deviations, between two comments
each; `--check` says what is stale or missing, and is part of `make lint`.
"""

import ast
import re
import textwrap

from study import MODULES, ROOT
from study.code import functions


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
    same = [other for function in tagged for name, other in found.items()
            if name == str(function) or name.startswith(f"{function}.")]
    return list({test.id: test for other in same for test in other.tests}.values())


def faults(found):
    """What is wrong with the tags: one line each."""
    lines, known = [], parts()
    for part, tagged in by_part(found).items():
        lines += [f"{function}: its docstring's [{part}] is no part of the paper (study/paper.md)"
                  for function in tagged if part not in known]
        if part in known and bool(tagged) == bool(known[part][1]):
            lines.append(f"{part}: " + ("has functions, and a reason why it is not here" if tagged else
                                        "no docstring has this tag, and study/paper.md gives no reason"))
    for module in MODULES:
        head = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))).split("\n\n")[0]
        lines += [f"{module}.py: {part} is no part of the paper (study/paper.md)" for part in re.findall(
            r"(?:Sec\.|Eq\.|Fig\.|Table) \d[\d.]*\b|App\. [A-Z]", head) if part not in known]
    lines += [f"{function}: has the tag [{function.place}] and no test; name one test_{function.name}_... or mark it "
              f'@pytest.mark.of("{function.name}")'
              for function in found.values() if function.place and not tests_of([function], found)]
    return lines


def table(found):
    """The README's table: one row a part, with the first four functions and the first test."""
    rows = ["| paper | function | test |", "|---|---|---|"]
    for part, tagged in by_part(found).items():
        words, reason = parts()[part]
        tests = sorted(tests_of(tagged, found), key=lambda test: test.is_reference)
        names = ", ".join(f"`{function}`" for function in tagged[:4]) + ", ..." * (len(tagged) > 4)
        rows.append(f"| {part}: {words} | {names or reason} | {f'`{tests[0].name}`' if tests else ''} |")
    return "\n".join(rows)


def deviations(found):
    """The README's list: every `Deviation:` of the six modules, to the end of its paragraph or comment, with the
    function in which it stands."""
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
        raise ValueError(f"README.md: wants one block <!-- {name}: ... --> to <!-- end -->")
    return text


def written(text, found):
    """The README with its two blocks made new."""
    return replaced(replaced(text, "paper map", table(found)), "deviations", deviations(found))


def paper_map(write=False, check=False):
    """Print the map, or write the README's blocks; ValueError says what is wrong, one line for each fault."""
    found, readme = functions(), ROOT / "README.md"
    wrong, text = faults(found), readme.read_text(encoding="utf-8")
    new = text if wrong else written(text, found)
    if write and not wrong:
        readme.write_text(new, encoding="utf-8", newline="\n")
    elif check and new != text:
        wrong.append("README.md: its paper map or list of deviations is stale: python -m study map --write")
    if wrong:
        raise ValueError("\n".join(wrong))
    for part, tagged in by_part(found).items() if not (write or check) else ():
        print(f"\n{part}: {' - '.join(filter(None, parts()[part]))}")
        for function in tagged:
            print(f"    {function}  ({function.module}.py, line {function.node.lineno})")
            print("".join(f"        {test.id}\n" for test in tests_of([function], found)), end="")
