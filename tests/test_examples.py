"""The programs of examples/, as their users run them, at a small size: they learn what they say."""

import csv
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {
    "emotion_classifier": ("numpy", "safetensors", "tokenizers"),
    "finetune_transformers": ("numpy", "transformers", "accelerate"),
    "gpt": ("numpy",),
    "gru_lm": ("numpy",),
    "recurrent_policy": ("gymnasium",),
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def example(name):
    """Its `main`; the test is skipped where a package that it needs is missing."""
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


@pytest.fixture(autouse=True)
def two_threads(restore_threads, tiny_calls_as_shipped):
    torch.set_num_threads(2)


@pytest.fixture
def text(tmp_path):
    """A file in which all but each line's number follows from what stands before."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} apples and {i % 7} pears are {i + i % 7} fruits\n" for i in range(2000)))
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        example(name)(["--help"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "--seed" in printed and f"python examples/{name}.py" in printed


def test_table():
    """The README has a row for each, the documentation its source."""
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(rows) == NAMES == sorted(NEEDS)
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    assert re.findall(r'^    --8<-- "examples/(\w+)\.py"$', page, re.M) == rows


def test_gru_lm(text, capsys):
    bits = example("gru_lm")(
        ["--data", text, *"--hidden 64 --batch-size 8 --length 48 --steps 120 --write 60 --prompt 17".split()]
    )
    assert bits[0] > 7 and bits[-1] < 1.2
    assert re.search(r"\d apples", capsys.readouterr().out)


def test_gpt(text, capsys):
    size = "--width 48 --heads 2 --layers 2 --context 64 --window 24 --steps 150 --write 60 --prompt 17"
    bits = example("gpt")(["--data", text, *size.split()])
    assert bits[0] > 7 and bits[-1] < 1.5
    assert re.search(r"\d apples", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", ["", "--lora 4"], ids=["whole", "lora"])
def test_finetune_transformers(text, tmp_path, capsys, more):
    """A Llama that fastlm exported goes on, whole or by low-rank updates; what is saved is what was tuned."""
    main = example("finetune_transformers")
    from transformers import AutoModelForCausalLM

    from fastlm.export import to_transformers
    from fastlm.models import GPT, GPTConfig
    from fastlm.tokenizer import ByteTokenizer

    model = GPT(
        GPTConfig(
            vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bias=False, pos="rope",
            norm="rmsnorm", mlp="swiglu", initializer_range=0.06,
        )
    )  # fmt: skip
    to_transformers(model, ByteTokenizer(), str(tmp_path / "begin"))
    if more:
        pytest.importorskip("peft")
    size = "--length 48 --most 40000 --steps 60 --lr 4e-3 --write 20"
    folders = ["--model", str(tmp_path / "begin"), "--data", text, "--save", str(tmp_path / "tuned")]
    losses = main([*folders, *size.split(), *more.split()])
    assert losses[0] > 5.4 and losses[1] < (4.6 if more else 2.0)
    assert "perplexity" in capsys.readouterr().out
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")  # torch's attention, our weights
    tokens = torch.tensor([list(Path(text).read_bytes()[-48 * 20 :])]).view(20, 48)
    assert tuned(tokens, labels=tokens).loss.item() < losses[0] - 1.5


def test_recurrent_policy():
    rewards = example("recurrent_policy")("--updates 30 --hidden 32 --lr 1e-2".split())
    assert len(rewards) == 31 and rewards[0] < 40
    assert rewards[-1] > 100


def test_emotion_classifier(capsys):
    """Sentences of frames that it hasn't seen; a sixth of them are right by chance."""
    size = "--width 48 --lm-steps 100 --steps 300"
    accuracy = example("emotion_classifier")(size.split())
    assert len(accuracy) == 2 and accuracy[0] < 0.35 and accuracy[1] > 0.5
    assert "said to be" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "txt", "jsonl"])
def test_emotion_classifier_reads_files(tmp_path, kind):
    """A label that a word says; with --lora, one of them."""
    words = {"joy": "glad", "fear": "afraid", "anger": "mad"}
    rows = [(f'i feel {word}, "{i}" times', label) for i in range(60) for label, word in words.items()]
    path = tmp_path / f"feelings.{kind}"
    with open(path, "w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("text", "label"), *rows])
        elif kind == "txt":
            file.writelines(f"{text};{label}\n" for text, label in rows)
        else:
            file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    size = f"--data {path} --width 32 --lm-steps 5 --steps 120 --lr 2e-2 --out {tmp_path / 'runs'}"
    if kind == "csv":
        pytest.importorskip("peft")
        size += " --lora 4"
    accuracy = example("emotion_classifier")(size.split())
    assert kind == "csv" or accuracy[1] > 0.6  # adapters of a model that has seen nothing learn little
    assert (kind == "csv") == any(tmp_path.rglob("adapter_model.safetensors"))
