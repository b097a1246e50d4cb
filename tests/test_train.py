"""The training loop: it learns, and a run that was killed goes on as if it had not been."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlm import checkpoint, train
from fastlm.models import GPT, GPTConfig
from fastlm.tokenizer import ByteTokenizer
from fastlm.train import Interrupted, Progress, TrainOptions, evaluate, learning_rate, resume, start

SMALL = {
    "gpt": {"n_layer": 1, "n_head": 2, "n_embd": 16},
    "gru": {"n_layer": 2, "n_embd": 8, "n_hidden": 16},
}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} and {i % 7}\n" for i in range(1500)))
    return path


@pytest.fixture
def options(corpus, tmp_path):
    """Makes the options of a run that takes a second."""

    def make(model="gpt", **changes):
        fresh = {} if "init_from" in changes else {"model": model, **SMALL[model], "dropout": 0.1}
        return TrainOptions(**{
            **fresh, "data": [str(corpus)], "cache": str(tmp_path / "cache"),
            "block_size": 16, "batch_size": 2, "lr": 1e-2, "warmup": 4, "max_steps": 24,
            "eval_every": 8, "eval_blocks": 4, "save_every": 5, "threads": 1,
            "tensorboard": False, **changes,
        })  # fmt: skip

    return make


@pytest.fixture(autouse=True)
def keep_threads(restore_threads):
    """A trainer sets torch's thread count."""


def curve(folder: Path):
    """Every record of a run's metrics, without those of time."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def weights(folder: Path):
    return (checkpoint.find_model(folder) / "model.safetensors").read_bytes()


class Killed(Exception):
    pass


def train_until(trainer, step):
    """Trains up to ``step``, and stops there without any chance to save."""

    def report(kind, values):
        if kind == "step" and values["step"] == step:
            raise Killed

    trainer.report = report
    with pytest.raises(Killed):
        trainer.train()
    trainer.run._lock.close()  # as the end of a process does


@pytest.mark.parametrize("model", SMALL)
def test_resumed_to_the_bit(options, tmp_path, model):
    """Killed before the first checkpoint, between two, right after one, and more than once."""
    options = options(model, accumulate=2, weight_decay=0.3)
    start(options, tmp_path / "whole").train()
    expected = curve(tmp_path / "whole")
    assert [r["step"] for r in expected if r["kind"] == "step"] == list(range(1, 25))
    assert [r["step"] for r in expected if r["kind"] == "eval"] == [8, 16, 24]
    for kills in ([2], [7], [10, 11], [3, 9, 23]):
        folder = tmp_path / f"killed{kills}"
        trainer = start(options, folder)
        for step in kills:
            train_until(trainer, step)
            torch.randn(3)  # the random state outside is another
            trainer = resume(folder)
        trainer.train()
        assert curve(folder) == expected
        assert weights(folder) == weights(tmp_path / "whole")


def test_resumed_after_sigkill(options, tmp_path, tiny_calls_as_shipped):
    """A process killed from outside, at a moment that nothing in it chose."""
    options = options(max_steps=400, save_every=20, eval_every=100)
    start(options, tmp_path / "whole").train()
    folder = tmp_path / "killed"
    given = {
        k: v for k, v in vars(options).items() if v is not None and k not in ("data", "tensorboard", "tie")
    }
    command = [sys.executable, "-m", "fastlm", "train", "--out", str(folder), "--sample", "0"]
    arguments = [a for k, v in given.items() for a in (f"--{k.replace('_', '-')}", str(v))]
    arguments += ["--data", options.data[0], "--no-tensorboard"]
    log = tmp_path / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command + arguments, stdout=output, stderr=output)
        while process.poll() is None and not (folder / "checkpoints/step-60").exists():
            time.sleep(0.005)
        process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()
    done = subprocess.run(command + ["--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert curve(folder) == curve(tmp_path / "whole")
    assert weights(folder) == weights(tmp_path / "whole")


def test_learns(options, tmp_path):
    trainer = start(options(max_steps=150, dropout=0.0, eval_every=150), tmp_path / "run")
    trainer.train()
    records = curve(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(math.log(256), abs=0.7)
    assert records[-1]["kind"] == "eval" and records[-1]["loss"] < 2.5
    assert records[-1]["bits_per_byte"] == pytest.approx(records[-1]["loss"] / math.log(2))


def test_gradient_accumulation_is_a_larger_batch(options, tmp_path):
    for name, sizes in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "accumulate": 2})):
        start(options(**sizes, dropout=0.0, max_steps=5), tmp_path / name).train()
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_only_matrices_decay(options, tmp_path):
    trainer = start(options(weight_decay=0.5), tmp_path / "run")
    decayed, free = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and all(p.dim() == 2 for p in decayed["params"])
    assert free["weight_decay"] == 0 and all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(trainer.model.parameters()))


def test_gradients_are_clipped(options, tmp_path):
    """AdamW's first mean is 0.1 of the gradient that it got."""
    trainer = start(options(clip=0.01, max_steps=1, dropout=0.0), tmp_path / "run")
    trainer.train()
    assert curve(tmp_path / "run")[0]["grad_norm"] > 0.1  # the one logged is from before
    means = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.model.parameters()]
    assert torch.cat([m.flatten() for m in means]).norm().item() / 0.1 == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_autocast(options, tmp_path):
    trainer = start(options(dtype="bfloat16", dropout=0.0, max_steps=100), tmp_path / "run")
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    trainer.train()
    losses = [r["loss"] for r in curve(tmp_path / "run") if r["kind"] == "step"]
    assert losses[-1] < losses[0] - 1


def test_schedule():
    options = TrainOptions(lr=1.0, min_lr=0.1, warmup=10, max_steps=100)
    lr = [learning_rate(options, Progress(step, 100)) for step in range(101)]
    assert lr[0] == pytest.approx(0.1) and lr[4] == pytest.approx(0.5, abs=0.01)
    assert max(lr) == max(lr[9:11]) and lr[100] == pytest.approx(0.1)
    assert lr[50] == pytest.approx(0.55)


def test_a_new_plan_bends_the_schedule_without_a_jump():
    progress = Progress(step=20, seconds=10.0)
    progress.plan(limit=100)
    assert progress.max_steps == 200 and progress.done() == 0
    progress.step, progress.seconds = 65, 37.0  # a quarter of the steps, at 0.6 s: 118 s in all
    progress.plan(limit=100)
    assert progress.max_steps == 200
    progress.step, progress.seconds = 110, 82.0  # half of them, at 0.8 s
    before = progress.done()
    progress.plan(limit=100)
    assert progress.done() == before == 0.5
    assert progress.max_steps == 132
    progress.step = 132
    assert progress.done() == 1
    progress.seconds = 130.0
    progress.plan(limit=100)
    assert progress.max_steps == 132


def test_a_timed_run_ends_in_time_and_resumes_on_its_plan(options, tmp_path, monkeypatch):
    """By a clock of ours: a step takes 0.03 s at first, 0.06 s from some moment on."""
    now = 0.0

    def clock():
        nonlocal now
        now += 0.01 if now < 2 else 0.02
        return now

    monkeypatch.setattr(train.time, "perf_counter", clock)
    options = options(max_steps=None, max_seconds=4.0, save_every=30, eval_every=1000)
    trainer = start(options, tmp_path / "run")
    train_until(trainer, 50)
    trainer.run._lock.close()
    plan = json.loads((tmp_path / "run/checkpoints/step-30/trainer.json").read_text())
    assert plan["max_steps"] == pytest.approx(4.0 / 0.03, abs=2)
    trainer = resume(tmp_path / "run")
    assert trainer.progress.step == 30 and trainer.progress.max_steps == plan["max_steps"]
    trainer.train()
    assert trainer.progress.step == trainer.progress.max_steps < plan["max_steps"] - 20
    assert 3.5 < trainer.progress.seconds < 4.0 * train.LATE
    last = [r["lr"] for r in curve(tmp_path / "run") if r["kind"] == "step"][-1]
    assert last < 0.15 * options.lr


def test_early_stop_keeps_the_best(options, tmp_path):
    """A rate far too high: it gets worse from some point on."""
    options = options(
        max_steps=2000, eval_every=5, patience=2, lr=3e-2, weight_decay=0.0, data=None, warmup=1
    )
    Path(tmp_path / "few.txt").write_text("some words " * 40)
    options.data = [str(tmp_path / "few.txt")]
    options.dropout = 0.0
    trainer = start(options, tmp_path / "run")
    trainer.train()
    losses = {r["step"]: r["loss"] for r in curve(tmp_path / "run") if r["kind"] == "eval"}
    best = min(losses, key=losses.get)
    assert trainer.progress.stopped and max(losses) == best + 10 < 2000
    model, _ = checkpoint.load_model(tmp_path / "run")
    assert evaluate(model, trainer.corpus.val, 16, limit=4) == pytest.approx(losses[best])


def test_evaluation_counts_every_token_once():
    model = GPT(GPTConfig(256, 16, n_embd=16, n_layer=1, n_head=2))
    tokens = torch.randint(256, (16 * 5 + 8,)).numpy()
    expected = [
        model.eval()(torch.tensor(tokens[i : i + 17])[None, :-1], torch.tensor(tokens[i + 1 : i + 17])[None])
        * min(16, len(tokens) - 1 - i)
        for i in range(0, 80, 16)
    ]
    expected.append(model(torch.tensor(tokens[80:-1])[None], torch.tensor(tokens[81:])[None]) * 7)
    model.train()
    assert evaluate(model, tokens, 16, batch_size=4) == pytest.approx(sum(expected).item() / 87, rel=1e-5)
    assert model.training


def test_interrupt_saves_and_can_go_on(options, tmp_path):
    options = options()
    start(options, tmp_path / "whole").train()
    trainer = start(options, tmp_path / "run")
    trainer.report = lambda kind, values: (
        os.kill(os.getpid(), signal.SIGINT) if (kind, values["step"]) == ("step", 12) else None
    )
    with pytest.raises(Interrupted):
        trainer.train()
    assert checkpoint.find_model(tmp_path / "run").name == "step-12"
    trainer.run._lock.close()
    resume(tmp_path / "run").train()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_checkpoints_are_whole_and_few(options, tmp_path):
    folder = tmp_path / "run"
    start(options(), folder).train()
    assert [p.name for p in checkpoint.list_steps(folder / "checkpoints")] == ["step-20", "step-24"]
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert not any(name.endswith((".pt", ".pkl", ".bin", ".tmp")) for name in names)
    assert {p.name for p in (folder / "checkpoints/step-24").iterdir()} == {
        "config.json", "model.safetensors", "trainer.json", "trainer.safetensors",
    }  # fmt: skip


def test_a_crash_while_saving_leaves_the_last_checkpoint(options, tmp_path, monkeypatch):
    start(options(), tmp_path / "whole").train()
    trainer, write = start(options(), tmp_path / "run"), checkpoint.write_tensors

    def crash(path, tensors):
        if trainer.progress.step == 15:
            path.write_bytes(b"half")
            raise Killed
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", crash)
    with pytest.raises(Killed):
        trainer.train()
    trainer.run._lock.close()
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    assert checkpoint.find_model(tmp_path / "run").name == "step-10"
    resume(tmp_path / "run").train()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_an_existing_run_is_kept(options, tmp_path):
    folder = tmp_path / "run"
    trainer = start(options(max_steps=5), folder)
    with pytest.raises(ValueError, match="another process is training there"):
        resume(folder)
    trainer.train()
    trainer.run._lock.close()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="holds a run already; --resume goes on with it, --overwrite"):
        start(options(), folder)
    bad = options(block_size=10**6)
    with pytest.raises(ValueError, match="the corpus is too short"):
        start(bad, folder, overwrite=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    start(options(max_steps=3, save_every=3), folder, overwrite=True).train()
    assert [p.name for p in checkpoint.list_steps(folder / "checkpoints")] == ["step-3"]


def test_a_folder_that_is_no_run_is_never_overwritten(options, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not a run of fastlm train"):
            start(options(), tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("trainer.safetensors", lambda b: b[: len(b) // 2], "damaged or not a safetensors file"),
        ("model.safetensors", lambda b: b[:-1], "damaged or not a safetensors file"),
        ("trainer.json", lambda b: b[:20], "trainer.json: damaged"),
        ("trainer.json", lambda b: b'{"step": 1, "other": 2}', "not a checkpoint of this run"),
        ("../../run.json", lambda b: b[:-9], "run.json: damaged"),
        ("../../run.json", lambda b: b'{"colour": 1}', "run.json: damaged"),
    ],
)
def test_damaged_runs(options, tmp_path, file, damage, message):
    trainer = start(options(max_steps=5), tmp_path / "run")
    trainer.train()
    trainer.run._lock.close()
    path = tmp_path / "run/checkpoints/step-5" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "run")


def test_resume_checks_what_it_goes_on_with(options, tmp_path, corpus):
    with pytest.raises(ValueError, match="no run of fastlm train here"):
        resume(tmp_path / "nowhere")
    for name, changes in (("run", {}), ("other", {"n_embd": 32})):
        trainer = start(options(max_steps=5, **changes), tmp_path / name)
        trainer.train()
        trainer.run._lock.close()
    ours, other = (tmp_path / name / "checkpoints/step-5" for name in ("run", "other"))
    (ours / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not a checkpoint of this model"):
        resume(tmp_path / "run")
    corpus.write_text(corpus.read_text() + "more")
    with pytest.raises(ValueError, match="the corpus or the tokenizer has changed since this run began"):
        resume(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    trainer = start(options(), tmp_path / "run")
    train_until(trainer, 12)
    trainer = resume(tmp_path / "run")
    with torch.no_grad():
        next(trainer.model.parameters())[0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 11: try a smaller lr"):
        trainer.train()
    assert checkpoint.find_model(tmp_path / "run").name == "step-10"


def test_tensorboard_logs(options, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = start(options(max_steps=12, tensorboard=True), tmp_path / "run")
    train_until(trainer, 7)
    resume(tmp_path / "run").train()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("step/loss")]
    expected = [(r["step"], r["loss"]) for r in curve(tmp_path / "run") if r["kind"] == "step"]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert [e.step for e in events.Scalars("eval/bits_per_byte")] == [8, 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lstm"}, "model must be one of gpt, gru, got 'lstm'"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"max_steps": -1}, "max_steps must be positive"),
        ({"clip": -1.0}, "clip must be finite and >= 0, got -1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"max_seconds": 3.0}, "max_steps and max_seconds can't be given together"),
        ({"n_hidden": 8}, "n_hidden is no option of model 'gpt'"),
    ],
)
def test_bad_options(options, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{"max_steps": 3, **changes})


def test_bad_device(options, tmp_path):
    with pytest.raises(ValueError, match="device 'abacus': "):
        start(options(device="abacus"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_saved_tokenizer_must_fit_the_model(tmp_path):
    checkpoint.save_model(tmp_path, GPT(GPTConfig(16, 16, n_embd=16, n_layer=1, n_head=2)), ByteTokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model 16"):
        checkpoint.load_model(tmp_path)
