"""Fine-tuning: a run goes on from a model of ours or of the transformers library."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed import _train, call, check_alike  # noqa: F401 - call is a fixture
from test_distributed import pytestmark as needs_gloo

from fastlm import checkpoint, cli, data
from fastlm.examples import Examples
from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig, from_pretrained
from fastlm.tokenizer import ByteTokenizer, FileTokenizer
from fastlm.train import TrainOptions, evaluate, resume, start

pytest.importorskip("safetensors")

V = 256
LLAMA = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def keep_threads(restore_threads):
    """A trainer sets torch's thread count."""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} and {i % 7}\n" for i in range(600)))
    return path


@pytest.fixture
def options(corpus, tmp_path):
    """Makes the options of a run that takes a second."""

    def make(**changes):
        return TrainOptions(**{
            "data": [str(corpus)], "cache": str(tmp_path / "cache"), "block_size": 16, "batch_size": 2,
            "lr": 1e-2, "warmup": 2, "max_steps": 6, "eval_every": 3, "eval_blocks": 2, "save_every": 3,
            "threads": 1, "tensorboard": False, **changes,
        })  # fmt: skip

    return make


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command; returns (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(command: str):
        monkeypatch.setattr(sys, "argv", ["fastlm", *command.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers", reason="the models to start from are its")


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 200 tokens or so."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V - 6,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:100],
    )
    tokenizer.train_from_iterator(["line and line 12: 34 and 5\n"] * 9, trainer)
    return tokenizer


def library_model(hf, kind: str, **changes):
    torch.manual_seed(1)
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | changes))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | changes))
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, and far enough from 0 to matter
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def save_library_model(folder, hf, words, kind: str = "llama", **changes):
    model = library_model(hf, kind, **changes)
    model.save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    return model


def tokens(B: int = 2, T: int = 24):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def close(trainer):
    trainer.run._lock.close()  # as the end of a process does


# ---- Llama's names and values -----------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0}
# Of a head's four frequencies with theta 50, the first stays, the last is divided, two are in between.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_theta": 50.0, **LINEAR}},
        {"rope_parameters": {"rope_theta": 50.0, **LLAMA3}},
        {
            "rope_parameters": {"rope_theta": 50.0, "rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 24,
        },
    ],
    ids=[
        "grouped",
        "tied",
        "biases",
        "theta-and-eps",
        "linear-positions",
        "llama3-positions",
        "dynamic-positions",
    ],
)
def test_llama(hf, tmp_path, changes):
    theirs = library_model(hf, "llama", **changes)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert isinstance(ours, GPT)
    idx = tokens()
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=2e-5, rtol=1e-4)
    targets = idx.roll(-1, 1)
    loss = ours(idx, targets)
    torch.testing.assert_close(loss, theirs(idx, labels=idx, shift_labels=targets).loss, atol=1e-5, rtol=1e-5)
    steps = theirs.generate(idx[:1, :5], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert ours.generate([idx[0, :5].tolist()], 6, temperature=0) == [steps[0, 5:].tolist()]


def test_llama_in_several_files(hf, tmp_path):
    theirs = library_model(hf, "llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(
        from_pretrained(tmp_path)(tokens()), theirs(tokens()).logits, atol=2e-5, rtol=1e-4
    )
    index = tmp_path / "model.safetensors.index.json"
    for damaged in ("{", '{"weight_map": 1}', '{"weight_map": {"a": "../../model.safetensors"}}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="index.json: damaged"):
            from_pretrained(tmp_path)


def test_llama_body_loads(hf):
    """A LlamaModel's state dict has no head; where it is tied, none is needed."""
    config = GPTConfig(V, 64, 32, 2, 4, 2, 48, bias=False, pos="rope", norm="rmsnorm", mlp="swiglu",
                       layer_norm_epsilon=1e-6)  # fmt: skip
    theirs = library_model(hf, "llama", tie_word_embeddings=True)
    ours = GPT(config).eval()
    ours.load_state_dict(theirs.model.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' isn't supported, only 'silu'"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type 'yarn' isn't supported, only 'default', 'dynamic', 'linear', 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_scaling must be a number > 0, got None"),
        ({"head_dim": 16}, "head_dim 16 isn't supported, only hidden_size / num_attention_heads, 8"),
        ({"attention_bias": True}, "mlp_bias False isn't supported, only that of attention_bias, True"),
        ({"hidden_size": None}, "hidden_size must be a whole number, got None"),
    ],
)
def test_unsupported_llama(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **changes}))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


# ---- runs that go on from a model -------------------------------------------------------------


def our_model(kind: str):
    if kind == "gru":
        return GRULM(GRULMConfig(V, n_embd=8, n_hidden=12, n_layer=2, zoneout=0.1))
    return GPT(GPTConfig(V, 80, n_embd=16, n_layer=1, n_head=2, pos="rope", embd_pdrop=0.2))


@pytest.mark.parametrize("kind", ["gpt", "gru"])
def test_a_run_begins_from_a_folder_of_ours_and_needs_it_no_more(options, tmp_path, kind):
    origin = tmp_path / "origin"
    model = our_model(kind)
    checkpoint.save_model(origin, model, ByteTokenizer())
    options = options(init_from=str(origin))
    trainer = start(options, tmp_path / "whole")
    assert type(trainer.model) is type(model) and trainer.model.config == model.config
    for (name, a), b in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    trainer.train()
    expected = (tmp_path / "whole/checkpoints/step-6/model.safetensors").read_bytes()

    for kill in (1, 5):
        run = tmp_path / f"killed-{kill}"
        checkpoint.save_model(origin, model, ByteTokenizer())
        trainer = start(options, run)

        def report(what, values, kill=kill):
            if (what, values["step"]) == ("step", kill):
                raise KeyboardInterrupt

        trainer.report = report
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        close(trainer)
        shutil.rmtree(origin)
        trainer = resume(run)
        assert trainer.progress.step == kill // 3 * 3
        trainer.train()
        assert (run / "checkpoints/step-6/model.safetensors").read_bytes() == expected


def test_a_run_begins_from_a_run_and_from_its_checkpoint(options, tmp_path):
    start(options(n_layer=1, n_head=2, n_embd=16), tmp_path / "first").train()
    for name, origin, step in (("run", "first", 6), ("checkpoint", "first/checkpoints/step-3", 3)):
        trainer = start(options(init_from=str(tmp_path / origin)), tmp_path / name)
        expected = from_pretrained(tmp_path / f"first/checkpoints/step-{step}")
        for a, b in zip(trainer.model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_run_begins_from_a_folder_of_transformers(hf, words, options, run, tmp_path, kind):
    theirs = save_library_model(tmp_path / "origin", hf, words, kind, eos_token_id=[7, 8])
    trainer = start(options(init_from=str(tmp_path / "origin")), tmp_path / "run")
    idx = tokens()
    torch.testing.assert_close(trainer.model.eval()(idx), theirs(idx).logits, atol=5e-5, rtol=1e-4)
    assert trainer.tokenizer.vocab_size == words.get_vocab_size()
    assert trainer.tokenizer.end_of_text == trainer.corpus.val[-1] == 7
    command = (
        "train --data corpus.txt --cache cache --block-size 16 --max-steps 4 --save-every 2 --no-tensorboard "
        "--threads 1"
    )
    status, _, errors = run(f"{command} --init-from origin --out cli --sample 5")
    assert status == 0, errors
    record = json.loads((tmp_path / "cli/run.json").read_text())
    assert record["lr"] == 1e-4 and record["model"] is None
    shutil.rmtree(tmp_path / "origin")
    shutil.rmtree(tmp_path / "cli/checkpoints/step-4")
    status, _, errors = run("train --resume --out cli --sample 0")
    assert status == 0, errors
    assert run("evaluate cli")[0] == run("generate cli line --max-new-tokens 3")[0] == 0


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("--n-layer 3", "n_layer"),
        ("--model gpt", "model"),
        ("--tokenizer bytes", "tokenizer"),
        ("--no-tie", "tie"),
        ("--dropout 0.1", "dropout"),
    ],
)
def test_options_of_the_model_belong_to_the_model(run, tmp_path, given, name):
    checkpoint.save_model(tmp_path / "origin", our_model("gpt"), ByteTokenizer())
    status, _, errors = run(f"train --init-from origin {given}")
    assert status == 2
    assert errors == f"fastlm: error: {name} can't be given with init_from, whose model has its own\n"


def test_bad_origins(run, tmp_path, corpus):
    checkpoint.save_model(tmp_path / "origin", our_model("gpt"), ByteTokenizer())
    (tmp_path / "empty").mkdir()
    our_model("gpt").save_pretrained(tmp_path / "mute")
    for command, message in (
        ("--init-from nowhere", "nowhere: no such folder"),
        ("--init-from empty", "empty: no model here (config.json is missing)"),
        ("--init-from mute", "mute: no tokenizer here (tokenizer.json is missing)"),
        ("--init-from origin --block-size 81", "origin: its context is 80, block_size is 81"),
    ):
        status, _, errors = run(f"train {command} --data corpus.txt --cache cache --no-tensorboard")
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "runs").exists()


# ---- instructions and answers -----------------------------------------------------------------


def write_lines(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def sums(n: int):
    return [{"prompt": f"{i} plus {i % 7} is ", "response": f"{i + i % 7}"} for i in range(n)]


def test_the_loss_is_that_of_the_answers(tmp_path):
    """Every sequence by itself, against a batch of unequal ones, for both models."""
    lines = [
        {"prompt": "ab", "response": "cde"},
        {"prompt": "", "response": "f"},
        {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "v"},
            {"role": "assistant", "content": "no"}, {"role": "user", "content": "w"},
        ]},
    ]  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", *lines)
    split, text = data.encode_all([path], ByteTokenizer())
    talk = b"\0<|system|>\ns\n<|user|>\nu\n<|assistant|>\nyes\0<|user|>\nv\n<|assistant|>\nno\0"
    sequences = [b"\0abcde\0", b"\0f\0", talk]
    counted = [range(3, 7), range(1, 3), [*range(talk.index(b"yes"), talk.index(b"yes") + 4), *range(len(talk) - 3, len(talk))]]  # fmt: skip
    assert bytes(text) == b"cde\0f\0yes\0no\0" and data.predicted(split) == len(text)
    for kind in ("gpt", "gru"):
        model = our_model(kind).eval()
        total = count = 0
        for sequence, places in zip(sequences, counted, strict=True):
            logits = model(torch.tensor([list(sequence)]))[0].log_softmax(-1)
            total -= sum(logits[t - 1, sequence[t]].item() for t in places)
            count += len(places)
        for batch_size in (1, 2, 3):
            loss = evaluate(model, split, 80, batch_size)
            assert loss == pytest.approx(total / count, rel=1e-5)


def test_long_examples_are_cut_at_the_block(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "abc", "response": "defgh"}, *sums(3))
    split, _ = data.encode_all([path], ByteTokenizer())
    for block, expected in ((4, 1), (5, 2), (8, 5), (9, 6), (50, 6)):
        idx, targets = split.rows(np.array([0, -1]), block)
        assert idx.shape == (2, min(block, 9))
        assert (targets[0] >= 0).sum() == split.counts(block)[0] == expected
        assert (targets[1] < 0).all()
    assert split.counts(50)[-1] == len("4") + 1  # to the very end of the tokens


def test_splits_hold_each_example_once(tmp_path):
    lines = sums(50)
    path = write_lines(tmp_path / "x.jsonl", *lines, *lines)

    def sides(*paths, **changes):
        options = {"block_size": 64, "cache": tmp_path / "cache", **changes}
        corpus = data.prepare(list(paths), ByteTokenizer(), **options)
        read = [
            [bytes(s.tokens[a:b]) for a, b in zip(s.starts, s.starts[1:], strict=False)]
            for s in (corpus.train, corpus.val)
        ]
        return corpus, *read

    corpus, train, val = sides(path)
    assert sorted(train + val) == sorted(2 * [f"\0{x['prompt']}{x['response']}\0".encode() for x in lines])
    assert not set(train) & set(val) and 2 <= len(val) < 16
    assert sides(path)[0].key == corpus.key
    assert isinstance(corpus.train.tokens, np.memmap)
    other, _, more = sides(path, write_lines(tmp_path / "y.jsonl", {"prompt": "?", "response": "!"}))
    assert other.key != corpus.key and len(set(val) - set(more)) <= 1
    _, _, half = sides(path, val_bytes=120)
    assert len(half) > len(val)


def test_an_epoch_takes_each_example_once(tmp_path):
    split, _ = data.encode_all([write_lines(tmp_path / "x.jsonl", *sums(7))], ByteTokenizer())
    orders = [split.order(7, 7 * epoch, seed=3).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({*map(tuple, orders)}) > 1
    assert split.order(9, 4, 3).tolist() == (orders[0] + orders[1])[4:13]
    assert data.training_targets(split, 64, 0, 21, 3) == 3 * data.predicted(split)


@pytest.mark.parametrize(("n", "step"), [(1000, 8), (997, 12), (5, 4), (3, 8), (40, 8), (64, 1)])
def test_a_steps_examples_are_of_like_length(tmp_path, n, step):
    lengths = np.random.default_rng(0).lognormal(3, 0.8, n).astype(int) + 2
    starts = np.concatenate([[0], lengths.cumsum()])
    split = Examples(np.zeros(starts[-1], np.uint8), np.ones(starts[-1], bool), starts)
    order = split.order(3 * n, 0, 7, step)
    for epoch in order.reshape(3, n):
        assert sorted(epoch) == list(range(n))
    assert not np.array_equal(order[:n], order[n : 2 * n]) or n < 6
    for first, count in ((0, step), (n - 1, 4), (2 * n - 3, 3)):  # whatever part is asked for
        assert np.array_equal(split.order(count, first, 7, step), order[first : first + count])
    if n < 900:
        return

    def padding(order):
        rows = lengths[order][: len(order) // step * step].reshape(-1, step)
        return 1 - rows.mean() / rows.max(1).mean()

    assert padding(order) < 0.3 * padding(split.order(3 * n, 0, 7))
    firsts = lengths[order[:n]].reshape(-1, step) if n % step == 0 else None
    if firsts is not None:  # steps of all lengths all the time, no curriculum
        half = len(firsts) // 2
        assert 0.7 < firsts[:half].mean() / firsts[half:].mean() < 1.4


def test_evaluations_take_examples_by_length(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *({"prompt": "", "response": "a" * (1 + i * 7 % 50)} for i in range(50)))  # fmt: skip
    split, _ = data.encode_all([path], ByteTokenizer())
    for part in ((0, 1), (1, 2)):
        rows = [(targets >= 0).sum(1) for _, targets in data.evaluation_batches(split, 99, 5, None, part)]
        assert torch.equal(torch.cat(rows), torch.cat(rows).sort().values)


def test_examples_need_a_line_each(tmp_path):
    good = {"prompt": "a", "response": "b"}
    for bad, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "a"}, r"expected prompt and response, or messages, got \['prompt'\]"),
        ({"prompt": "a", "response": ""}, "the response is empty"),
        ({"prompt": 1, "response": "b"}, "prompt must be a string, got int"),
        ({"prompt": "a", "response": "b\0"}, "response holds a NUL"),
        ('{"prompt": "a", "response": "\\ud800"}', "response holds half of a surrogate pair"),
        ({**good, "messages": []}, "has both messages and prompt"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, got str"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"role of messages\[0\] must be one of system"),
        ({"messages": [{"role": "user"}]}, r"content of messages\[0\] must be a string, got NoneType"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message is the assistant's"),
        ({"messages": [{"role": "assistant", "content": ""}]}, r"the content of messages\[0\] is empty"),
    ):
        path = write_lines(tmp_path / "x.jsonl", good, "", bad, good)
        with pytest.raises(ValueError, match=f"x.jsonl:3: {message}"):
            data.prepare([path], ByteTokenizer(), block_size=8, cache=tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="x.jsonl:1: not UTF-8 text"):
        data.prepare([path], ByteTokenizer(), block_size=8, cache=tmp_path)


def test_bad_files_of_examples(tmp_path, corpus):
    def prepare(*paths):
        return data.prepare(list(paths), ByteTokenizer(), block_size=8, cache=tmp_path / "cache")

    for lines, message in (
        ([], "the corpus is empty: no examples in"),
        (2 * sums(1), "at least 2 different examples are needed"),
        ([*sums(1), {"prompt": "12345678", "response": "9"}], "x.jsonl:2: its prompt fills a block of 8"),
        ([{"prompt": "1234567", "response": "9"}, {"prompt": "12345678", "response": "9"}],
         "x.jsonl:2: its prompt fills a block of 8 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepare(write_lines(tmp_path / "x.jsonl", *lines))
    with pytest.raises(ValueError, match="corpus.txt: not a .jsonl file; text and examples can't be mixed"):
        prepare(tmp_path / "x.jsonl", corpus)
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        prepare(tmp_path / "nowhere.jsonl")


def test_accumulated_passes_are_one_batch_of_examples(options, tmp_path):
    """Passes have unequal numbers of targets: each counts as much."""
    path = write_lines(tmp_path / "x.jsonl", *({"prompt": "a" * (i % 5), "response": "b" * (1 + i % 9)} for i in range(90)))  # fmt: skip
    curves = []
    for name, sizes in (("one", {"batch_size": 6}), ("three", {"batch_size": 2, "accumulate": 3})):
        start(options(data=[path], n_layer=1, n_head=2, n_embd=16, **sizes), tmp_path / name).train()
        curves.append([json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for a, b in zip(*curves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)


def test_instructions_are_learned_and_resumed(run, tmp_path):
    write_lines(tmp_path / "x.jsonl", *({"prompt": f"{i % 50}?", "response": "yes" if i % 2 else "no"} for i in range(100)))  # fmt: skip
    write_lines(tmp_path / "y.jsonl", {"prompt": "7?", "response": "yes"})
    command = (
        "train --data x.jsonl --cache cache --block-size 16 --batch-size 16 --n-layer 1 --n-head 2 --n-embd 32 "
        "--no-tensorboard --threads 1 --eval-every 40 --save-every 30 --warmup 5 --out r --sample 0"
    )
    status, output, errors = run(f"{command} --max-steps 80")
    assert (status, errors) == (0, "") and "tokens to learn" in output
    assert "no" in run("generate r 8? --temperature 0 --max-new-tokens 8")[1]
    assert run("generate r 7? --temperature 0 --max-new-tokens 8")[1] == "7?yes\n"
    held, given = run("evaluate r"), run("evaluate r --data y.jsonl")
    assert held[0] == given[0] == 0 and "4 bytes, 4 tokens" in given[1]
    assert float(given[1].split()[1]) < 0.5
    shutil.rmtree(tmp_path / "r/checkpoints/step-80")
    before = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert run("train --resume --out r --sample 0")[0] == 0
    after = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    keep = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines] for lines in (before, after)]  # fmt: skip
    assert keep[0] == keep[1]


@needs_gloo
def test_two_processes_fine_tune_as_one(call, options, tmp_path):  # noqa: F811
    """Each with answers of other lengths; the second run goes on alone, without what it began from."""
    path = write_lines(tmp_path / "x.jsonl", *sums(60), *({"prompt": "", "response": "b" * i} for i in range(1, 15)))  # fmt: skip
    checkpoint.save_model(tmp_path / "origin", our_model("gpt").eval(), ByteTokenizer())
    config = json.loads((tmp_path / "origin/config.json").read_text()) | {
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    (tmp_path / "origin/config.json").write_text(json.dumps(config))
    given = {"init_from": str(tmp_path / "origin"), "data": [path], "batch_size": 3, "accumulate": 2}
    runs = [(options(**given, parallel=parallel), str(tmp_path / parallel)) for parallel in ("ddp", "fsdp")]
    call(2, _train, runs)
    start(runs[0][0], tmp_path / "alone").train()
    for _, folder in runs:
        check_alike(Path(folder), tmp_path / "alone", rtol=1e-3)
    shutil.rmtree(tmp_path / "origin")
    shutil.rmtree(tmp_path / "fsdp/checkpoints/step-6")
    trainer = resume(tmp_path / "fsdp")
    assert trainer.progress.step == 3
    trainer.train()
    check_alike(tmp_path / "fsdp", tmp_path / "alone", rtol=1e-3)


# ---- models for other programs ----------------------------------------------------------------

LIKE_LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 0.1},
        {"bias": False, "tie_word_embeddings": False},
        {**LIKE_LLAMA, "bias": False, "rope_theta": 300.0, "rope_scaling": LLAMA3},
        {**LIKE_LLAMA, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    ],
    ids=["gpt2", "gpt2-without-biases", "llama", "llama-with-biases"],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_export_to_transformers(hf, words, run, tmp_path, changes, tokenizer):
    torch.manual_seed(2)
    ours = GPT(GPTConfig(V, 32, n_embd=32, n_layer=2, n_head=4, **changes)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn_like(p))
    tokenizer = ByteTokenizer() if tokenizer == "bytes" else FileTokenizer(words)
    checkpoint.save_model(tmp_path / "ours", ours, tokenizer)
    status, _, errors = run("export ours --to theirs")
    assert status == 0, errors
    theirs, report = hf.AutoModelForCausalLM.from_pretrained("theirs", output_loading_info=True)
    assert not any(report.values())
    idx = tokens()
    torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx), atol=5e-5, rtol=1e-4)
    library = hf.AutoTokenizer.from_pretrained("theirs")
    for text in ("line 12: 34 and 5\n", "  def f(x):\n\treturn 'ä€'\n", "Ā, no NUL"):
        if isinstance(tokenizer, ByteTokenizer):
            assert library.decode(library(text).input_ids) == text
        assert library(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.config.eos_token_id == tokenizer.end_of_text
    again, read = checkpoint.load_model("theirs")  # and back
    torch.testing.assert_close(again(idx), ours(idx), atol=5e-5, rtol=1e-4)
    assert read.encode("line 12").tolist() == tokenizer.encode("line 12").tolist()


@pytest.mark.parametrize("kind", ["gpt", "gru"])
def test_export_by_torch_export(run, tmp_path, kind):
    checkpoint.save_model(tmp_path / "ours", our_model(kind), ByteTokenizer())
    status, _, errors = run("export ours --torch-export deep/model.pt2")
    assert status == 0, errors
    program, ours = torch.export.load("deep/model.pt2").module(), from_pretrained("ours")
    for B, T in ((2, 24), (1, 1), (3, 80)):
        torch.testing.assert_close(program(tokens(B, T)), ours(tokens(B, T)))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.pt2"]


def test_what_can_not_be_exported(run, tmp_path):
    for kind in ("gpt", "gru"):
        checkpoint.save_model(tmp_path / kind, our_model(kind), ByteTokenizer())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for command, message in (
        ("gpt", "say what to write: --to FOLDER or --torch-export FILE.pt2"),
        ("gpt --torch-export model.onnx", "the name must end in .pt2"),
        ("gpt --to full", "full: exists and is not an empty folder"),
        ("gpt --to new", "has no GPT with pos='rope', norm='layernorm', mlp='gelu' and 2 of 2 heads"),
        ("gru --to new", "GRULM has no counterpart in the transformers library, only GPT has"),
        ("nowhere --to new", "nowhere: no such folder"),
    ):
        status, _, errors = run(f"export {command}")
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "new").exists()
