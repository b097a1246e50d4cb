"""Text to memory-mapped tokens: corpus, split, token files, batches.

A corpus is the source code of Python's standard library, or any text files and folders. Each
document is followed by an end-of-text token, and each split begins with one, so that every byte of
the text is predicted from something. Encoded splits are kept in a cache folder named by a hash of
all that they depend on; a folder appears there whole or not at all. JSON lines, of examples with answers
or of texts with labels, are :mod:`fastlm.rows`."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm import examples, labels, rows
from fastlm.examples import Examples
from fastlm.files import naming, write_file
from fastlm.labels import LabelledTexts
from fastlm.rows import IGNORED, Rows
from fastlm.tokenizer import ByteTokenizer, Tokenizer

FORMAT = 2  # of the cache's folders
_BUILDING = ".building-"
MAX_VALIDATION = 128 * 1024  # bytes, unless asked for more
# Left out of the default corpus: what isn't library code, generated tables, and tests of a build.
_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


@dataclass(frozen=True)
class Document:
    name: str  # relative and with "/", so that the order is every machine's
    path: Path

    def read(self) -> str:
        return read_text(self.path)


@dataclass
class Corpus:
    """The two splits, memory-mapped. ``train`` and ``val`` are token ids (N,), examples or labelled
    texts; ``train_text`` and ``val_text`` the text that is predicted as bytes: without the leading
    end-of-text, or the answers alone, one NUL after each document or answer; of labels, none."""

    train: np.ndarray | Rows
    val: np.ndarray | Rows
    train_text: np.ndarray
    val_text: np.ndarray
    key: str  # hash of the text, the tokenizer and the split
    folder: Path
    labels: tuple[str, ...] | None = None  # the names that labelled texts have


def read_text(path: Path) -> str:
    """The text of a file; ``ValueError`` unless it is UTF-8 without NUL."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from None
    if b"\0" in content:
        raise ValueError(f"{path}: binary, not text (it holds a NUL byte)")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def list_documents(paths: Sequence[str | os.PathLike] | None = None) -> list[Document]:
    """Text files at ``paths`` in a fixed order; ``None`` is the default corpus.

    Folders are searched through, without hidden files and folders, and what isn't text there is
    passed over. ``ValueError`` where a path is missing, a file named itself isn't text, or nothing
    is left."""
    if paths is None:
        root = Path(sysconfig.get_path("stdlib"))
        documents = [d for d in _walk(root, _NOT_LIBRARY) if d.path.suffix == ".py" and _is_text(d.path)]
        return _check_found(documents, [root])
    documents = []
    for path in map(Path, paths):
        if path.is_dir():
            documents += [d for d in _walk(path, set()) if _is_text(d.path)]
        elif path.is_file():
            read_text(path)
            documents.append(Document(path.name, path))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return _check_found(documents, paths)


def _walk(root: Path, skipped: set[str]) -> Iterator[Document]:
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in skipped and not n.startswith(".")]
        found += [Path(folder) / f for f in files if not f.startswith(".")]
    documents = [Document(path.relative_to(root).as_posix(), path) for path in found if path.is_file()]
    return iter(sorted(documents, key=lambda d: d.name))


def _is_text(path: Path) -> bool:
    try:
        return bool(read_text(path))
    except ValueError:
        return False


def _check_found(documents: list[Document], paths) -> list[Document]:
    if not any(d.path.stat().st_size for d in documents):
        raise ValueError(f"the corpus is empty: no text in {', '.join(map(str, paths)) or 'no paths'}")
    return documents


def prepare(
    paths: Sequence[str | os.PathLike] | None,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    val_bytes: int | None = None,
    cache: str | os.PathLike | None = None,
    names: Sequence[str] | None = None,
) -> Corpus:
    """Splits and encodes a corpus of text, or of examples or labelled texts where the paths end in
    ``.jsonl``, or finds it in the cache. ``names`` are those of a classifier's labels.

    ``val_bytes`` is about how much text is held out: whole documents where there are 20 or more,
    the end of each document otherwise; by default 5%, at most 128 KiB. ``cache`` defaults to
    ``$XDG_CACHE_HOME/fastlm``. ``ValueError`` where the corpus is empty, binary, or shorter than
    one block of ``block_size`` tokens."""
    settings = f"{FORMAT}\n{tokenizer.fingerprint}\n{val_bytes}\n{MAX_VALIDATION}\n"
    digest = hashlib.sha256(settings.encode())
    if rows.are_rows(paths):
        return _prepare_rows(paths, tokenizer, digest, block_size, val_bytes, cache_folder(cache), names)
    _check_not_labelled(names)
    documents, sizes = list_documents(paths), []
    for document in documents:
        content = document.read().encode()
        sizes.append(len(content))
        digest.update(f"{document.name}\n{len(content)}\n".encode() + content)
    key = digest.hexdigest()[:32]
    folder = cache_folder(cache) / key
    if not _is_whole(folder):
        splits = _split(documents, sizes, val_bytes)
        _build(folder, tokenizer, splits, _write_split, bytes=isinstance(tokenizer, ByteTokenizer))
    corpus = open_corpus(folder)
    for name, tokens, least in (
        ("training", corpus.train, block_size + 1),
        ("validation", corpus.val, 2),
    ):
        if len(tokens) < least:
            raise ValueError(
                f"the corpus is too short: its {name} split has {len(tokens)} tokens, at least "
                f"{least} are needed (block size {block_size})"
            )
    return corpus


def _prepare_rows(
    paths: Sequence[str | os.PathLike],
    tokenizer: Tokenizer,
    digest,
    block_size: int,
    val_bytes: int | None,
    cache: Path,
    names: Sequence[str] | None,
) -> Corpus:
    found, names = _read_rows(paths, names)
    splits = rows.split_rows(found, val_bytes, MAX_VALIDATION)
    for row in found:
        digest.update(b"example\n" + row.digest())
    digest.update(json.dumps(names).encode() if names else b"")
    folder = cache / digest.hexdigest()[:32]
    if not _is_whole(folder):
        _build(folder, tokenizer, splits, rows.write_rows, rows=True, labels=names)
    corpus = open_corpus(folder)
    if names is None:
        for split, of in zip((corpus.train, corpus.val), splits, strict=True):
            examples.check_answers_fit(split, of, block_size)
    return corpus


def _read_rows(
    paths: Sequence[str | os.PathLike], names: Sequence[str] | None
) -> tuple[list[rows.Row], tuple[str, ...] | None]:
    """What the lines hold, all the same, and the names of labels where it is these."""
    lines = list(rows.read_lines(paths))
    if not lines:
        raise ValueError(f"the corpus is empty: no examples in {', '.join(map(str, paths))}")
    first = lines[0][1].keys()
    if "label" in first and not {"prompt", "messages"} & first:
        return labels.number([labels.parse(*line) for line in lines], names)
    _check_not_labelled(names)
    return [examples.parse(*line) for line in lines], None


def _check_not_labelled(names: Sequence[str] | None) -> None:
    if names is not None:
        raise ValueError(
            "a classifier reads .jsonl files of texts and labels, "
            'lines as {"text": "...", "label": "..."}; these data are others'
        )


def encode_all(
    paths: Sequence[str | os.PathLike], tokenizer: Tokenizer, names: Sequence[str] | None = None
) -> tuple[np.ndarray | Rows, np.ndarray]:
    """A whole corpus, unsplit and in memory: its tokens (N,), examples or labelled texts, and its text as
    bytes (M,), as in :class:`Corpus`."""
    if rows.are_rows(paths):
        found, labelled = _read_rows(paths, names)
        arrays = rows.encode_rows(found, tokenizer)
        text = arrays.pop("text")
        return (Examples if labelled is None else LabelledTexts)(**arrays), text
    _check_not_labelled(names)
    texts = [text for document in list_documents(paths) if (text := document.read())]
    end = np.array([tokenizer.end_of_text], np.uint32)
    parts = [part for text in texts for part in (tokenizer.encode(text), end)]
    raw = "".join(f"{text}\0" for text in texts).encode()
    return np.concatenate([end, *parts]), np.frombuffer(raw, np.uint8)


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def _split(documents: list[Document], sizes: list[int], val_bytes: int | None):
    """The texts of each split. Documents are drawn by the hash of their name,
    so that one more document moves no other."""
    wanted = min(sum(sizes) // 20, MAX_VALIDATION) if val_bytes is None else val_bytes
    if len(documents) >= 20:
        chosen, total = set(), 0
        hashes = [hashlib.sha256(document.name.encode()).digest() for document in documents]
        for i in sorted(range(len(documents)), key=hashes.__getitem__):
            if 0 < sizes[i] <= wanted // 4 and total < wanted:
                chosen.add(i)
                total += sizes[i]
        if total >= wanted // 2 and len(chosen) < len(documents):
            return (
                (d.read() for i, d in enumerate(documents) if i not in chosen),
                (d.read() for i, d in enumerate(documents) if i in chosen),
            )
    share = min(1.0, wanted / sum(sizes))
    return (
        (_cut(d.read(), share)[0] for d in documents),
        (_cut(d.read(), share)[1] for d in documents),
    )


def _cut(text: str, share: float) -> tuple[str, str]:
    """The text in two, the second about ``share`` of it, from the start of a line where there is
    one."""
    at = len(text) - round(len(text) * share)
    line = text.find("\n", at) + 1
    at = line if 0 < line < len(text) else at
    return text[:at], text[at:]


def _build(folder: Path, tokenizer: Tokenizer, splits, write: Callable[..., dict[str, int]], **meta) -> None:
    """Writes the token files beside ``folder``, then moves them there in one step."""
    with naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        meta["dtype"] = np.dtype(dtype).name
        with naming(folder):
            for name, split in zip(("train", "val"), splits, strict=True):
                meta[name] = write(temporary / name, split, tokenizer, dtype)
            write_file(temporary / "meta.json", json.dumps(meta).encode())
        if folder.exists():  # a damaged one
            shutil.rmtree(folder)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            if not _is_whole(folder):
                raise
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Half a corpus that a process was killed over: nobody holds its lock. One that has just been begun may not
    be locked yet."""
    for folder in cache.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):  # another process removes it, or finishes it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > 60:
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _write_split(stem: Path, texts: Iterator[str], tokenizer: Tokenizer, dtype) -> dict[str, int]:
    end = np.array([tokenizer.end_of_text], dtype)
    keep_text = not isinstance(tokenizer, ByteTokenizer)  # else the tokens are the text
    sizes = {}
    with open(f"{stem}.tokens", "wb") as tokens, open(f"{stem}.text", "wb") as raw:
        tokens.write(end)
        for text in texts:
            if text:
                tokens.write(tokenizer.encode(text).astype(dtype))
                tokens.write(end)
                if keep_text:
                    raw.write(text.encode() + b"\0")
        for kind, file in (("tokens", tokens), ("text", raw)):
            file.flush()
            os.fsync(file.fileno())
            sizes[kind] = file.tell()
    return sizes


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all(
            (folder / f"{split}.{kind}").stat().st_size == size
            for split in ("train", "val")
            for kind, size in meta[split].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def open_corpus(folder: Path) -> Corpus:
    """Opens a folder of the cache; ``ValueError`` where it isn't there whole."""
    if not _is_whole(folder):
        raise ValueError(f"{folder}: no prepared corpus here")
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {}
    for split in ("train", "val"):
        if meta.get("rows"):
            kind, of = (
                (LabelledTexts, {"numbers": "int64"}) if meta["labels"] else (Examples, {"answers": "bool"})
            )
            arrays[split] = kind(**rows.map_rows(folder / split, tokens=meta["dtype"], starts="int64", **of))
            arrays[f"{split}_text"] = _map_bytes(folder / f"{split}.text")
            continue
        tokens = np.memmap(folder / f"{split}.tokens", np.dtype(meta["dtype"]), "r")
        arrays[split] = tokens
        arrays[f"{split}_text"] = tokens[1:] if meta["bytes"] else _map_bytes(folder / f"{split}.text")
    names = meta.get("labels")
    return Corpus(**arrays, key=folder.name, folder=folder, labels=names and tuple(names))


def _map_bytes(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def predicted(split: np.ndarray | Rows) -> int:
    """How many tokens, or labels, of it are predicted."""
    return split.targets if isinstance(split, Rows) else len(split) - 1


def training_targets(split: np.ndarray | Rows, block_size: int, step: int, size: int, seed: int) -> int:
    """How many targets the step after ``step`` others has, of ``size`` samples."""
    if isinstance(split, Rows):
        return int(split.counts(block_size)[split.order(size, step * size, seed, size)].sum())
    return size * block_size


def training_batch(
    split: np.ndarray | Rows, block_size: int, batch_size: int, first: int, seed: int, step: int = 1
) -> tuple[Tensor, ...]:
    """Samples ``first`` to ``first + batch_size - 1`` of the endless training order, as inputs and
    targets (batch_size, block_size) of int64; of rows, what their kind has, as long as the longest of
    them, at most ``block_size``, where each ``step`` samples are of like length.

    Each epoch cuts the text into blocks from another offset and takes them in another order. The
    order is a function of ``seed`` and the sample's number alone: to resume there is no state to
    restore."""
    if isinstance(split, Rows):
        return split.rows(split.order(batch_size, first, seed, step), block_size)
    per_epoch = max(1, (len(split) - block_size) // block_size)
    starts = np.empty(batch_size, np.int64)
    for i in range(batch_size):
        epoch, place = divmod(first + i, per_epoch)
        offset, order = _epoch(len(split), block_size, per_epoch, epoch, seed)
        starts[i] = offset + order[place] * block_size
    window = split[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(window[:, 1:].copy())


@lru_cache(maxsize=2)
def _epoch(length: int, block_size: int, per_epoch: int, epoch: int, seed: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(length - per_epoch * block_size)), random.permutation(per_epoch)


def evaluation_batches(
    split: np.ndarray | Rows,
    block_size: int,
    batch_size: int,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, ...]]:
    """Non-overlapping blocks that predict every token after the first exactly once; the last block
    is padded with ignored targets. With ``limit``, only so many blocks, spread evenly over the
    text. ``part`` (k, n) is the k-th of n parts, which have equally many batches: blocks of ignored
    targets alone fill up. Rows take the place of blocks."""
    if isinstance(split, Rows):
        yield from split.batches(block_size, batch_size, limit, part)
        return
    starts = np.arange(0, len(split) - 1, block_size)
    if limit is not None and limit < len(starts):
        starts = starts[np.arange(limit) * len(starts) // limit]
    k, n = part
    starts = np.pad(starts, (0, -len(starts) % n), constant_values=len(split))[k::n]
    for i in range(0, len(starts), batch_size):
        places = starts[i : i + batch_size, None] + np.arange(block_size + 1)
        window = split[np.minimum(places, len(split) - 1)].astype(np.int64)
        targets = np.where(places[:, 1:] < len(split), window[:, 1:], IGNORED)
        yield torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(targets)
