"""Study, one command:

    python -m study                        the exercises, and how far you are
    python -m study start NAME             writes my/NAME.py for you to fill in
    python -m study check [NAME ...]       the claims about NAME, with yours in place of ours everywhere it is used
    python -m study hint NAME              one hint more each time
    python -m study show NAME              ours
    python -m study play "PROMPT" ...      sample.py with all of yours in place
    python -m study train ...              train.py with all of yours in place
    python -m study mistakes [NAME ...]    plants the classic mistakes; says which claim catches each
    python -m study cost ...               how much worse the toy model plays with those of decoding
    python -m study watch "PROMPT" ...     one decode as a page for the browser, with the sound of every step
    python -m study map [--check | --write]   the paper's parts, their functions and tests
"""

import argparse
import importlib
import sys
from pathlib import Path

from study import ROOT
from support.cli import Parser, run

COMMANDS = {  # the function of each; what it needs is imported for it alone
    "list": "exercises.listing", "start": "exercises.start", "check": "check.check", "hint": "exercises.hint",
    "show": "exercises.show", "play": "mine.play", "train": "mine.train", "mistakes": "mistakes.mistakes",
    "cost": "mistakes.cost", "watch": "watch.watch", "map": "paper.paper_map"}


def main():
    """Parse the command; it parses what follows itself, and may give an exit code."""
    parser = Parser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--my", type=Path, default=ROOT / "my", help="the folder of your functions (default: my)")
    parser.add_argument("command", nargs="?", default="list", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("names", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    args = parser.parse_args()
    module, _, function = COMMANDS[args.command].partition(".")
    sys.exit(getattr(importlib.import_module(f"study.{module}"), function)(args.names, args.my.resolve()))


if __name__ == "__main__":
    run(main)
