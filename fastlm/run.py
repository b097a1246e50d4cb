"""`python -m fastlm run script.py ...`: a program that was never written for fastlm, run on it."""

import os
import runpy
import sys
from multiprocessing import spawn

from fastlm.patch import install

USAGE = """usage: python -m fastlm run SCRIPT [argument ...]
       python -m fastlm run -m MODULE [argument ...]

Runs a program as python does, after fastlm.install(): its attention, cross-entropy, GRU and linear layers
on the CPU run on fastlm, in the processes too that it starts with multiprocessing. Under torchrun:
torchrun [option ...] -m fastlm run SCRIPT [argument ...]
"""


class _Installed:
    """Part of what a process is told before it imports the program: unpickling it there installs fastlm."""

    def __reduce__(self):
        return _install, ()


def _install() -> None:
    """In this process, and those that it starts, which know nothing of it unless they are forked."""
    install()
    told = spawn.get_preparation_data
    spawn.get_preparation_data = lambda name: {**told(name), "fastlm": _Installed()}


def main(arguments: list[str]) -> None:
    """Runs the program that the arguments of the command line name. What it raises is its own affair."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    module = arguments[0] == "-m"
    if module:
        arguments = arguments[1:]
        if not arguments:
            _refuse("-m needs the name of a module")
    elif arguments[0].startswith("-"):
        _refuse(f"unknown option {arguments[0]}; the program's own stand behind its name")
    elif not os.path.exists(arguments[0]):
        _refuse(f"{arguments[0]}: no such file")
    _install()
    sys.argv = arguments
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(arguments[0]))
    if module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _refuse(reason: str) -> None:
    print(f"fastlm run: error: {reason}", file=sys.stderr)
    sys.exit(2)
