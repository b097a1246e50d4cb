"""Training: one loop for every model.

The whole state is the parameters, AdamW's moments, torch's random state and the number of the step;
the data's order is a function of the seed and the step. A checkpoint holds all of it, so a run that
was killed and resumed goes on bit by bit as if it had not been, and may do so on another number of
processes.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW) and 2017, arXiv:1608.03983 (cosine).
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm import checkpoint, lora
from fastlm.data import (
    Corpus,
    evaluation_batches,
    open_corpus,
    predicted,
    prepare,
    training_batch,
    training_targets,
)
from fastlm.files import naming, write_file
from fastlm.models import MODELS, SequenceClassifier, SequenceClassifierConfig
from fastlm.models.base import Model, not_finite
from fastlm.options import PRESETS, TrainOptions
from fastlm.processes import Alone, Lost, join
from fastlm.tokenizer import Tokenizer, load_tokenizer

TIMED_STEPS = 20  # a timed run plans its number of steps after so many
LATE = 1.25  # and again where it would take so many times its time


def build_model(options: TrainOptions, tokenizer: Tokenizer, labels: Sequence[str] | None = None) -> Model:
    """The model that the options describe, with fresh weights; with ``labels``, their classifier."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    values = PRESETS[options.model] | {k: v for k, v in given.items() if v is not None}
    values |= {
        "vocab_size": tokenizer.vocab_size,
        "tie_word_embeddings": options.tie,
        "n_positions": options.block_size,
    }
    if options.model == "gpt":
        values |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), values["dropout"])
    else:
        values["tie_word_embeddings"] = options.tie and values["n_embd"] == values["n_hidden"]
    config = MODELS[options.model].config_from_dict(values)
    if labels is not None:
        return SequenceClassifier(SequenceClassifierConfig(config, labels))
    return MODELS[options.model](config)


def make_optimizer(model: Model, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (biases, norms) don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)


@torch.no_grad()
def measure(
    model: Model,
    split,
    block_size: int,
    batch_size: int = 16,
    limit: int | None = None,
    processes: Alone | None = None,
) -> dict[str, float]:
    """The model's metrics over ``split``: tokens (N,), each after the first predicted once within its block,
    examples, or labelled texts; with ``limit``, over so many blocks or rows of it. ``loss`` is a mean in nats
    a target; a classifier has ``accuracy`` and ``macro_f1`` too. The processes share the batches.
    ``ValueError`` where no target lies within a block."""
    processes = processes or Alone()
    device = next(model.parameters()).device
    training, totals = model.training, []
    model.eval()
    part = processes.rank, processes.size
    for batch in evaluation_batches(split, block_size, batch_size, limit, part):
        totals.append(model.tally(*(t.to(device) for t in batch)))
    model.train(training)
    processes.release(model)
    totals = processes.sum(*map(math.fsum, zip(*totals, strict=True)))
    if not totals or not totals[1]:
        raise ValueError(f"evaluate: nothing to predict within blocks of {block_size} tokens")
    return model.metrics(totals)


def evaluate(model: Model, split, block_size: int, *arguments, **options) -> float:
    """The ``loss`` of :func:`measure`, whose arguments these are."""
    return measure(model, split, block_size, *arguments, **options)["loss"]


class Interrupted(Exception):
    """Training was asked to stop, and has saved a checkpoint."""


@dataclass
class Progress:
    """What a run needs to go on, besides tensors.

    A timed run plans its number of steps from its first steps' speed, and saves the plan at once, so
    that a resumed run follows it to the bit. Only a machine that has become much slower makes a new
    plan, at a checkpoint: it keeps the share of the schedule that is done and spreads the rest over
    the steps left.
    """

    step: int = 0  # steps done
    max_steps: int | None = None  # None: no plan yet
    plan_step: int = 0  # step of the last plan
    plan_done: float = 0.0  # share of the schedule that was done then
    plan_seconds: float = 0.0
    seconds: float = 0.0  # spent training so far
    best_loss: float | None = None
    bad_evaluations: int = 0
    stopped: bool = False  # early, for want of progress or of time

    def done(self) -> float:
        """Share of the schedule that is done, 0 to 1."""
        if self.max_steps is None or self.max_steps <= self.plan_step:
            return self.plan_done
        share = (self.step - self.plan_step) / (self.max_steps - self.plan_step)
        return self.plan_done + (1 - self.plan_done) * share

    def plan(self, limit: float) -> None:
        """Sets the number of steps to what fits ``limit`` seconds at the speed since the last plan,
        if there is no plan yet or the one there is would run late."""
        steps = self.step - self.plan_step
        if steps == 0:
            return
        pace = (self.seconds - self.plan_seconds) / steps
        if self.max_steps is not None:
            if self.seconds + (self.max_steps - self.step) * pace <= LATE * limit:
                return
        left = (limit - self.seconds) / pace
        self.plan_done, self.plan_step, self.plan_seconds = self.done(), self.step, self.seconds
        self.max_steps = self.step + max(0, math.floor(left))


def learning_rate(options: TrainOptions, progress: Progress) -> float:
    """Of the next step: a cosine from ``lr`` down to ``min_lr`` of it, times a linear warm-up."""
    cosine = (1 + math.cos(math.pi * progress.done())) / 2
    share = options.min_lr + (1 - options.min_lr) * cosine
    return options.lr * share * min(1.0, (progress.step + 1) / options.warmup)


class Trainer:
    """Trains one model. ``report(kind, values)`` is called with "step" and "eval" records as they
    are written to the metrics file, by the first of the processes."""

    def __init__(
        self,
        options: TrainOptions,
        corpus: Corpus,
        tokenizer: Tokenizer,
        model: Model,
        run: checkpoint.Run,
        report: Callable[[str, dict], None] = lambda kind, values: None,
        processes: Alone | None = None,
    ):
        self.options, self.run, self.report = options, run, report
        self.corpus, self.tokenizer = corpus, tokenizer
        self.processes = processes or Alone()
        self.device = self.processes.device(options.device)
        self.offset, self.count = self.processes.share(options.batch_size)  # of the sequences of a pass
        if options.lora is not None:
            torch.manual_seed(options.seed)  # the first process has drawn more than the others
            lora.adapt(model, options)
        self.model = model.train()
        self.wrapped = self.processes.wrap(self.model, options.parallel, self.device)
        self.optimizer = make_optimizer(self.model, options)
        self.progress = Progress(max_steps=options.max_steps)
        self.bytes_per_token = len(corpus.val_text) / predicted(corpus.val)  # 0: of labels
        self.unit = "tokens" if corpus.labels is None else "texts"  # of targets
        self.interrupted = False
        self.saved = False
        self.metrics_path = run.folder / "metrics.jsonl"
        self.metrics = self.writer = None

    # Checkpoints

    def save(self) -> None:
        processes = self.processes
        weights = processes.gather(checkpoint.trained_tensors(self.model))
        tensors = processes.gather(checkpoint.optimizer_tensors(self.model, self.optimizer))
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        processes.first(lambda: self._write(weights, tensors))
        self.saved = True

    def _write(self, weights: dict, tensors: dict) -> None:
        if (name := not_finite(weights | tensors)) is not None:
            self._diverged(f"{name} isn't finite after step {self.progress.step}")
        with naming(self.metrics_path):
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        state = dataclasses.asdict(self.progress)
        self.run.save(self.progress.step, self.model, self.tokenizer, weights, tensors, state)

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint; ``ValueError`` where it is damaged or of another model."""
        processes = self.processes
        weights, tensors, state = processes.first(lambda: checkpoint.load_state(folder)) or (None, None, None)
        self._load_weights(folder, weights)
        keys = ("exp_avg", "exp_avg_sq", "step")
        places = {f"{key}.{name}": p for name, p in self.model.named_parameters() for key in keys}
        tensors, state = processes.spread(tensors, places), processes.tell(state)
        processes.every(lambda: self._restore(folder, tensors, state))

    def _restore(self, folder: Path, tensors: dict, state: dict) -> None:
        random = {key: tensors.pop(key, None) for key in ("random.cpu", "random.cuda")}
        try:
            progress = Progress(**state)
            if type(progress.step) is not int or progress.step < 0:
                raise ValueError(f"step is {progress.step!r}")
            if progress.step:  # before the first, AdamW has no moments
                checkpoint.restore_optimizer(self.model, self.optimizer, tensors)
            torch.set_rng_state(random["random.cpu"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: not a checkpoint of this run: {error}") from None
        if random["random.cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["random.cuda"])
        self.progress, self.saved = progress, True

    def _load_weights(self, folder: Path, weights: dict | None) -> None:
        """Takes those that the first process read in ``folder``."""
        weights = self.processes.spread(weights, checkpoint.trained_tensors(self.model))
        self.processes.every(lambda: checkpoint.load_trained(self.model, weights, folder))

    def final_loss(self) -> float:
        """Of the model that the run keeps, over the whole validation text."""
        return self.final_metrics()["loss"]

    def final_metrics(self) -> dict[str, float]:
        """As :meth:`final_loss`."""
        read = self.processes.first(lambda: checkpoint.load_weights(self.run.folder))
        self._load_weights(self.run.folder, read)
        options = self.options
        return measure(self.model, self.corpus.val, options.block_size, processes=self.processes)

    # The loop

    def train(self) -> None:
        """Trains to the end, or raises :class:`Interrupted` after SIGINT or SIGTERM, to any of the
        processes, and :class:`fastlm.processes.Lost` where one of them has ended."""
        self.processes.first(self._open_logs)
        self.began, self.seconds_before = time.perf_counter(), self.progress.seconds
        in_main = threading.current_thread() is threading.main_thread()  # else none may be set
        signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        handlers = {s: signal.signal(s, self._interrupt) for s in signals}
        try:
            with _Quiet(), self.processes.watched():
                self._run()
        except Lost:
            handlers.pop(signal.SIGTERM, None)  # torchrun sends it now; first there is a reason to report
            raise
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            self._close_logs()

    def _run(self) -> None:
        if self.options.init_from is not None and not self.saved:
            self.save()  # from now on the run goes on without that folder
        while not self.progress.stopped and self.progress.step != self.progress.max_steps:
            self._step()
            self._agree()
            if self._due(self.options.eval_every):
                self._evaluate()
            if self.interrupted or self._due(self.options.save_every) or self._first_plan_due():
                self._plan()
                self.save()
            if self.interrupted:
                raise Interrupted

    def _agree(self) -> None:
        """On what the processes decide by: the first one's clock, and whether any is to stop."""
        seconds = self.progress.seconds if self.processes.rank == 0 else 0.0
        interrupted, self.progress.seconds = self.processes.sum(self.interrupted, seconds)
        self.interrupted = interrupted > 0

    def _due(self, every: int) -> bool:
        progress = self.progress
        return progress.step % every == 0 or progress.step == progress.max_steps or progress.stopped

    def _first_plan_due(self) -> bool:
        """A slow model is planned earlier, while there is time left to plan."""
        progress = self.progress
        return progress.max_steps is None and (
            progress.step >= TIMED_STEPS or progress.seconds > self.options.max_seconds / 5
        )

    def _plan(self) -> None:
        progress, limit = self.progress, self.options.max_seconds
        if limit is not None and not progress.stopped and progress.step != progress.max_steps:
            progress.plan(limit)
            progress.stopped = progress.step >= progress.max_steps

    def _interrupt(self, *unused) -> None:
        self.interrupted = True

    def _step(self) -> None:
        start, progress = time.perf_counter(), self.progress
        lr = learning_rate(self.options, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._accumulate_gradients()
        self._check_finite("the loss", loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip or math.inf)
        norm = self.processes.whole(norm).item()
        self._check_finite("the gradient's norm", norm)  # clipped, it would make every weight NaN
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        progress.step += 1
        progress.seconds = self.seconds_before + time.perf_counter() - self.began
        self._log("step", loss=loss, grad_norm=norm, lr=lr, seconds=seconds)

    def targets(self, step: int) -> int:
        """How many the step after ``step`` others has, over its passes and processes."""
        options = self.options
        return training_targets(self.corpus.train, options.block_size, step, options.step_size, options.seed)

    def _accumulate_gradients(self) -> float:
        options, processes, total = self.options, self.processes, 0.0
        processes.seed(options.seed, self.progress.step)
        targets = self.targets(self.progress.step)
        for i in range(options.accumulate):
            first = self.progress.step * options.step_size + i * options.batch_size + self.offset
            batch = training_batch(
                self.corpus.train, options.block_size, self.count, first, options.seed, options.step_size
            )
            # Gradients are means over the processes, of means over the targets of a pass.
            share = processes.size * int((batch[1] >= 0).sum()) / targets
            batch = [t.to(self.device) for t in batch]
            with processes.gradients(self.wrapped, last=i == options.accumulate - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                    loss = self.wrapped(*batch) * share
                loss.backward()
            total += loss.item()
        return processes.sum(total)[0] / processes.size

    def _check_finite(self, what: str, value: float) -> None:
        """Ends the run on all processes before such a step changes the weights."""
        if not math.isfinite(value):
            step = self.progress.step + 1
            self.processes.every(lambda: self._diverged(f"{what} is {value} at step {step}"))

    def _diverged(self, what: str) -> None:
        kept = checkpoint.list_steps(self.run.folder / "checkpoints")
        last = f"The last checkpoint, {kept[-1]}, is from before" if kept else "There is no checkpoint yet"
        raise ValueError(f"{what}: try a smaller lr. {last}")

    def _evaluate(self) -> None:
        options, progress = self.options, self.progress
        metrics = measure(
            self.model,
            self.corpus.val,
            options.block_size,
            limit=options.eval_blocks,
            processes=self.processes,
        )
        loss = metrics["loss"]
        if not math.isfinite(loss):
            what = f"the validation loss is {loss} after step {progress.step}"
            self.processes.every(lambda: self._diverged(what))
        if options.patience is not None:
            if progress.best_loss is None or loss < progress.best_loss:
                progress.best_loss, progress.bad_evaluations = loss, 0
                weights = self.processes.gather(checkpoint.trained_tensors(self.model))
                self.processes.first(
                    lambda: self.run.save_best(progress.step, self.model, self.tokenizer, weights)
                )
            else:
                progress.bad_evaluations += 1
                progress.stopped = progress.bad_evaluations >= options.patience
        if self.bytes_per_token:
            metrics["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        self._log("eval", **metrics)

    # Logs

    def _open_logs(self) -> None:
        """Opens the logs, without what a killed run wrote after its last checkpoint."""
        path, step = self.metrics_path, self.progress.step
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                if not _is_record(line, step):
                    break
                kept.append(line + b"\n")
        write_file(path, b"".join(kept))
        self.metrics = open(path, "a")
        if self.options.tensorboard:
            with naming(self.run.folder / "tensorboard"):
                self.writer = _summary_writer()(self.run.folder / "tensorboard", purge_step=step + 1)

    def _close_logs(self) -> None:
        """Both, where one can't be written too."""
        with contextlib.ExitStack() as stack:
            for log, path in (
                (self.metrics, self.metrics_path),
                (self.writer, self.run.folder / "tensorboard"),
            ):
                if log is not None:
                    stack.enter_context(naming(path))
                    stack.callback(log.close)

    def _log(self, kind: str, **values: float) -> None:
        if self.metrics is None:
            return
        record = {"step": self.progress.step, "kind": kind, **values}
        with naming(self.metrics_path):
            self.metrics.write(json.dumps(record) + "\n")
        if self.writer is not None:
            with naming(self.run.folder / "tensorboard"):
                for name, value in values.items():
                    self.writer.add_scalar(f"{kind}/{name}", value, self.progress.step)
        shown = {"max_steps": self.progress.max_steps, "targets": self.targets(self.progress.step - 1)}
        self.report(kind, record | shown)


def _is_record(line: bytes, last: int) -> bool:
    """Whether a line of the metrics is whole, and of a step up to ``last``."""
    try:
        match json.loads(line):
            case {"step": int(step)}:
                return step <= last
    except ValueError:  # cut off by a kill
        pass
    return False


class _Quiet:
    """While logs are open: the thread that writes TensorBoard's prints no traceback; what it fails with is
    raised by the next record."""

    def __enter__(self) -> None:
        self.before, threading.excepthook = threading.excepthook, self.hook

    def __exit__(self, *error) -> None:
        threading.excepthook = self.before

    def hook(self, args) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            self.before(args)


def start(
    options: TrainOptions,
    folder: Path,
    *,
    overwrite: bool = False,
    report=lambda kind, values: None,
    processes: Alone | None = None,
) -> Trainer:
    """A trainer for a new run in ``folder``; nothing there is touched before all options are found
    good. ``processes`` are those that torchrun started, if any, unless given."""
    processes = processes or join()
    processes.first(lambda: checkpoint.check_free(folder, overwrite))
    parts = _parts(options, processes)
    record = dataclasses.asdict(options) | {"corpus": parts[0].key, "threads": torch.get_num_threads()}
    run = processes.first(lambda: checkpoint.Run.create(folder, record, overwrite))
    _keep_base(options, run, processes, *parts[1:])
    return Trainer(options, *parts, run or checkpoint.Run(folder, locked=False), report, processes)


def _keep_base(options: TrainOptions, run, processes: Alone, tokenizer: Tokenizer, model: Model) -> None:
    if options.lora is not None:
        processes.first(lambda: run.save_base(model, tokenizer))


def resume(
    folder: Path,
    report=lambda kind, values: None,
    processes: Alone | None = None,
    parallel: str | None = None,
) -> Trainer:
    """A trainer that goes on with the run in ``folder`` from its last checkpoint, or from its
    start, on as many processes as there are now, in another kind of parallelism if one is given."""
    processes = processes or join()
    opened = processes.first(lambda: (checkpoint.Run.open(folder), checkpoint.read_options(folder)))
    run, record = opened or (checkpoint.Run(folder, locked=False), None)
    record = processes.tell(record)
    key = record.pop("corpus", None)
    options = processes.every(lambda: _recorded(folder, record, parallel))
    steps = processes.tell(processes.first(lambda: checkpoint.list_steps(folder / "checkpoints")))
    last = steps[-1] if steps else None
    corpus, tokenizer, model = _parts(options, processes, last)
    processes.every(lambda: _check_corpus(folder, corpus, key))
    if last is None:
        _keep_base(options, run, processes, tokenizer, model)
    trainer = Trainer(options, corpus, tokenizer, model, run, report, processes)
    if last is not None:
        trainer.load(last)
    return trainer


def _recorded(folder: Path, record: dict, parallel: str | None) -> TrainOptions:
    try:
        return TrainOptions(**record | ({} if parallel is None else {"parallel": parallel}))
    except TypeError as error:
        raise ValueError(f"{folder / 'run.json'}: damaged: {error}") from None


def _check_corpus(folder: Path, corpus: Corpus, key: str | None) -> None:
    if corpus.key != key:
        raise ValueError(f"{folder}: the corpus or the tokenizer has changed since this run began")


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "TensorBoard isn't installed: pip install tensorboard, or give --no-tensorboard"
        ) from None
    return SummaryWriter


def _parts(
    options: TrainOptions, processes: Alone, last: Path | None = None
) -> tuple[Corpus, Tokenizer, Model]:
    """``last``: the checkpoint that a run goes on from, whose weights are loaded later."""
    processes.check_same("options", options)
    processes.every(lambda: _set_up(options, processes))
    origin, kind, names = last or options.init_from, None, None
    if origin is None:
        tokenizer = processes.every(lambda: load_tokenizer(options.tokenizer))
    else:
        described = processes.first(lambda: _describe(Path(origin), options.block_size))
        origin, kind, config, tokenizer = processes.tell(described)
        names = config.labels if kind is SequenceClassifier else None
    folder = processes.each_machine(
        lambda: (
            prepare(
                options.data,
                tokenizer,
                block_size=options.block_size,
                val_bytes=options.val_bytes,
                cache=options.cache,
                names=names,
            ).folder
        )
    )
    corpus = processes.every(lambda: open_corpus(folder))
    processes.check_same("text to train on", corpus.key)
    torch.manual_seed(options.seed)
    if kind is None:
        return corpus, tokenizer, processes.every(lambda: build_model(options, tokenizer, corpus.labels))
    if corpus.labels is not None and names is None:  # of a language model, all but its head
        kind, config = SequenceClassifier, SequenceClassifierConfig(config, corpus.labels)
    if options.lora is not None:
        processes.every(lambda: _check_adapters(kind, config, options))
    model = processes.every(lambda: kind(config))
    if last is None or options.lora is not None:  # else all of them are the checkpoint's

        def read():
            model = checkpoint.load_model(origin)[0] if last is None else checkpoint.load_base(origin)
            return model.stored_tensors()

        weights = processes.spread(processes.first(read), {})
        place = model.body if corpus.labels is not None and names is None else model
        processes.every(lambda: place.load_tensors(weights, origin))
    return corpus, tokenizer, model


def _describe(origin: Path, block_size: int):
    """The folder of weights that ``origin`` stands for, and what it holds."""
    folder = checkpoint.find_model(origin)
    kind, config, tokenizer = checkpoint.describe(folder)
    limit = getattr(getattr(config, "body", config), "n_positions", None)
    if limit is not None and block_size > limit:
        raise ValueError(f"{origin}: its context is {limit}, block_size is {block_size}")
    return folder, kind, config, tokenizer


def _check_adapters(kind: type[Model], config, options: TrainOptions) -> None:
    """``ValueError`` where such a model can't have them, before anything is read or written."""
    with torch.device("meta"):
        lora.adapt(kind(config), options)


def _set_up(options: TrainOptions, processes: Alone) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.tensorboard:
        _summary_writer()
    processes.share(options.batch_size)
    try:
        torch.empty(0, device=processes.device(options.device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {options.device!r}: {str(error).splitlines()[0]}") from None
