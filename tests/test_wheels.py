"""What users install: the source distribution and a wheel, built of the objects that the build in place left.
`make wheels` builds all of them from scratch and tries them with more than one torch."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import wheels
from elftools.elf.elffile import ELFFile
from wheels import ROOT

import fastlm

PYTHON = {str(path.relative_to(ROOT)) for path in (ROOT / "fastlm").rglob("*.py")}
CSRC = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}


def test_source_distribution_has_what_the_build_needs(tmp_path):
    made = wheels.source_distribution(ROOT, tmp_path)
    top = f"fastlm-{fastlm.__version__}/"
    assert made.name == f"{top[:-1]}.tar.gz"
    with tarfile.open(made) as archive:
        names = {member.name.removeprefix(top) for member in archive if member.isfile()}
    needed = PYTHON | CSRC | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= names
    assert names - needed == {"MANIFEST.in", "PKG-INFO", "setup.cfg"}


@pytest.fixture
def wheel(tmp_path):
    # A copy: what is built in place is not to be linked anew. Where nothing was, this compiles everything.
    objects = tmp_path / "objects"
    if (ROOT / "build" / "ninja").exists():
        shutil.copytree(ROOT / "build" / "ninja", objects)
    return wheels.wheel(ROOT, tmp_path, FASTLM_CUDA="0", FASTLM_BUILD=str(objects))


def test_wheel(wheel, tmp_path):
    # For every Python; and for a glibc, found by auditwheel, which asks the same of what it is shown.
    tag = re.fullmatch(rf"fastlm-{fastlm.__version__}-(py3-none-manylinux_2_\d+_\w+)\.whl", wheel.name)[1]
    shown = wheels.call([sys.executable, "-m", "auditwheel", "show", wheel])
    assert f'"{tag.removeprefix("py3-none-")}"' in shown
    info = f"fastlm-{fastlm.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {x for x in names if not x.startswith(info) and not x.endswith("/")} == PYTHON | {
            "fastlm/libfastlm.so"
        }
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert re.findall(r"^Tag: (.*)", archive.read(f"{info}/WHEEL").decode(), re.M) == [tag]
        archive.extract("fastlm/libfastlm.so", tmp_path)

    # Its libraries are those of torch and of the system, an OpenMP runtime is not among them.
    library = tmp_path / "fastlm" / "libfastlm.so"
    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic = list(elf.get_section_by_name(".dynamic").iter_tags())
        needed = {entry.needed for entry in dynamic if entry.entry.d_tag == "DT_NEEDED"}
        assert {"libtorch_cpu.so", "libc10.so"} <= needed
        assert all(re.match(r"lib(torch_cpu|c10|stdc\+\+|m|gcc_s|c)\.so|ld-linux", name) for name in needed)
        assert not {"DT_RPATH", "DT_RUNPATH"} & {entry.entry.d_tag for entry in dynamic}
        versions = re.findall(rb"GLIBC_2\.(\d+)", elf.get_section_by_name(".dynstr").data())
        if elf["e_machine"] == "EM_X86_64":
            assert max(map(int, versions)) <= 28  # csrc/cpu/glibc.cpp
    for folder in (ROOT, sys.prefix):
        assert str(folder).encode() not in library.read_bytes()

    python = wheels.environment(tmp_path / "environment", sys.executable, "")
    wheels.pip(python, "--no-deps", wheel)
    smoke = [python, "-I", ROOT / "tests" / "smoke.py", "--quick"]
    subprocess.run(smoke, cwd=tmp_path, check=True)
