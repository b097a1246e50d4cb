"""The documentation: its examples run, its links lead somewhere, and it leaves no public name out.

A page's ```python blocks run in order in one namespace. The comment `<!-- needs NAME -->` before a block says
what it can't do without, a GPU or a Python package; where that is missing, the block is a skipped test.
"""

import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

import fastlm
import fastlm.nn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text() for page in (ROOT / "README.md", *DOCS.rglob("*.md"))
}
SITE = (ROOT / "mkdocs.yml").read_text()
BLOCK = re.compile(r"^(?:<!-- needs ([\w.]+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[int, str | None, str]]:
    """(line, what it needs, program) of each."""
    text = PAGES[page]
    return [(text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in BLOCK.finditer(text)]


def is_here(need: str) -> bool:
    return torch.cuda.is_available() if need == "GPU" else importlib.util.find_spec(need) is not None


def run(page: str, chosen: list[tuple[int, str | None, str]]) -> None:
    names = {"__name__": "__main__", **given(page)}
    for line, _, program in chosen:
        # As many empty lines before it as in the page: a traceback shows the page's own line.
        exec(compile("\n" * (line - 1) + program, ROOT / page, "exec"), names)


def given(page: str) -> dict:
    """What a page's examples take for granted."""
    if page != "README.md":
        return {}
    q = torch.randn(1, 2, 8, 16)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return {
        **dict.fromkeys("qkv", q),
        "hidden": torch.randn(4, 8),
        "head": torch.nn.Linear(8, 10),
        "target": torch.arange(4),
        "model": model,
    }


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch, tiny_calls_as_shipped):
    monkeypatch.chdir(tmp_path)
    yield
    fastlm.uninstall()
    fastlm.use_backend(None)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_examples(page):
    run(page, [block for block in blocks(page) if block[1] is None])


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}:{block[0]}-needs-{block[1]}")
        for page in PAGES
        for block in blocks(page)
        if block[1] is not None
    ],
)
def test_examples_that_need_something(page, block):
    if not is_here(block[1]):
        pytest.skip(f"needs {block[1]}, which is not here")
    run(page, [other for other in blocks(page) if other[1] is None and other[0] < block[0]] + [block])


# ---- links ----------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of a page's headings, as Markdown's table of contents names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = os.path.normpath((ROOT / page).parent / path) if path else ROOT / page
        assert Path(target).exists(), f"{page}: {link}"
        if anchor:
            name = Path(target).relative_to(ROOT).as_posix()
            assert anchor in anchors(PAGES[name]), f"{page}: {link}"


def test_every_page_is_in_the_navigation():
    assert set(re.findall(r"- ([\w/]+\.md)$", SITE, re.MULTILINE)) == {
        page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")
    }


REFERENCES = sorted(
    {name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_are_documented_objects(name):
    owner, _, attribute = name.rpartition(".")
    while True:  # the longest part that is a module
        try:
            module = importlib.import_module(owner)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{owner}.".startswith(f"{error.name}."):
                pytest.skip(f"needs {error.name}, which is not here")
            owner, _, outer = owner.rpartition(".")
            attribute = f"{outer}.{attribute}"
    for part in attribute.split("."):
        module = getattr(module, part)
    assert module.__doc__


# ---- commands ---------------------------------------------------------------------------------

SHELL = [
    line.partition("#")[0].split()
    for text in PAGES.values()
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_make_targets_exist():
    made = {words[1] for words in SHELL if words[:1] == ["make"]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert made and made <= targets


def test_command_line_options_exist():
    pytest.importorskip("typer", reason="the command line is made with it")
    pytest.importorskip("rich", reason="the command line prints with it")
    import typer.main

    from fastlm import cli

    commands = typer.main.get_command(cli.app).commands
    lines = [words[1:] for words in SHELL if words[:1] == ["fastlm"] and words[1] != "run"]
    assert lines
    for name, *arguments in lines:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {x for x in arguments if x.startswith("--")} <= options, f"fastlm {name}"


# ---- nothing is left out ----------------------------------------------------------------------

READ = re.compile(r"""(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\()\s*["'](FASTLM_\w+)["']""")


def environment_variables() -> set[str]:
    """All that the sources read, those of the tests included."""
    sources = [ROOT / "setup.py"]
    for folder in ("csrc", "fastlm", "tests", "benchmarks"):
        for suffix in ("py", "h", "cpp", "cu", "cuh"):
            sources += (ROOT / folder).rglob(f"*.{suffix}")
    return {name for source in sources for name in READ.findall(source.read_text())}


def named(name: str) -> bool:
    return any(
        re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)
        for page, text in PAGES.items()
        if page != "README.md"
    )


@pytest.mark.parametrize("name", fastlm.__all__)
def test_public_names(name):
    assert named(f"fastlm.{name}")


@pytest.mark.parametrize("name", fastlm.nn.__all__)
def test_public_modules(name):
    assert f"::: fastlm.nn.{name}" in PAGES["docs/modules.md"]


def test_extras():
    section = (
        (ROOT / "pyproject.toml")
        .read_text()
        .partition("[project.optional-dependencies]")[2]
        .partition("\n[")[0]
    )
    for name in re.findall(r"^(\w+) = ", section, re.MULTILINE):
        assert f"| `{name}` |" in PAGES["docs/install.md"], name


@pytest.mark.parametrize(
    "name", [name for name in fastlm.ops.backends() if name != "cuda-host"]
)  # the tests'
def test_backends(name):
    assert f"| `{name}` |" in PAGES["docs/backends.md"]


@pytest.mark.parametrize("name", sorted(environment_variables()))
def test_environment_variables(name):
    assert f"| `{name}` |" in PAGES["docs/install.md"]
