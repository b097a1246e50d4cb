"""The command ``fastlm``: train, evaluate, generate, classify, export, bench, info."""

import dataclasses
import inspect
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"fastlm: the command line needs {error.name}: pip install 'fastlm[train]'") from None

from fastlm import checkpoint, data
from fastlm import train as training
from fastlm.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from fastlm.display import TrainingDisplay
from fastlm.labels import encode_text
from fastlm.processes import Alone, Elsewhere, Lost, join
from fastlm.tokenizer import text_stream

RUNS = Path("runs")
SAMPLE_PROMPT = "import os\n\n\ndef "  # for the default corpus
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Train language models on fused kernels, and use them. `fastlm run SCRIPT` runs any program on them.",
)
console = Console(highlight=False)


def main() -> None:
    """Runs the command line: one line and exit status 2 for bad usage or input, 130 when
    interrupted."""
    try:
        code = app(_spread_lists(sys.argv[1:]), standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Elsewhere:  # reported there
        sys.exit(2)
    except Exception as error:  # typer's errors of usage know how to put themselves
        if hasattr(error, "format_message"):
            if int(os.environ.get("RANK", 0)):  # the first process of several says it
                sys.exit(2)
            message = error.format_message() or "no command given"
        elif isinstance(error, (ValueError, OSError, Lost)):
            named = isinstance(error, OSError) and error.filename is not None
            message = f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())
        else:
            raise
        print(f"fastlm: error: {message}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, Lost) else 2)
    sys.exit(code)


def _spread_lists(arguments: list[str]) -> list[str]:
    """Lets an option take several values: ``--data A B`` becomes ``--data A --data B``."""
    spread, option, values = [], None, 0
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            option, values = argument if argument in ("--data", "--lora-targets") else None, 0
        elif option:
            if values:
                spread.append(option)
            values += 1
        spread.append(argument)
    return spread


# fastlm train


def _train(
    ctx: typer.Context,
    out: str | None,
    resume: bool,
    or_resume: bool,
    overwrite: bool,
    prompt: str | None,
    sample: int,
    **given,
) -> None:
    """Train a model, then evaluate it and let it write a sample. Several processes, that torchrun
    started, train it together."""
    processes = join()
    console.quiet = processes.rank > 0
    try:
        folder, trainer = _trainer(processes, ctx, out, resume, or_resume, overwrite, given)
        _run(trainer, folder)
        final_report(trainer)
    except Lost as error:
        where = f" --out {out}" if out else ""
        raise Lost(f"{error}. From the last checkpoint on: fastlm train --resume{where}") from None
    processes.leave()
    if sample and processes.rank == 0 and trainer.corpus.labels is None:
        options = trainer.options
        if prompt is None:
            prompt = SAMPLE_PROMPT if options.data is None else ""
        console.rule("sample")
        print_sample(
            *checkpoint.load_model(folder),
            prompt,
            sample,
            device=options.device,
            temperature=0.8,
            top_p=0.95,
            seed=options.seed,
        )


def _trainer(
    processes: Alone,
    ctx: typer.Context,
    out: str | None,
    resume: bool,
    or_resume: bool,
    overwrite: bool,
    given: dict,
) -> tuple[Path, training.Trainer]:
    """Where the run is, and its trainer."""
    if or_resume:
        processes.every(lambda: _check_or_resume(out, resume, overwrite))
        resume = processes.tell(processes.first(lambda: (Path(out) / "run.json").is_file()))
    elif resume:
        processes.every(lambda: _refuse_given(ctx, given, overwrite))
    options = processes.every(lambda: training.TrainOptions(**given))
    if not resume:
        folder = (
            Path(out)
            if out
            else processes.tell(processes.first(lambda: free_folder(options.model or "fine-tuned")))
        )
        return folder, training.start(options, folder, overwrite=overwrite, processes=processes)
    folder = Path(out) if out else processes.tell(processes.first(newest_run))
    parallel = options.parallel if or_resume or _was_given(ctx, "parallel") else None
    trainer = training.resume(folder, processes=processes, parallel=parallel)
    if or_resume:
        processes.every(lambda: _check_same_run(folder, trainer.options, options))
    return folder, trainer


def _run(trainer: training.Trainer, folder: Path) -> None:
    """Trains to the end, and shows it."""
    options, model, processes = trainer.options, trainer.model, trainer.processes
    several = f"{processes.size} processes ({options.parallel}), " if processes.size > 1 else ""
    console.print(
        f"{model.model_type}: {model.num_params():,} parameters, {_trained_share(model)}"
        f"vocabulary {model.config.vocab_size}, "
        f"{several}{torch.get_num_threads()} threads; "
        f"{data.predicted(trainer.corpus.train):,} {trainer.unit} to learn; "
        f"in {folder}",
        soft_wrap=True,
        markup=False,
    )
    try:
        with TrainingDisplay(trainer, console) as display:
            trainer.report = display.report
            trainer.train()
    except training.Interrupted:
        console.print(
            f"stopped after step {trainer.progress.step}; to go on: fastlm train --resume --out {folder}",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(130) from None
    console.print(f"{trainer.progress.step} steps, {trainer.progress.seconds:.0f} s of training")


def _trained_share(model) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return "" if trained == model.num_params() else f"{trained:,} of them trained, "


def _was_given(ctx: typer.Context, name: str) -> bool:
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


def _refuse_given(ctx: typer.Context, given: dict, overwrite: bool) -> None:
    changed = [name for name in given if name != "parallel" and _was_given(ctx, name)]
    if overwrite:
        raise ValueError("--resume and --overwrite can't be given together")
    if changed:
        raise ValueError(
            f"--resume goes on with the run's own options; leave out --{changed[0].replace('_', '-')}"
        )


def _check_or_resume(out: str | None, resume: bool, overwrite: bool) -> None:
    if not out:
        raise ValueError("--or-resume needs --out, to find the run by")
    if resume or overwrite:
        raise ValueError("--or-resume can't be given together with --resume or --overwrite")


def _check_same_run(folder: Path, own: training.TrainOptions, given: training.TrainOptions) -> None:
    """``ValueError`` where the command line asks for another run than the one in ``folder``."""
    for name, value in dataclasses.asdict(given).items():
        free = name == "threads" and value is None  # a run keeps the number it began with
        if getattr(own, name) != value and not free:
            raise ValueError(f"{folder}: this run's {name} is {getattr(own, name)}, not {value}")


def _make_train_command() -> None:
    """Registers ``train``: an option for each field of ``TrainOptions``, and the command's own."""

    def option(name, kind, default, text):
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(help=text)],
        )

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [
        option(f.name, f.type, f.default, f.metadata["help"])
        for f in dataclasses.fields(training.TrainOptions)
    ]
    parameters += [
        option("out", str | None, None, "folder of the run [default: a new one in runs/]"),
        option("resume", bool, False, "go on with the run in --out, or with the newest in runs/"),
        option("or_resume", bool, False, "begin the run in --out or, where it is begun, go on with it"),
        option("overwrite", bool, False, "replace the run in --out"),
        option("prompt", str | None, None, "what the sample begins with"),
        option("sample", int, 400, "tokens of the sample at the end; 0: none"),
    ]

    def command(**values):
        _train(**values)

    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command("train", help=_train.__doc__)(command)


_make_train_command()


def free_folder(model: str) -> Path:
    """``runs/MODEL``, or ``runs/MODEL-2`` and so on where that exists."""
    folder, n = RUNS / model, 1
    while folder.exists():
        n += 1
        folder = RUNS / f"{model}-{n}"
    return folder


def newest_run() -> Path:
    runs = sorted(RUNS.glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ValueError(f"{RUNS}/: there is no run to resume")
    return runs[-1].parent


def final_report(trainer: training.Trainer) -> None:
    """Bits per byte of the whole validation text: the model's beside those of n-grams and gzip; or the
    accuracy of a classifier."""
    corpus, model = trainer.corpus, trainer.model.model_type
    metrics = trainer.final_metrics()
    if trainer.processes.rank > 0:
        return
    if corpus.labels is not None:
        print_accuracy(metrics, corpus.val, np.bincount(corpus.train.numbers).argmax(), corpus.labels)
        return
    loss = metrics["loss"]
    table = Table(title=f"validation, {len(corpus.val_text):,} bytes", title_justify="left")
    table.add_column("")
    table.add_column("bits/byte", justify="right")
    table.add_row(
        f"[bold]{model}[/bold]",
        f"[bold]{bits_per_byte(loss, corpus.val, corpus.val_text):.3f}[/bold]",
    )
    for name, bits in ngram_bits_per_byte(corpus.train_text, corpus.val_text).items():
        table.add_row(name, f"{bits:.3f}")
    table.add_row("gzip -9", f"{gzip_bits_per_byte(corpus.val_text):.3f}")
    console.print(table)


def print_accuracy(metrics: dict, split, commonest: int, labels) -> None:
    """A classifier's, beside that of giving every text the label that training saw most often."""
    table = Table(title=f"validation, {len(split):,} texts", title_justify="left")
    for column in ("", "accuracy", "macro F1", "loss"):
        table.add_column(column, justify="right" if column else "left")
    values = f"{metrics['accuracy']:.1%}", f"{metrics['macro_f1']:.3f}", f"{metrics['loss']:.3f}"
    table.add_row("[bold]model[/bold]", *(f"[bold]{value}[/bold]" for value in values))
    table.add_row(escape(f"always {labels[commonest]}"), f"{(split.numbers == commonest).mean():.1%}", "", "")
    console.print(table)


def bits_per_byte(loss: float, split, text) -> float:
    """From a loss in nats a token of a split."""
    return loss * data.predicted(split) / len(text) / math.log(2)


# fastlm evaluate, generate, info

ModelFolder = Annotated[
    str, typer.Argument(help="a run, one of its checkpoints, or a folder of a GPT-2 or Llama model")
]


@app.command()
def evaluate(
    model: ModelFolder,
    data_: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="text files or folders, or .jsonl files, evaluated whole [default: what the run held out]",
        ),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens in a sequence [default: as trained]")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences in a pass")] = 16,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> None:
    """Loss, perplexity and bits per byte of a model; loss, accuracy and F1 of a classifier."""
    loaded, tokenizer = checkpoint.load_model(model)
    for name, value in (("block_size", block_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if block_size is None:
        block_size = _run_options(Path(model)).get("block_size") or loaded.max_length or 256
    if loaded.max_length is not None and block_size > loaded.max_length:
        raise ValueError(f"block_size is {block_size}, the model's context {loaded.max_length}")
    names = getattr(loaded, "labels", None)
    split, text = (
        data.encode_all(data_, tokenizer, names) if data_ else _held_out(Path(model), tokenizer, names)
    )
    start = time.perf_counter()
    metrics = training.measure(loaded.to(device), split, block_size, batch_size)
    speed = data.predicted(split) / (time.perf_counter() - start)
    loss = metrics["loss"]
    if not math.isfinite(loss):
        raise ValueError(f"{model}: its loss is {loss}: the model has diverged")
    if names is not None:
        rows = (
            ("loss", f"{loss:.4f} nats/text"),
            ("accuracy", f"{metrics['accuracy']:.4f}"),
            ("macro F1", f"{metrics['macro_f1']:.4f}"),
            ("texts", f"{len(split):,}"),
            ("speed", f"{speed:,.0f} texts/s"),
        )
    else:
        rows = (
            ("loss", f"{loss:.4f} nats/token"),
            ("perplexity", f"{math.exp(min(loss, 700)):.4f}"),
            ("bits per byte", f"{bits_per_byte(loss, split, text):.4f}"),
            ("text", f"{len(text):,} bytes, {data.predicted(split):,} tokens"),
            ("speed", f"{speed:,.0f} tokens/s"),
        )
    for name, value in rows:
        console.print(f"{name:<14} {value}")


def _held_out(folder: Path, tokenizer, names):
    """The validation split of the run that ``folder`` is or lies in."""
    options = _run_options(folder)
    if not options:
        raise ValueError(f"{folder}: not of a run, so no text is held out; give one with --data")
    corpus = data.prepare(
        options["data"],
        tokenizer,
        block_size=options["block_size"],
        val_bytes=options["val_bytes"],
        cache=options["cache"],
        names=names,
    )
    if corpus.key != options["corpus"]:
        raise ValueError(f"{folder}: its corpus has changed since; give the text with --data")
    return corpus.val, corpus.val_text


def _run_options(folder: Path) -> dict:
    """Those of the run that ``folder`` is or lies in; none where it isn't of a run."""
    for candidate in (folder, *folder.absolute().parents[:2]):
        if (candidate / "run.json").is_file():
            return checkpoint.read_options(candidate)
    return {}


@app.command()
def generate(
    model: ModelFolder,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="texts to go on from [default: an empty one]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 400,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="draw from the k most probable tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="draw from the fewest tokens of so much probability")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="for the same text each time")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="keep the weights in int8; needs torchao")] = False,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> None:
    """Text from a model, as it comes; several prompts run as one batch."""
    loaded, tokenizer = checkpoint.load_model(model)
    if not hasattr(loaded, "generate"):
        raise ValueError(f"{model}: a classifier writes no text: fastlm classify {model} TEXT")
    if int8:
        quantize(loaded)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    prompts = prompts or [""]
    if len(prompts) == 1:
        print_sample(loaded, tokenizer, prompts[0], max_new_tokens, device=device, **options)
        return
    end = tokenizer.end_of_text
    rows = loaded.to(device).generate(
        [[end, *tokenizer.encode(p).tolist()] for p in prompts],
        max_new_tokens,
        stop_tokens=[end],
        **options,
    )
    for prompt, row in zip(prompts, rows, strict=True):
        console.rule()
        console.out(prompt + tokenizer.decode(row))


def quantize(model) -> None:
    try:
        from fastlm.integrations.torchao import quantize_
    except ImportError as error:
        raise ValueError(f"--int8 needs torchao 0.17 or later (pip install torchao): {error}") from None
    quantize_(model)


def print_sample(model, tokenizer, prompt: str, max_new_tokens: int, *, device: str, **options) -> None:
    """Prints a prompt, and what the model goes on with as it comes, to the end of the text."""
    end = tokenizer.end_of_text
    steps = model.to(device).stream(
        [[end, *tokenizer.encode(prompt).tolist()]], max_new_tokens, stop_tokens=[end], **options
    )
    print(prompt, end="", flush=True)
    for piece in text_stream(tokenizer, (row[0] for row in steps)):
        print(piece, end="", flush=True)
    print()


@app.command()
def classify(
    model: ModelFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(help="texts [default: the lines of the standard input]")
    ] = None,
    top: Annotated[int, typer.Option(help="labels to show of each text")] = 3,
    json_: Annotated[
        bool, typer.Option("--json", help="a JSON object a line, with the probabilities of all labels")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="texts in a pass")] = 16,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> None:
    """The labels that a classifier gives to texts, the most probable first."""
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    loaded, tokenizer = checkpoint.load_model(model)
    names = getattr(loaded, "labels", None)
    if names is None:
        raise ValueError(f"{model}: a language model, not a classifier; train one on texts with labels")
    loaded = loaded.to(device)
    lines = (line.rstrip("\r\n") for line in sys.stdin) if not texts else iter(texts)
    while batch := list(itertools.islice(lines, batch_size)):
        rows = [encode_text(text, tokenizer).tolist() for text in batch]
        for text, p in zip(batch, loaded.predict(rows).tolist(), strict=True):
            ranked = sorted(zip(p, names, strict=True), key=lambda pair: -pair[0])
            if json_:
                shown = {name: round(value, 6) for value, name in ranked}
                print(json.dumps({"text": text, "label": ranked[0][1], "probabilities": shown}), flush=True)
            else:
                shown = ", ".join(f"{name} {value:.1%}" for value, name in ranked[:top])
                print(f"{shown}\t{text}", flush=True)


@app.command()
def export(
    model: ModelFolder,
    to: Annotated[
        str | None, typer.Option(help="new folder for the transformers library: a GPT-2 or a Llama")
    ] = None,
    torch_export: Annotated[
        str | None, typer.Option(help="file, NAME.pt2, of torch.export, from tokens to logits")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="new folder for PEFT: low-rank adapters of a GPT-2 or a Llama")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="the adapters' model, for the transformers library [default: what --init-from was]"
        ),
    ] = None,
) -> None:
    """A model for other programs."""
    from fastlm.export import to_peft, to_torch_export, to_transformers

    if to is None and torch_export is None and adapter is None:
        raise ValueError("say what to write: --to FOLDER or --torch-export FILE.pt2 (or --adapter FOLDER)")
    if base is not None and adapter is None:
        raise ValueError("--base is of adapters: give --adapter too")
    if torch_export is not None and not torch_export.endswith(".pt2"):
        raise ValueError(f"--torch-export {torch_export}: the name must end in .pt2")
    loaded, tokenizer = checkpoint.load_model(model)
    kind = "SequenceClassification" if hasattr(loaded, "labels") else "CausalLM"
    if to is not None:
        to_transformers(loaded, tokenizer, to)
        console.print(f"{to}: for AutoModelFor{kind}.from_pretrained", soft_wrap=True, markup=False)
    if adapter is not None:
        to_peft(model, adapter, base or _run_options(Path(model)).get("init_from"))
        console.print(f"{adapter}: for AutoPeftModelFor{kind}.from_pretrained", soft_wrap=True, markup=False)
    if torch_export is not None:
        to_torch_export(loaded, torch_export)
        console.print(f"{torch_export}: for torch.export.load", soft_wrap=True, markup=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="only benchmarks with one of these words in their name [default: all]"),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or int8, may be repeated [default: all]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of torch [default: torch's own]")] = None,
    seconds: Annotated[float, typer.Option(help="timed calls of each pass over each shape")] = 2.0,
    memory: Annotated[bool, typer.Option(help="measure the peak memory too")] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="the smallest shapes, briefly, without torch.compile")
    ] = False,
    html: Annotated[
        str | None, typer.Option(help="file of the page [default: report.html beside the raw figures]")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="folder of the raw figures [default: in benchmarks/results]")
    ] = None,
) -> None:
    """Time and memory of every operator and training step against eager PyTorch and torch.compile,
    as tables and as one page with charts."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "report.py").is_file():
        raise ValueError(
            "the benchmarks are part of the source folder, not of the installed package; "
            "run `make bench` there"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    for name in dtype or ():
        if name not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"dtype must be float32, bfloat16 or int8, got {name}")
    sys.path.insert(0, str(root))
    from benchmarks import report

    if threads is not None:
        torch.set_num_threads(threads)
    folder, page = (Path(path) if path else None for path in (out, html))
    asked = report.Request(names or [], dtype or [], seconds, memory, quick, folder, page)
    if not report.run(console, asked):
        raise typer.Exit(1)


@app.command()
def info(
    kernels: Annotated[
        bool,
        typer.Option(help="Compile the kernels for GPUs, here or not, and show what becomes of them."),
    ] = False,
) -> None:
    """Versions, threads, instruction sets and backends, with the reason for each that is
    missing."""
    import fastlm
    from fastlm import _C, ops

    missing, notes = ops.missing_backends(), ops.backend_notes()
    rows = {
        "fastlm": fastlm.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (built against {_C.torch_version}, with {_C.compiler})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "instruction set": f"{_C.isa()} (this CPU runs {', '.join(_C.isas())}; "
        f"built in: {', '.join(_C.built_isas())})",
    }
    rows |= {
        f"backend {name}": f"missing: {missing[name]}" if name in missing else notes[name]
        for name in ops.backends()
    }
    for name, value in rows.items():
        console.print(f"{name:<16} {value}", soft_wrap=True, markup=False)
    if kernels:
        _show_kernels()


def _show_kernels() -> None:
    """A line for each CUDA and Triton kernel, target and configuration, or why there are none."""
    from fastlm import targets

    console.print()
    console.print(targets.HEAD, soft_wrap=True, markup=False)
    for family, tables in (("CUDA", _cuda_kernels), ("Triton", _triton_kernels)):
        try:
            for row in tables():
                console.print(targets.line(row), soft_wrap=True, markup=False)
        except targets.Unavailable as error:
            console.print(f"{family}: {error}", soft_wrap=True, markup=False)


def _cuda_kernels() -> Iterator:
    from fastlm import targets

    folder = Path(__file__).parents[1] / "tests"
    if not (folder / "cuda_targets.py").is_file():
        raise targets.Unavailable(
            "the kernels' source is part of the source folder, not of the installed package"
        )
    sys.path.insert(0, str(folder))
    import cuda_targets

    yield from cuda_targets.table(cuda_targets.ALL)


def _triton_kernels() -> Iterator:
    from fastlm import targets, triton

    if not triton.installed():
        raise targets.Unavailable("is not installed (pip install triton)")
    if triton.INTERPRETING:
        raise targets.Unavailable("its interpreter compiles nothing: unset TRITON_INTERPRET")
    from fastlm.triton.targets import COMPILED_FOR, table

    for target in COMPILED_FOR:
        yield from table(target)


if __name__ == "__main__":
    main()
