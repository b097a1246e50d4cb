"""Files that are there whole or not at all, and errors that name the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_JSON = 1 << 26  # bytes of a JSON file that is read whole


def write_file(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` so that a crash at any moment leaves the old file or the new one."""
    write_files({path: content})


def write_files(contents: dict[Path, bytes]) -> None:
    """Puts each content at its path. All are on the disk before the first takes its place: where one can't
    be written, the old files stay. ``OSError`` with the path."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with naming(path), open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            with naming(path):
                os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What a process that was killed in :func:`write_files` left there."""
    return list(folder.glob(".*.tmp"))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An ``OSError`` of writing inside says that ``path`` can't be written; the system's own names no file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if not reason.startswith("can't be written"):
            reason = f"can't be written: {reason}"
        raise OSError(error.errno or 0, reason, str(path)) from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; ``ValueError`` where it is damaged, no object or absurdly large."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"has {path.stat().st_size:,} bytes, more than {MOST_JSON:,}")
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError(f"{path}: damaged: nested too deep") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object, got {type(values).__name__}")
    return values
