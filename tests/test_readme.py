"""The README's claims about names: every function and every test that it points to is there."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("masking", "model", "decoding", "autoregressive", "objectives", "sample", "hub", "train", "data",
           "t5_encoder", "encodec_wrap", "cli")


def test_readme_names_functions_that_exist():
    named = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", README)
    assert len(named) > 15
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_readme_names_tests_that_exist():
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", source))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 10
    assert set(named) <= defined


def test_readme_names_files_that_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked and all((ROOT / path).exists() for path in linked)


def test_readme_begins_with_the_two_commands():
    assert README.index("make demo") < README.index("make test") < 1500
