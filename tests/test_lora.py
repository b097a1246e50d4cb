"""Low-rank adapters: PEFT on our models, and runs that train nothing else."""

import copy
import re

import pytest
import torch

peft = pytest.importorskip("peft", reason="the adapters are its")

from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig  # noqa: E402

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
