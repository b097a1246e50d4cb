"""The command line, in this process; one test runs it as a program."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from fastlm import checkpoint, cli, train
from fastlm.data import encode_all

TINY = "--n-layer 1 --n-embd 16 --block-size 16 --batch-size 2 --threads 1 --eval-blocks 4 --no-tensorboard"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, restore_threads):
    """Runs a command in a folder of its own; returns (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("".join(f"{i} apples and {i % 7} pears\n" for i in range(400)))
    (tmp_path / "b.txt").write_text("".join(f"{i} plums\n" for i in range(400)))

    def run(command: str):
        monkeypatch.setattr(sys, "argv", ["fastlm", *command.replace("TINY", TINY).split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def bits(output: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"[│|] (.+?) +[│|] +(\d+\.\d+) [│|]", output)}


@pytest.mark.parametrize("model", ["gpt --n-head 2", "gru --n-hidden 24"])
def test_train_evaluate_generate(run, tmp_path, model):
    name = model.split()[0]
    status, output, errors = run(f"train --model {model} TINY --data a.txt b.txt --max-steps 60 --sample 20")
    assert (status, errors) == (0, "")
    assert json.loads((tmp_path / f"runs/{name}/run.json").read_text())["data"] == [
        "a.txt",
        "b.txt",
    ]
    table = bits(output)
    assert list(table) == [name, "byte unigram", "byte bigram", "byte trigram", "gzip -9"]
    assert table["byte trigram"] < table["byte bigram"] < table["byte unigram"] < 8
    assert "sample" in output

    status, output, _ = run(f"evaluate runs/{name}")
    values = dict(re.findall(r"^(\S.*?)  +([\d.]+)", output, re.M))
    assert float(values["bits per byte"]) == pytest.approx(table[name], abs=1e-3)
    assert float(values["perplexity"]) == pytest.approx(math.exp(float(values["loss"])), rel=1e-3)
    assert run(f"evaluate runs/{name}/checkpoints/step-60")[1].splitlines()[:3] == output.splitlines()[:3]

    status, output, _ = run(f"evaluate runs/{name} --data b.txt --block-size 8")
    loaded, tokenizer = checkpoint.load_model(f"runs/{name}")
    tokens, text = encode_all(["b.txt"], tokenizer)
    assert len(text) == len(tokens) - 1 == (tmp_path / "b.txt").stat().st_size + 1
    assert f"loss           {train.evaluate(loaded, tokens, 8):.4f} nats/token" in output

    command = (
        f"generate runs/{name} 12 --max-new-tokens 30 --seed 3 --temperature 1.5 --top-k 30 --top-p 0.95"
    )
    first, again = run(command), run(command)
    assert first == again and first[0] == 0 and first[1].startswith("12") and len(first[1]) > 10
    greedy = run(f"generate runs/{name} 12 7 --max-new-tokens 10 --temperature 0")[1]
    assert run(f"generate runs/{name} 7 --max-new-tokens 10 --temperature 0")[1] in greedy


def test_runs_get_folders_of_their_own_and_resume_takes_the_newest(run, tmp_path):
    command = "train TINY --n-head 2 --data a.txt --max-steps 4 --sample 0"
    for folder in ("gpt", "gpt-2", "gpt-3"):
        assert run(command)[0] == 0
        assert (tmp_path / "runs" / folder / "run.json").is_file()
    status, output, _ = run("train --resume --sample 0")
    assert status == 0 and "in runs/gpt-3" in output
    assert "in runs/gpt-2" in run("train --resume --out runs/gpt-2 --sample 0")[1]


def test_one_command_begins_and_goes_on(run, tmp_path):
    command = "train TINY --n-head 2 --data a.txt --sample 0 --out run --or-resume --max-steps"
    assert run(f"{command} 4")[0] == 0
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert "4 steps" in run(f"{command} 4")[1]
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    assert run(f"{command} 8")[::2] == (2, "fastlm: error: run: this run's max_steps is 4, not 8\n")


def test_interrupt(run, tmp_path, monkeypatch):
    step = train.Trainer._step

    def interrupted(self):
        step(self)
        self.interrupted = self.progress.step == 5

    monkeypatch.setattr(train.Trainer, "_step", interrupted)
    status, output, _ = run("train TINY --n-head 2 --data a.txt --max-steps 8 --out run")
    assert status == 130
    assert "stopped after step 5; to go on: fastlm train --resume --out run" in output
    assert run("train --resume --out run --sample 0")[0] == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fly", "No such command 'fly'"),
        ("train --colour red", "No such option: --colour"),
        ("train --max-steps many", "Invalid value for '--max-steps'"),
        ("train --model lstm", "model must be one of gpt, gru, got 'lstm'"),
        ("train --lr -1", "lr must be positive, got -1.0"),
        ("train --data nowhere", "nowhere: no such file or folder"),
        ("train --data a.txt --block-size 100000", "the corpus is too short"),
        (
            "train --data a.txt --n-embd 10 --n-head 4",
            "n_embd (10) must be a multiple of n_head (4)",
        ),
        ("train --data a.txt --tokenizer b.txt", "tokenizer 'b.txt': "),
        ("train --data a.txt --out full", "full: exists and is not a run of fastlm train"),
        ("train --resume", "runs/: there is no run to resume"),
        ("train --resume --out full", "full: no run of fastlm train here"),
        ("train --resume --out full --lr 1", "leave out --lr"),
        ("train --resume --overwrite --out full", "can't be given together"),
        ("train --or-resume", "--or-resume needs --out"),
        ("train --or-resume --overwrite --out full", "can't be given together"),
        ("train --parallel tensor", "parallel must be ddp or fsdp, got 'tensor'"),
        ("evaluate", "Missing argument 'model'"),
        ("evaluate nowhere", "nowhere: no such folder"),
        ("evaluate full", "full: no model here (config.json is missing)"),
        ("generate nowhere", "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(run, tmp_path, command, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    status, output, errors = run(command)
    assert status == 2
    assert errors.startswith("fastlm: error: ") and errors.count("\n") == 1, errors
    assert message in errors
    assert output == ""
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


def test_errors_of_a_trained_model(run, tmp_path):
    assert run("train TINY --n-head 2 --data a.txt --max-steps 2 --out run --sample 0")[0] == 0
    for command, message in (
        ("train --data a.txt --out run", "run: holds a run already"),
        ("generate run --temperature -1", "temperature must be finite and >= 0"),
        ("generate run --top-k 0", "top_k must be a whole number >= 1"),
        ("evaluate run --block-size 17", "block_size is 17, the model's context 16"),
        ("evaluate run --batch-size 0", "batch_size must be at least 1, got 0"),
    ):
        status, _, errors = run(command)
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
    (tmp_path / "a.txt").write_text("other text\n" * 100)
    assert "its corpus has changed since" in run("evaluate run")[2]
    for part in ("model.safetensors", "config.json"):
        (tmp_path / "run/checkpoints/step-2" / part).write_bytes(b"\0\1")
        status, _, errors = run("generate run")
        assert status == 2 and part in errors and errors.count("\n") == 1, errors


def test_info(run):
    status, output, _ = run("info")
    assert status == 0
    for name in ("fastlm", "torch", "threads", "instruction set", "backend cpu", "backend eager"):
        assert re.search(rf"^{name} ", output, re.M), output
    assert torch.__version__ in output
    assert re.search(r"^backend cuda +(available|missing: \w+)", output, re.M)


def test_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fastlm", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "evaluate", "generate", "info"))
    done = subprocess.run(
        [sys.executable, "-m", "fastlm", "train", "--colour"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("fastlm: error: No such option: --colour")
