"""What goes wrong outside: no room on the disk, folders that can't be written, weights and losses that are no
numbers, files from strangers."""

import ast
import json
import math
import os
import pickle
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import OPERATORS
from test_cli import TINY, run  # noqa: F401
from test_train import corpus, curve, options, train_until, weights  # noqa: F401

import fastlm
from fastlm import checkpoint, export, files, train, tuned
from fastlm.models import GPT, GPTConfig, from_pretrained
from fastlm.tokenizer import ByteTokenizer
from fastlm.train import resume, start

PACKAGE = Path(fastlm.__file__).parent


@pytest.fixture(autouse=True)
def keep_threads(restore_threads):
    """A trainer sets torch's thread count."""


@contextmanager
def room(most: int):
    """No file can grow beyond so many bytes: writing then fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(256, 16, n_embd=16, n_layer=1, n_head=2))


@pytest.fixture
def saved(model, tmp_path):
    """The folder of a model."""
    checkpoint.save_model(tmp_path / "model", model, ByteTokenizer())
    return tmp_path / "model"


# ---- no room ----------------------------------------------------------------------------------


def test_no_room_for_the_corpus_or_the_run(options, tmp_path):  # noqa: F811
    with room(1000), pytest.raises(OSError, match="can't be written: File too large: .*cache"):
        start(options(), tmp_path / "run")
    assert not names(tmp_path / "cache") and not (tmp_path / "run").exists()
    start(options(), tmp_path / "other")
    with room(100), pytest.raises(OSError, match="can't be written: File too large: .*run.json"):
        start(options(), tmp_path / "run")
    assert not names(tmp_path / "run")
    assert start(options(), tmp_path / "run").run.folder == tmp_path / "run"


@pytest.mark.parametrize("file", ["metrics.jsonl", "model.safetensors", "trainer.safetensors"])
def test_no_room_for_a_checkpoint(options, tmp_path, file):  # noqa: F811
    """The last one stays, nothing half is left, and with room again the run goes on to the same bits."""
    start(options(), tmp_path / "whole").train()
    folder = tmp_path / "run"
    train_until(start(options(), folder), 12)
    trainer, before = resume(folder), names(folder)
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    most = sizes[file] - 100 if file != "metrics.jsonl" else sizes[file] + 100
    assert file != "trainer.safetensors" or most > sizes["model.safetensors"]
    with room(most), pytest.raises(OSError, match="can't be written: File too large") as error:
        trainer.train()
    assert Path(error.value.filename).name == file
    assert names(folder) == before and checkpoint.find_model(folder).name == "step-10"
    trainer.run._lock.close()
    resume(folder).train()
    assert curve(folder) == curve(tmp_path / "whole")
    assert weights(folder) == weights(tmp_path / "whole")


def test_no_room_for_the_best_model(options, tmp_path):  # noqa: F811
    trainer = start(options(patience=3, save_every=1000), tmp_path / "run")
    with room(9000), pytest.raises(OSError, match="model.safetensors"):
        trainer.train()
    assert not names(tmp_path / "run/best")


def test_no_room_for_tensorboard(options, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Its thread writes later: what it fails with ends the run, and is said once."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    trainer = start(options(tensorboard=True), tmp_path / "run")
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="can't be written: No space left on device: .*tensorboard"):
        trainer.train()
    assert "Traceback" not in capfd.readouterr().err


def test_files_are_replaced_together(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    files.write_files({one: b"old", two: b"old"})
    with room(1000), pytest.raises(OSError, match="can't be written: File too large: .*two"):
        files.write_files({one: b"new", two: b"new" * 1000})
    assert (one.read_bytes(), two.read_bytes()) == (b"old", b"old") and names(tmp_path) == {"one", "two"}


def test_no_room_for_a_model(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder, note="first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with room(4000), pytest.raises(OSError, match="model.safetensors"):
        model.save_pretrained(folder, note="second")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_room_for_an_export(model, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    with room(4000), pytest.raises(OSError, match="can't be written"):
        export.to_transformers(model, ByteTokenizer(), tmp_path / "out")
    assert not names(tmp_path / "out")
    export.to_transformers(model, ByteTokenizer(), tmp_path / "out")

    program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(1, 64),))
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: program)
    (tmp_path / "out.pt2").write_bytes(b"old")
    with room(4000), pytest.raises(OSError, match="out.pt2"):
        export.to_torch_export(model, tmp_path / "out.pt2")
    assert (tmp_path / "out.pt2").read_bytes() == b"old"
    assert names(tmp_path) - names(tmp_path / "out") == {"out", "out.pt2"}


def test_no_room_for_a_tuned_choice(tmp_path, monkeypatch):
    """Half a line is no choice, and spoils none that follows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timed = []

    def fastest():
        timed.append(1)
        return "a"

    with room(8):
        assert tuned.choice("cpu", "key", ("a", "b"), fastest) == "a"
    assert (tmp_path / "fastlm/tuned/cpu.jsonl").stat().st_size == 8
    for _ in range(2):
        assert tuned.choice("cpu", "key", ("a", "b"), fastest) == "a"
    assert len(timed) == 2


def test_one_line_says_what_is_wrong(run, tmp_path):  # noqa: F811
    command = "train TINY --n-head 2 --data a.txt --max-steps 9 --save-every 3 --sample 0 --out r"
    with room(30000):
        status, _, errors = run(command)
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith("fastlm: error: r/checkpoints/.step-3/") and "File too large" in errors
    for place in ("--out /proc/nowhere", "--cache /proc/nowhere --out s"):
        status, _, errors = run(f"train TINY --n-head 2 --data b.txt --max-steps 2 {place}")
        assert status == 2 and errors.count("\n") == 1 and "/proc/nowhere" in errors
    assert not (tmp_path / "s").exists()


# ---- no numbers -------------------------------------------------------------------------------


def finite(folder: Path) -> bool:
    """Whether all that the run's checkpoints hold is."""
    found = [files for files in folder.rglob("*.safetensors")]
    return all(
        torch.isfinite(t).all()
        for path in found
        for t in checkpoint.read_tensors(path).values()
        if t.is_floating_point()
    )


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(options, tmp_path, value, clip):  # noqa: F811
    """The loss is fine. The step isn't taken, though a checkpoint is due right after it."""
    trainer = start(options(clip=clip), tmp_path / "run")
    seen = []

    def spoil(gradient):
        seen.append(1)
        return torch.full_like(gradient, value) if len(seen) == 10 else None

    next(iter(trainer.model.parameters())).register_hook(spoil)
    with pytest.raises(
        ValueError, match=f"the gradient's norm is {value} at step 10: .*step-5, is from before"
    ):
        trainer.train()
    assert checkpoint.find_model(tmp_path / "run").name == "step-5" and finite(tmp_path / "run")
    trainer.run._lock.close()
    resume(tmp_path / "run").train()  # without what spoiled it
    assert finite(tmp_path / "run")


@pytest.mark.parametrize("model", ["gpt", "gru"])
def test_rates_that_diverge(options, tmp_path, model):  # noqa: F811
    """A step makes the weights infinite, and its checkpoint isn't written."""
    trainer = start(options(model, lr=1e38, clip=0.0, warmup=1, save_every=1), tmp_path / "run")
    with pytest.raises(ValueError, match="(isn't finite after|is nan|is inf).* step .*: try a smaller lr"):
        trainer.train()
    assert finite(tmp_path / "run")


def test_moments_and_validation_losses_that_are_not_finite(options, tmp_path, monkeypatch):  # noqa: F811
    trainer = start(options(), tmp_path / "run")
    train_until(trainer, 4)
    trainer = resume(tmp_path / "run")
    trainer.report = lambda kind, values: next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].fill_(
        math.inf
    )
    with pytest.raises(
        ValueError, match="exp_avg_sq.* isn't finite after step .* There is no checkpoint yet"
    ):
        trainer.train()
    monkeypatch.setattr(train, "measure", lambda *args, **kwargs: {"loss": math.nan})
    trainer = start(options(patience=2), tmp_path / "other")
    with pytest.raises(ValueError, match="the validation loss is nan after step 8: .*step-5, is from before"):
        trainer.train()
    assert not (tmp_path / "other/best").exists()


def test_weights_that_are_not_finite_are_not_loaded(run, options, saved, model, tmp_path):  # noqa: F811
    with torch.no_grad():
        model.lm_head.weight[3, 5] = math.inf
    model.save_pretrained(saved, tokenizer="bytes", eos_token_id=0)
    message = "transformer.wte.weight holds values that aren't finite"
    with pytest.raises(ValueError, match=message):
        start(options(init_from=str(saved)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for command in ("evaluate model --data a.txt", "generate model hello", "export model --to out"):
        status, output, errors = run(command)
        assert (status, output, errors.count("\n")) == (2, "", 1) and message in errors


def test_a_loss_that_is_not_finite_is_no_result(run, saved, model):  # noqa: F811
    """The weights are numbers, but products of them none."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3e38)
    model.save_pretrained(saved, tokenizer="bytes", eos_token_id=0)
    status, _, errors = run("evaluate model --data a.txt")
    assert status == 2 and errors == "fastlm: error: model: its loss is nan: the model has diverged\n"


# ---- files from strangers ---------------------------------------------------------------------


def header(content: bytes, size: int | None = None) -> bytes:
    """A safetensors file of this header, which says that it has `size` bytes."""
    return struct.pack("<Q", len(content) if size is None else size) + content


class Payload:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


INDEX = "model.safetensors.index.json"
INTEGERS = {"transformer.wte.weight": torch.zeros(256, 16, dtype=torch.int64)}


def changed(**values):
    return lambda content: json.dumps(json.loads(content) | values).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", changed(n_layer=10**9), "n_layer 1000000000, the weights are"),
        ("config.json", changed(n_embd=10**9), "config.json: Storage size calculation overflowed"),
        ("config.json", changed(n_inner=10**12), "size mismatch"),
        ("config.json", changed(n_positions=10**12), "size mismatch"),
        ("config.json", changed(pos="rope", n_positions=10**13), "not a checkpoint of this model"),
        ("config.json", changed(vocab_size=10**15), "size mismatch"),
        ("config.json", changed(n_layer=10**400), "n_layer"),
        ("config.json", changed(n_layer="many"), "n_layer must be a whole number"),
        ("config.json", changed(tokenizer="/etc/passwd"), "names a tokenizer outside of the folder, '/etc/passwd'"),
        ("config.json", changed(tokenizer="../../tokenizer.json"), "outside of the folder"),
        ("config.json", changed(tokenizer="hub:someone/model"), "outside of the folder"),
        ("config.json", changed(tokenizer={"a": 1}), "outside of the folder"),
        ("config.json", lambda _: b"[" * 10**6, "config.json: damaged"),
        ("config.json", lambda _: b" " * (files.MOST_JSON + 1), "config.json: damaged: has 67,108,865 bytes"),
        ("config.json", lambda _: b"\xff\xfe", "config.json: damaged"),
        (INDEX, lambda _: b'{"weight_map": {"a": "../../model.safetensors"}}', "damaged: a file outside the folder"),
        (INDEX, lambda _: b'{"weight_map": {"a": "/etc/passwd"}}', "damaged: a file outside the folder"),
        (INDEX, lambda _: b'{"weight_map": {"a": ".."}}', "damaged or not a safetensors file"),
        (INDEX, lambda _: b'{"weight_map": {"a": 7}}', "damaged"),
        ("model.safetensors", lambda _: header(b"{}", 2**63), "damaged or not a safetensors file"),
        ("model.safetensors", lambda _: header(b"{}", 2**64 - 1), "damaged or not a safetensors file"),
        ("model.safetensors", lambda _: header(b"no JSON"), "damaged or not a safetensors file"),
        (
            "model.safetensors",
            lambda _: header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'),
            "damaged or not a safetensors file",
        ),
        (
            "model.safetensors",
            lambda _: header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [400, 404]}}'),
            "damaged or not a safetensors file",
        ),
        ("model.safetensors", lambda _: b"", "damaged or not a safetensors file"),
        ("model.safetensors", lambda _: pickle.dumps(Payload()), "damaged or not a safetensors file"),
        ("model.safetensors", lambda content: changed_weights(content, INTEGERS), "is torch.int64, expected a floating"),
        (
            "model.safetensors",
            lambda content: changed_weights(content, {"more": torch.zeros(1)}),
            "not a checkpoint of this model: Unexpected key",
        ),
    ],
)  # fmt: skip
def test_models_from_strangers(saved, monkeypatch, tmp_path, file, content, message):
    monkeypatch.chdir(tmp_path)
    path = saved / file
    path.write_bytes(content(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_model(saved)
    assert str(saved) in str(error.value) or "GPTConfig" in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def changed_weights(content: bytes, tensors: dict) -> bytes:
    from safetensors.torch import load, save

    return save(load(content) | tensors)


def test_pickles_are_not_looked_for(saved, monkeypatch, tmp_path):
    """What transformers would read beside safetensors, or where there is none."""
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "trainer.pt"):
        (saved / name).write_bytes(pickle.dumps(Payload()))
    from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        from_pretrained(saved)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("../../run.json", b"[1]", "run.json: damaged: expected a JSON object, got list"),
        ("../../run.json", b'{"block_size": "x"}', "run.json: damaged"),
        ("trainer.json", b'{"step": "5"}', "not a checkpoint of this run: step is '5'"),
        ("trainer.json", b'{"step": -1}', "not a checkpoint of this run: step is -1"),
        ("trainer.json", b"{" * 10**6, "trainer.json: damaged"),
        ("trainer.safetensors", b"", "damaged or not a safetensors file"),
    ],
)
def test_runs_from_strangers(options, tmp_path, file, content, message):  # noqa: F811
    trainer = start(options(max_steps=5), tmp_path / "run")
    trainer.train()
    trainer.run._lock.close()
    (tmp_path / "run/checkpoints/step-5" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "run")


@pytest.mark.parametrize("line", [b"[1]", b'{"step": "9"}', b"{}", b"3", b"\xff", b'{"step": 1'], ids=repr)
def test_metrics_end_at_the_first_line_that_is_no_record(options, tmp_path, line):  # noqa: F811
    trainer = start(options(max_steps=6, save_every=3), tmp_path / "run")
    train_until(trainer, 5)
    path = tmp_path / "run/metrics.jsonl"
    kept = path.read_bytes().splitlines()[:2]
    path.write_bytes(b"\n".join([*kept, line, b'{"step": 3}']) + b"\n")
    resume(tmp_path / "run").train()
    assert [record["step"] for record in curve(tmp_path / "run") if record["kind"] == "step"] == [
        1,
        2,
        4,
        5,
        6,
    ]


def test_no_source_reads_a_pickle():
    """Nor runs what a file says. Objects of a run's own processes are told by torch.distributed."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
    calls = {
        ("torch", "load"),
        ("np", "load"),
        ("numpy", "load"),
        ("torch.jit", "load"),
        ("torch.export", "load"),
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not modules & {name.partition(".")[0] for name in named}, where
            if isinstance(node, ast.Attribute):
                assert (ast.unparse(node.value), node.attr) not in calls, where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), where


# ---- operators --------------------------------------------------------------------------------

NAN_CALLS = {
    "scaled_dot_product_attention": [(1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)],
    "gru_cell": [(3, 5), (3, 8), (24, 5), (24, 8), (24,), (24,)],
    "gru": [(4, 3, 5), (1, 3, 8), (24, 5), (24, 8), (24,), (24,)],
    "cross_entropy": [(4, 33)],
    "linear_cross_entropy": [(4, 16), (33, 16)],
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "place"), [(name, i) for name, shapes in NAN_CALLS.items() for i in range(len(shapes))]
)
def test_operators_give_nan_where_pytorch_does(isa, name, place, value):
    """In the outputs and in every gradient; each argument in turn holds one."""
    tensors = [torch.randn(shape) for shape in NAN_CALLS[name]]
    tensors[place].view(-1)[3] = value

    def call(function):
        given = [x.clone().requires_grad_() for x in tensors]
        if name == "gru":
            outputs = function(*given[:2], given[2:], True, 1, 0.0, False, False, False)
        elif name.endswith("cross_entropy"):
            outputs = function(*given, torch.tensor([3, 0, 32, 7]))
        else:
            outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad([x.sum() for x in outputs], given)

    operator = OPERATORS[name]
    # The fused attention of PyTorch's CPU takes a query that is NaN for one without keys; its formula doesn't.
    expected = operator.reference if name == "scaled_dot_product_attention" else operator.eager
    for ours, theirs in zip(call(operator.function), call(expected), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert torch.equal(ours.isnan(), theirs.isnan())
