"""Weights of int8 by torchao: values, what multiplies them, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as theirs
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import fastlm
from fastlm.checkpoint import save_model
from fastlm.cli import app
from fastlm.integrations.torchao import Int8Weight, quantize_
from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig
from fastlm.ops import products
from fastlm.tokenizer import ByteTokenizer

MODELS = {
    "gpt": lambda: GPT(GPTConfig(256, 64, 64, 2, 4)),
    "llama": lambda: GPT(GPTConfig(256, 64, 64, 2, 4, 2, pos="rope", norm="rmsnorm", mlp="swiglu", bias=False)),
    "gru": lambda: GRULM(GRULMConfig(256, 32, 48, 2)),
    "gru-tied": lambda: GRULM(GRULMConfig(256, 48, 48, 1, tie_word_embeddings=True)),
}  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():  # biases too
            p.add_(0.05 * torch.randn_like(p))
    return model


def widened(model):
    """The quantized model with its weights as floating ones again."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, Int8Weight):
                setattr(module, name, torch.nn.Parameter(p.dequantize()))
    return exact


@pytest.fixture
def calls(monkeypatch):
    """The numbers of tokens that the kernel multiplied by int8."""
    seen, kernel = [], products.few_tokens

    def spy(x, weight, scale, bias):
        if weight.dtype is torch.int8:
            seen.append(len(x))
        return kernel(x, weight, scale, bias)

    monkeypatch.setattr(products, "few_tokens", spy)
    return seen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kind", MODELS)
def test_generation_is_that_of_the_widened_weights(kind, dtype, calls):
    model = make(kind).to(dtype)
    before = [p.clone() for p in model.parameters()]
    quantized = copy.deepcopy(model)
    quantize_(quantized)
    kept = [p for p in quantized.parameters() if isinstance(p, Int8Weight)]
    # Of each block of a GPT four layers, of a GRU two weights a layer, and the head.
    assert len(kept) == {"gpt": 9, "llama": 9, "gru": 5, "gru-tied": 3}[kind]
    assert all(map(torch.equal, model.parameters(), before))
    exact = widened(quantized)
    prompts, lengths = torch.randint(256, (3, 9)), torch.tensor([9, 4, 7])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with torch.no_grad():
        logits, state = quantized.prefill(prompts, lengths, 12)
        right, right_state = exact.prefill(prompts, lengths, 12)
        torch.testing.assert_close(logits, right, **tolerance)
        calls.clear()
        for _ in range(3):
            tokens = right.argmax(-1)
            logits, state = quantized.decode(tokens, state)
            right, right_state = exact.decode(tokens, right_state)
            torch.testing.assert_close(logits, right, **tolerance)
        assert calls == 3 * len(kept) * [3]  # every weight, at every step
    rounding = torch.stack(
        [(a - b).abs().max() for a, b in zip(model(prompts), quantized(prompts), strict=True)]
    )
    assert 0 < rounding.max() < 0.1 * model(prompts).abs().max()


def test_models_of_the_transformers_library(calls):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    quantize_(model)
    exact = widened(model)
    prompt = torch.randint(100, (1, 6))
    torch.testing.assert_close(model(prompt).logits, exact(prompt).logits, rtol=1e-4, atol=1e-5)
    calls.clear()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **settings), exact.generate(prompt, **settings))
    # Two blocks of four layers and the head, which sees the last of the prompt's tokens only.
    assert calls == 8 * [6] + [1] + 4 * 9 * [1]


def test_torchaos_own_tensors_are_taken_over():
    layer = torch.nn.Sequential(torch.nn.Linear(24, 10))
    theirs(layer, Int8WeightOnlyConfig(version=2))
    q, x = layer[0].weight.qdata, torch.randn(2, 24)
    expected = layer(x)
    quantize_(layer)
    assert isinstance(layer[0].weight, Int8Weight) and layer[0].weight.qdata.data_ptr() == q.data_ptr()
    torch.testing.assert_close(layer(x), expected)
    other = torch.nn.Sequential(torch.nn.Linear(24, 10))
    theirs(other, Int8DynamicActivationInt8WeightConfig())
    assert isinstance(other[0].weight, Int8Tensor)
    with pytest.raises(ValueError, match="quantized in another way"):
        quantize_(other)


@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_gru(bias, batch_first, directions, calls):
    torch.manual_seed(0)
    gru = fastlm.nn.GRU(20, 24, 2, bias=bias, batch_first=batch_first, bidirectional=directions == 2).eval()
    quantize_(gru)
    exact = widened(gru)
    hx = torch.randn(2 * directions, 3, 24)
    for T in (1, 4):
        x = torch.randn(*((3, T) if batch_first else (T, 3)), 20)
        with torch.no_grad():
            torch.testing.assert_close(gru(x, hx), exact(x, hx))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 20) for n in (5, 2, 1)])
    with torch.no_grad():
        torch.testing.assert_close(gru(packed, hx)[0].data, exact(packed, hx)[0].data)
    assert calls == (4 * [3] if directions == 1 else [])  # one step of two layers


def test_options_of_a_gru_are_kept():
    torch.manual_seed(0)
    gru = fastlm.nn.GRU(20, 24, zoneout=0.3, layer_norm=True).eval()
    quantize_(gru)
    x = torch.randn(1, 3, 20)
    with torch.no_grad():
        torch.testing.assert_close(gru(x), widened(gru)(x))


def test_gradients_reach_what_is_not_quantized():
    layer = fastlm.nn.Linear(24, 10)
    quantize_(layer)
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.weight.dequantize(), layer.bias)
    got, right = (torch.autograd.grad(out.sin().sum(), (x, layer.bias)) for out in (y, expected))
    torch.testing.assert_close(got, right)


def test_a_quantized_model_is_not_saved(tmp_path):
    model = make("gpt")
    quantize_(model)
    with pytest.raises(ValueError, match="save a model before it is quantized"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_command(tmp_path):
    model = make("gru")
    save_model(tmp_path / "run", model, ByteTokenizer())
    arguments = [
        "generate",
        str(tmp_path / "run"),
        "abc",
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--int8",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    quantize_(model)
    end = ByteTokenizer().end_of_text
    tokens = model.generate([[end, *b"abc"]], 8, temperature=0, stop_tokens=[end])[0]
    assert done.stdout.strip("\n") == "abc" + ByteTokenizer().decode([t for t in tokens if t != end])
