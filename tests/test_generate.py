"""Sampling and the decoding loop, on both models."""

import pytest
import torch

from fastlm.generate import generate, sample, stream
from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2]]


def small_model(kind, **options):
    if kind == "gru":
        model = GRULM(GRULMConfig(vocab_size=50, n_embd=24, n_hidden=32, n_layer=2, dropout=0.1))
    else:
        options = {"n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4, **options}
        if kind == "gpt-modern":
            options |= {
                "n_kv_head": 2,
                "pos": "rope",
                "norm": "rmsnorm",
                "mlp": "swiglu",
                "bias": False,
            }
        model = GPT(GPTConfig(vocab_size=50, **options))
    for p in model.parameters():  # large enough for distinct logits
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(params=["gpt", "gpt-modern", "gru"])
def model(request):
    return small_model(request.param)


@torch.no_grad()
def greedy_without_cache(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_greedy_equals_whole_forward_passes(model):
    expected = [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert [model.generate([p], 20, temperature=0)[0] for p in PROMPTS] == expected
    assert model.generate(PROMPTS, 20, temperature=0) == expected  # unequal lengths, one batch
    assert model.generate(torch.tensor(PROMPTS[:1]), 20, temperature=0) == expected[:1]


def test_a_full_context_goes_on_from_its_last_half():
    model = small_model("gpt-modern", n_positions=8)
    tokens, expected = [1, 2, 3], []
    start = 0
    for _ in range(30):
        if len(tokens) - start > 8:
            start = len(tokens) - 4
        token = greedy_without_cache(model, tokens[start:], 1)[0]
        tokens.append(token)
        expected.append(token)
    assert model.generate([[1, 2, 3]], 30, temperature=0)[0] == expected


def test_a_prompt_longer_than_the_context():
    model = small_model("gpt", n_positions=8)
    prompt = list(range(20))
    assert model.generate([prompt], 3, temperature=0)[0] == greedy_without_cache(model, prompt[-4:], 3)


def test_rows_end_at_stop_tokens(model):
    free = model.generate(PROMPTS, 20, temperature=0)
    stop = free[0][3]
    stopped = model.generate(PROMPTS, 20, temperature=0, stop_tokens=[stop])
    for before, after in zip(free, stopped, strict=True):
        end = before.index(stop) + 1 if stop in before else 20
        assert after == before[:end]


def test_stream_yields_as_it_goes_and_leaves_the_model_as_it_was(model):
    model.train()
    steps = stream(model, PROMPTS[:1], 20, temperature=0)
    first = next(steps)
    assert model.training and torch.is_grad_enabled()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout)).eval()
    model.generate([[1, 2]], 2)
    assert model.training and not frozen.training
    rest = [step[0] for step in steps]
    assert first + rest == greedy_without_cache(model.eval(), PROMPTS[0], 20)


def test_seed_repeats_the_draw(model):
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    a, b = (model.generate(PROMPTS, 20, seed=7, **options) for _ in range(2))
    assert a == b
    assert model.generate(PROMPTS, 20, seed=8, **options) != a
    state = torch.get_rng_state()
    model.generate(PROMPTS, 5, seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator isn't touched
    assert model.generate(PROMPTS, 0) == [[], [], []]


def test_sample_follows_the_distribution():
    torch.manual_seed(1)
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])

    def frequencies(**options):
        drawn = sample(logits.expand(20000, 4), **options)
        return torch.bincount(drawn, minlength=4) / 20000

    p = logits[0].softmax(0)
    torch.testing.assert_close(frequencies(), p, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(temperature=2.0), (logits[0] / 2).softmax(0), atol=0.015, rtol=0)
    two = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])
    torch.testing.assert_close(frequencies(top_k=2), two, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=float(p[1]) + 0.01), two, atol=0.015, rtol=0)
    assert frequencies(top_p=float(p[1]) - 0.01)[1] == 1  # the first token alone is enough
    assert frequencies(temperature=0)[1] == 1
    assert frequencies(top_k=1)[1] == 1
    torch.testing.assert_close(frequencies(top_k=99, top_p=1.0), p, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
        ({"top_k": 1.5}, "top_k must be a whole number >= 1, got 1.5"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 50]]}, r"prompt 0 has a token outside the vocabulary 0\.\.49"),
        ({"prompts": [[-1]]}, "outside the vocabulary"),
        (
            {"prompts": torch.zeros(2, 2)},
            r"must be \(B, T\) of whole numbers, got \(2, 2\) of torch.float32",
        ),
    ],
)
def test_bad_options(options, message):
    call = {"prompts": [[1]], "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        stream(small_model("gpt"), **call)  # at the call, before a token is asked for
    with pytest.raises(ValueError, match=message):
        generate(small_model("gpt"), **call)
