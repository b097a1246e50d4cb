"""Models of the transformers library on fastlm, against their own eager attention and loss in float32."""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as hf  # noqa: E402
from transformers import masking_utils  # noqa: E402

import fastlm  # noqa: E402
import fastlm.integrations.transformers as integration  # noqa: E402
from fastlm.integrations.deferred import Logits  # noqa: E402

hf.logging.set_verbosity_error()

V, T = 61, 12
SIZE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
MODELS = {
    "gpt2": (hf.GPT2Config, GPT2),
    "llama": (hf.LlamaConfig, SIZE),
    "qwen2": (hf.Qwen2Config, {**SIZE, **MIXED, "use_sliding_window": True}),
    "qwen3": (hf.Qwen3Config, SIZE),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**SIZE, "num_experts": 4, "num_experts_per_tok": 2,
                                      "moe_intermediate_size": 16, "output_router_logits": True}),
    "gemma": (hf.GemmaConfig, SIZE),
    "gemma2": (hf.Gemma2Config, {**SIZE, **MIXED, "attn_logit_softcapping": 3.0,
                                 "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": (hf.Gemma3TextConfig, {**SIZE, **MIXED, "query_pre_attn_scalar": 8}),
    "gpt_oss": (hf.GptOssConfig, {**SIZE, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2,
                                  "output_router_logits": True, "rope_scaling": {"rope_type": "default"}}),
    "cohere": (hf.CohereConfig, {**SIZE, "logit_scale": 0.25}),
    "granite": (hf.GraniteConfig, {**SIZE, "logits_scaling": 4.0}),
}  # fmt: skip


def make(name, attention="eager", **changes):
    kind, options = MODELS[name]
    model = hf.AutoModelForCausalLM.from_config(kind(**options | changes), attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():  # away from zeros, ones and near-zero weights
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def batch(padding=None):
    """Labels follow real tokens only: a query without any key is 0 here, as in torch's SDPA, and the mean
    of all values in eager attention."""
    ids = torch.randint(2, V, (3, T))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if padding in ("left", "right"):
        mask = torch.ones_like(ids)
        for row, n in enumerate((4, 0, 1)):
            mask[row, slice(0, n) if padding == "left" else slice(T - n, T)] = 0
        first = F.pad(mask, (1, 0))[:, :-1] == 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill((mask == 0) | first, -100)}
    if padding == "packed":
        positions = [torch.cat([torch.arange(n) for n in row]) for row in ((7, 5), (1, 2, 9), (12,))]
        inputs |= {"position_ids": torch.stack(positions), "use_cache": False}
    return inputs


def run(model, inputs, loss=None):
    model.zero_grad()
    out = model(**inputs)
    (out.loss if loss is None else loss(out)).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(model, inputs, loss=None):
    """One step of the model, as it is and applied; the output of the second."""
    expected, gradients = run(model, inputs, loss)
    integration.apply(model)
    out, mine = run(model, inputs, loss)
    if expected.loss is not None:
        torch.testing.assert_close(out.loss, expected.loss)
        assert loss is not None or not was_made(out)
    real = inputs.get("attention_mask", torch.ones(expected.logits.shape[:2])).bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-4, atol=2e-5)
    assert mine.keys() == gradients.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(
            mine[name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max()), msg=name
        )
    return out


def was_made(out):
    return not isinstance(out.logits, Logits) or out.logits._dense is not None


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                self.size = max(self.size, x.numel())
        return result


# ---- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", (None, "left", "right", "packed"))
@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_gradients(name, padding):
    check_same(make(name), batch(padding))


@pytest.mark.parametrize("name", ("gpt2", "gemma2", "gpt_oss"))
@pytest.mark.parametrize("padding", ("left", "right", "packed"))
def test_no_mask_of_queries_by_keys(name, padding, monkeypatch):
    model = integration.apply(make(name))
    monkeypatch.setattr(integration.Mask, "dense", lambda self: pytest.fail("a mask was made"))
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **k: pytest.fail("a mask was made"))
    run(model, batch(padding))


def test_keys_and_values_are_not_repeated(monkeypatch):
    heads = []

    def attention(query, key, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1]))
        return fastlm.scaled_dot_product_attention(query, key, *args, **kwargs)

    monkeypatch.setattr(integration, "scaled_dot_product_attention", attention)
    integration.apply(make("llama"))(**batch("left"))
    assert heads == [(4, 2)] * 2


def test_loss_makes_no_logits():
    model, inputs = make("llama", vocab_size=4000), batch()
    sizes = []
    for apply in (False, True):
        if apply:
            integration.apply(model)
        with Largest() as largest:
            run(model, inputs)
        sizes.append(largest.size)
    logits = inputs["input_ids"].numel() * 4000
    weight = model.lm_head.weight.numel()
    assert weight < logits
    assert sizes == [logits, weight]  # that of the weight's gradient


@pytest.mark.parametrize(
    "change",
    ({"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"sliding_window": 64}),
    ids=lambda change: next(iter(change)),
)
def test_options_of_gemma_matter(change):
    torch.manual_seed(1)
    inputs, losses = batch(), []
    for options in ({}, change):
        torch.manual_seed(2)
        losses.append(integration.apply(make("gemma2", **options))(**inputs).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-4


def test_sinks_matter():
    model, inputs = integration.apply(make("gpt_oss")), batch()
    before = model(**inputs).loss.item()
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks += 3
    assert abs(model(**inputs).loss.item() - before) > 1e-4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("how", ("weights", "autocast"))
def test_low_precision(dtype, how):
    model, inputs = make("gemma2", "sdpa" if how == "none" else "eager"), batch("left")
    truth, _ = run(model, inputs)
    if how == "weights":
        model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        eager, eager_grads = run(model, inputs)
        integration.apply(model)
        mine, grads = run(model, inputs)
    assert mine.loss.dtype == eager.loss.dtype == torch.float32
    assert mine.logits.dtype == eager.logits.dtype
    error = (mine.loss - truth.loss).abs()
    assert error <= 2 * (eager.loss - truth.loss).abs() + 2e-3
    for name, grad in grads.items():
        scale = eager_grads[name].float().abs().max()
        assert (grad - eager_grads[name]).float().abs().max() <= 0.1 * scale + 1e-3, name


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant):
    model = make("gemma2").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_same(model, batch("right") | {"use_cache": False})


def test_dropout_reaches_the_operator():
    model = make("llama", attention_dropout=0.5).train()
    inputs = batch("right")
    with torch.no_grad():
        losses = {integration.apply(model)(**inputs).loss.item() for _ in range(3)}
        assert len(losses) == 3
        model.eval()
        assert len({model(**inputs).loss.item() for _ in range(3)}) == 1
    check_same(integration.restore(make("llama", attention_dropout=1.0)).train(), inputs)  # all weights


def test_flash_attention_arguments():
    model = make("gemma2")
    inputs = {k: v[:1] for k, v in batch("packed").items() if k != "use_cache"}
    starts = torch.tensor([0, 7, T], dtype=torch.int32)
    packing = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    expected = model(**inputs, use_cache=False)
    integration.apply(model)
    for positions in (inputs["position_ids"], None):  # with the positions a mask says it too
        out = model.model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False, **packing)
        assert out.last_hidden_state.shape[1] == T
    out = model(**inputs, use_cache=False, **packing)
    torch.testing.assert_close(out.loss, expected.loss)
    mask = torch.ones(1, T)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="neither padding"):
        model(input_ids=inputs["input_ids"], attention_mask=mask, **packing)


# ---- losses and logits --------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    (
        lambda ids: {"num_items_in_batch": torch.tensor(7)},
        lambda ids: {"num_items_in_batch": 7},
        lambda ids: {"shift_labels": ids.roll(-1, 1)},
        lambda ids: {"logits_to_keep": 4, "labels": ids[:, -4:]},
        lambda ids: {"labels": torch.full_like(ids, -100)},
    ),
    ids=("items tensor", "items", "shift", "keep", "none"),
)
def test_loss_arguments(extra):
    inputs = batch()
    inputs |= extra(inputs["input_ids"])
    model = make("gemma2")
    expected, gradients = run(model, inputs)
    out, mine = run(integration.apply(model), inputs)
    torch.testing.assert_close(out.loss, expected.loss, equal_nan=True)
    for name, grad in gradients.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not was_made(out)


LOSSES = {
    "shifted": lambda o, y: F.cross_entropy(o.logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "ellipsis": lambda o, y: F.cross_entropy(
        o.logits[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
    ),
    "chosen": lambda o, y: F.cross_entropy(o.logits[y > 30], y[y > 30], reduction="sum"),
    "smoothed": lambda o, y: F.cross_entropy(o.logits.view(-1, V).float(), y.view(-1), label_smoothing=0.1),
    "weighted": lambda o, y: torch.nn.CrossEntropyLoss(torch.linspace(1, 2, V))(o.logits.view(-1, V), y.view(-1)),
    "per token": lambda o, y: F.cross_entropy(o.logits.flatten(0, 1), y.flatten(), reduction="none").square().sum(),
    "probabilities": lambda o, y: F.cross_entropy(o.logits.view(-1, V), F.one_hot(y, V).float().view(-1, V)),
    "fastlm": lambda o, y: fastlm.cross_entropy(o.logits.view(-1, V), y.view(-1), z_loss=0.1),
    "by hand": lambda o, y: -o.logits.log_softmax(-1).gather(-1, y[..., None]).mean(),
    "in place": lambda o, y: F.cross_entropy(o.logits.clone().mul_(2).view(-1, V), y.view(-1)),
    "classes second": lambda o, y: F.cross_entropy(o.logits.transpose(1, 2), y),
}  # fmt: skip


@pytest.mark.parametrize("name", ("gemma2", "granite"))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_the_programs_own(name, loss):
    inputs = batch()
    labels = inputs.pop("labels")
    check_same(make(name), inputs, lambda out: LOSSES[loss](out, labels))


class Squares(torch.autograd.Function):
    """Reads logits without any torch function's knowledge."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_logits_in_a_function_of_the_programs_own():
    inputs = batch()
    del inputs["labels"]
    check_same(make("gemma2"), inputs, lambda out: Squares.apply(out.logits))


def test_a_hook_on_logits():
    """It sees the gradient that comes to them later, and does not make them."""
    model, inputs, seen = make("gemma2"), batch(), []
    labels = inputs.pop("labels")

    def loss(out):
        out.logits.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        assert not isinstance(out.logits, Logits) or not was_made(out)
        return F.cross_entropy(out.logits.view(-1, V), labels.view(-1))

    check_same(model, inputs, loss)
    torch.testing.assert_close(*seen)


def test_logits_are_made_once_and_in_time():
    model = integration.apply(make("llama"))
    out = model(**batch())
    assert out.logits.shape == (3, T, V) and out.logits.dtype == torch.float32 and out.logits.requires_grad
    assert out.logits.dim() == 3 and len(out.logits) == 3 and out.logits.device.type == "cpu"
    assert not was_made(out)
    assert out.logits.sum().requires_grad and out.logits.dense() is out.logits.dense()
    out = model(**batch())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed since"):
        out.logits.argmax(-1)
    with torch.no_grad():
        out = model(**batch())
    assert not out.logits.requires_grad and not out.logits[0].requires_grad
    assert pickle.loads(pickle.dumps(out.logits)).shape == (3, T, V)
    assert "Logits" not in type(copy.deepcopy(out.logits)).__name__


def test_what_is_made_at_once(monkeypatch):
    """One position, and evaluations of several processes, where FSDP takes the weight away."""
    model = integration.apply(make("llama"))
    assert type(model(input_ids=torch.ones(2, 1, dtype=torch.int64)).logits) is torch.Tensor
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert isinstance(model(**batch()).logits, Logits)
    with torch.no_grad():
        assert type(model(**batch()).logits) is torch.Tensor


# ---- masks --------------------------------------------------------------------------------

FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "chunked": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), 4),
    "all": (masking_utils.bidirectional_mask_function, None),
    "both sides": (masking_utils.sliding_window_bidirectional_mask_function(2), 2),
    "own": (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2), None),
}


@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize(
    "sizes",  # queries, keys, position of the first query and of the first key
    ((6, 6, 0, 0), (3, 9, 6, 0), (6, 12, 0, 0), (3, 12, 4, 0), (4, 6, 9, 7), (1, 7, 6, 0), (1, 12, 4, 0)),
    ids=("start", "chunk", "static start", "static chunk", "sliding cache", "step", "static step"),
)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_masks(kind, sizes, padded):
    """A mask does in the operator what the library's own tensor says, and is that when read."""
    function, local = FUNCTIONS[kind]
    Tq, Tk, q_offset, kv_offset = sizes
    attention_mask = torch.ones(2, q_offset + Tq, dtype=torch.bool)
    if padded:
        attention_mask[0, : kv_offset + 2] = False
    skip = {"allow_is_causal_skip": kind in ("causal", "window", "chunked"),
            "allow_is_bidirectional_skip": kind in ("all", "both sides")}  # fmt: skip
    given = {
        "batch_size": 2, "q_length": Tq, "kv_length": Tk, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": attention_mask, "local_size": local,
        "device": torch.device("cpu"),
    }  # fmt: skip
    mask = integration.fastlm_mask(**given, **skip)
    truth = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    if isinstance(mask, integration.Mask):
        assert torch.equal(mask & True, truth) and mask.shape == truth.shape
    else:
        assert Tq == 1 or kind in ("own", "chunked") or mask is None
    q, k, v = torch.randn(2, 4, Tq, 8), torch.randn(2, 2, Tk, 8), torch.randn(2, 2, Tk, 8)
    module = torch.nn.Module()
    module.is_causal = not skip["allow_is_bidirectional_skip"]
    for bias in (None, torch.randn(1, 4, Tq, Tk)):
        out, weights = integration.fastlm_attention(module, q, k, v, mask, position_bias=bias)
        whole = truth if bias is None else torch.where(truth, bias, -torch.inf)
        expected = fastlm.reference.scaled_dot_product_attention(q, k, v, whole, enable_gqa=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        assert weights is None


def test_sliding_window_without_a_mask():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    for causal in (True, False):
        out, _ = integration.fastlm_attention(
            torch.nn.Module(), q, k, v, None, is_causal=causal, sliding_window=3
        )
        expected = fastlm.reference.scaled_dot_product_attention(q, k, v, window_size=(2, 0 if causal else 2))
        torch.testing.assert_close(out, expected.transpose(1, 2))


# ---- generation ---------------------------------------------------------------------------


GENERATE = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "assisted": {"prompt_lookup_num_tokens": 2, "eos_token_id": V},  # transformers 5.4 wants one
}


@pytest.mark.parametrize(
    "name, how",
    [("gemma2", how) for how in GENERATE]
    + [(name, how) for name in ("gpt2", "gpt_oss") for how in list(GENERATE)[:3]],
)
def test_generates_the_same_tokens(name, how):
    """With padding on the left, from more tokens than the sliding window has."""
    options = {"output_router_logits": False} if name == "gpt_oss" else {}
    model = make(name, **options).eval()
    inputs = batch("left")
    rows = slice(2, 3) if how == "assisted" else slice(None)
    inputs = {k: inputs[k][rows] for k in ("input_ids", "attention_mask")}
    options = GENERATE[how] | {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(integration.apply(model).generate(**inputs, **options), expected)


# ---- other architectures ------------------------------------------------------------------

SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip


def encoder_decoder(kind):
    if kind == "t5":
        return hf.T5ForConditionalGeneration, hf.T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
    return hf.BartForConditionalGeneration, hf.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        dropout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ("t5", "bart"))
def test_encoder_and_decoder(kind):
    """Position biases, cross-attention, a bias added to the logits, two configurations or one."""
    cls, config = encoder_decoder(kind)
    model = cls._from_config(config, attn_implementation="eager")
    inputs = batch("right")
    labels = inputs["input_ids"][:, :7].contiguous()
    mask = inputs.pop("attention_mask")
    expected, gradients = run(model, inputs | {"labels": labels, "attention_mask": mask})
    out, mine = run(integration.apply(model), inputs | {"labels": labels, "attention_mask": mask})
    torch.testing.assert_close(out.loss, expected.loss)
    assert not was_made(out)
    for name, grad in gradients.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5)
    tokens = model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=5, num_beams=2)
    again = integration.restore(model).generate(
        inputs["input_ids"], attention_mask=mask, max_new_tokens=5, num_beams=2
    )
    assert torch.equal(tokens, again)


def test_encoders():
    config = hf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    check_same(hf.BertForMaskedLM._from_config(config, attn_implementation="eager"), batch("right"))
    config = hf.ModernBertConfig(
        **SMALL | {"num_hidden_layers": 3}, local_attention=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    check_same(hf.ModernBertForMaskedLM._from_config(config, attn_implementation="eager"), batch("right"))


def test_without_an_output_layer():
    config = hf.LlamaConfig(**SIZE)
    model = hf.LlamaModel._from_config(config, attn_implementation="eager").eval()
    ids = batch()["input_ids"]
    expected = model(ids).last_hidden_state
    out = integration.apply(model)(ids).last_hidden_state
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_attention_weights_are_refused(name):
    model = integration.apply(make(name))
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch(), output_attentions=True)
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True


def test_wrong_models():
    with pytest.raises(TypeError, match="expected a transformers.PreTrainedModel"):
        integration.apply("llama")
    with pytest.raises(TypeError, match="contains no"):
        integration.apply(torch.nn.Linear(2, 2))


def test_what_stays_is_said():
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.warns(UserWarning, match="keeps its own loss, as its output layer is a Sequential"):
        integration.apply(model)
    assert model.config._attn_implementation == "fastlm"
    integration.restore(model)
    with pytest.raises(ValueError, match="nothing to replace"):
        integration.apply(model, attention=False)


# ---- apply and restore --------------------------------------------------------------------


def state(model):
    return [
        (type(module), {k: (id(v), v) if isinstance(v, hf.PretrainedConfig) else id(v)
                        for k, v in vars(module).items()})
        for module in model.modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", ("gpt2", "gemma2"))
def test_restore_undoes_all(name):
    model = make(name)
    config, before, values = model.config, state(model), copy.deepcopy(vars(model.config))
    other = type(model)(config)
    integration.apply(integration.apply(model))
    assert model.config._attn_implementation == "fastlm" and model.config is not config
    assert other.config._attn_implementation == config._attn_implementation == "eager"
    assert isinstance(model(**batch()).logits, Logits) and not isinstance(other(**batch()).logits, Logits)
    integration.restore(integration.restore(model))
    assert state(model) == before and vars(model.config) == values and model.config is config


def test_parts():
    model = make("llama")
    integration.apply(model, loss=False)
    assert model.config._attn_implementation == "fastlm" and type(model(**batch()).logits) is torch.Tensor
    integration.apply(model, attention=False)
    assert model.config._attn_implementation == "eager" and not was_made(model(**batch()))


def test_changes_of_the_configuration_survive():
    model = make("llama")
    config = model.config
    integration.apply(model)
    model.config.use_cache = False
    model.resize_token_embeddings(V + 3)  # makes another output layer
    assert not was_made(integration.apply(model)(**batch()))
    assert config.use_cache is False and config.vocab_size == V + 3
    assert integration.restore(model).config is config and config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("copy", "pickle")
)
def test_copies(how):
    model = integration.apply(make("llama", tie_word_embeddings=True))
    inputs = batch()
    twin = how(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert torch.equal(twin(**inputs).loss, model(**inputs).loss) and not was_made(twin(**inputs))
    integration.restore(twin)
    assert type(twin.lm_head) is torch.nn.Linear and twin.config._attn_implementation == "eager"
    assert twin.config is twin.model.config is twin.model.layers[0].self_attn.config
    assert model.config._attn_implementation == "fastlm" and not was_made(model(**inputs))


def test_what_is_saved_is_the_librarys(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path / "before")
    integration.apply(model).save_pretrained(tmp_path / "applied")
    for path in sorted((tmp_path / "before").iterdir()):
        assert path.read_bytes() == (tmp_path / "applied" / path.name).read_bytes(), path.name


def test_by_name(tmp_path):
    """attn_implementation="fastlm", without apply."""
    model = make("qwen3", "fastlm").eval()
    ids = batch()["input_ids"]
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastlm").eval()
    assert again.config._attn_implementation == "fastlm"
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.set_attn_implementation("eager")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


# ---- with other libraries -----------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(2, V, (8, T))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = torch.ones(T, dtype=torch.int64)
        mask[T - i % 4 :] = 0 if i % 4 else 1
        return {
            "input_ids": self.ids[i],
            "attention_mask": mask,
            "labels": self.ids[i].masked_fill(mask == 0, -100),
        }


def history(tmp_path, apply, **options):
    torch.manual_seed(3)
    model, data = make("gemma2"), Data()
    if apply:
        integration.apply(model)
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path / str(apply)), per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=4, **options,
    )  # fmt: skip
    trainer = hf.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda p: {"mean": float(p.predictions.mean()), "n": p.predictions.size},
    )  # fmt: skip
    trainer.train()
    kept = ("loss", "eval_loss", "grad_norm", "eval_mean", "eval_n")
    return [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history]


@pytest.mark.parametrize(
    "options, entries",
    (
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}, 4),
        ({"max_steps": 1, "label_smoothing_factor": 0.1, "save_strategy": "no"}, 2),
    ),
    ids=("accumulated", "smoothed"),
)
def test_trainer(options, entries, tmp_path):
    """Accumulation (num_items_in_batch), metrics of the predictions, a checkpoint."""
    before, after = (history(tmp_path, apply, **options) for apply in (False, True))
    assert len(before) == len(after) == entries
    assert "eval_steps" not in options or before[2]["eval_n"] == 8 * T * V
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys() and other == pytest.approx(one, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("first", ("apply", "lora"))
def test_lora(first, tmp_path):
    import peft

    model, inputs = make("llama"), batch("right")
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    if first == "apply":
        adapted = peft.get_peft_model(integration.apply(model), lora)
    else:
        adapted = integration.apply(peft.get_peft_model(model, lora))
    out, gradients = run(adapted, inputs)
    assert gradients and all("lora" in name for name in gradients) and not was_made(out)
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    tokens = adapted.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
    adapted.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "adapter_config.json").read_text()
    integration.restore(adapted)
    assert model.config._attn_implementation == "eager" and type(model.lm_head) is torch.nn.Linear
    expected, truth = run(adapted, inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    for name, grad in truth.items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapted.generate(**prompt, max_new_tokens=4, do_sample=False), tokens)


def test_compiled():
    """Logits and masks are ordinary tensors in a compiled program."""
    model, inputs = make("gemma2", num_hidden_layers=1, layer_types=["sliding_attention"]), batch("left")
    inputs["use_cache"] = False
    expected, gradients = run(model, inputs)
    integration.apply(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    out = compiled(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
