"""Choices made by timing, kept in files ($XDG_CACHE_HOME/fastlm/tuned or ~/.cache/fastlm/tuned), so that
the next program and the next day choose the same and give the same bits. With FASTLM_AUTOTUNE=0 nothing is
timed: the best guess is taken at once."""

import contextlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path


def wanted() -> bool:
    return os.environ.get("FASTLM_AUTOTUNE") != "0"


def choice(name: str, key: str, choices: Collection[str], fastest: Callable[[], str]) -> str:
    """Which of `choices` is kept for `key` in the file of this name; if none is, what `fastest` finds.

    A file has a line for each key, and lines are only ever added, each by one write: of two programs that
    time at once, the one that writes first decides for both. A cache that can't be written, as in a home
    that is read-only, costs the next program its time only.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "tuned"
    path = folder / f"{name.replace(' ', '-').replace('/', '-')}.jsonl"
    kept = _kept(path, key, choices)
    if kept is None:
        found = fastest()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                file.write(f"\n{json.dumps([key, found])}\n".encode())  # behind half a line too
        kept = _kept(path, key, choices) or found
    return kept


def _kept(path: Path, key: str, choices: Collection[str]) -> str | None:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # of a program that was stopped as it wrote
                match json.loads(line):
                    case [str(found), str(chosen)] if found == key and chosen in choices:
                        return chosen
    return None
