"""`make gpu-check` from end to end, on the CPU: what fails is reported, and loses nothing of the rest."""

import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.workloads import EAGER, FASTLM, Workload

SMALL = Workload("scaled_dot_product_attention", "smallest-1x2x8x16", torch.float32)
LARGE = Workload("cross_entropy", "too large", torch.float32)


def broken(*args, **kwargs):
    raise NotImplementedError("no such shape")


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs it, with a contender that fails; gives its exit code and the report."""
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(gpu, "contenders", lambda workload: [EAGER, FASTLM, "fastlm cuda", gpu.FLASH])
    monkeypatch.setitem(gpu.OTHERS, (SMALL.operator, gpu.FLASH), ("torch", broken))
    monkeypatch.setattr(gpu, "measure_peaks", lambda device: gpu.Peaks(1e12, 1e11, 1e10))
    monkeypatch.setattr(gpu, "workloads", lambda: [SMALL, LARGE])

    def run(*arguments):
        folder = tmp_path / "report"
        monkeypatch.setattr(
            sys, "argv", ["gpu-check", "--device", "cpu", "--output", str(folder), *arguments]
        )
        code = gpu.main()
        return code, (folder / "report.md").read_text(), folder

    return run


def test_report(check):
    code, report, folder = check("--no-tests", "smallest")
    assert code == 0
    for line in report.splitlines():
        if line.startswith("| smallest"):
            eager, fastlm, cuda, flash = line.split("|")[4:8]
            assert eager.strip().endswith("x)") and fastlm.strip().endswith("s") and "fails" in cuda + flash
    assert report.count("NotImplementedError: no such shape") == 2  # forward, and with backward
    assert "backend 'cuda' is not available" in report
    page = (folder / "report.html").read_text()
    assert "<svg" in page and ">fails<" in page and "NotImplementedError: no such shape" in page


def test_failures_are_reported(check, monkeypatch, tmp_path):
    """A workload that can't be made, a test that fails, one that can't be read: exit code and report say so."""
    (tmp_path / "test_wrong.py").write_text(
        "def test_wrong():\n    assert False\n\ndef test_right():\n    pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import no_such_module\n")
    files = [str(tmp_path / name) for name in ("test_wrong.py", "test_unreadable.py")]
    monkeypatch.setattr(gpu, "SUITES", {"some": files})
    code, report, folder = check(*(["--tests=-n0"] if gpu.parallel() else []))
    assert code == 1
    assert "FAILED" in report and "test_wrong" in report and "ERROR" in report
    assert "1 failed, 1 passed" in report and (folder / "tests-some.txt").exists()
    assert "cross_entropy/too large/float32 was not measured: StopIteration" in report
    assert "| smallest-1x2x8x16 | float32 | forward |" in report


def test_needs_are_said_first(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "NEEDED", {"no_such_package"})
    monkeypatch.setattr(sys, "argv", ["gpu-check"])
    assert gpu.main() == 2
    assert "needs Python package no_such_package, a GPU that this torch can use" in capsys.readouterr().err
