"""Classifiers of texts: the model, its data, its runs, and the same in the transformers library."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_distributed import _train, call, check_alike  # noqa: F401 - call is a fixture
from test_distributed import pytestmark as needs_gloo
from test_finetune import close, corpus, hf, options, run, save_library_model, words, write_lines  # noqa: F401

from fastlm import checkpoint, data
from fastlm.examples import Examples
from fastlm.models import (
    GPT,
    GRULM,
    GPTConfig,
    GRULMConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    from_pretrained,
)
from fastlm.tokenizer import ByteTokenizer, FileTokenizer
from fastlm.train import resume, start

V = 256
LABELS = ("anger", "fear", "joy")
BODIES = {
    "gpt2": GPTConfig(V, 48, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "llama": GPTConfig(
        V, 48, 16, 2, 4, 2, pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, embd_pdrop=0.0,
        attn_pdrop=0.0, resid_pdrop=0.0,
    ),
    "gru": GRULMConfig(V, 12, 20, 1, dropout=0.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def keep_threads(restore_threads):
    """A trainer sets torch's thread count."""


def make(kind: str, labels=LABELS):
    torch.manual_seed(1)
    model = SequenceClassifier(SequenceClassifierConfig(BODIES[kind], labels)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def padded(*lengths):
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(1, V, (len(lengths), max(lengths)), generator=random)
    for row, length in zip(idx, lengths, strict=True):
        row[length:] = 0
    return idx, torch.tensor(lengths)


def feelings(n: int, seed: int = 0):
    """Texts of unequal lengths whose label is one word of theirs."""
    random = np.random.default_rng(seed)
    said = {"anger": "furious", "fear": "afraid", "joy": "glad"}
    rest = ["today", "again", "at work", "since the morning", "about it all", "and that is it"]
    for i in range(n):
        label = LABELS[i % 3]
        more = " ".join(random.choice(rest, random.integers(0, 4)))
        yield {"text": f"i feel {said[label]} {more} {i}", "label": label}


# ---- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BODIES)
def test_logits_are_those_of_the_last_token(kind, tmp_path):
    model = make(kind)
    idx, lengths = padded(9, 1, 5)
    logits = model(idx, lengths=lengths)
    assert logits.shape == (3, 3)
    for row, length, whole in zip(idx, lengths, logits, strict=True):  # each by itself, from features
        alone = model.body.features(row[None, :length])[0, -1] @ model.score.weight.T
        torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(row[None, :length])[0], alone, rtol=1e-4, atol=1e-5)
    targets = torch.tensor([2, -100, 0])
    loss = model(idx, targets, lengths)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP waits for each of them
    rows = [row[:length].tolist() for row, length in zip(idx, lengths, strict=True)]
    torch.testing.assert_close(model.predict(rows), logits.softmax(-1))

    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is SequenceClassifier and again.labels == LABELS and not again.training
    assert torch.equal(again(idx, lengths=lengths), logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "anger", "1": "fear", "2": "joy"} and config["label2id"]["joy"] == 2


def test_metrics():
    model = make("gru", ("a", "b", "c", "never"))
    idx, lengths = padded(*range(1, 21))
    given = model(idx, lengths=lengths).argmax(-1)
    targets = given.clone()
    targets[:6] = (given[:6] + 1) % 3
    targets[19] = -100
    totals = model.tally(idx, targets, lengths)
    halves = [model.tally(idx[i : i + 10], targets[i : i + 10], lengths[i : i + 10]) for i in (0, 10)]
    assert totals == pytest.approx(np.sum(halves, 0).tolist(), rel=1e-5)
    here, t, g = slice(0, 19), targets[:19], given[:19]
    expected = []
    for label in range(4):
        right, there, said = ((t == label) & (g == label)).sum(), (t == label).sum(), (g == label).sum()
        if there + said:
            expected.append(float(2 * right / (there + said)))
    metrics = model.metrics(totals)
    assert metrics["accuracy"] == 13 / 19 and metrics["macro_f1"] == pytest.approx(np.mean(expected))
    assert metrics["loss"] == pytest.approx(model(idx[here], t, lengths[here]).item(), rel=1e-5)


def test_what_a_classifier_refuses():
    model = make("gpt2")
    for labels in (("a",), ("a", "a"), ()):
        with pytest.raises(ValueError, match="labels must be 2 or more different names"):
            SequenceClassifierConfig(BODIES["gpt2"], labels)
    idx, lengths = padded(3, 2)
    with pytest.raises(ValueError, match=r"targets must be \(2,\), one for each row of idx, got \(2, 3\)"):
        model(idx, idx)
    with pytest.raises(ValueError, match=r"lengths must be \(2,\)"):
        model(idx, lengths=lengths[:1])
    with pytest.raises(ValueError, match="idx has 49 tokens, the model's context is 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match="a row is empty"):
        model.predict([[1], []])


# ---- data -------------------------------------------------------------------------------------


def test_labels_are_named_and_numbered(tmp_path):
    def encode(*lines, names=None):
        return data.encode_all([write_lines(tmp_path / "x.jsonl", *lines)], ByteTokenizer(), names)[0]

    def lines(*labels):
        return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]

    assert encode(*lines("joy", "anger", "joy")).numbers.tolist() == [1, 0, 1]
    assert encode(*lines(10, 9, 3)).numbers.tolist() == [2, 1, 0]
    assert encode(*lines("joy", "fear"), names=("joy", "fear")).numbers.tolist() == [0, 1]
    assert encode(*lines(1, 0), names=("joy", "fear")).numbers.tolist() == [1, 0]
    assert encode(*lines(5, 4), names=("4", "5")).numbers.tolist() == [1, 0]
    split = encode({"text": "ab", "label": "x"}, {"text": "", "label": "y", "more": 1})
    idx, targets, lengths = split.rows(np.array([0, 1, -1]), 9)
    assert idx.tolist()[:2] == [[0, 97, 98], [0, 0, 0]] and targets.tolist() == [0, 1, -100]
    assert lengths.tolist() == [3, 1, 1] and split.rows(np.array([0]), 2)[0].tolist() == [[0, 97]]
    for bad, message in (
        (lines("joy", 1), "x.jsonl:2: label 1 is a number, others are strings"),
        (lines("joy", "joy"), "at least 2 different labels are needed, got 'joy' alone"),
        (lines("a", True), "x.jsonl:2: label must be a string or a whole number, got bool"),
        (lines("a", 1.5), "label must be a string or a whole number, got float"),
        (lines("a", " "), "x.jsonl:2: label is empty"),
        ([*lines("a"), {"text": "t"}], r"x.jsonl:2: expected text and label, got \['text'\]"),
        ([{"text": 1, "label": "a"}], "text must be a string, got int"),
        ([*lines("a"), {"prompt": "p", "response": "r"}], "expected text and label, got"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(*bad)
    for names, label in ((("joy", "fear"), 2), (("4", "5"), 0), (("joy", "fear"), "sad")):
        with pytest.raises(ValueError, match=f"label {label!r} is none of the model's: {names[0]}"):
            encode(*lines(label), names=names)
    answers = encode({"prompt": "p", "response": "r", "label": "x"})  # of an instruction, one thing more
    assert type(answers) is Examples
    with pytest.raises(ValueError, match="a classifier reads .jsonl files of texts and labels"):
        encode({"prompt": "p", "response": "r"}, names=LABELS)


def test_equal_texts_are_held_out_together(tmp_path):
    lines = [{"text": f"t{i % 30}", "label": i % 7} for i in range(90)]
    path = write_lines(tmp_path / "x.jsonl", *lines)
    corpus = data.prepare([path], ByteTokenizer(), block_size=8, cache=tmp_path / "cache")  # noqa: F811
    sides = [
        {bytes(s.tokens[a:b]) for a, b in zip(s.starts, s.starts[1:], strict=False)}
        for s in (corpus.train, corpus.val)
    ]
    assert len(sides[0]) + len(sides[1]) == 30 and not sides[0] & sides[1] and sides[1]
    assert corpus.labels == tuple("0123456") and len(corpus.train) + len(corpus.val) == 90
    other = data.prepare(
        [path], ByteTokenizer(), block_size=8, cache=tmp_path / "cache", names=tuple("6543210")
    )
    assert other.key != corpus.key and other.labels[0] == "6"


# ---- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "gru"])
def test_a_classifier_is_learned_and_resumed(run, tmp_path, kind):  # noqa: F811
    write_lines(tmp_path / "x.jsonl", *feelings(240))
    write_lines(tmp_path / "y.jsonl", *feelings(60, seed=1))
    steps = 120 if kind == "gpt" else 240
    sizes = "--n-layer 1 --n-head 2 --n-embd 32" if kind == "gpt" else "--n-layer 1 --n-embd 16 --n-hidden 48"
    common = (
        "--cache cache --block-size 64 --batch-size 8 --no-tensorboard --threads 1 --save-every 40 --warmup 5"
    )
    status, output, errors = run(
        f"train --model {kind} --data x.jsonl {sizes} {common} --max-steps {steps} --lr 0.01 --eval-every 60 "
        "--val-bytes 1000 --out r"
    )
    assert (status, errors) == (0, "") and "texts to learn" in output
    assert "always" in output and "macro F1" in output
    shutil.rmtree(tmp_path / f"r/checkpoints/step-{steps}")
    before = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert run("train --resume --out r")[0] == 0
    after = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    keep = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines] for lines in (before, after)]  # fmt: skip
    assert keep[0] == keep[1] and {"loss", "accuracy", "macro_f1"} < keep[0][-1].keys()
    assert keep[0][-1]["accuracy"] > 0.7

    lines = run("evaluate r --data y.jsonl")[1].splitlines()
    values = {line[:14].strip(): line[14:].split()[0] for line in lines}
    assert float(values["accuracy"]) > 0.7 and values["texts"] == "60"
    assert run("evaluate r")[0] == 0
    status, output, _ = run("classify r glad --top 2")
    assert status == 0 and output.endswith("\tglad\n") and output.count("%") == 2
    status, output, _ = run("classify r --json furious afraid --batch-size 1")
    first, second = map(json.loads, output.splitlines())
    assert first["text"] == "furious" and first["probabilities"].keys() == set(LABELS)
    assert sum(second["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert second["label"] == max(second["probabilities"], key=second["probabilities"].get)
    assert "a classifier writes no text: fastlm classify r TEXT" in run("generate r")[2]
    write_lines(tmp_path / "z.jsonl", {"text": "t", "label": "sad"}, {"text": "u", "label": "joy"})
    for command in ("evaluate r --data z.jsonl", f"train --init-from r --data z.jsonl {common}"):
        assert "z.jsonl:1: label 'sad' is none of the model's: anger, fear, joy" in run(command)[2]
    (tmp_path / "plain.txt").write_text("words " * 100)
    assert "a classifier reads .jsonl files" in run(f"train --init-from r --data plain.txt {common}")[2]
    status, _, errors = run(
        f"train --init-from r --data y.jsonl {common} --max-steps 2 --out s --val-bytes 100"
    )
    assert (status, errors) == (0, "")


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["gpt", "gru"])
def test_a_language_model_becomes_a_classifier(options, tmp_path, kind, adapters):  # noqa: F811
    torch.manual_seed(0)
    origin = GRULM(BODIES["gru"]) if kind == "gru" else GPT(BODIES["gpt2"])
    checkpoint.save_model(tmp_path / "origin", origin.eval(), ByteTokenizer())
    path = write_lines(tmp_path / "x.jsonl", *feelings(60))
    given = {"init_from": str(tmp_path / "origin"), "data": [path], "block_size": 40}
    if adapters:
        pytest.importorskip("peft", reason="the adapters are its")
        given["lora"] = 2
    trainer = start(options(**given), tmp_path / "run")
    body = trainer.model.eval().body
    idx, _ = padded(7)
    torch.testing.assert_close(body.features(idx), origin.features(idx))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    assert not adapters or all("lora_" in name or "score" in name for name in trained)
    trainer.model.train()
    trainer.train()
    loaded, _ = checkpoint.load_model(tmp_path / "run")
    assert type(loaded) is SequenceClassifier and loaded.labels == LABELS
    trainer.model.eval()
    torch.testing.assert_close(loaded(idx), trainer.model(idx), rtol=1e-4, atol=1e-5)
    assert (
        not torch.equal(loaded.score.weight, trainer.model.score.original_module.weight) if adapters else True
    )
    shutil.rmtree(tmp_path / "run/checkpoints/step-6")
    close(trainer)
    again = resume(tmp_path / "run")
    again.train()
    for (name, p), q in zip(again.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@needs_gloo
def test_two_processes_train_one_classifier(call, options, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    checkpoint.save_model(tmp_path / "origin", GPT(BODIES["gpt2"]).eval(), ByteTokenizer())
    path = write_lines(tmp_path / "x.jsonl", *feelings(60))
    given = {"init_from": str(tmp_path / "origin"), "data": [path], "block_size": 40, "batch_size": 3, "accumulate": 2, "eval_blocks": 9}  # fmt: skip
    runs = [(options(**given, parallel=parallel), str(tmp_path / parallel)) for parallel in ("ddp", "fsdp")]
    call(2, _train, runs)
    start(runs[0][0], tmp_path / "alone").train()
    for _, folder in runs:
        check_alike(tmp_path / folder, tmp_path / "alone", rtol=1e-3)


# ---- the transformers library -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_export(hf, words, run, tmp_path, kind, tokenizer):  # noqa: F811
    model = make(kind)
    tokenizer = ByteTokenizer() if tokenizer == "bytes" else FileTokenizer(words)
    checkpoint.save_model(tmp_path / "ours", model, tokenizer)
    status, output, errors = run("export ours --to theirs")
    assert status == 0 and "AutoModelForSequenceClassification" in output, errors
    theirs, report = hf.AutoModelForSequenceClassification.from_pretrained("theirs", output_loading_info=True)
    assert not any(report.values()) and theirs.config.id2label == dict(enumerate(LABELS))
    idx, lengths = padded(9, 1, 5)
    end = tokenizer.end_of_text
    idx[0, 1:][idx[0, 1:] == end] = 5
    for row, length in zip(idx, lengths, strict=True):
        row[length:] = end
    logits = model(idx, lengths=lengths)
    torch.testing.assert_close(theirs.eval()(idx).logits, logits, atol=2e-5, rtol=1e-4)

    # The library's own pipeline says of a text what fastlm classify does.
    pipeline = hf.pipeline("text-classification", model="theirs", top_k=None)
    for text in ("line 12: 34", ""):
        row = [end, *tokenizer.encode(text).tolist()]
        expected = dict(zip(LABELS, model.predict([row])[0].tolist(), strict=True))
        assert {x["label"]: x["score"] for x in pipeline([text])[0]} == pytest.approx(expected, abs=1e-5)
    again, _ = checkpoint.load_model("theirs")  # and back
    assert again.labels == LABELS
    torch.testing.assert_close(again(idx, lengths=lengths), logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gru"])
def test_export_by_torch_export(run, tmp_path, kind):  # noqa: F811
    checkpoint.save_model(tmp_path / "ours", make(kind), ByteTokenizer())
    status, _, errors = run("export ours --torch-export model.pt2")
    assert status == 0, errors
    program, ours = torch.export.load("model.pt2").module(), from_pretrained("ours")
    for lengths in ((9, 9), (1,), (48, 48, 48)):
        idx, _ = padded(*lengths)
        torch.testing.assert_close(program(idx), ours(idx))


def test_what_is_not_ours_is_refused(hf, words, run, tmp_path):  # noqa: F811
    checkpoint.save_model(tmp_path / "gru", make("gru"), ByteTokenizer())
    assert "GRULM has no counterpart in the transformers library" in run("export gru --to new")[2]
    checkpoint.save_model(tmp_path / "ours", make("gpt2"), FileTokenizer(words))
    assert run("export ours --to theirs")[0] == 0
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    for change, message in (
        ({"problem_type": "regression"}, "problem_type 'regression' isn't supported"),
        ({"id2label": {"a": "b"}}, "id2label must name each label's number"),
        ({"id2label": {"0": "b"}}, "labels must be 2 or more different names"),
    ):
        (tmp_path / "theirs/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path / "theirs")
    assert "a language model, not a classifier" in run(f"classify {save_lm(tmp_path)} text")[2]


def save_lm(folder):
    checkpoint.save_model(folder / "lm", GRULM(BODIES["gru"]).eval(), ByteTokenizer())
    return "lm"
