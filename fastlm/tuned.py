"""Choices made by timing, kept in files ($XDG_CACHE_HOME/fastlm/tuned or ~/.cache/fastlm/tuned), so that
the next program and the next day choose the same and give the same bits. With FASTLM_AUTOTUNE=0 nothing is
timed: the best guess is taken at once."""

import contextlib
import json
import os
import tempfile
from pathlib import Path


def wanted() -> bool:
    return os.environ.get("FASTLM_AUTOTUNE") != "0"


class Record:
    """What was chosen for one key, in the file of this name."""

    def __init__(self, name: str, key: str):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "tuned"
        self.path = folder / f"{name.replace(' ', '-').replace('/', '-')}.json"
        self.key = key

    def _all(self) -> dict[str, str]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def read(self) -> str | None:
        return self._all().get(self.key)

    def write(self, chosen: str) -> None:
        """Replaces the file whole, so that another process never reads half of it. A cache that can't
        be written, as in a home that is read-only, costs the next program its time only."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self._all() | {self.key: chosen}, file, indent=1)
            os.replace(file.name, self.path)
