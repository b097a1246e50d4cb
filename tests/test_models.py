"""GPT and the GRU LM against plain PyTorch, and as citizens: compile, export, save, load."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig, from_pretrained
from fastlm.models.rope import rope_tables, rotate

V = 61


def gpt_config(**options):
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return GPTConfig(**{**sizes, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, **options})


MODERN = {"n_kv_head": 2, "pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
CONFIGS = {
    "gpt2": gpt_config(),
    "gpt-modern": gpt_config(**MODERN),
    "gpt-untied": gpt_config(tie_word_embeddings=False),
    "gru": GRULMConfig(vocab_size=V, n_embd=24, n_hidden=32, n_layer=2, dropout=0.0),
    "gru-tied": GRULMConfig(V, n_embd=32, n_hidden=32, dropout=0.0, tie_word_embeddings=True),
}


def build(config):
    return (GPT if isinstance(config, GPTConfig) else GRULM)(config)


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param])


def tokens(B=3, T=20, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def gpt2_logits(weights, idx, n_layer, n_head):
    """GPT-2 in plain functions, over the names of the transformers library."""
    get = lambda name: weights[f"transformer.{name}"]  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"))  # noqa: E731
    conv = lambda x, name: x @ get(f"{name}.weight") + get(f"{name}.bias")  # noqa: E731
    B, T = idx.shape
    x = get("wte.weight")[idx] + get("wpe.weight")[:T]
    hidden = torch.ones(T, T).triu(1).bool()
    for i in range(n_layer):
        q, k, v = conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (t.reshape(B, T, n_head, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + conv(y, f"h.{i}.attn.c_proj")
        u = conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv(gelu, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["lm_head.weight"].T


def gpt2_weights():
    """A state dict as GPT2LMHeadModel's, with the mask buffers of old releases."""
    shapes = {
        "wte.weight": (V, 48),
        "wpe.weight": (32, 48),
        "ln_f.weight": (48,),
        "ln_f.bias": (48,),
    }
    for i in range(2):
        for name, n_in, n_out in (("attn.c_attn", 48, 144), ("attn.c_proj", 48, 48),
                                  ("mlp.c_fc", 48, 192), ("mlp.c_proj", 192, 48)):  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (48,), f"h.{i}.{name}.bias": (48,)}
    weights = {f"transformer.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    for i in range(2):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["GPT2LMHeadModel", "GPT2Model"])
def test_gpt2_state_dict_loads(prefix):
    weights, idx = gpt2_weights(), tokens()
    expected = gpt2_logits(weights, idx, n_layer=2, n_head=4)
    loaded = {name.replace("transformer.", prefix): w for name, w in weights.items()}
    if not prefix:
        del loaded["lm_head.weight"]
    model = build(CONFIGS["gpt2"])
    model.load_state_dict(loaded)
    torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=1e-4)


def test_transformers_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=48, n_layer=2, n_head=4,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits)
    theirs.load_state_dict(ours.state_dict())  # and back


def test_gru_lm_equals_torch():
    model, idx = build(CONFIGS["gru"]), tokens()
    plain = nn.GRU(24, 32, 2, batch_first=True)
    plain.load_state_dict(model.gru.state_dict())
    hidden, state = plain(model.embedding(idx))
    logits, ours = model(idx, return_state=True)
    torch.testing.assert_close(logits, model.head(hidden))
    torch.testing.assert_close(ours, state)


def test_gru_lm_carries_its_state():
    model, idx = build(CONFIGS["gru"]), tokens()
    whole, (first, state) = model(idx), model(idx[:, :7], return_state=True)
    torch.testing.assert_close(torch.cat([first, model(idx[:, 7:], state=state)], 1), whole)


def test_loss_is_the_cross_entropy_of_the_logits(model):
    idx, targets = tokens(), tokens(seed=1)
    targets[0, :5] = -100
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(idx, targets)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_no_token_sees_a_later_one(model):
    idx = tokens()
    changed = idx.clone()
    changed[:, 10:] = (idx[:, 10:] + 1) % V
    torch.testing.assert_close(model(idx)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(idx)[:, 10:], model(changed)[:, 10:])


def test_rope_depends_on_distance_only():
    cos, sin = rope_tables(gpt_config(**MODERN))
    q, k = torch.randn(2, 1, 1, 1, 12)
    at = lambda x, i: rotate(x, cos[i : i + 1], sin[i : i + 1]).flatten()  # noqa: E731
    products = torch.stack([at(q, i + 5) @ at(k, i) for i in range(20)])
    torch.testing.assert_close(products, products[:1].expand(20))
    torch.testing.assert_close(at(q, 3).norm(), q.norm())


def test_initialisation():
    """GPT-2's: a first loss near log V, smaller weights where a block writes to the residual."""
    model = GPT(GPTConfig(vocab_size=V, n_positions=32, n_embd=128, n_layer=8, n_head=4))
    assert model(tokens(), tokens(seed=1)).item() == pytest.approx(math.log(V), abs=0.3)
    block = model.transformer["h"][0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.attn.c_attn.bias.any()


def test_dropout_follows_the_seed():
    for config in (gpt_config(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1),
                   GRULMConfig(V, 24, 32, 2, dropout=0.1)):  # fmt: skip
        model, losses = build(config), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(tokens(), tokens(seed=1)).item())
        assert losses[0] == losses[1] != losses[2]
        model.eval()
        assert model(tokens(), tokens()).item() == model(tokens(), tokens()).item()


def test_num_params():
    model = build(CONFIGS["gpt2"])
    assert model.num_params() == V * 48 + 32 * 48 + 2 * (12 * 48 * 48 + 13 * 48) + 2 * 48
    assert model.num_params(embeddings=False) == model.num_params() - V * 48 - 32 * 48
    untied = build(CONFIGS["gpt-untied"])
    assert untied.num_params() == model.num_params() + V * 48


def test_compiles_whole(model):
    idx, targets = tokens(), tokens(seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx, targets), model(idx, targets))
    compiled(idx, targets).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(idx, targets).backward()
    for got, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


def test_exports_with_any_batch_and_length(model):
    shapes = {"idx": {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=32)}}
    exported = torch.export.export(model.eval(), (tokens(),), dynamic_shapes=shapes).module()
    for B, T in ((3, 20), (2, 7), (5, 32)):
        torch.testing.assert_close(exported(tokens(B, T)), model(tokens(B, T)))


def test_save_and_load(model, tmp_path):
    pytest.importorskip("safetensors")
    model.save_pretrained(tmp_path, note="kept")
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "kept"
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert loaded.num_params() == model.num_params()  # tied weights are still tied


def test_bad_checkpoints(tmp_path):
    pytest.importorskip("safetensors")
    model = build(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match=r"no model here \(config.json is missing\)"):
        from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'gpt', expected 'gru'"):
        GRULM.from_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for cut in (0, 7, 500, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(config.read_text().replace('"n_embd": 48', '"n_embd": 96'))
    with pytest.raises(ValueError, match=r"not a checkpoint of this model: .*size mismatch"):
        from_pretrained(tmp_path)
    config.write_text('{"model_type": "gpt"')
    with pytest.raises(ValueError, match="config.json: damaged"):
        from_pretrained(tmp_path)
    config.write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"holds a model of type 'mamba', expected one of \['gpt', 'gru'\]"):
        from_pretrained(tmp_path)
    config.write_text('{"model_type": "gpt2", "activation_function": "relu"}')
    with pytest.raises(ValueError, match="activation_function 'relu' isn't supported"):
        from_pretrained(tmp_path)
    config.write_text('{"model_type": "gpt2", "scale_attn_weights": false}')
    with pytest.raises(ValueError, match="without scale_attn_weights isn't supported"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 50}, r"n_embd \(50\) must be a multiple of n_head \(4\)"),
        ({"n_kv_head": 3}, r"n_head \(4\) must be a multiple of n_kv_head \(3\)"),
        ({"n_layer": 0}, "n_layer must be a whole number >= 1, got 0"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop must be in \[0, 1\), got 1.0"),
        ({"pos": "alibi"}, "pos must be one of .*, got 'alibi'"),
        ({"n_embd": 60, "pos": "rope"}, "RoPE needs an even head size, got 15"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}},
            "rope_scaling needs pos='rope', got 'learned'",
        ),
        (
            {"pos": "rope", "rope_scaling": {"rope_type": "yarn"}},
            "needs a rope_type of .*'llama3'.*, got .*'yarn'",
        ),
        (
            {"pos": "rope", "rope_scaling": {"rope_type": "linear", "by": 2}},
            "'linear' is by factor, got .*'by'",
        ),
        (
            {"pos": "rope", "rope_scaling": {"rope_type": "linear", "factor": 0}},
            "factor .* must be a number > 0, got 0",
        ),
    ],
)
def test_bad_gpt_config(options, message):
    with pytest.raises(ValueError, match=message):
        gpt_config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_hidden": 0}, "n_hidden must be a whole number >= 1, got 0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"n_embd": 8, "tie_word_embeddings": True}, "needs n_embd == n_hidden, got 8 and 512"),
    ],
)
def test_bad_gru_config(options, message):
    with pytest.raises(ValueError, match=message):
        GRULMConfig(**options)


def test_bad_inputs(model):
    idx = tokens()
    with pytest.raises(ValueError, match=r"idx must be \(B, T\) of int64 or int32, got \(20,\)"):
        model(idx[0])
    with pytest.raises(ValueError, match="got .* of torch.float32"):
        model(idx.float())
    with pytest.raises(ValueError, match=r"targets must have the shape of idx, \(3, 20\), got \(3, 19\)"):
        model(idx, idx[:, 1:])
    if model.max_length:
        with pytest.raises(ValueError, match="idx has 33 tokens, the model's context is 32"):
            model(tokens(T=33))
