"""What an installed fastlm must do: run by wheels.py in a fresh environment, outside the source folder.

Values and gradients of every case of cases.py on every instruction set, one OpenMP runtime in the process, the
CUDA library where it is installed and torch has CUDA, torch.compile; and with the packages of the extra `train`,
`fastlm info` and a short training. `--quick`: some of the cases, on the instruction set in use, and no compiler.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import LINEAR, OPERATORS  # noqa: E402
from harness import check_compiled, compare  # noqa: E402

import fastlm  # noqa: E402
from fastlm import _C, cuda  # noqa: E402

OPENMP = re.compile(r"/\S*lib(?:g|i)?omp[\w.-]*\.so\S*")


def check_installed() -> str:
    folder = Path(fastlm.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"fastlm comes from {folder}, not from {sys.prefix}"
    version = importlib.metadata.version("fastlm")
    assert version.partition("+")[0] == fastlm.__version__, (
        f"{version} is installed, {fastlm.__version__} imported"
    )
    return f"fastlm {version}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def check_operators(quick: bool) -> str:
    fastlm.ops.TINY = dict.fromkeys(fastlm.ops.TINY, 0)  # small cases too are for the kernels
    before, count = _C.isa(), 0
    with fastlm.use_backend("cpu"):
        for isa in (before,) if quick else _C.isas():
            _C.set_isa(isa)
            for operator in (*OPERATORS.values(), LINEAR):
                for case in operator.cases[:: 6 if quick else 1]:
                    for dtype in {torch.float32, torch.bfloat16} & set(case.dtypes):
                        compare(operator, case, dtype)
                        count += 1
    _C.set_isa(before)
    return f"{count} cases on {before if quick else ', '.join(_C.isas())}"


def check_openmp() -> str:
    """Asked before torch.compile, which may bring the compiler's own."""
    found = sorted(set(OPENMP.findall(Path("/proc/self/maps").read_text())))
    assert len(found) == 1, f"OpenMP runtimes in one process: {found}"
    return f"OpenMP of {found[0]}"


def check_cuda_library() -> str:
    if not Path(cuda.__file__).with_name("libfastlm_cuda.so").exists():
        return "no CUDA kernels in this wheel"
    if not torch.version.cuda:
        assert "without CUDA" in cuda.unusable()
        return "CUDA kernels left alone by a torch without CUDA"
    assert cuda._library is not None, cuda.unusable()
    for name in ("attention_forward", "gru_layer", "cross_entropy", "linear_cross_entropy"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm::{name}", "CUDA"), name
    return f"CUDA kernels for {cuda.archs()} registered; {cuda.missing() or cuda.note()}"


def check_torch_compile() -> str:
    operator = OPERATORS["cross_entropy"]
    check_compiled(operator, operator.cases[0].build(torch.float32, 0))
    return "torch.compile"


def check_commands() -> str:
    missing = [
        name for name in ("rich", "safetensors", "tokenizers", "typer") if not importlib.util.find_spec(name)
    ]
    if missing:
        return f"no commands: no {', '.join(missing)} here"
    command = [sys.executable, "-I", "-m", "fastlm"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.txt").write_text("".join(f"{i} apples and {i % 7} pears\n" for i in range(2000)))
        size = "--n-layer 1 --n-embd 32 --n-head 2 --block-size 32 --batch-size 4 --eval-blocks 4 --threads 1"
        done = {}
        for arguments in ("info", f"train --model gpt {size} --data a.txt --max-steps 30 --no-tensorboard"):
            run = subprocess.run([*command, *arguments.split()], cwd=folder, text=True, capture_output=True)
            assert run.returncode == 0, f"fastlm {arguments}\n{run.stdout}\n{run.stderr}"
            done[arguments.split()[0]] = run.stdout
    assert "cpu" in done["info"] and _C.isa() in done["info"], done["info"]
    bits = {name: float(x) for name, x in re.findall(r"[│|] (.+?) +[│|] +(\d+\.\d+) [│|]", done["train"])}
    assert bits["gpt"] < 7.5, done["train"]  # 8 before
    return f"fastlm info, fastlm train (to {bits['gpt']} bits per byte)"


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    print(check_installed())
    print(check_operators(quick))
    print(check_openmp())
    print(check_cuda_library())
    if not quick:
        print(check_torch_compile())
        print(check_commands())


if __name__ == "__main__":
    main()
