"""Tokenizers behind one interface: bytes, the ``tokenizers`` library, ``tiktoken``.

A tokenizer is named by a spec: ``bytes``; the path of a ``tokenizer.json``; ``tiktoken:NAME``; or
``hub:NAME``, a model on the Hugging Face Hub whose ``tokenizer.json`` is downloaded.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastlm.files import write_file

TOKENIZER_FILE = "tokenizer.json"
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class ByteTokenizer:
    """UTF-8 bytes. Text holds no NUL, so 0 ends a document."""

    vocab_size, end_of_text = 256, 0
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in tokens if t != self.end_of_text).decode(errors="replace")

    def save(self, folder: Path) -> str:
        """Writes what :func:`load_tokenizer` needs into ``folder``; returns the spec to give it."""
        return "bytes"


class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library. A document ends with the token given as ``end_of_text``,
    else with one whose name we know or, where it has none, with a token of ours after its vocabulary."""

    def __init__(self, tokenizer, end_of_text: int | None = None):
        self.library = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        known = (tokenizer.token_to_id(name) for name in _END_TOKENS)
        named = next((token for token in known if token is not None), self.vocab_size)
        self.end_of_text = named if end_of_text is None else end_of_text
        self.vocab_size = max(self.vocab_size, self.end_of_text + 1)
        self.fingerprint = "tokenizers:" + hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        if self.end_of_text != named:
            self.fingerprint += f":{self.end_of_text}"

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.library.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.library.decode([t for t in tokens if t != self.end_of_text])

    def save(self, folder: Path) -> str:
        write_file(folder / TOKENIZER_FILE, self.library.to_str().encode())
        return TOKENIZER_FILE


class TiktokenTokenizer:
    def __init__(self, encoding):
        self._encoding = encoding
        self.vocab_size, self.end_of_text = encoding.n_vocab, encoding.eot_token
        self.fingerprint = f"tiktoken:{encoding.name}"

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self._bytes(t) for t in tokens if t != self.end_of_text).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # vocabularies have gaps, which an untrained model can draw
            return b""

    def save(self, folder: Path) -> str:
        return self.fingerprint


Tokenizer = ByteTokenizer | FileTokenizer | TiktokenTokenizer


def load_tokenizer(spec: str, folder: str | os.PathLike = ".", end_of_text: int | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names; a relative path is taken from ``folder``. A file may not say
    which token ends a text: ``end_of_text`` does.

    Raises ``ValueError`` where there is none, where its file is damaged, or where its library is
    missing."""
    if spec == "bytes":
        return ByteTokenizer()
    kind, _, name = spec.partition(":")
    if kind == "tiktoken" and name:
        return TiktokenTokenizer(_tiktoken_encoding(name))
    library = _import("tokenizers", spec)
    try:
        if kind == "hub" and name:
            return FileTokenizer(library.Tokenizer.from_pretrained(name))
        path = Path(folder) / spec
        if not path.is_file():
            raise ValueError("no such file; expected bytes, a tokenizer.json, tiktoken:NAME or hub:NAME")
        return FileTokenizer(library.Tokenizer.from_file(str(path)), end_of_text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {spec!r}: {error}") from None


def _tiktoken_encoding(name: str):
    tiktoken = _import("tiktoken", f"tiktoken:{name}")
    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"tokenizer 'tiktoken:{name}': tiktoken has {', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # it is downloaded at first use: any network error
        raise ValueError(f"tokenizer 'tiktoken:{name}': {error}") from None


def _import(name: str, spec: str):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"tokenizer {spec!r} needs the {name} library: pip install {name}") from None


def text_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come, in pieces that hold whole characters only.

    A token's text may depend on the one before (word pieces, bytes of one character), so each piece
    is the difference between two decodings that begin at the same earlier token."""
    ids: list[int] = []
    anchor = shown = 0  # ids[:shown] is out; decoding begins at ids[anchor]
    for token in tokens:
        ids.append(token)
        before, after = tokenizer.decode(ids[anchor:shown]), tokenizer.decode(ids[anchor:])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            yield after[len(before) :]
            anchor, shown = shown, len(ids)
    rest = tokenizer.decode(ids[anchor:])[len(tokenizer.decode(ids[anchor:shown])) :]
    if rest:
        yield rest
