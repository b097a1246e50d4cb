"""GRU: the modules beside torch.nn's, what is drawn at random, errors, compilation."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastlm

LENGTHS = (3, 5, 1, 5, 2)


def pair(*args, **kwargs):
    """torch.nn.GRU and ours with the same parameters."""
    theirs = torch.nn.GRU(*args, **kwargs)
    ours = fastlm.nn.GRU(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(module, input, hx):
    """Outputs and every gradient of a call."""
    data = input.data if isinstance(input, PackedSequence) else input
    leaves = [data, *([hx] if hx is not None else []), *module.parameters()]
    output, hn = module(input, hx)
    if isinstance(output, PackedSequence):
        assert torch.equal(output.batch_sizes, input.batch_sizes)
        for a, b in zip(output[2:], input[2:], strict=True):
            assert a is b
        output = output.data
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    loss = (output * weight).sum() + (hn * hn).sum()
    return output, hn, *torch.autograd.grad(loss, leaves)


def assert_same(theirs, ours):
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b)


OPTIONS = {
    "plain": {},
    "layers": dict(num_layers=3),
    "bidirectional": dict(bidirectional=True, num_layers=2),
    "no-bias": dict(bias=False),
    "batch-first": dict(batch_first=True),
    "float64": dict(dtype=torch.float64),
    "dropout": dict(num_layers=3, dropout=0.5, bidirectional=True),
}


@pytest.mark.parametrize("given", (False, True), ids=("zero-state", "state"))
@pytest.mark.parametrize("form", ("batched", "unbatched", "sorted", "unsorted"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_module_is_torchs(options, form, given):
    """Outputs and gradients; with dropout too, since the masks come from the same seed."""
    theirs, ours = pair(4, 6, **options)
    dtype = options.get("dtype", torch.float32)
    if form in ("sorted", "unsorted"):
        lengths = sorted(LENGTHS, reverse=True) if form == "sorted" else LENGTHS
        sequences = [torch.randn(n, 4, dtype=dtype) for n in lengths]
        packed = pack_sequence(sequences, enforce_sorted=form == "sorted")
        input, batch = packed._replace(data=packed.data.requires_grad_()), (len(LENGTHS),)
    else:
        shape, batch = ((7, 4), ()) if form == "unbatched" else ((7, 5, 4), (5,))
        if options.get("batch_first") and form == "batched":
            shape = (5, 7, 4)
        input = torch.randn(shape, dtype=dtype, requires_grad=True)
    rows = theirs.num_layers * (2 if theirs.bidirectional else 1)
    hx = torch.randn(rows, *batch, 6, dtype=dtype, requires_grad=True) if given else None
    expected = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        expected.append(results(module, input, hx))
    assert_same(*expected)


@pytest.mark.parametrize("batched", (True, False), ids=("batched", "unbatched"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
def test_cell_is_torchs(bias, batched):
    theirs = torch.nn.GRUCell(4, 6, bias=bias)
    ours = fastlm.nn.GRUCell(4, 6, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.GRUCell) and repr(ours) == repr(theirs)
    batch = (3,) if batched else ()
    x, h = torch.randn(*batch, 4, requires_grad=True), torch.randn(*batch, 6, requires_grad=True)
    for hx in (h, None):
        leaves = [x, *([h] if hx is not None else []), *theirs.parameters()]
        mine = [x, *([h] if hx is not None else []), *ours.parameters()]
        a, b = theirs(x, hx), ours(x, hx)
        torch.testing.assert_close(a, b)
        assert_same(
            torch.autograd.grad(a.square().sum(), leaves, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(b.square().sum(), mine, allow_unused=True, materialize_grads=True),
        )


def test_gradients_in_eval_mode():
    theirs, ours = pair(4, 6, 2, dropout=0.5)
    x = torch.randn(3, 2, 4, requires_grad=True)
    assert_same(results(theirs.eval(), x, None), results(ours.eval(), x, None))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_attributes_and_checkpoints_are_torchs(options):
    theirs, ours = pair(4, 6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RNNBase)
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
                 "bidirectional", "proj_size", "training"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    ours.flatten_parameters()


def test_copies_pickles_and_moves():
    module = fastlm.nn.GRU(4, 6, 2, zoneout=0.1, layer_norm=True)
    x = torch.randn(3, 2, 4)
    expected = module.eval()(x)[0]
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(x)[0], expected)
        assert repr(other) == repr(module) == "GRU(4, 6, num_layers=2, zoneout=0.1, layer_norm=True)"
        assert other.norm_hh_l1 is not module.norm_hh_l1
    assert module.double()(x.double())[0].dtype == torch.float64


def test_replaced_weights_are_used():
    """functional_call, tied and reassigned parameters: no stale list of weights."""
    theirs, ours = pair(4, 6)
    x = torch.randn(3, 2, 4)
    doubled = {name: 2 * p for name, p in theirs.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(theirs, doubled, (x,)), torch.func.functional_call(ours, doubled, (x,))
    )
    for module in (theirs, ours):
        module.weight_hh_l0 = torch.nn.Parameter(torch.full((18, 6), 0.25))
    torch.testing.assert_close(theirs(x), ours(x))


@pytest.mark.parametrize("batch_first", (False, True))
def test_results_may_be_changed_in_place(batch_first):
    """As those of torch on a CPU: `h[done] = 0` in a recurrent policy, `F.relu_(output)`."""
    options = dict(num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(5, 3, 6, requires_grad=True)
    gradients = []
    for kind, cell in ((torch.nn.GRU, torch.nn.GRUCell), (fastlm.nn.GRU, fastlm.nn.GRUCell)):
        torch.manual_seed(0)
        module, step = kind(6, 40, **options), cell(6, 40)
        output, hn = module(x)
        state = step(x[0], step(x[1]))
        output[1] = 0
        hn.relu_()
        state[0] = 0
        total = output.square().sum() + hn.sum() + state.sum()
        gradients.append(torch.autograd.grad(total, [x, *module.parameters(), *step.parameters()]))
    torch.testing.assert_close(*gradients)


def test_backward_twice_and_partly():
    module = fastlm.nn.GRU(4, 6)
    x = torch.randn(3, 2, 4, requires_grad=True)
    output, hn = module(x)
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert_same(first, torch.autograd.grad(output.sum(), x, retain_graph=True))
    assert torch.autograd.grad(hn.sum(), module.weight_hh_l0)[0].abs().sum() > 0


def test_no_gradient_keeps_nothing():
    """Without autograd the operator keeps no gates, and asking it for a gradient is an error."""
    x, h = torch.randn(3, 2, 4), torch.randn(1, 2, 6)
    weights = [torch.randn(18, 4, requires_grad=True), torch.randn(18, 6)]
    call = torch.ops.fastlm.gru_layer
    output, _, gates, normed, rstd = call(x, None, h, weights, False, False, None, 0.0, False)
    assert gates.numel() == normed.numel() == rstd.numel() == 0
    with pytest.raises(RuntimeError, match="a gradient needs a forward with save=True"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("input_dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_autocast_is_torchs(dtype, input_dtype):
    theirs, ours = pair(4, 6, 2, bidirectional=True)
    x = torch.randn(5, 3, 4).to(input_dtype)
    if input_dtype == torch.float64:
        theirs, ours = theirs.double(), ours.double()
    with torch.autocast("cpu", dtype=dtype):
        expected, actual = theirs(x), ours(x)
        cells = torch.nn.GRUCell(4, 6), fastlm.nn.GRUCell(4, 6)
        if input_dtype == torch.float32:
            assert cells[0](x[0]).dtype == cells[1](x[0]).dtype
    for a, b in zip(expected, actual, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    if input_dtype == torch.float32:
        actual[0].sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


# ---- what is drawn ----


def test_zoneout_keeps_or_updates_each_unit():
    """One step in training: a unit is its old state or what the plain GRU makes of it (Krueger et al.)."""
    torch.manual_seed(1)
    module = fastlm.nn.GRU(4, 500, zoneout=0.3)
    x, h = torch.randn(1, 4, 4), torch.randn(1, 4, 500)
    zoned = module(x, h)[1]
    expected = module.eval()(x, h)[1]
    module.zoneout = 0.0
    plain = module(x, h)[1]
    kept = zoned == h
    torch.testing.assert_close(zoned[~kept], plain[~kept])
    assert 0.25 < kept.float().mean() < 0.35
    torch.testing.assert_close(expected, 0.3 * h + 0.7 * plain)


def test_zoneout_of_one_stands_still():
    module = fastlm.nn.GRU(4, 6, 2, bidirectional=True, zoneout=1.0)
    h = torch.randn(4, 3, 6)
    for mode in (True, False):
        assert torch.equal(module.train(mode)(torch.randn(5, 3, 4), h)[1], h)


def test_recurrent_dropout_drops_weights_once():
    """The masks are DropConnect's: those of F.dropout on the recurrent weights, one for all steps."""
    module = fastlm.nn.GRU(4, 6, recurrent_dropout=0.5)
    x = torch.randn(5, 3, 4)
    torch.manual_seed(2)
    actual = module(x)[0]
    torch.manual_seed(2)
    dropped = torch.nn.functional.dropout(module.weight_hh_l0, 0.5)
    plain = torch.nn.GRU(4, 6)
    plain.load_state_dict({**module.state_dict(), "weight_hh_l0": dropped})
    torch.testing.assert_close(actual, plain(x)[0])
    assert torch.equal(module.eval()(x)[0], module(x)[0])


def test_layer_norm_by_its_definition():
    module = fastlm.nn.GRU(4, 6, layer_norm=True)
    for gain in (module.norm_ih_l0, module.norm_hh_l0):
        assert torch.equal(gain, torch.ones(18))
        torch.nn.init.uniform_(gain, 0.5, 1.5)
    x, h = torch.randn(1, 3, 4), torch.randn(1, 3, 6)

    def norm(y, gain):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    i = norm(x[0] @ module.weight_ih_l0.T, module.norm_ih_l0) + module.bias_ih_l0
    y = norm(h[0] @ module.weight_hh_l0.T, module.norm_hh_l0) + module.bias_hh_l0
    r, z = torch.sigmoid(i[:, :6] + y[:, :6]), torch.sigmoid(i[:, 6:12] + y[:, 6:12])
    n = torch.tanh(i[:, 12:] + r * y[:, 12:])
    torch.testing.assert_close(module(x, h)[0][0], (1 - z) * n + z * h[0])
    module.reset_parameters()
    assert torch.equal(module.norm_ih_l0, torch.ones(18))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_layer_norm_rounds_its_gradients_once(dtype, isa):
    """Those of biases and gains are sums of what the norms' backward begins with; nothing of it is rounded to 16
    bits before."""
    B, I, H = 40, 3, 5
    shapes = (3 * H, I), (3 * H, H), (3 * H,), (3 * H,)
    given = [torch.randn(shape).to(dtype) for shape in ((1, B, I), (1, B, H), *shapes, (3 * H,), (3 * H,))]
    cotangent = torch.randn(1, B, H).to(dtype)

    def gradients(function, arguments):
        x, h, *rest = (a.requires_grad_() for a in arguments)
        out, _ = function(x, h, rest[:4], True, 1, 0.0, False, False, False, layer_norm=rest[4:])
        return torch.autograd.grad(out, rest[2:], cotangent.to(out.dtype))

    exact = gradients(fastlm.reference.gru, [x.double() for x in given])
    for ours, expected in zip(gradients(fastlm.gru, given), exact, strict=True):
        half_ulp = 0.5 * torch.finfo(dtype).eps * expected.abs()
        assert ((ours - expected).abs() <= half_ulp + 1e-6 * expected.abs().max()).all()


# ---- compilation ----


class Tagger(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gru = fastlm.nn.GRU(4, 6, 2, bidirectional=True, **options)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0])


@pytest.mark.parametrize("options", ({}, dict(layer_norm=True, zoneout=0.2)), ids=("plain", "options"))
def test_module_compiles_whole(options):
    model = Tagger(**options).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4, requires_grad=True)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *model.parameters()]
    assert_same(
        torch.autograd.grad(expected.square().sum(), leaves),
        torch.autograd.grad(actual.square().sum(), leaves),
    )


def test_module_compiles_with_dynamic_shapes():
    model = Tagger().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 3, 4), (7, 2, 4), (4, 9, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(torch.randn(11, 6, 4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@pytest.mark.parametrize("given", (True, False), ids=("state", "zero-state"))
def test_packed_sequence_compiles_whole(given):
    module = fastlm.nn.GRU(4, 6, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 4) for n in LENGTHS], enforce_sorted=False)
    hx = torch.randn(2, len(LENGTHS), 6) if given else None
    compiled = torch.compile(lambda p, h: module(p, h), fullgraph=True, backend="aot_eager")
    output, hn = compiled(packed, hx)
    expected, expected_hn = module(packed, hx)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(hn, expected_hn)


def test_exports():
    model = Tagger().eval()
    x = torch.randn(5, 3, 4)
    steps = torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: steps},))
    for T in (5, 9):
        x = torch.randn(T, 3, 4)
        torch.testing.assert_close(program.module()(x), model(x))


def test_meta_tensors():
    module = fastlm.nn.GRU(4, 6, 2, bidirectional=True, device="meta")
    output, hn = module(torch.randn(5, 3, 4, device="meta"))
    assert output.shape == (5, 3, 12) and hn.shape == (4, 3, 6)


def test_vmap():
    """torch.nn.GRU has no batching rule; ours goes through the reference formula."""
    module = fastlm.nn.GRU(4, 6)
    x = torch.randn(3, 5, 2, 4)
    expected = torch.stack([module(part)[0] for part in x])
    torch.testing.assert_close(torch.func.vmap(lambda part: module(part)[0])(x), expected)


def test_eager_backend():
    module = fastlm.nn.GRU(4, 6, 2, layer_norm=True)
    x = torch.randn(5, 3, 4)
    expected = module(x)
    with fastlm.use_backend("eager"):
        torch.testing.assert_close(module(x), expected)


# ---- errors ----

X, H0, W = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4), [torch.zeros(12, 3), torch.zeros(12, 4)]
REST = (False, 1, 0.0, True, False, False)
DATA, SIZES = torch.zeros(5, 3), torch.tensor([2, 2, 1])


@pytest.mark.parametrize(
    "args, options, kind, message",
    [
        ((X, H0, W, *REST[:-1]), {}, TypeError, "missing arguments batch_first"),
        ((X, H0, W, *REST, 0), {}, TypeError, "10 positional arguments, expected 9"),
        ((X, H0, W, *REST), dict(hx=H0), TypeError, "unexpected or repeated argument 'hx'"),
        ((X, H0, W[0], *REST), {}, TypeError, "params is bool, expected a list of Tensors"),
        ((X, H0, None, *REST), {}, TypeError, "params is NoneType, expected a list of Tensors"),
        ((X, None, W, *REST), {}, TypeError, "hx is NoneType, expected a Tensor"),
        ((X, H0, W[:1], *REST), {}, RuntimeError, "1 weights, expected 2 for each of 1 layers and 1 directions"),
        ((X, H0.double(), W, *REST), {}, RuntimeError, "hx is torch.float64, expected torch.float32 as the input is"),
        ((X, H0.to_sparse(), W, *REST), {}, RuntimeError, "hx has layout torch.sparse_coo, expected torch.strided"),
        ((X.long(), H0.long(), W, *REST), {}, RuntimeError, "expected a floating dtype"),
        ((X, H0.to("meta"), W, *REST), {}, RuntimeError, "hx is on meta, expected cpu"),
        ((X[0], H0, W, *REST), {}, RuntimeError, r"input has shape \(2, 3\), expected 3 dimensions"),
        ((X, H0[0], W, *REST), {}, RuntimeError, r"hx has shape \(2, 4\), expected \(1, B, H\)"),
        ((X, H0.expand(2, 2, 4), W, *REST), {}, RuntimeError, r"hx has shape \(2, 2, 4\), expected \(1, B, H\)"),
        ((X[:, :1], H0, W, *REST), {}, RuntimeError,
         r"hx has batch size 2, expected 1 \(input is \(T=5, B=1, I=3\)\)"),
        ((X[:0], H0, W, *REST), {}, RuntimeError, "Expected sequence length to be larger than 0"),
        ((X, H0, [W[1], W[1]], *REST), {}, RuntimeError, r"w_ih\[0\] has shape \(12, 4\), expected \(12, 3\)"),
        ((X, H0, [W[0], W[0]], *REST), {}, RuntimeError, r"w_hh\[0\] has shape \(12, 3\), expected \(12, 4\)"),
        ((X, H0, W, False, 1, 1.5, True, False, False), {}, ValueError, r"dropout is 1.5, expected a probability"),
        ((X, H0, W, *REST), dict(zoneout=-0.1), ValueError, "zoneout is -0.1, expected a probability"),
        ((X, H0, W, *REST), dict(recurrent_dropout=float("nan")), ValueError, "recurrent_dropout is nan"),
        ((X, H0, W, *REST), dict(layer_norm=[W[0]]), RuntimeError, "1 layer_norm gains, expected 2"),
        ((X, H0, W, *REST), dict(layer_norm=W), RuntimeError, r"layer_norm\[0\] has shape \(12, 3\), expected \(12,\)"),
        ((DATA, SIZES.int(), H0, W, *REST[:-1]), {}, RuntimeError, "batch_sizes must be an int64 vector"),
        ((DATA, SIZES[:0], H0, W, *REST[:-1]), {}, RuntimeError, "batch_sizes is empty"),
        ((DATA, SIZES.flip(0), H0, W, *REST[:-1]), {}, RuntimeError, "expected positive sizes that never grow"),
        ((DATA, SIZES[:2], H0, W, *REST[:-1]), {}, RuntimeError, "adds up to 4, expected the 5 rows of data"),
        ((DATA, SIZES, H0[:, :1], W, *REST[:-1]), {}, RuntimeError, "hx has batch size 1, expected 2"),
    ],
)  # fmt: skip
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message) as error:
        fastlm.gru(*args, **options)
    assert str(error.value).startswith("fastlm.gru: ")


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[0], H0[0, :1], *W), r"Input batch size 2 doesn't match .* batch size 1 \(hx is \(1, 4\)\)"),
        ((X, H0[0], *W), r"input has shape \(5, 2, 3\), expected 2 dimensions"),
        ((X[0], H0[0], W[0], W[0]), r"hidden0 .*hidden_size: got 4, expected 3 .*w_hh is \(12, 3\)"),
        ((X[0], H0[0], W[0], W[1][:9]), r"w_hh has shape \(9, 4\), expected \(12, 4\)"),
        ((X[0], H0[0], *W, torch.zeros(11)), r"b_ih has shape \(11,\), expected \(12,\)"),
    ],
)
def test_cell_errors(args, message):
    with pytest.raises(RuntimeError, match="fastlm.gru_cell: " + message):
        fastlm.gru_cell(*args)


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(5, 2, 4),),  # wrong features
        (torch.zeros(2, 5, 2, 3),),  # wrong rank
        (X, torch.zeros(1, 3, 4)),  # wrong batch of states
        (X, torch.zeros(2, 4)),  # unbatched states
        (X[:, 0], torch.zeros(1, 1, 4)),  # batched states
        (X.double(),),
        (X[:0],),
    ],
)
def test_module_raises_what_torch_raises(args):
    theirs, ours = pair(3, 4)
    with pytest.raises(Exception) as expected:
        theirs(*args)
    with pytest.raises(type(expected.value)) as actual:
        ours(*args)
    assert str(expected.value) in str(actual.value)


@pytest.mark.parametrize(
    "options", (dict(proj_size=2), dict(dropout=2.0), dict(num_layers=0), dict(bias=1)), ids=str
)
def test_constructor_raises_what_torch_raises(options):
    try:
        torch.nn.GRU(3, 4, **options)
    except Exception as expected:
        with pytest.raises(type(expected), match=str(expected)[:20]):
            fastlm.nn.GRU(3, 4, **options)
    else:
        pytest.skip(f"torch {torch.__version__} takes it")


def test_constructor_checks_our_options():
    with pytest.raises(ValueError, match="zoneout is 2, expected a probability"):
        fastlm.nn.GRU(3, 4, zoneout=2)
