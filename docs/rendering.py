"""What MkDocs needs to know beyond Markdown: formulas, this project's docstrings, and parts of other files.

Formulas between dollar signs become MathML, which browsers draw themselves: nothing is fetched, neither when the
site is built nor when it is read. Docstrings are written in Sphinx's roles, as torch's are, and become Markdown.
mkdocs.yml names this file twice: as a hook of MkDocs and as an extension of griffe, which reads the docstrings.
"""

import re
import textwrap
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parents[1]

# ---- formulas -----------------------------------------------------------------------------


def mathml(latex: str, display: str) -> str:
    """A line of MathML for each line of LaTeX: browsers know no line breaks within one."""
    latex = latex.replace(r"\_", "_")  # which it takes for two characters
    latex = re.sub(r"\\mathrm\{(\w{2,})\}", r"\\text{\1}", latex)  # else a letter at a time
    lines = [latex] if r"\begin" in latex else latex.split(r"\\")
    return "".join(convert(line.strip(), display=display) for line in lines)


class BlockFormulas(Preprocessor):
    """Lines between two of ``$$``. Fenced code is gone by now: see the priorities below."""

    def run(self, lines):
        parts = re.split(r"^( *)\$\$\n(.*?)\n *\$\$$", "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
        for i in range(1, len(parts), 3):
            formula = f'<div class="formula">{mathml(parts[i + 1], "block")}</div>'
            parts[i + 1] = self.md.htmlStash.store(formula)
        return "".join(parts).split("\n")


class InlineFormula(InlineProcessor):
    def handleMatch(self, m, data):
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class Formulas(Extension):
    def extendMarkdown(self, md):
        md.preprocessors.register(BlockFormulas(md), "block formulas", 20)  # fenced code has 25
        # Before backslashes are taken as escapes (180), after code (190).
        md.inlinePatterns.register(InlineFormula(r"\$([^$\s](?:[^$]*[^$\s])?)\$", md), "formulas", 185)


# ---- docstrings ---------------------------------------------------------------------------

ROLE = re.compile(r":(math|func|class|meth|mod|data):`~?([^`]+)`")
LITERAL = re.compile(r"::\n\n((?: +.*\n|\n)+)")
FUNCTIONAL = re.compile(r"^fastlm\.functional\.(\w+)$")  # where the public functions are defined
DIRECTIVE = re.compile(r"\.\. math::\n((?: +.*\n|\n)+)")


def to_markdown(docstring: str, obj: griffe.Object) -> str:
    def role(m):
        kind, text = m[1], " ".join(m[2].split())
        if kind == "math":
            return f"${text}$"
        text = FUNCTIONAL.sub(r"fastlm.\1", text)
        target = None if kind == "mod" else documented(text, obj)
        return f"[`{text}`][{target}]" if target else f"`{text}`"

    def block(before, after):
        def replace(m):
            return f"{before}{textwrap.dedent(m[1]).strip()}{after}\n\n"

        return replace

    text = DIRECTIVE.sub(block("$$\n", "\n$$"), docstring + "\n")
    text = LITERAL.sub(block(":\n\n```python\n", "\n```"), text)
    return ROLE.sub(role, text)


def documented(name: str, obj: griffe.Object) -> str | None:
    """The full name of what a docstring refers to, where it is fastlm's own; the site has nothing of torch's."""
    if "." not in name:  # a neighbour
        owner = obj.parent if obj.is_function else obj
        return f"{owner.path}.{name}" if owner is not None and name in owner.all_members else None
    return name if name.startswith("fastlm.") else None


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        """fastlm.gru is the function, which griffe, without running anything, takes for the module of that name."""
        if pkg.path != "fastlm":
            return
        functional = pkg.members["functional"]
        for name, member in [*pkg.members.items()]:
            if member.is_alias and name in functional.members and functional.members[name].is_module:
                pkg.set_member(name, griffe.Alias(name, f"{functional.members[name].path}.{name}"))

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)


# ---- MkDocs -------------------------------------------------------------------------------


def on_config(config):
    config["markdown_extensions"].append(Formulas())
    return config


def on_page_markdown(markdown, page, config, files):
    """``<!-- include FILE -->`` and ``<!-- include FILE: SECTION -->`` stand for text of the source folder."""
    return re.sub(r"^<!-- include (\S+?)(?:: (.+?))? -->$", included, markdown, flags=re.MULTILINE)


def included(m) -> str:
    text = (ROOT / m[1]).read_text()
    if m[2]:
        text = re.search(rf"^## {re.escape(m[2])}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    else:
        text = text.partition("\n")[2]  # without its title
    return re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"`\1`", text)  # links there are not links here
