"""Low-rank adapters: PEFT on our models, and runs that train nothing else."""

import copy
import json
import re
import shutil

import peft
import pytest
import torch
from test_distributed import _train, call, check_alike  # noqa: F401 - call is a fixture
from test_distributed import pytestmark as needs_gloo
from test_finetune import corpus, options, run, save_library_model, words, write_lines  # noqa: F401
from test_finetune import tokens as byte_tokens

from fastlm import checkpoint
from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig
from fastlm.tokenizer import ByteTokenizer
from fastlm.train import resume, start

V = 100
KINDS = {
    "gpt2": (GPTConfig(V, 32, 32, 2, 4, tie_word_embeddings=False), ["c_attn", "c_fc", "c_proj", "wte", "lm_head"]),
    "llama": (
        GPTConfig(V, 32, 32, 1, 4, 2, pos="rope", norm="rmsnorm", mlp="swiglu", bias=False),
        ["c_attn", "mlp.c_fc"],
    ),
    "gru": (GRULMConfig(V, 24, 32, 2, zoneout=0.1), ["gru", "embedding", "head"]),
    "gru-layer-norm": (GRULMConfig(V, 24, 32, 1, layer_norm=True), ["gru"]),
}  # fmt: skip


def make(kind: str):
    torch.manual_seed(1)
    config, _ = KINDS[kind]
    model = (GPT if isinstance(config, GPTConfig) else GRULM)(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases too
            p.add_(0.1 * torch.randn_like(p))
    return model


def adapt(model, kind: str, **changes):
    torch.manual_seed(2)
    given = {"r": 3, "lora_alpha": 5, "target_modules": KINDS[kind][1], "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


IDX = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(0))


def pairs(model):
    """(weight's name in the base model, A, B) of each adapter, B A being what W is changed by, but for GPT's layers."""
    parameters = dict(model.base_model.model.named_parameters())
    for name, a in parameters.items():
        if match := re.match(r"(.+)\.lora_(embedding_)?A(_\w+)?\.default", name):
            b = parameters[name.replace("_A", "_B")]
            yield f"{match[1]}.{(match[3] or '_weight')[1:]}", a, b


def merged_by_hand(adapted, base):
    """A model with W + 5/3 B A in the place of each W that is adapted."""
    merged = copy.deepcopy(base)
    weights = merged.state_dict()
    for name, a, b in pairs(adapted):
        transposed = "c_" in name or "wte" in name or "embedding" in name
        weights[name] += 5 / 3 * ((b @ a).T if transposed else b @ a).detach()
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_our_models(kind, tmp_path):
    base = make(kind)
    with torch.no_grad():
        before = base(IDX)
    model = adapt(copy.deepcopy(base), kind)
    by_hand = merged_by_hand(model, base)
    logits = model(IDX)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits, by_hand(IDX), **close)
    assert (logits - before).abs().max() > 0.1

    loss = model(IDX, IDX.roll(-1, 1))
    torch.testing.assert_close(loss, by_hand(IDX, IDX.roll(-1, 1)), **close)
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("lora_" in name), name
        assert p.grad is None or p.grad.abs().max() > 0, name

    prompts = [[1, 2, 3], [4]]
    assert model.generate(prompts, 5, temperature=0) == by_hand.generate(prompts, 5, temperature=0)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDX), before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(IDX), logits)
    model.merge_adapter()
    torch.testing.assert_close(model(IDX), logits, **close)
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(model(IDX), before, **close)
    whole = model.merge_and_unload()
    assert type(whole) is type(base) and whole.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(whole(IDX), logits, **close)


@pytest.mark.parametrize("kind", ["gpt2", "gru"])
def test_gradients_of_adapters_are_those_of_the_matrices(kind):
    """dA = s B^T dW and dB = s dW A^T, through the matrices of the merged model."""
    base = make(kind).double()
    model = adapt(copy.deepcopy(base), kind, target_modules=["mlp.c_fc"] if kind == "gpt2" else ["gru"])
    by_hand = merged_by_hand(model, base)
    for one in (model, by_hand):
        one(IDX, IDX.roll(-1, 1)).backward()
    gradients, checked = {n: p.grad for n, p in by_hand.named_parameters()}, 0
    for name, a, b in pairs(model):
        d = 5 / 3 * (gradients[name].T if kind == "gpt2" else gradients[name])
        torch.testing.assert_close(a.grad, b.detach().T @ d)
        torch.testing.assert_close(b.grad, d @ a.detach().T)
        checked += 1
    assert checked == (2 if kind == "gpt2" else 4)


def test_two_adapters_of_a_gru_add_up():
    base = make("gru")
    model = adapt(copy.deepcopy(base), "gru", target_modules=["gru"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["gru"], init_lora_weights="gaussian"))
    first = model(IDX)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(IDX), first)  # the other begins at zero
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("other"):
                p.normal_()
    assert (model(IDX) - first).abs().max() > 0.1
    both = model(IDX)
    torch.testing.assert_close(model.merge_and_unload()(IDX), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "LoRA of a GRU: lora_dropout must be 0.0, got 0.1"),
        ({"use_dora": True}, "LoRA of a GRU: use_dora must be False, got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"r": 0}, "r` should be a positive integer|r must be at least 1"),
    ],
    ids=["dropout", "dora", "pissa", "rank"],
)
def test_what_a_gru_can_not_have(changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(make("gru"), "gru", target_modules=["gru"], **changes)


def test_hooks_see_a_linear_layer():
    """What a layer gives is its product alone, whatever follows it in the model."""
    model, seen = make("gpt2"), {}
    layer = model.transformer["h"][0].mlp.c_fc
    layer.register_forward_hook(lambda layer, x, y: seen.update(x=x[0], y=y))
    model(IDX)
    torch.testing.assert_close(seen["y"], seen["x"] @ layer.weight + layer.bias)


@pytest.mark.parametrize("first", ["apply", "lora"])
def test_adapters_of_the_librarys_head(first):
    """On a GPT-2 on fastlm's operators, its layers (in, out) and its head."""
    transformers = pytest.importorskip("transformers")
    on_fastlm = pytest.importorskip("fastlm.integrations.transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    plain = transformers.GPT2LMHeadModel(config)
    ours, results = copy.deepcopy(plain), []
    if first == "apply":
        on_fastlm.apply(ours)
    for model in (plain, ours):
        model = adapt(model, "gpt2", target_modules=["c_attn", "c_fc", "lm_head"], fan_in_fan_out=True)
        if model.base_model.model is ours and first == "lora":
            with pytest.warns(UserWarning, match="keeps its own loss"):
                on_fastlm.apply(model)
        out = model(IDX, labels=IDX)
        out.loss.backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, truth), (out, gradients) = results
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == truth.keys() and any("lm_head" in name for name in truth)
    for name, grad in truth.items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-5)


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def keep_threads(restore_threads):
    """A trainer sets torch's thread count."""


def save_origin(folder, kind: str):
    """A model of bytes to begin from."""
    torch.manual_seed(1)
    model = (
        GRULM(GRULMConfig(256, 16, 24, 1, dropout=0.0))
        if kind == "gru"
        else GPT(GPTConfig(256, 80, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    )
    checkpoint.save_model(folder, model.eval(), ByteTokenizer())
    return model


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.parametrize("kind", ["gpt", "gru"])
def test_a_run_trains_adapters_alone_and_resumes_to_the_bit(options, tmp_path, kind):  # noqa: F811
    base = save_origin(tmp_path / "origin", kind)
    given = options(init_from=str(tmp_path / "origin"), lora=2, lora_dropout=0.2 if kind == "gpt" else 0.0)
    assert (given.lora_alpha, given.lr) == (4, 1e-2)
    trainer = start(given, tmp_path / "whole")
    state = {id(p) for p in trainer.optimizer.state} | {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert state == {id(p) for p in trained.values()} and all("lora_" in n for n in trained)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert name in trained or torch.equal(p, frozen[name]), name
    shutil.rmtree(tmp_path / "origin")

    # Killed after step 3, behind whose checkpoint it wrote two lines.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-6")
    again = resume(tmp_path / "killed")
    assert again.progress.step == 3
    again.train()
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    a, b = (checkpoint.load_weights(tmp_path / name) for name in ("killed", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    # The model of the run is the merged one, PEFT's own reading of the folder the same.
    idx = byte_tokens()
    merged, _ = checkpoint.load_model(tmp_path / "whole")
    expected = trainer.model.eval()(idx)
    torch.testing.assert_close(merged(idx), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "whole/checkpoints/step-6")
    torch.testing.assert_close(theirs(idx), expected)
    assert not (tmp_path / "whole/checkpoints/step-6/model.safetensors").exists()


def test_a_run_goes_on_from_merged_adapters(options, run, tmp_path):  # noqa: F811
    save_origin(tmp_path / "origin", "gpt")
    common = {"lora": 2, "max_steps": 3, "lr": 0.1}
    start(options(init_from=str(tmp_path / "origin"), **common), tmp_path / "first").train()
    merged, _ = checkpoint.load_model(tmp_path / "first")
    trainer = start(options(init_from=str(tmp_path / "first"), **common), tmp_path / "second")
    idx = byte_tokens()
    torch.testing.assert_close(trainer.model.eval()(idx), merged(idx))  # new adapters change nothing yet
    assert (merged(idx) - checkpoint.load_model(tmp_path / "first/base")[0](idx)).abs().max() > 1e-3
    trainer.train()
    for command in ("evaluate second", "generate second line --max-new-tokens 3"):
        status, output, errors = run(command)
        assert status == 0 and output, errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--init-from gpt --lora 2 --lora-targets c_attn nope", "no layer 'nope' to adapt here, but c_attn, c_fc, c_proj, lm_head, wpe, wte"),
        ("--init-from gpt --lora 2 --lora-targets wte", "'wte' shares its weight with another layer"),
        ("--init-from gru --lora 2 --lora-dropout 0.1", "LoRA of a GRU: lora_dropout must be 0.0, got 0.1"),
        ("--init-from gpt --lora 0", "lora must be positive, got 0"),
        ("--init-from gpt --lora 2 --lora-dropout 1", "lora_dropout must be in [0, 1), got 1.0"),
        ("--init-from gpt --lora-alpha 2", "lora_alpha is of low-rank adapters: give lora, their rank, too"),
        ("--lora 2", "lora needs init_from"),
    ],
    ids=["target", "tied", "gru-dropout", "rank", "dropout", "alpha", "no-origin"],
)  # fmt: skip
def test_bad_options(run, tmp_path, corpus, given, message):  # noqa: F811
    for kind in ("gpt", "gru"):
        save_origin(tmp_path / kind, kind)
    status, _, errors = run(
        f"train {given} --data corpus.txt --cache cache --no-tensorboard --block-size 16 --out r"
    )
    assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "r").exists()


def test_damaged_adapters(options, tmp_path):  # noqa: F811
    save_origin(tmp_path / "origin", "gpt")
    start(options(init_from=str(tmp_path / "origin"), lora=2, max_steps=1), tmp_path / "run").train()
    step = tmp_path / "run/checkpoints/step-1"
    weights, config = (step / "adapter_model.safetensors").read_bytes(), json.loads((step / "adapter_config.json").read_text())  # fmt: skip
    for name, content, message in (
        ("adapter_model.safetensors", weights[:-9], "damaged or not a safetensors file"),
        ("adapter_config.json", "{", "adapter_config.json: damaged"),
        ("adapter_config.json", json.dumps(config | {"r": 3}), "not an adapter of this model: base_model.model"),
        ("adapter_config.json", json.dumps(config | {"target_modules": ["x"]}), "not adapters of this model"),
        ("adapter_config.json", json.dumps(config | {"base_model_name_or_path": "x"}), "the adapters' model, 'x', is no folder here"),
    ):  # fmt: skip
        before = (step / name).read_bytes()
        (step / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            checkpoint.load_model(tmp_path / "run")
        (step / name).write_bytes(before)
    checkpoint.load_model(tmp_path / "run")


@needs_gloo
def test_two_processes_train_the_same_adapters(call, options, tmp_path):  # noqa: F811
    runs = []
    for kind in ("gpt", "gru"):
        save_origin(tmp_path / kind, kind)
        for parallel in ("ddp", "fsdp"):
            given = options(init_from=str(tmp_path / kind), lora=2, accumulate=2, parallel=parallel)
            runs.append((given, str(tmp_path / f"{kind}-{parallel}")))
    call(2, _train, runs)
    for kind in ("gpt", "gru"):
        alone = tmp_path / f"{kind}-alone"
        start(options(init_from=str(tmp_path / kind), lora=2, accumulate=2), alone).train()
        for parallel in ("ddp", "fsdp"):
            check_alike(tmp_path / f"{kind}-{parallel}", alone, rtol=1e-3)
    shutil.rmtree(tmp_path / "gru-fsdp/checkpoints/step-6")
    trainer = resume(tmp_path / "gru-fsdp")
    trainer.train()
    check_alike(tmp_path / "gru-fsdp", tmp_path / "gru-alone", rtol=1e-3)


# ---- adapters for the transformers library -----------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("labelled", [False, True], ids=["lm", "classifier"])
def test_export_of_adapters(run, options, words, tmp_path, kind, labelled):  # noqa: F811
    """Trained here for a folder of the library's, they load there with PEFT alone."""
    hf = pytest.importorskip("transformers")
    save_library_model(tmp_path / "theirs", hf, words, kind)
    given = {"init_from": str(tmp_path / "theirs"), "lora": 2, "lr": 0.1}
    if kind == "llama" and not labelled:
        given["lora_targets"] = ["c_attn", "c_proj", "c_fc", "wte", "lm_head"]  # not tied
    if labelled:
        lines = [{"text": f"line {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]
        given["data"] = [write_lines(tmp_path / "x.jsonl", *lines)]
    start(options(**given), tmp_path / "run").train()
    status, output, errors = run("export run --adapter adapter")
    assert status == 0 and "AutoPeftModelFor" in output, errors
    assert "exists and is not an empty folder" in run("export run --adapter adapter")[2]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == given["init_from"]
    assert config["task_type"] == ("SEQ_CLS" if labelled else "CAUSAL_LM")
    load = peft.AutoPeftModelForSequenceClassification if labelled else peft.AutoPeftModelForCausalLM
    theirs = load.from_pretrained("adapter").eval()
    ours, _ = checkpoint.load_model("run")
    before, _ = checkpoint.load_model("theirs")
    idx = byte_tokens(1) % 200
    expected = ours(idx)
    torch.testing.assert_close(theirs(idx).logits, expected, rtol=1e-3, atol=1e-4)
    assert labelled or (expected - before(idx)).abs().max() > 0.1


def test_adapters_that_are_not_there(run, tmp_path):  # noqa: F811
    for kind in ("gpt", "gru"):
        save_origin(tmp_path / kind, kind)
    for command, message in (
        ("gpt --adapter new", "gpt: no low-rank adapters here, which fastlm train --lora makes"),
        ("gpt --to new --base x", "--base is of adapters: give --adapter too"),
    ):
        status, _, errors = run(f"export {command}")
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "new").exists()
