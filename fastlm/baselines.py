"""What simple models reach on the same text, in bits per byte: n-grams of bytes, and gzip.

The n-gram models are interpolated with the Witten-Bell weights (Witten and Bell 1991, IEEE Trans.
Inf. Theory 37; the form of Chen and Goodman 1998, section 2.4): with n(h) bytes seen after the
history h, d(h) different ones among them and h' the history without its oldest byte,

    p(c | h) = (n(h c) + d(h) p(c | h')) / (n(h) + d(h)),       p(c) = (n(c) + 1) / (N + 256)
"""

import gzip

import numpy as np

MAX_TRAINING = 64 * 2**20  # bytes of training text that are counted


def ngram_bits_per_byte(train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    """Unigram, bigram and trigram models of ``train`` (N,) uint8, evaluated on ``val`` (M,) uint8.
    Both are taken to follow two NUL bytes."""
    train = np.concatenate([np.zeros(2, np.uint8), train[:MAX_TRAINING]])
    val = np.concatenate([np.zeros(2, np.uint8), val])
    alphabet = np.union1d(train, val)
    a = np.searchsorted(alphabet, train).astype(np.int64)
    b = np.searchsorted(alphabet, val).astype(np.int64)
    size = len(alphabet)

    counts = np.bincount(a[2:], minlength=size)
    p = ((counts + 1) / (counts.sum() + 256))[b[2:]]  # p of each byte of val
    bits = {"byte unigram": _bits(p)}
    for order, name in ((2, "byte bigram"), (3, "byte trigram")):
        history, seen_history = np.zeros(len(a) - 2, np.int64), np.zeros(len(b) - 2, np.int64)
        for back in range(order - 1, 0, -1):
            history = history * size + a[2 - back : len(a) - back]
            seen_history = seen_history * size + b[2 - back : len(b) - back]
        counts = np.bincount(history * size + a[2:], minlength=size**order).reshape(-1, size)
        total, different = counts.sum(1)[seen_history], (counts > 0).sum(1)[seen_history]
        seen = total > 0
        mixed = (counts[seen_history, b[2:]] + different * p) / np.maximum(total + different, 1)
        p = np.where(seen, mixed, p)
        bits[name] = _bits(p)
    return bits


def _bits(p: np.ndarray) -> float:
    return float(-np.log2(p).mean())


def gzip_bits_per_byte(text: np.ndarray) -> float:
    """``gzip -9`` of the whole text, (M,) uint8."""
    return 8 * len(gzip.compress(text.tobytes(), 9)) / len(text)
