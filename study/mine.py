"""Your functions in place of ours, everywhere they are used, for as long as the process lives.

A file of `my/` is compiled from its text and never imported: it leaves no `__pycache__`. Ours is replaced under every
name that it has in a module of this repository, where imports make more, and in the dictionaries that modules hold.
"""

import importlib
import sys
import types
from functools import partial

import pytest

from study import MODULES, is_ours
from study.exercises import EXERCISES


def load(exercise, folder):
    """The function in my/NAME.py. ValueError says which line is wrong, or that it is not there."""
    path = folder / f"{exercise.name}.py"
    module = types.ModuleType(f"my.{exercise.name}")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    except Exception as error:
        raise ValueError(f"{path.name} cannot be run: {type(error).__name__}: {error}") from error
    wanted = exercise.function.node.name
    if not callable(vars(module).get(wanted)):
        raise ValueError(f"{path.name}: there is no function {wanted} in it")
    return vars(module)[wanted], module


def begun(folder):
    """The exercises that have a file in the folder, in their order."""
    return [exercise for exercise in EXERCISES.values() if (folder / f"{exercise.name}.py").is_file()]


def plant(folder, exercises=None, wrap=None):
    """Put mine in place of ours; wrap(mine, ours) may give another function. -> a function that undoes it."""
    patch = pytest.MonkeyPatch()
    for name in MODULES:
        importlib.import_module(name)
    modules = [module for module in list(sys.modules.values()) if is_ours(getattr(module, "__file__", ""))]
    for exercise in begun(folder) if exercises is None else exercises:
        kind, _, attribute = exercise.function.name.rpartition(".")
        owner = importlib.import_module(exercise.function.module)
        owner = getattr(owner, kind) if kind else owner
        ours, (mine, module) = vars(owner)[attribute], load(exercise, folder)
        modules.append(module)
        mine = wrap(mine, ours) if wrap else mine
        patch.setattr(owner, attribute, mine)
        for place in [vars(module) for module in modules] + [
                value for module in modules for value in vars(module).values() if type(value) is dict]:
            for key in [key for key, value in place.items() if value is ours]:
                patch.setitem(place, key, mine)
    return patch.undo


def play(arguments, folder, module="sample"):
    """Run the command of a module with all of mine in place."""
    plant(folder)
    print("with yours in place of ours:", *[exercise.name for exercise in begun(folder)], file=sys.stderr)
    sys.argv = [f"{module}.py", *arguments]
    try:
        importlib.import_module(module).main()
    except NotImplementedError as error:  # what `start` wrote, unchanged
        raise ValueError(error) from error


train = partial(play, module="train")
