"""Tokenizers, corpora, token files and batches."""

import gzip
import json
import math
import sysconfig
from collections import Counter

import numpy as np
import pytest

from fastlm import baselines, data
from fastlm.tokenizer import ByteTokenizer, load_tokenizer, text_stream

TEXT = "".join(f"line {i}: {i * i % 97} häuser, {i % 7} trees\n" for i in range(2000))


@pytest.fixture
def tokenizer_file(tmp_path):
    """A small byte-level BPE of the tokenizers library, without an end-of-text token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def prepare(paths, tokenizer=None, **options):
    options = {"block_size": 16, **options}
    return data.prepare(paths, tokenizer or ByteTokenizer(), **options)


def test_default_corpus_is_library_code_in_a_fixed_order():
    names = [document.name for document in data.list_documents()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "/test" in name for name in names)
    root = sysconfig.get_path("stdlib")
    assert all(str(document.path).startswith(root) for document in data.list_documents())


def test_splits_hold_the_whole_text_once(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}\n" * 20)
    corpus = prepare([tmp_path / f"{i:02}.txt" for i in range(30)], val_bytes=2000, cache=tmp_path / "c")
    train, val = (bytes(t).decode().split("\0")[:-1] for t in (corpus.train_text, corpus.val_text))
    assert sorted(train + val) == sorted(f"document {i}\n" * 20 for i in range(30))
    assert 1000 <= len(corpus.val_text) <= 3000
    for tokens, text in ((corpus.train, corpus.train_text), (corpus.val, corpus.val_text)):
        assert tokens.dtype == np.uint8
        assert tokens[0] == 0 and np.array_equal(tokens[1:], text)


def test_one_file_is_split_at_a_line(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text(TEXT)
    corpus = prepare([file], cache=tmp_path / "c")
    train, val = (bytes(t).decode().rstrip("\0") for t in (corpus.train_text, corpus.val_text))
    assert train + val == TEXT
    assert train.endswith("\n")
    assert 0.03 < len(val) / len(TEXT) < 0.06


def test_cache_is_found_again_and_follows_the_content(tmp_path):
    file, cache = tmp_path / "one.txt", tmp_path / "c"
    file.write_text(TEXT)
    first = prepare([file], cache=cache)
    stamp = (first.folder / "train.tokens").stat().st_mtime_ns
    again = prepare([file], cache=cache)
    assert again.key == first.key and (again.folder / "train.tokens").stat().st_mtime_ns == stamp
    file.write_text(TEXT + "more\n")
    assert prepare([file], cache=cache).key != first.key
    assert prepare([file], cache=cache, val_bytes=999).key != first.key
    assert not list(cache.glob(".building-*"))


def test_damaged_cache_is_built_again(tmp_path):
    file, cache = tmp_path / "one.txt", tmp_path / "c"
    file.write_text(TEXT)
    corpus = prepare([file], cache=cache)
    whole = bytes(corpus.train)
    del corpus
    key = next(cache.iterdir())
    (key / "train.tokens").write_bytes(whole[:100])
    assert bytes(prepare([file], cache=cache).train) == whole


@pytest.mark.parametrize("hidden", [".git/config", ".hidden.txt"])
def test_folders_skip_hidden_and_binary_files(tmp_path, hidden):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / hidden).parent.mkdir(exist_ok=True)
    (folder / hidden).write_text("hidden")
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("h\xe4user".encode("latin-1"))
    (folder / "sub/b.txt").write_text("b")
    (folder / "a.txt").write_text("a")
    assert [d.name for d in data.list_documents([folder])] == ["a.txt", "sub/b.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the corpus is empty"),
        (b"text\0text", r"x: binary, not text \(it holds a NUL byte\)"),
        (b"text \xff\xfe", r"x: not UTF-8 text \(byte 5\)"),
        (b"short", r"too short: its training split has \d+ tokens, at least 17 are needed"),
    ],
)
def test_bad_corpus(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "x"], cache=tmp_path / "c")


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        prepare([tmp_path / "nowhere"], cache=tmp_path / "c")
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare([tmp_path], cache=tmp_path / "c")


@pytest.mark.parametrize("length", [17, 18, 33, 100, 1000])
def test_an_epoch_takes_each_block_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    blocks = max(1, (length - 16) // 16)
    for epoch in range(3):
        idx, targets = data.training_batch(tokens, 16, blocks, epoch * blocks, seed=5)
        assert (targets == idx + 1).all()
        assert len(set(idx.flatten().tolist())) == blocks * 16
    one_by_one = [data.training_batch(tokens, 16, 1, i, seed=5)[0][0].tolist() for i in range(2 * blocks)]
    assert data.training_batch(tokens, 16, 2 * blocks, 0, seed=5)[0].tolist() == one_by_one


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
def test_evaluation_predicts_each_token_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    predicted = []
    for idx, targets in data.evaluation_batches(tokens, 16, 3):
        counted = targets != data.IGNORED
        assert (targets[counted] == idx[counted] + 1).all()
        predicted += targets[counted].tolist()
    assert predicted == list(range(1, length))


def test_limited_evaluation_is_spread_over_the_text():
    batches = list(data.evaluation_batches(np.arange(1601), 16, 4, limit=5))
    assert [x for idx, _ in batches for x in idx[:, 0].tolist()] == [0, 320, 640, 960, 1280]


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("häuser €").tolist()) == "häuser €"
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"


def test_file_tokenizer(tokenizer_file, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1  # ours, after its vocabulary
    tokens = tokenizer.encode(TEXT)
    assert tokens.max() < tokenizer.end_of_text
    assert tokenizer.decode([*tokens.tolist(), tokenizer.end_of_text]) == TEXT
    (tmp_path / "saved").mkdir()
    spec = tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(spec, tmp_path / "saved").fingerprint == tokenizer.fingerprint

    file = tmp_path / "one.txt"
    file.write_text(TEXT)
    corpus = prepare([file], tokenizer, cache=tmp_path / "c")
    assert corpus.train.dtype == np.uint16
    assert tokenizer.decode(corpus.train.tolist()) == bytes(corpus.train_text).decode().rstrip("\0")
    assert len(corpus.train) < len(corpus.train_text) / 1.5


def test_tiktoken(monkeypatch):
    """With a vocabulary of ours, since tiktoken downloads its own; 299 is in none of its tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 300})  # fmt: skip
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["tiny"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("tiktoken:tiny")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 300)
    assert tokenizer.encode("the <|endoftext|>")[0] == 257
    assert tokenizer.decode([257, 299, 300, 32, 256]) == "the th"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.json", "nowhere.json': no such file"),
        ("tiktoken:nothing", "tiktoken has .*gpt2"),
        ("{broken}", "tokenizer '"),
    ],
)
def test_bad_tokenizer(tmp_path, spec, message):
    (tmp_path / "broken.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(spec.format(broken=tmp_path / "broken.json"))


@pytest.mark.parametrize("text", ["", "plain", "häuser €5 \U0001f600!", "€"])
def test_text_stream_yields_whole_characters(text):
    pieces = list(text_stream(ByteTokenizer(), ByteTokenizer().encode(text).tolist()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_text_stream_shows_what_is_no_character():
    assert "".join(text_stream(ByteTokenizer(), [65, 0xFF, 66, 0xE2])) == "A\ufffdB\ufffd"


def test_text_stream_of_a_file_tokenizer(tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert "".join(text_stream(tokenizer, tokenizer.encode(TEXT[:3000]).tolist())) == TEXT[:3000]


def test_ngrams_follow_their_formula():
    """Against the formula, written for one byte at a time over dictionaries."""
    train, val = (np.frombuffer(t.encode(), np.uint8) for t in ("abracadabra abra", "abra cad xyz aab"))

    def probability(history: bytes, byte: int) -> float:
        seen = Counter()
        text = b"\0\0" + train.tobytes()
        for i in range(2, len(text)):
            if text[i - len(history) : i] == history:
                seen[text[i]] += 1
        if not history:
            return (seen[byte] + 1) / (len(train) + 256)
        lower = probability(history[1:], byte)
        total = sum(seen.values())
        return (seen[byte] + len(seen) * lower) / (total + len(seen)) if total else lower

    text = b"\0\0" + val.tobytes()
    bits = baselines.ngram_bits_per_byte(train, val)
    for order, name in enumerate(("byte unigram", "byte bigram", "byte trigram")):
        logs = [math.log2(probability(text[i - order : i], text[i])) for i in range(2, len(text))]
        assert bits[name] == pytest.approx(-sum(logs) / len(val))


def test_gzip_bits():
    text = np.frombuffer(TEXT.encode(), np.uint8)
    assert baselines.gzip_bits_per_byte(text) == 8 * len(gzip.compress(TEXT.encode(), 9)) / len(text)
