"""What the READMEs name is there: commands, their flags, and files. The paper map and the list of deviations on the
front page are tested in test_study.py.

Read in this order: the front page; then what holds for every page.
"""

import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import lru_cache

import pytest
from conftest import ROOT

FRONT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[a-z]*/README.md"))]


def commands(text):
    """The `python ...` and `torchrun ...` commands in a page, continued lines joined, comments gone: lists of words."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = "\n".join([*blocks, *re.findall(r"`(python [^`]*)`", text)]).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(\S*/)?(python|torchrun) ", line)]
    return [line for line in words if "-m" not in line or line[2] not in ("pytest", "venv")]


@lru_cache
def flags_of(module):
    """The flags of a module's command line, those that begin a line of its --help."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        importlib.import_module(module).main()
    beginnings = re.findall(r"^  (-.*?)(?:  |$)", out.getvalue(), re.MULTILINE)
    return {flag for flags in beginnings for flag in re.findall(r"--[\w-]+", flags)}


def test_the_front_page_is_short_and_says_first_things_first():
    """A picture, the two commands, the files; and that the published models were not tried before how to use them."""
    assert len(FRONT.splitlines()) <= 200
    places = [FRONT.index(text) for text in ("decode.png", "make demo", "make test", "## Six files",
                                             "have not been tried here", "--model facebook/")]
    assert places == sorted(places)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_commands_and_flags_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for words in commands(text):
        script = next(word for word in words if word.endswith(".py")) if "-m" not in words else words[2]
        module = script.removesuffix(".py") if script != "study" else "study.__main__"
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), words
        flags = [word for word in words[words.index(script) + 1:] if word.startswith("--")]
        inner = [word for flag in flags if " " in flag for word in flag.split() if word.startswith("--")]
        known = flags_of(module) if script != "study" else {  # which hands the flags on to these commands
            *flags_of("sample"), *flags_of("train"), "--check", "--write"}
        assert {flag for flag in flags if " " not in flag} <= known, words
        assert set(inner) <= flags_of("train"), words  # as --train-flags holds them


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_to_files_that_exist(page):
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert linked
    for path in linked:
        assert (ROOT / page).parent.joinpath(path).exists(), path
