"""install(), uninstall(), installed(), convert(): unmodified programs run on fastlm, and back."""

import copy
import pickle
import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
import fastlm.nn

HAS_LINEAR_LOSS = hasattr(F, "linear_cross_entropy")  # torch 2.13 and later
LinearLoss = nn.LinearCrossEntropyLoss if HAS_LINEAR_LOSS else fastlm.nn.LinearCrossEntropyLoss
PLACES = (
    (F, "scaled_dot_product_attention"),
    (F, "cross_entropy"),
    *([(F, "linear_cross_entropy")] if HAS_LINEAR_LOSS else []),
    (F, "linear"),
    (F, "embedding"),
    (F, "gelu"),
    (torch, "gru"),
    (torch, "gru_cell"),
    (torch._VF, "gru"),
    (torch._VF, "gru_cell"),
)
BEFORE = tuple(getattr(owner, name) for owner, name in PLACES)


@pytest.fixture(autouse=True)
def uninstalled():
    assert current() == BEFORE
    yield
    fastlm.uninstall()
    assert current() == BEFORE


def current():
    return tuple(getattr(owner, name) for owner, name in PLACES)


class Operators(TorchDispatchMode):
    """The names of fastlm's operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlm":
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def operators_of(function):
    with Operators() as seen:
        function()
    return seen.names


# ---- putting in place and back -------------------------------------------------------------


def test_uninstall_restores_the_very_objects():
    assert not any("gru" in name for name in vars(torch._VF))
    fastlm.install()
    fastlm.install()
    assert all(a is not b for a, b in zip(current(), BEFORE, strict=True))
    fastlm.uninstall()
    assert all(a is b for a, b in zip(current(), BEFORE, strict=True))
    assert not any("gru" in name for name in vars(torch._VF))
    fastlm.uninstall()
    assert all(a is b for a, b in zip(current(), BEFORE, strict=True))


def test_contexts_nest_and_respect_install():
    with fastlm.installed(), pytest.raises(ZeroDivisionError), fastlm.installed():
        _ = 1 / 0
    assert current() == BEFORE
    with fastlm.installed():
        with fastlm.installed():
            pass
        assert F.cross_entropy is not BEFORE[1]
    fastlm.install()
    with fastlm.installed():
        pass
    assert F.cross_entropy is not BEFORE[1]
    with fastlm.installed():
        fastlm.uninstall()
        assert current() == BEFORE


def test_threads_install_and_uninstall_at_once():
    def work():
        for _ in range(20):
            with fastlm.installed():
                assert F.cross_entropy is not BEFORE[1]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert current() == BEFORE


def test_somebody_elses_replacement_stays():
    def theirs(*args, **kwargs):
        return None

    fastlm.install()
    ours, F.cross_entropy = F.cross_entropy, theirs
    fastlm.uninstall()
    assert F.cross_entropy is theirs
    F.cross_entropy = BEFORE[1]
    # What was kept of ours is torch's again.
    assert operators_of(lambda: ours(torch.randn(2, 3), torch.tensor([0, 1]))) == []


def test_functions_imported_by_name():
    """Globals of the program's modules are replaced, whether imported before or meanwhile."""
    before, meanwhile = types.ModuleType("program_before"), types.ModuleType("program_meanwhile")
    statement = "from torch.nn.functional import cross_entropy, scaled_dot_product_attention"
    sys.modules.update(program_before=before, program_meanwhile=meanwhile)
    try:
        exec(statement, vars(before))
        before.kept = before.cross_entropy
        fastlm.install()
        exec(statement, vars(meanwhile))
        for module in (before, meanwhile):
            assert module.cross_entropy is F.cross_entropy is not BEFORE[1]
        assert before.kept is BEFORE[1]
        fastlm.uninstall()
        for module in (before, meanwhile):
            assert module.scaled_dot_product_attention is BEFORE[0]
            assert module.cross_entropy is BEFORE[1]
    finally:
        del sys.modules["program_before"], sys.modules["program_meanwhile"]


def test_varlen_attn_before_and_after_its_import():
    program = """
import sys, torch, fastlm
fastlm.install()
assert "torch.nn.attention.varlen" not in sys.modules
from torch.nn.attention.varlen import varlen_attn
import torch.nn.attention.varlen as module
q = torch.randn(7, 2, 8)
cu = torch.tensor([0, 3, 7], dtype=torch.int32)
out = varlen_attn(q, q, q, cu, cu, 4, 4)
torch.testing.assert_close(out, fastlm.varlen_attn(q, q, q, cu, cu, 4, 4))
replaced = module.varlen_attn
fastlm.uninstall()
assert module.varlen_attn is not replaced and varlen_attn is module.varlen_attn
original = module.varlen_attn
with fastlm.installed():
    assert module.varlen_attn is replaced
assert module.varlen_attn is original
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- what runs on us -----------------------------------------------------------------------


def test_modules_made_before_and_after():
    x = torch.randn(5, 2, 3)
    early = nn.GRU(3, 4), nn.GRUCell(3, 4), nn.CrossEntropyLoss()
    fastlm.install()
    late = nn.GRU(3, 4), nn.GRUCell(3, 4), nn.CrossEntropyLoss()
    for gru, cell, loss in (early, late):
        assert operators_of(lambda gru=gru: gru(x))
        assert operators_of(lambda gru=gru: gru(pack_padded_sequence(x, [5, 2])))
        assert operators_of(lambda cell=cell: cell(x[0]))
        assert operators_of(lambda loss=loss: loss(x[0], torch.tensor([0, 2])))
        assert type(gru) is nn.GRU and pickle.loads(pickle.dumps(gru))(x)[0].shape == (5, 2, 4)


def test_functions():
    q, target = torch.randn(2, 3, 4, 8), torch.tensor([0, 7])
    calls = {
        "attention": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "cross": lambda: F.cross_entropy(q[0, :2, 0], target),
        "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16)(q[0]),
        "decoder": lambda: nn.TransformerDecoderLayer(8, 2, 16)(q[0], q[1]),
    }
    if HAS_LINEAR_LOSS:
        calls["linear"] = lambda: F.linear_cross_entropy(q[0, 0, :2], torch.randn(9, 8), target)
        calls["linear module"] = lambda: LinearLoss(8, 9)(q[0, 0, :2], target)
    for name, call in calls.items():
        assert not operators_of(call), name
    fastlm.install()
    for name, call in calls.items():
        assert operators_of(call), name


def test_what_we_do_not_serve_keeps_torchs_function():
    x = torch.randn(2, 3, 4, 8)

    class Logged(torch.Tensor):
        pass

    class Wrapper(torch.Tensor):
        """Holds another tensor and has its own idea of every operator."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            assert function.namespace == "aten", function
            unwrapped = torch.utils._pytree.tree_map_only(Wrapper, lambda w: w.inner, args)
            return function(*unwrapped, **(kwargs or {}))

    jagged = torch.nested.nested_tensor(
        [torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged
    ).transpose(1, 2)
    calls = [
        lambda: F.scaled_dot_product_attention(*[x.as_subclass(Logged)] * 3),
        lambda: F.scaled_dot_product_attention(*[Wrapper(x)] * 3),
        lambda: F.scaled_dot_product_attention(jagged, jagged, jagged),
        lambda: F.scaled_dot_product_attention(*[x.to("meta")] * 3),
        lambda: torch.func.vmap(F.scaled_dot_product_attention)(x, x, x),
        lambda: torch.func.grad(lambda y: F.cross_entropy(y, torch.tensor([1, 2])))(x[0, :2, 0]),
        lambda: torch.jit.trace(lambda y: F.scaled_dot_product_attention(y, y, y), (x,), check_trace=False),
    ]
    with fastlm.installed():
        for call in calls:
            assert operators_of(call) == []
        result = F.scaled_dot_product_attention(*[x.as_subclass(Logged)] * 3)
        assert type(result) is Logged
        with pytest.raises(RuntimeError):
            F.cross_entropy(torch.randn(2, 3, dtype=torch.complex64), torch.tensor([0, 1]))
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention([1.0], [1.0], [1.0])


def test_misuse_raises_what_torch_raises():
    """In torch's words, which programs and their tests may look for."""
    x, logits, classes = torch.randn(2, 3, 4, 8), torch.randn(4, 5), torch.tensor([0, 4, 1, 2])
    gru, cell = nn.GRU(5, 6), nn.GRUCell(5, 6)
    calls = [
        lambda: F.scaled_dot_product_attention(x, x[..., :4], x),
        lambda: F.scaled_dot_product_attention(x[0, 0, 0], x, x),
        lambda: F.scaled_dot_product_attention(x, x.double(), x),
        lambda: F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4, dtype=torch.int32)),
        lambda: F.scaled_dot_product_attention(x, x, x, torch.ones(3, 9, dtype=torch.bool)),
        lambda: F.cross_entropy(logits, classes[:3]),
        lambda: F.cross_entropy(logits, classes + 1),
        lambda: F.cross_entropy(logits, classes, torch.ones(4)),
        lambda: F.cross_entropy(logits, classes, reduction="some"),
        lambda: gru(torch.randn(0, 4, 5)),
        lambda: gru(torch.randn(3, 4, 5), torch.randn(1, 4, 6).double()),
        lambda: gru(nn.utils.rnn.PackedSequence(torch.randn(5, 5), torch.tensor([2, 3]))),
        lambda: cell(torch.randn(4, 7)),
        lambda: cell(torch.randn(4, 5), torch.randn(3, 6)),
    ]
    if HAS_LINEAR_LOSS:
        calls.append(lambda: F.linear_cross_entropy(logits, torch.randn(7, 6), classes))
    for call in calls:
        with pytest.raises(Exception) as theirs:
            call()
        with fastlm.installed(), pytest.raises(type(theirs.value)) as ours:
            call()
        assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used", "ignore:All fused kernels")
def test_attention_of_a_kernel_of_torchs_by_name():
    """Where torch may take its formula, so may we; where it may not, the call is torch's, to serve or refuse."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randn(1, 2, 70, 64)
    with fastlm.installed():
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            assert operators_of(lambda: F.scaled_dot_product_attention(x, x, x))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert not operators_of(lambda: F.scaled_dot_product_attention(x, x, x))
            with pytest.raises(RuntimeError, match="No available kernel"):
                F.scaled_dot_product_attention(x[0], x[0], x[0])


def test_a_forced_backend_serves_or_says_why_not(monkeypatch):
    monkeypatch.setattr(fastlm.ops, "_forced", "cuda")
    with fastlm.installed(), pytest.raises(RuntimeError, match="fastlm.gru: backend 'cuda' is forced"):
        nn.GRU(3, 4)(torch.randn(5, 2, 3))


def test_errors_of_others_pass_through():
    """Only what fastlm refuses is handed to torch: an error inside is raised once."""
    calls = []

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            raise RuntimeError("no")

    x = torch.randn(1, 2, 70, 64)
    with fastlm.installed(), Refusing(), pytest.raises(RuntimeError, match="^no$"):
        F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == 1


def test_export_to_onnx_keeps_torchs_operators(monkeypatch):
    class Model(nn.Module):
        def forward(self, q, target):
            return F.cross_entropy(F.scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0], target)

    def fastlms():
        graph = torch.export.export(Model(), (torch.randn(1, 2, 3, 8), torch.tensor([0, 2, 1]))).graph
        return [node for node in graph.nodes if "fastlm" in str(node.target)]

    with fastlm.installed():
        assert fastlms()
        monkeypatch.setattr(torch.onnx._internal.exporter._flags, "_is_onnx_exporting", True)
        assert not fastlms()


def test_causal_bias_masks():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    for mask in (causal_lower_right(4, 6), causal_upper_left(4, 6)):
        expected = F.scaled_dot_product_attention(q, k, k, mask)
        with fastlm.installed():
            actual = F.scaled_dot_product_attention(q, k, k, mask)
        torch.testing.assert_close(actual, expected)


def test_inference_fast_path_of_transformers_stays_right():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in (
        {},
        {"src_key_padding_mask": padding},
        {"mask": torch.ones(5, 5).triu(1) > 0},
    ):
        for no_grad in (True, False):
            with torch.set_grad_enabled(not no_grad):
                expected = encoder(x, **arguments)
                with fastlm.installed():
                    torch.testing.assert_close(encoder(x, **arguments), expected)


def test_scripting_and_pickling_see_torchs_functions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.cell = nn.GRU(3, 4), nn.GRUCell(4, 4)

        def forward(self, x: torch.Tensor, target: torch.Tensor):
            h = self.cell(self.gru(x)[0][-1])
            h = F.scaled_dot_product_attention(h, h, h)
            return F.cross_entropy(h, target)

    model, x, target = Model(), torch.randn(5, 2, 3), torch.tensor([0, 3])
    expected = model(x, target)
    with fastlm.installed():
        torch.testing.assert_close(torch.jit.script(model)(x, target), expected)
        for owner, name in PLACES:
            assert pickle.loads(pickle.dumps(getattr(owner, name))) is getattr(owner, name)


# ---- whole programs ------------------------------------------------------------------------

GPT = """
import torch, torch.nn as nn, torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 32)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.head = nn.Linear(32, 31)

    def forward(self, x, target):
        logits = self.head(self.blocks(self.embed(x)))
        return F.cross_entropy(logits.view(-1, 31), target.reshape(-1))
"""

GRU = """
import torch, torch.nn as nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.gru = nn.GRU(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(48, 20)
        self.head = nn.Linear(20, 31)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, target):
        y, _ = self.gru(self.embed(x))
        h, losses = None, []
        for t in range(y.shape[1]):
            h = self.cell(y[:, t], h)
            losses.append(self.loss(self.head(h), target[:, t]))
        return torch.stack(losses).mean()
"""

LOOP = """
def train(steps=12, compiled=False, autocast=False):
    torch.manual_seed(0)
    model = Model()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        x = torch.randint(0, 31, (4, 13))
        with torch.autocast("cpu", enabled=autocast):
            loss = forward(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)
"""


def program(source):
    module = types.ModuleType("program")
    exec(source + LOOP, vars(module))
    return module


@pytest.mark.parametrize("source", (GPT, GRU), ids=("gpt", "gru"))
def test_unmodified_program_has_the_same_loss_curve(source):
    train = program(source).train
    expected = train()
    assert expected[-1] < expected[0]
    with fastlm.installed():
        assert operators_of(lambda: train(1))
        actual = train()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(train(), expected)


@pytest.mark.parametrize("source", (GPT, GRU), ids=("gpt", "gru"))
def test_unmodified_program_under_autocast(source):
    train = program(source).train
    expected = train(autocast=True)
    with fastlm.installed():
        torch.testing.assert_close(train(autocast=True), expected, rtol=2e-2, atol=2e-2)


def test_compiled_program_follows_install_and_uninstall():
    """A program compiled before install() runs on us afterwards, and on torch after uninstall()."""
    ran = []

    def backend(graph, inputs):
        targets = " ".join(str(node.target) for node in graph.graph.nodes)

        def run(*args):
            ran.append("fastlm" in targets)
            return graph(*args)

        return run

    torch.compiler.reset()
    model = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend=backend, fullgraph=True)
    q = torch.randn(1, 2, 5, 8)
    expected = model(q)
    for _ in range(2):
        with fastlm.installed():
            torch.testing.assert_close(model(q), expected)
        assert torch.equal(model(q), expected)
    assert ran == [False, True, False, True, False]


def test_compiled_gpt_trains_installed():
    torch.compiler.reset()
    train = program(GPT).train
    expected = train()
    with fastlm.installed():
        torch.testing.assert_close(train(compiled=True), expected, rtol=1e-4, atol=1e-5)


# ---- convert -------------------------------------------------------------------------------


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.loss = nn.ModuleList([nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1)])
        self.head = LinearLoss(8, 5, bias=True)

    def forward(self, x, target):
        y, _ = self.gru(x)
        z = self.cell(y.flatten(0, 1)).view_as(x)
        z, _ = self.attention(z, z, z, need_weights=False)
        z = z.flatten(0, 1)
        return self.loss[0](z, target) + self.head(z, target)


def test_convert_keeps_everything_but_the_kernels():
    model = Zoo()
    parameters = list(model.parameters())
    model.same_gru = model.gru
    calls = []
    model.gru.register_forward_hook(lambda *_: calls.append("hook"))
    x, target = torch.randn(2, 3, 8), torch.randint(0, 5, (6,))
    expected = model(x, target)
    expected.backward()
    gradients = [p.grad.clone() for p in parameters]
    text, state = repr(model), list(model.state_dict())
    model.zero_grad()

    assert fastlm.convert(model) is model
    assert len(operators_of(lambda: model(x, target))) >= 5
    calls.clear()
    actual = model(x, target)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([p.grad for p in parameters], gradients)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert calls == ["hook"] and model.same_gru is model.gru
    assert repr(model) == text and list(model.state_dict()) == state
    assert type(model.gru) is fastlm.nn.GRU and type(model.loss[0]) is fastlm.nn.CrossEntropyLoss
    for twin in (copy.deepcopy(model.eval()), pickle.loads(pickle.dumps(model.head))):
        assert type(getattr(twin, "gru", model.gru)) is fastlm.nn.GRU

    fresh = Zoo()
    fresh.same_gru = fresh.gru
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x, target), model(x, target))


def test_convert_a_module_itself_but_not_subclasses():
    class Mine(nn.GRU):
        def forward(self, x, hx=None):
            return "mine"

    assert type(fastlm.convert(nn.GRUCell(3, 4))) is fastlm.nn.GRUCell
    assert type(fastlm.convert(Mine(3, 4))) is Mine
    converted = fastlm.convert(fastlm.nn.GRU(3, 4))
    assert type(converted) is fastlm.nn.GRU
    with pytest.raises(TypeError, match="fastlm.convert: model is a dict"):
        fastlm.convert({})
