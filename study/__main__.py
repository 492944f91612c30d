"""Study, one command:

    python -m study                        the exercises, and how far you are
    python -m study start NAME             writes my/NAME.py for you to fill in
    python -m study check [NAME ...]       the claims about NAME, with yours in place of ours everywhere it is used
    python -m study hint NAME              one hint more each time
    python -m study show NAME              ours
    python -m study play "PROMPT" ...      sample.py with all of yours in place
    python -m study train ...              train.py with all of yours in place
    python -m study mistakes [NAME ...]    plants the classic mistakes; says which claim catches each
    python -m study watch "PROMPT" ...     one decode as a page for the browser, with the sound of every step
    python -m study map [--check | --write]   the paper's parts, their functions and tests
"""

import sys
from pathlib import Path

from study import ROOT
from support.cli import Parser, run

COMMANDS = ("list", "start", "check", "hint", "show", "play", "train", "mistakes", "watch", "map")


def main():
    parser = Parser(prog="python -m study", description=__doc__, formatter_class=__import__("argparse").RawTextHelpFormatter)
    parser.add_argument("--my", type=Path, default=ROOT / "my", help="folder of your functions (default: my)")
    parser.add_argument("command", nargs="?", default="list", choices=COMMANDS, help="see above")
    ours, rest = parser.parse_known_args(sys.argv[1:2])
    print(ours, rest)


if __name__ == "__main__":
    run(main)
