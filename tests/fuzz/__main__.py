"""Fuzzing of the boundary of every operator: `make fuzz [ARGS="--minutes 10"]`.

Draws calls of the public functions, of fastlm.nn's modules and of the raw operators (torch.ops.fastlm), with
random shapes, memory layouts, dtypes and options, right ones and ones in which arguments were altered, and holds
each to what check.py says: no crash and no hang; right calls agree with the reference; wrong ones raise a
documented type of error that names function and argument; inputs stay as they are; the same bits when repeated;
fake kernels describe what the real ones return; no memory lost.

Calls run in batches in a child process, which writes each down before it runs it. One that fails is shrunk and
printed as a command that runs it alone: `python tests/fuzz --call "Call(...)"`.
"""

import argparse
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import torch  # noqa: E402
from fuzz.calls import Call, T, leaves, replaced, without  # noqa: E402
from fuzz.check import Unmade, anonymous_bytes, judge, leak, repeat  # noqa: E402
from fuzz.draw import Drawer  # noqa: E402

ROOM = (
    4 << 30
)  # bytes of address space that a child may take beside what it has: a huge allocation then fails
PATIENCE = 60  # seconds for one call
CRASHED, HUNG = "the process dies of", "takes more than"


def parsed(text: str) -> Call:
    return eval(text, {"Call": Call, "T": T, "nan": float("nan"), "inf": float("inf")})


# ---- the child ----


def run_batch(seed: str, first: int, count: int, note: Path, seconds: float, leaks: bool) -> int:
    """Draws and judges `count` calls; prints those that fail. Before each call it is written to `note`."""
    descriptor = os.open(note, os.O_RDWR | os.O_CREAT)

    def write(call: Call, *unused) -> None:
        text = repr(call).encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))

    limit_memory()
    calls, failed, end = [], 0, time.monotonic() + seconds
    for number in range(first, first + count):
        if time.monotonic() > end:
            break
        call = Drawer(f"{seed}/{number}").call(write)
        write(call)
        problem = judged(call)
        calls.append(call)
        if problem:
            failed += 1
            report(shrunk(call, problem, judged, seconds=2), number)
    if leaks and time.monotonic() < end:
        failed += look_for_leaks(calls, write)
    print(f"done {len(calls)}", flush=True)
    return failed


def judged(call: Call) -> str | None:
    try:
        return judge(call)
    except Unmade:
        return None
    except Exception:
        return f"the fuzzer itself fails: {traceback.format_exc()[-1500:]}"


def limit_memory() -> None:
    if "LD_PRELOAD" in os.environ:  # a sanitizer's, which takes terabytes of addresses
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def look_for_leaks(calls: list[Call], write) -> int:
    """Where passes over all calls lose memory, tells of those that do."""
    sizes = []
    for _ in range(5):
        for call in calls:
            write(call)
            repeat(call)
        sizes.append(anonymous_bytes())
    if min(b - a for a, b in zip(sizes[1:], sizes[2:], strict=False)) < 256 * len(calls):
        return 0
    found = 0
    for call in calls:
        write(call)
        if lost := leak(call):
            found += 1
            report((call, f"loses {lost:.0f} bytes a call"), -1)
    return found


def report(found: tuple[Call, str], number: int) -> None:
    call, problem = found
    print(f"FAILED {number}\t{problem!r}\t{call!r}", flush=True)


# ---- shrinking ----


def smaller(call: Call):
    """Simpler calls, the boldest first."""
    for name, value in (("threads", 1), ("isa", None), ("autocast", None)):
        if getattr(call, name) != value:
            yield dataclasses.replace(call, **{name: value})
    for part in ("kwargs", "args"):
        tree = getattr(call, part)
        for path, value in leaves(tree):
            if part == "kwargs" and len(path) == 1:
                yield dataclasses.replace(call, kwargs=without(tree, path))
            if isinstance(value, T):
                for other in smaller_tensors(value):
                    yield dataclasses.replace(call, **{part: replaced(tree, path, other)})
            elif value is not None and part == "args" and not isinstance(value, (bool, list, tuple)):
                yield dataclasses.replace(call, args=replaced(tree, path, None))


def smaller_tensors(x: T):
    if x.grad:
        yield dataclasses.replace(x, grad=False)
    if x.layout != "contiguous":
        yield dataclasses.replace(x, layout="contiguous")
    if isinstance(x.values, tuple):
        return
    if x.values != "normal":
        yield dataclasses.replace(x, values="normal")
    for i, n in enumerate(x.shape):
        for less in {1, n // 2} if n > 1 else ():
            yield dataclasses.replace(x, shape=(*x.shape[:i], less, *x.shape[i + 1 :]))


def kind(problem: str | None) -> str | None:
    """What stays while a call is shrunk."""
    return problem and problem[:24]


def shrunk(call: Call, problem: str, judged, seconds: float) -> tuple[Call, str]:
    """A simpler call with the same problem."""
    end, went_on = time.monotonic() + seconds, True
    while went_on:
        went_on = False
        for other in smaller(call):
            if time.monotonic() > end:
                return call, problem
            found = judged(other)
            if kind(found) == kind(problem):
                call, problem, went_on = other, found, True
                break
    return call, problem


# ---- the parent ----


def child(*arguments: str, timeout: float) -> tuple[int | None, str]:
    """Exit status, None where it hangs, and output."""
    process = subprocess.Popen(
        [sys.executable, str(HERE), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]
    return process.returncode, output


def run_alone(call: Call) -> str | None:
    """Its problem, in a process of its own."""
    status, output = child("--call", repr(call), timeout=PATIENCE)
    if status is None:
        return f"{HUNG} {PATIENCE} s"
    if status < 0:
        return f"{CRASHED} {signal.Signals(-status).name}"
    if "ERROR: AddressSanitizer" in output or "runtime error:" in output:
        return f"{CRASHED} a sanitizer's finding:\n{output[-3000:]}"
    return None if status == 0 else output.strip()


def batch(
    seed: str, first: int, count: int, seconds: float, leaks: bool
) -> tuple[int, list[tuple[Call, str]]]:
    """Calls made, and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "call"
        arguments = f"--seed={seed}", f"--first={first}", f"--calls={count}", f"--note={note}"
        rest = f"--seconds={seconds}", *(() if leaks else ("--no-leaks",))
        status, output = child(*arguments, *rest, timeout=4 * seconds + PATIENCE)
        found = [line.split("\t", 2)[1:] for line in output.splitlines() if line.startswith("FAILED ")]
        failed = [(parsed(call), eval(problem)) for problem, call in found]
        done = [line for line in output.splitlines() if line.startswith("done ")]
        if done:
            return int(done[0].split()[1]), failed
        if not note.exists():
            raise SystemExit(f"a child of the fuzzer ends with status {status}:\n{output}")
        call = parsed(note.read_text())
    problem = run_alone(call)
    if problem is None:  # what came before it is to blame
        return 0, [
            *failed,
            (call, f"status {status}, but not alone; after --seed={seed} --first={first}:\n{output[-2000:]}"),
        ]
    return 0, [*failed, shrunk(call, problem, run_alone, seconds=60)]


def fuzz(seed: str, minutes: float, calls: int, batches: float, leaks: bool) -> int:
    """Batches until the time is over; the number of calls that failed, each kind once."""
    end, first, made, known = time.monotonic() + 60 * minutes, 0, 0, {}
    while (left := end - time.monotonic()) > 0 and first < calls * batches:
        count, failed = batch(seed, first, calls, left, leaks)
        first, made = first + calls, made + count
        for call, problem in failed:
            key = call.name, problem[:60]
            known[key] = known.get(key, 0) + 1
            if known[key] == 1:
                print(f'{call.name}: {problem}\n    python tests/fuzz --call "{call!r}"', flush=True)
    print(f"{made} calls, {sum(known.values())} failed, of {len(known)} kinds (seed {seed})")
    return len(known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="[default: 10]")
    parser.add_argument("--seed", help="[default: another one each time]")
    parser.add_argument("--calls", type=int, default=500, help="in a process [default: 500]")
    parser.add_argument("--batches", type=float, default=float("inf"), help="[default: as time allows]")
    parser.add_argument("--no-leaks", action="store_true", help="don't look for lost memory")
    parser.add_argument("--call", help="run this one alone")
    for hidden in ("--first", "--note", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.call:
        limit_memory()
        problem = judged(parsed(given.call))
        print(problem or "no problem")
        return 1 if problem else 0
    if given.first:
        leaks = not given.no_leaks
        run_batch(given.seed, int(given.first), given.calls, Path(given.note), float(given.seconds), leaks)
        return 0
    seed = given.seed or str(time.time_ns() % 10**9)
    return 1 if fuzz(seed, given.minutes, given.calls, given.batches, not given.no_leaks) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
