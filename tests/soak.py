"""Training for long, in one process whose memory must stay flat: `make soak [ARGS="--minutes 60"]`.

One small run after another, both models in float32 and under bfloat16 autocast: each is broken off at a random
step without a chance to save, resumed, evaluated on the way and at its end, and writes checkpoints, the best
model, metrics and TensorBoard logs; then the model writes a sample. Sampled, each second of training: the
anonymous memory of the process (RssAnon: without the files that are mapped, as the corpus), its open files and
threads.

The verdict: after the warm-up, memory grows by no more than ALLOWED_MIB, by the Theil-Sen line through the
samples (the median of the slopes of all pairs: single runs may well need more), and the last quarter of them
has no more files or threads open than the one after the warm-up. At 150 steps a second, 8 MiB in an hour are
16 bytes a step.
"""

import argparse
import ctypes
import os
import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fastlm import checkpoint  # noqa: E402
from fastlm.display import TrainingDisplay  # noqa: E402
from fastlm.train import Trainer, TrainOptions, resume, start  # noqa: E402

ALLOWED_MIB = 8.0
KINDS = [
    dict(model="gpt", n_layer=2, n_head=2, n_embd=32, dropout=0.1),
    dict(model="gru", n_layer=1, n_embd=24, n_hidden=48, dropout=0.1),
    dict(
        model="gpt", n_layer=1, n_head=4, n_embd=32, n_kv_head=2, mlp="gelu", dtype="bfloat16", accumulate=2
    ),
    dict(model="gru", n_layer=2, n_embd=16, n_hidden=32, zoneout=0.1, layer_norm=True, dtype="bfloat16"),
]
COMMON = dict(
    block_size=64, batch_size=4, lr=1e-3, warmup=10, max_steps=400, eval_every=60, eval_blocks=8, save_every=45,
    patience=10**6, threads=1,
)  # fmt: skip


class BrokenOff(Exception):
    """Training was left, as by a kill."""


class Samples:
    """Columns of what was sampled; `every` seconds, from `begin` on."""

    def __init__(self, every: float):
        self.every, self.begin, self.due = every, time.monotonic(), 0.0
        self.rows: list[tuple[float, float, int, int]] = []  # seconds, MiB, open files, threads

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def take(self) -> None:
        now = self.seconds()
        if now < self.due:
            return
        self.due = now + self.every
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory = int(status["RssAnon"].split()[0]) / 1024
        self.rows.append((now, memory, len(os.listdir("/proc/self/fd")), int(status["Threads"])))


def slope(points: torch.Tensor) -> float:
    """The median slope of all pairs of points (N, 2)."""
    points = points[:: max(1, len(points) // 1000)]
    first, second = torch.combinations(torch.arange(len(points))).unbind(1)
    run, rise = (points[second] - points[first]).unbind(1)
    return (rise / run).median().item()


def verdict(rows: list[tuple[float, float, int, int]], warm_up: float, allowed: float) -> tuple[bool, str]:
    """Whether what was sampled after `warm_up` seconds is flat, and the words for it."""
    table = torch.tensor([row for row in rows if row[0] >= warm_up], dtype=torch.float64)
    if len(table) < 8:
        return False, f"only {len(table)} samples after the warm-up: nothing to judge by"
    seconds = (table[-1, 0] - table[0, 0]).item()
    speed = slope(table[:, :2])
    growth = speed * seconds
    quarter = len(table) // 4
    # A checkpoint has files open for a moment: what is open all the time counts.
    more = [int(table[-quarter:, i].min() - table[:quarter, i].min()) for i in (2, 3)]
    flat = growth <= allowed and max(more) <= 0
    words = (
        f"{len(table)} samples over {seconds:.0f} s after {warm_up:.0f} s of warm-up\n"
        f"memory {table[0, 1]:.1f} MiB at first, {table[-1, 1]:.1f} at last, {table[:, 1].max():.1f} at most; "
        f"slope {speed * 3600:+.2f} MiB/hour, growth {growth:+.2f} MiB, allowed {allowed:g}\n"
        f"open files {more[0]:+d}, threads {more[1]:+d}, allowed 0\n"
    )
    return flat, words + ("flat" if flat else "GROWS")


def train(
    options: TrainOptions, folder: Path, random: random.Random, console: Console, sample, end: float
) -> int:
    """A run, broken off once and resumed; ends early at `end`. Returns the steps it took."""
    steps, trainer = 0, start(options, folder, overwrite=True)
    for last in (random.randrange(1, options.max_steps), None):
        if last is not None and time.monotonic() > end:
            break
        try:
            with TrainingDisplay(trainer, console) as display:

                def report(kind: str, values: dict, display=display, last=last) -> None:
                    nonlocal steps
                    display.report(kind, values)
                    sample()
                    steps += kind == "step"
                    if values["step"] == last or time.monotonic() > end:
                        raise BrokenOff

                trainer.report = report
                trainer.train()
        except BrokenOff:
            if last is None or time.monotonic() > end:
                break
            leave(trainer)
            trainer = resume(folder)
    else:
        trainer.final_loss()
        model, tokenizer = checkpoint.load_model(folder)
        for _ in model.stream([[tokenizer.end_of_text]], 32, seed=steps):
            pass
    leave(trainer)
    return steps


def leave(trainer: Trainer) -> None:
    """Unlocks the run, as the end of a process does."""
    trainer.run._lock.close()


def soak(
    minutes: float, warm_up: float, every: float, seed: int, leak: int, data: list[str]
) -> tuple[int, list]:
    """Trains for so long, losing `leak` bytes a sample; returns the steps and what was sampled."""
    samples, draw, steps, lost = Samples(every), random.Random(seed), 0, []
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)

    def sample() -> None:
        samples.take()
        if leak:
            lost.append(ctypes.memset(malloc(leak), 1, leak))

    end = samples.begin + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        console = Console(file=null, force_terminal=True)
        for number in count():
            if time.monotonic() > end:
                break
            options = TrainOptions(
                **COMMON, **KINDS[number % len(KINDS)], seed=number, data=data, cache=f"{folder}/cache"
            )
            steps += train(options, Path(folder) / options.model, draw, console, sample, end)
    return steps, samples.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="[default: 60]")
    parser.add_argument("--warm-up", type=float, help="minutes that don't count [default: a sixth]")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between samples [default: 1]")
    parser.add_argument("--allowed", type=float, default=ALLOWED_MIB, help="MiB of growth [default: 8]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are broken off")
    parser.add_argument(
        "--leak", type=int, default=0, help="bytes to lose at each step, to see the verdict fail"
    )
    parser.add_argument("--data", nargs="+", help="text to train on [default: Python's email package]")
    parser.add_argument("--out", help="file for the samples, as lines of seconds, MiB, open files, threads")
    given = parser.parse_args()
    import email

    data = given.data or [str(Path(email.__file__).parent)]
    warm_up = given.minutes / 6 if given.warm_up is None else given.warm_up
    steps, rows = soak(given.minutes, warm_up, given.every, given.seed, given.leak, data)
    if given.out:
        Path(given.out).write_text("".join(f"{t:.1f} {m:.3f} {f} {n}\n" for t, m, f, n in rows))
    flat, words = verdict(rows, 60 * warm_up, given.allowed)
    print(f"{steps} steps of training; {words}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
