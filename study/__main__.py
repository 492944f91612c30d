"""Study, one command:

    python -m study                        the exercises, and how far you are
    python -m study start NAME             writes my/NAME.py for you to fill in
    python -m study check [NAME ...]       the claims about NAME, with yours in place of ours everywhere it is used
    python -m study hint NAME              one hint more each time
    python -m study show NAME              ours
    python -m study play "PROMPT" ...      sample.py with all of yours in place
    python -m study train ...              train.py with all of yours in place
    python -m study mistakes [NAME ...]    plants the classic mistakes; says which claim catches each
    python -m study cost ...               how much worse the toy model plays with those of decoding (hours)
    python -m study watch "PROMPT" ...     one decode as a page for the browser, with the sound of every step
    python -m study map [--check | --write]   the paper's parts, their functions and tests
"""

import argparse
import importlib
import sys
from pathlib import Path

from study import ROOT
from support.cli import Parser, run, say

COMMANDS = ("list", "start", "check", "hint", "show", "play", "train", "mistakes", "cost", "watch", "map")


def listing(folder):
    from study.exercises import EXERCISES, state

    say("The exercises, in reading order; study/README.md leads through them.\n")
    for number, exercise in enumerate(EXERCISES.values(), start=1):
        say(f"{number:3}  {exercise.name:26} {exercise.place:22} {state(exercise, folder)}")


def with_mine(folder, module, arguments):
    """Run the command of a module with all of mine in place."""
    from study.mine import begun, plant

    plant(folder)
    names = ", ".join(exercise.name for exercise in begun(folder)) or "nothing"
    print(f"with yours in place of ours: {names}", file=sys.stderr)
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


def main():
    """Parse the command; it parses what follows itself. What a command needs is imported for it alone."""
    parser = Parser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--my", type=Path, default=ROOT / "my", help="the folder of your functions (default: my)")
    parser.add_argument("command", nargs="?", default="list", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("names", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    args = parser.parse_args()
    command, names, folder = args.command, args.names, args.my.resolve()
    if command == "list":
        listing(folder)
    elif command == "map":
        importlib.import_module("study.paper").paper_map("--write" in names, "--check" in names)
    elif command in ("play", "train"):
        with_mine(folder, "train" if command == "train" else "sample", names)
    elif command in ("watch", "cost"):
        getattr(importlib.import_module(f"study.{command}"), command)(names)
    elif command == "mistakes":
        sys.exit(importlib.import_module("study.mistakes").plant_all(names))
    elif command == "check":
        sys.exit(0 if importlib.import_module("study.check").check_all(names, folder) else 1)
    elif not names:
        raise ValueError(f"{command} which exercise? python -m study lists them")
    else:
        act = getattr(importlib.import_module("study.exercises"), command)
        for name in names:
            act(name, folder)


if __name__ == "__main__":
    run(main)
