"""Training that is killed (SIGKILL) at random moments and goes on: `python tests/kills.py --kills 100`.

A run is trained once without a kill, and again by processes that kill themselves, each at a moment drawn from a
seed: before the n-th operation on a file in the run's folder or the corpus cache (opening one, renaming, removing
or making one), while part of what was written before may still be in a buffer; or are killed from outside after
some milliseconds. The corpus has to be prepared first, and a checkpoint is written every other step, so that the
moments lie in all of it. At the end metrics, checkpoints, the best model and the cache must be the same to the bit,
and nothing else may be left.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastlm import data  # noqa: E402
from fastlm.train import TrainOptions, resume, start  # noqa: E402

MODELS = {
    "gpt": {"n_layer": 1, "n_head": 2, "n_embd": 16},
    "gru": {"n_layer": 1, "n_embd": 8, "n_hidden": 16},
}
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.truncate"}


def options(model: str, folder: Path, steps: int) -> TrainOptions:
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i % 97} and {i % 7}\n" for i in range(1500)))
    return TrainOptions(
        model=model, **MODELS[model], dropout=0.1, data=[str(text)], cache=str(folder / "cache"), block_size=16,
        batch_size=2, lr=1e-2, warmup=4, max_steps=steps, eval_every=3, eval_blocks=4, save_every=2,
        patience=10**6, threads=1, tensorboard=False,
    )  # fmt: skip


def train(options: TrainOptions, folder: Path) -> None:
    """Begins the run in the folder, or goes on with it."""
    (resume(folder) if (folder / "run.json").is_file() else start(options, folder)).train()


def in_process(options: TrainOptions, folder: Path, last: int | None, seconds: float | None) -> int | None:
    """Trains in a process of its own, which ends before its operation `last` on a file, or is killed after so
    many seconds. How many operations there were where it came to the end of the run, else None."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            counted = kill_before(last, folder.parent)
            train(options, folder)
            os.write(writing, str(counted()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading) as pipe:
        count = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise SystemExit(f"training fails with status {os.waitstatus_to_exitcode(status)}")
    return int(count)


def kill_before(last: int | None, folder: Path) -> Callable[[], int]:
    """This process is gone at its operation of that number on a file below the folder; counts them."""
    below, count = str(folder), 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in WATCHED and str(arguments[0]).startswith(below):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: count


def fresh(folder: Path) -> Path:
    """The folder, and the cache beside it, gone."""
    for path in (folder, folder.parent / "cache"):
        shutil.rmtree(path, ignore_errors=True)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Each file below the folder and the hash of what it holds, without the times that were measured."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in r.items() if k != "seconds"} for r in records]).encode()
        if path.name == "trainer.json":
            state = json.loads(content)
            content = json.dumps({k: v for k, v in state.items() if "seconds" not in k}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two folders of runs and of their cache."""
    differences = []
    for part in ("run", "cache"):
        a, b = contents(whole / part), contents(killed / part)
        if part == "cache":  # half a corpus goes when the next one is prepared, after a while
            b = {name: h for name, h in b.items() if not name.startswith(data._BUILDING)}
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                kind = "differs" if name in a and name in b else "is missing" if name in a else "is left over"
                differences.append(f"{part}/{name} {kind}")
    return differences


def kill(model: str, kills: int, steps: int, seed: int) -> str:
    """Kills a model's training so many times, over as many runs as that takes; says what came of it."""
    draw = random.Random(f"{seed}/{model}")
    # In memory, where there is such a folder: a kill loses nothing that is written, flushed to the disk or not.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        work, whole = Path(folder) / "work", Path(folder) / "whole"
        work.mkdir()
        given = options(model, work, steps)
        begin = time.perf_counter()
        last = in_process(given, work / "run", None, None)
        seconds = time.perf_counter() - begin
        shutil.copytree(work, whole)
        done, runs, moments = 0, 0, []
        while done < kills:
            fresh(work / "run")
            ended = False
            while not ended:
                if done >= kills or draw.random() < 0.1:
                    moment = None, None
                elif draw.random() < 0.7:
                    moment = draw.randint(1, last), None
                else:
                    moment = None, draw.uniform(0, seconds)
                moments.append(moment)
                ended = in_process(given, work / "run", *moment) is not None
                done += not ended
            runs += 1
            if found := compare(whole, work):
                raise SystemExit(f"{model}, seed {seed}, after the moments {moments}: {'; '.join(found)}")
        return f"{model}: {done} kills in {runs} runs of {steps} steps, {last} operations on files; the same to the bit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each model [default: 20]")
    parser.add_argument("--steps", type=int, default=8, help="of a run [default: 8]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    for model in MODELS:
        print(kill(model, given.kills, given.steps, given.seed), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
