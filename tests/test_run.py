"""`python -m fastlm run`: programs run as python runs them, in all of their processes on fastlm."""

import os
import subprocess
import sys

PROGRAM = """
import multiprocessing, os, sys
from torch.nn.functional import cross_entropy
from helper import name  # beside the program

def where(_=None):
    import torch.nn.functional as F
    return [f.__code__.co_filename.rpartition(os.sep)[2] for f in (F.cross_entropy, cross_entropy)]

if __name__ == "__main__":
    print(name, sys.argv[1:], sys.argv[0] == __file__, where())
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, *pool.map(where, [0]))
    raise ValueError("the program's own")
"""


def python(*arguments, folder):
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-m", "fastlm", "run", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_program_and_the_processes_it_starts(tmp_path):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "train.py").write_text(PROGRAM)
    (tmp_path / "programs" / "helper.py").write_text("name = 'helper'\n")
    done = python("programs/train.py", "--data", "a", "-m", folder=tmp_path)
    ours = ["patch.py", "patch.py"]
    assert done.stdout.splitlines() == [
        f"helper ['--data', 'a', '-m'] True {ours}",
        f"fork {ours}",
        f"spawn {ours}",
        f"forkserver {ours}",
    ], done.stderr
    assert done.returncode == 1 and done.stderr.endswith("ValueError: the program's own\n")


def test_a_module_and_its_exit_status(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    done = python("-m", "package", "--help", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "['--help']\n", "")


def test_what_is_no_program(tmp_path):
    done = python("none.py", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastlm run: error: none.py: no such file\n"
    done = python(folder=tmp_path)
    assert done.returncode == 2 and "usage: python -m fastlm run" in done.stdout
