"""GRU: the public functions. Arguments as PyTorch's, checked here, before any work."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from fastlm import reference
from fastlm.functional.arguments import check_flag, check_integer, check_tensor
from fastlm.ops import (
    KERNEL_DTYPES,
    PLAIN,
    autocast_is_on,
    autocast_is_on_somewhere,
    choose_backend,
    is_tiny,
    memory,
    transforms_are_off,
)
from fastlm.ops import gru as ops_gru

_GRU = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional",
    "batch_first",
)  # fmt: skip
_GRU_PACKED = ("data", "batch_sizes", *_GRU[1:-1])
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def gru_arguments(args: tuple, kwargs: dict) -> dict:
    """The arguments of either overload of torch._VF.gru by name."""
    packed = "batch_sizes" in kwargs or "data" in kwargs or (len(args) > 2 and isinstance(args[2], Tensor))
    names = _GRU_PACKED if packed else _GRU
    if len(args) > len(names):
        raise TypeError(f"fastlm.gru: {len(args)} positional arguments, expected {len(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise TypeError(f"fastlm.gru: unexpected or repeated argument {name!r}")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise TypeError(f"fastlm.gru: missing arguments {', '.join(missing)}")
    return given


def check_probability(function: str, name: str, p: float) -> float:
    if type(p) is float and 0.0 <= p <= 1.0:
        return p
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"fastlm.{function}: {name} is {p!r}, expected a probability in [0, 1]")
    return float(p)


def _check_gru_tensors(
    function: str, tensors: Sequence[Tensor], name: Callable[[int], str], casting: bool
) -> None:
    """All are what the first one, the input, is. name(i) is the i-th tensor's."""
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"fastlm.{function}: {name(i)} is {type(x).__name__}, expected a Tensor")
        if i == 0:
            dtype, device = x.dtype, x.device
        if x.layout is not torch.strided or x.is_nested:
            raise RuntimeError(f"fastlm.{function}: {name(i)} has layout {x.layout}, expected torch.strided")
        if (i == 0 or x.dtype is not dtype) and x.dtype not in KERNEL_DTYPES:
            raise RuntimeError(f"fastlm.{function}: {name(i)} is {x.dtype}, expected a floating dtype")
        if x.dtype is not dtype and not casting:
            raise RuntimeError(f"fastlm.{function}: {name(i)} is {x.dtype}, expected {dtype} as the input is")
        if x.device != device:
            raise RuntimeError(
                f"fastlm.{function}: {name(i)} is on {x.device}, expected {device} as the input is"
            )


def _check_gru_shapes(
    function: str, tensors: Sequence[Tensor], name: Callable[[int], str], shapes: list, I: int, H: int
) -> None:
    """Of what follows input and hx."""
    for i, shape in enumerate(shapes, 2):
        if tensors[i].shape != shape:
            raise RuntimeError(
                f"fastlm.{function}: {name(i)} has shape {tuple(tensors[i].shape)}, expected {shape} "
                f"(input size {I}, hidden size {H})"
            )


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, if it is on, wants products of x to be in; float64 is left alone."""
    wanted = x.dtype != torch.float64 and autocast_is_on(x.device)
    return torch.get_autocast_dtype(x.device.type) if wanted else None


def _check_batch_sizes(batch_sizes: Tensor, data: Tensor, B: int) -> None:
    check_tensor("fastlm.gru", "batch_sizes", batch_sizes)
    rows = data.shape[0]
    if (
        batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
        or batch_sizes.device.type not in ("cpu", data.device.type if data.is_meta else "cpu")
    ):
        raise RuntimeError("fastlm.gru: batch_sizes must be an int64 vector on the CPU")
    symbolic = torch.compiler.is_compiling() or isinstance(batch_sizes, FakeTensor)
    if symbolic or batch_sizes.device.type == "meta":
        return  # the values are not known; the kernel checks them
    if batch_sizes.shape[0] == 0:
        raise RuntimeError("fastlm.gru: batch_sizes is empty, expected at least one time step")
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or any(a < b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise RuntimeError(f"fastlm.gru: batch_sizes is {sizes}, expected positive sizes that never grow")
    if sum(sizes) != rows:
        raise RuntimeError(
            f"fastlm.gru: batch_sizes adds up to {sum(sizes)}, expected the {rows} rows of data"
        )
    if sizes[0] != B:
        raise RuntimeError(f"fastlm.gru: hx has batch size {B}, expected {sizes[0]} (batch_sizes[0])")


def _one_layer(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
) -> tuple[Tensor, Tensor] | None:
    """The results of an eager call on a CPU for one layer, by the shortest way; None for arguments that it is not
    for, which the caller's checks are for. The operator asks of the tensors what these do, in less time."""
    if not (
        type(num_layers) is int
        and num_layers == 1
        and batch_first is False
        and type(has_biases) is type(train) is type(bidirectional) is bool
        and type(dropout) is float
        and 0.0 <= dropout <= 1.0
        and type(params) is list
        and len(params) == (2 + 2 * has_biases) * (1 + bidirectional)
        and type(input) in PLAIN
        and type(hx) in PLAIN
        and PLAIN.issuperset(map(type, params))
        and not (
            is_dynamo_compiling() or has_torch_function_variadic(input, hx) or autocast_is_on_somewhere()
        )
        and transforms_are_off()
        and input.is_cpu
        and input.dim() == 3
        and input.numel() > 0
    ):
        return None
    try:
        if choose_backend("gru", input) != "cpu":
            return None
        output, hn = ops_gru.gru_layer("cpu", input, None, hx, params, has_biases, False, None, 0.0)
    except RuntimeError:
        return None
    return _own(output), hn


def _own(output: Tensor) -> Tensor:
    """One that may be changed in place, as torch's: the backward reads the other."""
    return output.clone() if output.requires_grad else output


def _run_gru(function, stack, tensors, dtype, arguments):
    """Calls stack(layer, *arguments) with tensors cast to dtype, if autocast wants one. As in torch.nn.GRU: a GPU's
    autocast casts the states too, on a CPU they keep the dtype that promotion gives them."""
    input, hx = tensors
    backend = choose_backend(function, input)
    layer = reference.gru_layer if backend == "eager" else partial(ops_gru.gru_layer, backend)
    if dtype is None:
        return stack(layer, *arguments)
    result = torch.promote_types(hx.dtype, dtype) if input.device.type == "cpu" else dtype

    def cast(x):
        if isinstance(x, Tensor):
            return memory.to(x, dtype) if x.is_floating_point() else x
        return [cast(y) for y in x] if isinstance(x, (list, tuple)) else x

    output = stack(layer, *(cast(x) for x in arguments))
    return output.to(result) if isinstance(output, Tensor) else tuple(x.to(result) for x in output)


@overload
def gru(
    input: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool, *, zoneout: float = 0.0,
    recurrent_dropout: float = 0.0, layer_norm: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def gru(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, *, zoneout: float = 0.0,
    recurrent_dropout: float = 0.0, layer_norm: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def gru(*args, zoneout=0.0, recurrent_dropout=0.0, layer_norm=None, **kwargs):
    r"""A gated recurrent unit over whole sequences; both forms of ``torch._VF.gru``, which
    :class:`torch.nn.GRU` calls::

        gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        gru(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    .. math::
        r = \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}), \quad
        z = \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}), \\
        n = \tanh(W_{in} x + b_{in} + r (W_{hn} h + b_{hn})), \quad
        h' = (1 - z) n + z h

    Args:
        input (Tensor): :math:`(T, B, I)`, or :math:`(B, T, I)` with `batch_first`; at least one step.
        data (Tensor): :math:`(N, I)`, the rows of a :class:`~torch.nn.utils.rnn.PackedSequence`.
        batch_sizes (Tensor): its batch sizes, int64 :math:`(T)` on the CPU.
        hx (Tensor): initial states, :math:`(L D, B, H)` for L layers and D directions.
        params (list of Tensor): for each layer and direction ``w_ih`` :math:`(3H, I)`, ``w_hh``
            :math:`(3H, H)` and, with `has_biases`, ``b_ih`` and ``b_hh`` :math:`(3H)`; gates r, z, n.
            Behind the first layer I is :math:`D H`.
        dropout (float): dropped share of every layer's output but the last one's, when training.
        train (bool): training; gradients are right in either mode.
        zoneout (float): probability that a unit keeps its state at a step. In training a mask is drawn
            for each step, otherwise its expectation is used: ``h' = p h + (1 - p) h'`` (Krueger et al.,
            Zoneout, ICLR 2017).
        recurrent_dropout (float): dropped share of the elements of each ``w_hh`` in training, drawn
            once per call and scaled by ``1 / (1 - p)`` (DropConnect on the recurrent weights: Merity et
            al., Regularizing and Optimizing LSTM Language Models, ICLR 2018).
        layer_norm (list of Tensor): for each layer and direction two gains :math:`(3H)`: ``W_i x`` and
            ``W_h h`` are normalised over their 3H values, eps 1e-5, and scaled by them before the biases
            are added (Ba et al., Layer Normalization, 2016, in the form of the library haste).

    Returns:
        ``output`` :math:`(T, B, D H)`, :math:`(B, T, D H)` or :math:`(N, D H)`, and the last states
        ``hn`` :math:`(L D, B, H)`.

    All tensors have one dtype: float64, float32, bfloat16 or float16; the 16-bit ones are computed in
    float32. Under autocast they are cast as for torch.nn.GRU. Masks come from torch's generator.

    Raises:
        TypeError: an argument is missing or is no tensor.
        ValueError: a probability outside [0, 1].
        RuntimeError: shapes, dtypes or devices that do not fit; no time step; bad batch sizes.
    """
    if (
        layer_norm is None
        and type(zoneout) is type(recurrent_dropout) is float
        and zoneout == recurrent_dropout == 0.0
        and not kwargs
        and len(args) == len(_GRU)
        and (results := _one_layer(*args)) is not None
    ):
        return results
    if kwargs or len(args) != len(_GRU):
        by_name = gru_arguments(args, kwargs)
        packed = "batch_sizes" in by_name
        given = [by_name[name] for name in (_GRU_PACKED if packed else _GRU)]
    else:
        given, packed = args, isinstance(args[2], Tensor)
    if packed:
        input, batch_sizes, hx, params, has_biases, layers, dropout, train, bidirectional = given
        batch_first = False
    else:
        input, hx, params, has_biases, layers, dropout, train, bidirectional, batch_first = given
        batch_sizes = None
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"fastlm.gru: params is {type(params).__name__}, expected a list of Tensors")
    if layer_norm is not None and not isinstance(layer_norm, (list, tuple)):
        raise TypeError(f"fastlm.gru: layer_norm is {type(layer_norm).__name__}, expected a list of Tensors")
    gains = layer_norm or ()
    everything = (input, hx, *params, *gains)
    if has_torch_function(everything):
        options = dict(zoneout=zoneout, recurrent_dropout=recurrent_dropout, layer_norm=layer_norm)
        return handle_torch_function(gru, everything, *args, **options, **kwargs)

    if not type(has_biases) is type(train) is type(bidirectional) is type(batch_first) is bool:
        flags = dict(has_biases=has_biases, train=train, bidirectional=bidirectional, batch_first=batch_first)
        for name, flag in flags.items():
            check_flag("fastlm.gru", name, flag)
    check_integer("fastlm.gru", "num_layers", layers)
    D = 2 if bidirectional else 1
    dropout = check_probability("gru", "dropout", dropout)
    zoneout = check_probability("gru", "zoneout", zoneout)
    recurrent_dropout = check_probability("gru", "recurrent_dropout", recurrent_dropout)
    names = _WEIGHTS[: 4 if has_biases else 2]
    if layers < 1 or len(params) != layers * D * len(names):
        raise RuntimeError(
            f"fastlm.gru: {len(params)} weights, expected {len(names)} for each of "
            f"{layers} layers and {D} directions"
        )
    if layer_norm is not None and len(gains) != 2 * layers * D:
        raise RuntimeError(f"fastlm.gru: {len(gains)} layer_norm gains, expected {2 * layers * D}")

    def name_of(i):
        if i < 2:
            return ("input", "hx")[i]
        place, kind = divmod(i - 2, len(names))
        return f"{names[kind]}[{place}]" if place < layers * D else f"layer_norm[{i - 2 - len(params)}]"

    dtype = _autocast(input) if isinstance(input, Tensor) else None
    _check_gru_tensors("gru", everything, name_of, dtype is not None)

    if input.dim() != (2 if packed else 3):
        raise RuntimeError(
            f"fastlm.gru: {'data' if packed else 'input'} has shape {tuple(input.shape)}, expected "
            f"{'(N, I)' if packed else '3 dimensions'}"
        )
    if batch_first:
        input = input.transpose(0, 1)
    if hx.dim() != 3 or hx.shape[0] != layers * D or hx.shape[2] < 1:
        raise RuntimeError(
            f"fastlm.gru: hx has shape {tuple(hx.shape)}, expected ({layers * D}, B, H) for "
            f"{layers} layers and {D} directions"
        )
    I, H = input.shape[-1], hx.shape[2]
    if packed:
        _check_batch_sizes(batch_sizes, input, hx.shape[1])
        batch_sizes = batch_sizes.contiguous()
    else:
        T, B = input.shape[:2]
        if T == 0:
            raise RuntimeError(
                "fastlm.gru: input has no step: Expected sequence length to be larger than 0 in RNN"
            )
        if hx.shape[1] != B:
            raise RuntimeError(
                f"fastlm.gru: hx has batch size {hx.shape[1]}, expected {B} (input is (T={T}, B={B}, I={I}))"
            )
    vector = (3 * H,)
    shapes = []
    for layer in range(layers):
        shapes += [(3 * H, D * H if layer else I), (3 * H, H), vector, vector][: len(names)] * D
    shapes += [vector] * len(gains)
    _check_gru_shapes("gru", everything, name_of, shapes, I, H)

    if torch.jit.is_tracing() and not (zoneout or recurrent_dropout or gains):
        # An operator of any number of steps, in the format that a trace is stored in.
        rest = (list(params), bool(has_biases), layers, dropout, bool(train), bool(bidirectional))
        given = (input, batch_sizes, hx, *rest) if packed else (input, hx, *rest, False)
        output, hn = torch._C._VariableFunctions.gru(*given)
    else:
        output, hn = _run_gru(
            "gru", reference.gru_stack, (input, hx), dtype,
            (input, batch_sizes, hx, params, bool(has_biases), layers, dropout, bool(train),
             bool(bidirectional), zoneout, recurrent_dropout, layer_norm or None),
        )  # fmt: skip
        if output.dtype is (dtype or input.dtype) and not torch.compiler.is_compiling():
            output = _own(output)
    return output.transpose(0, 1) if batch_first else output, hn


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, zoneout: float = 0.0, recurrent_dropout: float = 0.0,
    layer_norm: tuple[Tensor, Tensor] | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    r"""One step of :func:`gru`; ``torch.gru_cell``, which :class:`torch.nn.GRUCell` calls.

    Args:
        input (Tensor): :math:`(B, I)`.
        hx (Tensor): states, :math:`(B, H)`.
        w_ih, w_hh (Tensor): :math:`(3H, I)` and :math:`(3H, H)`, gates r, z, n.
        b_ih, b_hh (Tensor): :math:`(3H)`, or None.
        zoneout, recurrent_dropout (float): as for :func:`gru`; masks are drawn at every call. To drop
            the same recurrent weights at all steps of a sequence, drop them out of `w_hh` beforehand.
        layer_norm (pair of Tensor): the gains of the norms of ``W_i x`` and ``W_h h``, :math:`(3H)`.
        training (bool): draw masks for zoneout and recurrent dropout.

    Returns:
        The new states, :math:`(B, H)`.

    dtypes and errors are those of :func:`gru`.
    """
    if (
        layer_norm is None
        and type(zoneout) is type(recurrent_dropout) is float
        and zoneout == recurrent_dropout == 0.0
        and type(training) is bool
        and not has_torch_function_variadic(input, hx, w_ih, w_hh, b_ih, b_hh)
        and is_tiny("gru_cell", hx)
        and isinstance(input, Tensor)
        and input.dtype in (torch.float32, torch.float64)  # 16 bits are slow there
        and input.ndim == hx.ndim == 2
        and not autocast_is_on_somewhere()
    ):
        try:
            return torch._C._VariableFunctions.gru_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
        except (LookupError, RuntimeError, TypeError, ValueError):
            pass  # arguments that don't fit: the checks below say so
    if layer_norm is not None and not isinstance(layer_norm, (list, tuple)):
        raise TypeError(
            f"fastlm.gru_cell: layer_norm is {type(layer_norm).__name__}, expected a pair of Tensors"
        )
    gains = layer_norm or ()
    biases = [b for b in (b_ih, b_hh) if b is not None]
    everything = (input, hx, w_ih, w_hh, *biases, *gains)
    if has_torch_function(everything):
        return handle_torch_function(
            gru_cell, everything, input, hx, w_ih, w_hh, b_ih, b_hh, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, layer_norm=layer_norm, training=training,
        )  # fmt: skip
    check_flag("fastlm.gru_cell", "training", training)
    zoneout = check_probability("gru_cell", "zoneout", zoneout)
    recurrent_dropout = check_probability("gru_cell", "recurrent_dropout", recurrent_dropout)
    if layer_norm is not None and len(gains) != 2:
        raise RuntimeError(f"fastlm.gru_cell: {len(gains)} layer_norm gains, expected 2")
    names = ["input", "hx", "w_ih", "w_hh"]
    names += [name for name, b in (("b_ih", b_ih), ("b_hh", b_hh)) if b is not None]
    names += [f"layer_norm[{i}]" for i in range(len(gains))]
    dtype = _autocast(input) if isinstance(input, Tensor) else None
    _check_gru_tensors("gru_cell", everything, names.__getitem__, dtype is not None)
    for name, x in (("input", input), ("hx", hx)):
        if x.dim() != 2:
            raise RuntimeError(f"fastlm.gru_cell: {name} has shape {tuple(x.shape)}, expected 2 dimensions")
    # In the words of torch.nn.GRUCell.
    if w_ih.dim() == 2 and input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(
            f"fastlm.gru_cell: input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}"
            f" (w_ih is {tuple(w_ih.shape)})"
        )
    if hx.shape[0] != input.shape[0]:
        raise RuntimeError(
            f"fastlm.gru_cell: Input batch size {input.shape[0]} doesn't match hidden0 batch size {hx.shape[0]}"
            f" (hx is {tuple(hx.shape)})"
        )
    if w_hh.dim() == 2 and hx.shape[1] != w_hh.shape[1]:
        raise RuntimeError(
            f"fastlm.gru_cell: hidden0 has inconsistent hidden_size: got {hx.shape[1]}, expected {w_hh.shape[1]}"
            f" (hx is {tuple(hx.shape)}, w_hh is {tuple(w_hh.shape)})"
        )
    if hx.shape[1] < 1:
        raise RuntimeError(
            f"fastlm.gru_cell: hx has shape {tuple(hx.shape)}, expected a hidden unit at least"
        )
    I, H = input.shape[1], hx.shape[1]
    shapes = [(3 * H, I), (3 * H, H)] + [(3 * H,)] * (len(names) - 4)
    _check_gru_shapes("gru_cell", everything, names.__getitem__, shapes, I, H)
    return _run_gru(
        "gru_cell", reference.gru_cell_stack, (input, hx), dtype,
        (input, hx, w_ih, w_hh, b_ih, b_hh, zoneout, recurrent_dropout, gains or None, training),
    )  # fmt: skip
