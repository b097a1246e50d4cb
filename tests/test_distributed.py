"""Several processes on this machine, over gloo: each with one thread, forked from one that has imported
torch, since importing takes longer than what is tested."""

import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastlm
from fastlm import checkpoint, distributed, processes
from fastlm.data import evaluation_batches
from fastlm.train import Interrupted, TrainOptions, resume, start

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
HERE = Path(__file__).parent
PATIENCE = 120  # seconds that a group of processes may take


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """``call(size, function, *arguments)`` runs a function of this file in the processes of a group and
    gives what each returns; an error in one of them is the test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.distributed.fsdp", "torch.distributed.tensor"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds this file by it
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parent))))
        multiprocessing.forkserver.ensure_running()

    def call(size, function, *arguments):
        meeting = tmp_path_factory.mktemp("group") / "store"
        pipes, workers = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(sender, str(meeting), rank, size, function, arguments), daemon=True
            )
            worker.start()
            sender.close()
            pipes.append(receiver)
            workers.append(worker)
        try:
            results, deadline = {}, time.monotonic() + PATIENCE
            while len(results) < size:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
                assert ready, f"only processes {sorted(results)} of {size} have answered"
                for pipe in ready:
                    rank = pipes.index(pipe)
                    failure, results[rank] = pipe.recv()
                    assert failure is None, f"in process {rank} of {size}:\n{failure}"
            return [results[rank] for rank in range(size)]
        finally:
            for worker in workers:
                worker.kill()
                worker.join()

    return call


def _work(sender, meeting, rank, size, function, arguments):
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        sender.send((None, function(rank, size, *arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    dist.barrier()
    dist.destroy_process_group()


# ---- losses over a shared vocabulary -------------------------------------------------------

C, D = 23, 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of a result's largest value
SHARDS = {2: ([16, 7], [0, 23]), 4: ([1, 12, 0, 10],)}
OPTIONS = (
    {},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "z_loss": 1e-2, "return_lse": True},
    {"label_smoothing": 0.1, "weight": True, "softcap": 2.0},
    {"weight": True, "softcap": 3.0, "return_lse": True, "ignore_index": 3},
    {"reduction": "none", "weight": True, "label_smoothing": 1.0, "z_loss": 1e-2},
)
SHAPES = ((), (6,), (4, 3))  # of tokens; the last is a two-dimensional loss


def _results(function, *leaves):
    """Outputs and gradients for drawn upstream gradients, the same on every process."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def _draw(shape, dtype, ignored):
    """Logits, hidden states, classifier, its bias, targets and class weights, alike on all processes."""
    torch.manual_seed(0)
    batch, rest = shape[:1], shape[1:]
    logits = 3 * torch.randn(*batch, C, *rest)
    hidden, weight, bias = torch.randn(*batch, D), torch.randn(C, *rest, D), torch.randn(C, *rest)
    target = torch.randint(C, shape)
    if target.dim():
        target[0] = ignored
        target[1] = 3
    return *(x.to(dtype) for x in (logits, hidden, weight, bias)), target, (0.5 + torch.rand(C)).to(dtype)


def _compare_losses(rank, size):
    fastlm.ops.TINY = dict.fromkeys(fastlm.ops.TINY, 0)
    for sizes in SHARDS[size]:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for i, given in enumerate(OPTIONS):
            for shape in SHAPES:
                for dtype in (torch.float32, torch.bfloat16):
                    _compare_loss(mine, sizes if i % 2 else None, given, shape, dtype)


def _compare_loss(mine, sizes, given, shape, dtype):
    x, h, w, b, target, class_weight = _draw(shape, dtype, given.get("ignore_index", -100))
    given = given | {"weight": class_weight if "weight" in given else None}
    shared = given | {"sizes": sizes}
    axis = 1 if shape else 0
    narrow = (slice(None), mine) if axis else (mine,)
    pairs = [
        (
            _results(lambda x: fastlm.cross_entropy(x, target, **given), x),
            _results(lambda x: distributed.cross_entropy(x, target, **shared), x[narrow]),
            {-1: narrow},
        ),
        (
            _results(lambda h, w, b: fastlm.linear_cross_entropy(h, w, target, linear_bias=b, **given), h, w, b),
            _results(
                lambda h, w, b: distributed.linear_cross_entropy(h, w, target, linear_bias=b, **shared),
                h, w[mine], b[mine],
            ),
            {-1: mine, -2: mine},
        ),
    ]  # fmt: skip
    for whole, shard, cuts in pairs:
        for i, (a, b) in enumerate(zip(shard, whole, strict=True), -len(whole)):
            what = f"{given}, {shape}, {dtype}: {i}"
            atol = TOLERANCE[dtype] * b.nan_to_num().abs().max().item()  # the mean over no token is nan
            torch.testing.assert_close(
                a, b[cuts[i]] if i in cuts else b, rtol=0, atol=atol, equal_nan=True, msg=what
            )


def _edge_cases(rank, size):
    """Two processes, of 4 and 3 classes."""
    sizes = [4, 3]
    mine = slice(*((0, 4), (4, 7))[rank])
    inf = float("inf")
    x = torch.randn(6, 7)
    x[0, :4], x[1, 5:], x[2, 4:], x[3] = -inf, -inf, -inf, 100 * x[3]
    x[4, 2] = 60.0  # a confident token, and a share that it dwarfs
    target = torch.tensor([5, 0, 6, 2, 2, -100])
    whole = _results(lambda x: fastlm.cross_entropy(x, target, reduction="none", return_lse=True), x)
    shard = _results(
        lambda x: distributed.cross_entropy(x, target, reduction="none", return_lse=True), x[:, mine]
    )
    torch.testing.assert_close(shard[:2], whole[:2])
    assert whole[0][2] == inf  # of a target whose whole shard is impossible; its gradient is arbitrary
    finite = [0, 1, 3, 4, 5]
    torch.testing.assert_close(shard[2][finite], whole[2][finite, mine])

    nothing = _results(lambda x: distributed.cross_entropy(x, torch.full((6,), -100)), x[:, mine])
    assert nothing[0].isnan() and not nothing[1].any()

    empty = _results(lambda x: distributed.cross_entropy(x, target[:0], reduction="sum"), x[:0, mine])
    assert empty[0] == 0 and empty[1].shape == (0, sizes[rank])

    with fastlm.use_backend("eager"):
        plain = _results(lambda x: distributed.cross_entropy(x, target[3:], z_loss=0.1), x[3:, mine])
    fused = _results(lambda x: distributed.cross_entropy(x, target[3:], z_loss=0.1), x[3:, mine])
    torch.testing.assert_close(plain, fused)

    h, w = torch.randn(6, D), torch.randn(7, D)
    with torch.autocast("cpu", torch.bfloat16):
        whole = _results(lambda h, w: fastlm.linear_cross_entropy(h, w, target), h, w)
        shard = _results(lambda h, w: distributed.linear_cross_entropy(h, w, target), h, w[mine])
    assert shard[0].dtype == whole[0].dtype == torch.float32
    torch.testing.assert_close(shard, [*whole[:2], whole[2][mine]], rtol=1.6e-2, atol=1e-2)


def _second_derivatives(rank, size):
    """Of a penalty on both gradients, that of the classifier's shards being summed over the group."""
    mine = slice(*((0, 4), (4, 7))[rank])
    target = torch.tensor([0, 6, 3, -100])
    options = {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 1e-2}
    hidden = torch.randn(4, D, dtype=torch.float64).requires_grad_()
    whole = torch.randn(7, D, dtype=torch.float64)

    def penalty(loss, w, total):
        w = w.clone().requires_grad_()
        dh, dw = torch.autograd.grad(loss(hidden, w, target, **options), (hidden, w), create_graph=True)
        return torch.autograd.grad(dh.square().sum() + total(dw.square().sum()), (hidden, w))

    expected = penalty(fastlm.linear_cross_entropy, whole, lambda x: x)
    actual = penalty(
        distributed.linear_cross_entropy, whole[mine], lambda x: distributed._Total.apply(x, None)
    )
    torch.testing.assert_close(actual, (expected[0], expected[1][mine]))


def _refusals(rank, size):
    """What is wrong on one process is an error on all."""
    x, target = torch.randn(3, 4), torch.tensor([0, 7, 2])
    loss = distributed.cross_entropy
    other = dist.new_group([0])
    for message, kind, function in (
        ("differ in tokens: [3, 2]", RuntimeError, lambda: loss(x[rank:], target[rank:])),
        ("differ in dtype", RuntimeError, lambda: loss(x.to((torch.float32, torch.float64)[rank]), target)),
        (
            "differ in whether input requires a gradient: [0, 1]",
            RuntimeError,
            lambda: loss(x.clone().requires_grad_(rank == 1), target),
        ),
        ("target 8 is out of bounds for 8 classes", IndexError, lambda: loss(x, target + 1)),
        ("target has shape (2,), expected (3,)", ValueError, lambda: loss(x, target[:2])),
        ("no class probabilities", RuntimeError, lambda: loss(x, torch.rand(3, 8))),
        ("all 8 classes", RuntimeError, lambda: loss(x, target, weight=torch.ones(4))),
        (
            "sizes has 3 entries, expected one for each of 2",
            ValueError,
            lambda: loss(x, target, sizes=[4] * 3),
        ),
        (f"sizes[{rank}] is 5", ValueError, lambda: loss(x, target, sizes=[5, 5])),
        ("reduction is 'all'", ValueError, lambda: loss(x, target, reduction="all")),
        (
            "expected equal input and linear_weight last dimensions",
            RuntimeError,
            lambda: distributed.linear_cross_entropy(x, torch.randn(4, 5), target),
        ),
        ("no rule for functorch", RuntimeError, lambda: torch.func.grad(lambda x: loss(x, target))(x)),
    ):
        with pytest.raises(kind) as caught:
            function()
        assert message in str(caught.value)
    if rank == 1:
        with pytest.raises(RuntimeError, match="this process, number 1, is not in the group"):
            loss(x, target, other)
    else:
        alone = loss(x, target.clamp(max=3), other)
        torch.testing.assert_close(alone, fastlm.cross_entropy(x, target.clamp(max=3)))


def _losses_of_two(rank, size):
    _compare_losses(rank, size)
    torch.manual_seed(0)
    _edge_cases(rank, size)
    _second_derivatives(rank, size)
    _refusals(rank, size)


@pytest.mark.parametrize(("size", "check"), ((2, _losses_of_two), (4, _compare_losses)), ids=("2", "4"))
def test_losses_as_of_one_process(call, size, check):
    call(size, check)


def test_a_loss_needs_a_group():
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group"):
        distributed.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]))


# ---- training ------------------------------------------------------------------------------

MODELS = {
    "gpt": {"n_layer": 2, "n_head": 3, "n_embd": 18},  # widths that 4 processes can't halve
    "gru": {"n_layer": 1, "n_embd": 10, "n_hidden": 14},
}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("".join(f"line {i}: {i * i % 97} and {i % 7}\n" for i in range(1000)))

    def make(model="gpt", **changes):
        return TrainOptions(**{
            "model": model, **MODELS[model], "data": [str(folder / "a.txt")], "cache": str(folder / "cache"),
            "block_size": 16, "batch_size": 6, "accumulate": 2, "lr": 1e-2, "warmup": 2, "max_steps": 6,
            "eval_every": 3, "eval_blocks": 5, "save_every": 2, "threads": 1, "tensorboard": False,
            "weight_decay": 0.3, "clip": 0.5, **changes,
        })  # fmt: skip

    return make


def curve(folder: Path):
    """Every record of a run's metrics, without those of time."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def check_alike(folder: Path, expected: Path, rtol: float):
    """Two runs with the same curve and the same weights at its end, to rounding."""
    assert len(curve(folder)) == len(curve(expected))
    for a, b in zip(curve(folder), curve(expected), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=rtol)
    a, b = checkpoint.load_weights(folder), checkpoint.load_weights(expected)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def _train(rank, size, runs):
    """Each run (options, folder) to its end, and its loss over all of the validation text."""
    losses = []
    for options, folder in runs:
        trainer = start(options, Path(folder))
        trainer.train()
        losses.append(trainer.final_loss())
    return losses


def _interrupt(rank, size, folder, options, parallel, at):
    """A run, begun or gone on with, of which the last process is asked to stop at a step."""
    trainer = resume(Path(folder), parallel=parallel) if options is None else start(options, Path(folder))
    step = trainer._step

    def interrupted():
        step()
        trainer.interrupted = rank == size - 1 and trainer.progress.step == at

    trainer._step = interrupted
    with pytest.raises(Interrupted):
        trainer.train()


def _collectives(rank, size, options, folder):
    """How often gradients are sent in a step, by the kind of parallelism and the passes of a step."""
    counts = {}
    for parallel in ("ddp", "fsdp"):
        for passes in (1, 3):
            given = TrainOptions(**vars(options) | {"parallel": parallel, "accumulate": passes})
            trainer = start(given, Path(folder) / f"{parallel}{passes}")
            step = trainer._step

            def profiled():
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    step()  # noqa: B023
                events = [e for e in profile.key_averages() if e.key.startswith("c10d::")]
                counts[key] = sum(e.count for e in events if "reduce" in e.key)  # noqa: B023

            trainer._step, key = profiled, (parallel, passes)
            trainer.train()
    return counts


def test_two_processes_train_as_one(call, options, tmp_path):
    runs = [
        (options("gpt", parallel="fsdp"), "fsdp"),
        (options("gru", parallel="ddp", patience=3), "ddp"),
    ]
    (first, second) = call(2, _train, [(given, str(tmp_path / name)) for given, name in runs])
    assert first == second
    for (given, name), loss in zip(runs, first, strict=True):
        alone = start(given, tmp_path / f"{name}-alone")
        alone.train()
        assert alone.final_loss() == pytest.approx(loss, rel=1e-5)
        check_alike(tmp_path / name, tmp_path / f"{name}-alone", rtol=1e-4)


def test_four_processes_with_unequal_shares(call, options, tmp_path):
    """Six sequences on four processes, and gradients that are sent once a step."""
    runs = [
        (options("gpt", parallel="ddp"), "ddp"),
        (options("gru", parallel="fsdp"), "fsdp"),
    ]
    call(4, _train, [(given, str(tmp_path / name)) for given, name in runs])
    for given, name in runs:
        start(given, tmp_path / f"{name}-alone").train()
        check_alike(tmp_path / name, tmp_path / f"{name}-alone", rtol=1e-4)


def test_gradients_are_sent_once_a_step(call, options, tmp_path):
    # DDP fills its buckets in another way from the second step on.
    (counts, _) = call(2, _collectives, options(max_steps=2), str(tmp_path))
    assert counts["ddp", 1] == counts["ddp", 3] == 2  # one bucket, and the loss
    assert counts["fsdp", 1] == counts["fsdp", 3] == 5  # two blocks, the rest, the norm and the loss


def test_resumed_on_another_number_of_processes(call, options, tmp_path):
    """Begun by two, gone on with by four and by one, each stopped where no checkpoint was due."""
    given = options(max_steps=9, save_every=4)
    start(given, tmp_path / "alone").train()
    folder = tmp_path / "moved"
    call(2, _interrupt, str(folder), given, None, 3)
    call(4, _interrupt, str(folder), None, "fsdp", 6)
    trainer = resume(folder)
    assert trainer.progress.step == 6 and trainer.options.parallel == "ddp"
    trainer.train()
    check_alike(folder, tmp_path / "alone", rtol=1e-4)


def _command(*arguments):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "fastlm",
        "train",
        *arguments,
    ]


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processes are found in /proc")
def test_killed_process(call, options, tmp_path):
    """Under torchrun: the others end at once and say why; the same command goes on, bit by bit."""
    given = options(max_steps=80, save_every=10, eval_every=40, dropout=0.1, accumulate=1)
    folder = tmp_path / "killed"
    arguments = [
        part
        for name, value in vars(given).items()
        if value is not None and name not in ("data", "tensorboard", "tie")
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    arguments += [
        "--data",
        *given.data,
        "--no-tensorboard",
        "--sample",
        "0",
        "--out",
        str(folder),
        "--or-resume",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastlm.__file__).parents[1])}
    log = tmp_path / "log"
    with open(log, "w") as output:
        launcher = subprocess.Popen(_command(*arguments), stdout=output, stderr=output, env=environment)
        while launcher.poll() is None and not (folder / "checkpoints/step-20").exists():
            time.sleep(0.01)
        workers = _children(launcher.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        assert launcher.wait(60) != 0
    assert "lost another process of this run" in log.read_text(), log.read_text()
    assert f"fastlm train --resume --out {folder}" in log.read_text()

    done = subprocess.run(_command(*arguments), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps, ") == 1  # one process writes
    call(2, _train, [(given, str(tmp_path / "whole"))])
    assert curve(folder) == curve(tmp_path / "whole")
    for name, tensor in checkpoint.load_weights(tmp_path / "whole").items():
        assert torch.equal(tensor, checkpoint.load_weights(folder)[name])


def _fail(rank, size, folder):
    """An error of one process is raised by it, and reported to the others."""
    group = processes.join()

    def fail():
        raise OSError("the disk is full")

    with pytest.raises((OSError, processes.Elsewhere)) as caught:
        group.first(fail)
    assert str(caught.value) == ("process 0: " if rank else "") + "the disk is full"
    assert isinstance(caught.value, processes.Elsewhere) == (rank > 0)
    with pytest.raises(ValueError, match="processes 0 and 1 of this run have different ranks"):
        group.check_same("ranks", rank)
    with pytest.raises(ValueError, match="batch_size is 1: 2 processes need a sequence each"):
        group.share(1)
    assert group.tell(rank) == 0 and group.every(lambda: rank) == rank
    assert group.each_machine(lambda: "made once") == "made once"


def test_an_error_ends_all(call, tmp_path):
    call(2, _fail, str(tmp_path))


@pytest.mark.parametrize("parts", (1, 2, 3, 4))
def test_evaluation_is_shared_out(parts):
    """Every token is predicted once by one of the parts, in equally many batches."""
    tokens = torch.arange(101).numpy()
    batches = [list(evaluation_batches(tokens, 8, 2, part=(k, parts))) for k in range(parts)]
    assert len({len(b) for b in batches}) == 1
    targets = torch.cat([t.flatten() for part in batches for _, t in part])
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, 101))
