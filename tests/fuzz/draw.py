"""Random calls: right ones of every operator, and what can be altered in them."""

import random
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm

from .calls import LAYOUTS, STRANGE, Call, T, described, leaves, replaced, without

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
SIZES = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33)
DTYPES = ("float64", "float32", "float32", "bfloat16", "float16")
ISAS = tuple(fastlm._C.isas())


class Drawer:
    """Draws calls from a seed."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.one = self.random.choice

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def tensor(self, *shape: int, dtype: str, grad: float = 0.7, layout: str | None = None, **values) -> T:
        layout = layout or (self.one(LAYOUTS) if self.chance(0.5) else "contiguous")
        return T(
            shape, dtype, layout=layout, grad=self.chance(grad), seed=self.random.randrange(1000), **values
        )

    def common(self) -> dict:
        return dict(isa=self.one(ISAS), threads=self.one((1, 1, 2, 3)), seed=self.random.randrange(1000))

    # ---- right calls ----

    def right(self) -> Call:
        kinds = (
            self.attention, self.varlen, self.cross_entropy, self.linear_cross_entropy, self.gru, self.gru_cell,
            self.linear, self.module,
        )  # fmt: skip
        return self.one(kinds)()

    def attention(self) -> Call:
        one, dtype = self.one, self.one(DTYPES)
        B, Hkv, group = one((0, 1, 1, 2)), one((1, 2)), one((1, 1, 2, 3))
        Tq, Tk, D, Dv = one(LENGTHS), one(LENGTHS), one(SIZES), one(SIZES)
        if self.chance(0.4):  # as most are
            Tk, Dv = Tq, D
        H, kwargs = Hkv * group, {}
        q, k, v = (
            self.tensor(B, h, t, d, dtype=dtype) for h, t, d in ((H, Tq, D), (Hkv, Tk, D), (Hkv, Tk, Dv))
        )
        if group > 1:
            kwargs["enable_gqa"] = True
        shape = tuple(n if self.chance(0.6) else 1 for n in (B, H, Tq, Tk))[one((0, 0, 1, 2)) :]
        match one(("none", "none", "causal", "bool", "float", "float32")):
            case "causal":
                kwargs["is_causal"] = True
            case "bool":
                bits = tuple(int(self.chance(0.7)) for _ in range(torch.Size(shape).numel()))
                kwargs["attn_mask"] = T(shape, "bool", values=bits)
            case "float":
                kwargs["attn_mask"] = self.tensor(*shape, dtype=dtype)
            case "float32":
                kwargs["attn_mask"] = self.tensor(*shape, dtype="float32" if dtype != "float64" else dtype)
        if self.chance(0.3):
            kwargs["scale"] = one((0.05, 0.5, 1.0, -0.3, 0.0))
        if self.chance(0.2):
            kwargs["dropout_p"] = one((0.0, 0.3, 1.0))
        if self.chance(0.3):
            kwargs["window_size"] = (one((-1, 0, 1, 9, 1 << 40)), one((-1, 0, 2)))
        if self.chance(0.2):
            kwargs["softcap"] = one((0.5, 20.0))
        if self.chance(0.2):
            shape = (H,) if self.chance(0.5) else (B, H)
            kwargs["alibi_slopes"] = self.tensor(*shape, dtype="float32", values="uniform")
        if self.chance(0.2):
            kwargs["sinks"] = self.tensor(H, dtype=dtype)
        if self.chance(0.3):
            kwargs["return_lse"] = True
        return Call("scaled_dot_product_attention", (q, k, v), kwargs, **self.common())

    def varlen(self) -> Call:
        one, dtype, N = self.one, self.one(DTYPES), self.one((0, 1, 2, 3))
        H, group, D, Dv = one((1, 2)), one((1, 2)), one(SIZES), one(SIZES)
        q_lengths, k_lengths = [one(LENGTHS) for _ in range(N)], [one(LENGTHS) for _ in range(N)]
        kwargs = dict(enable_gqa=True) if group > 1 else {}
        if self.chance(0.4):
            kwargs["window_size"] = one(((-1, 0), (3, 0), (2, 1)))
        if self.chance(0.3):
            kwargs["return_aux"] = True
        paged = self.chance(0.3)
        q = self.tensor(sum(q_lengths), H * group, D, dtype=dtype, grad=0 if paged else 0.7)
        at = tuple(sum(q_lengths[:i]) for i in range(N + 1))
        q_at = T((N + 1,), "int32", values=at)
        longest = max(q_lengths, default=0), max(k_lengths, default=0)
        if not paged:
            k, v = (self.tensor(sum(k_lengths), H, d, dtype=dtype) for d in (D, Dv))
            at = tuple(sum(k_lengths[:i]) for i in range(N + 1))
            return Call(
                "varlen_attn",
                (q, k, v, q_at, T((N + 1,), "int32", values=at), *longest),
                kwargs,
                **self.common(),
            )
        page = one((1, 4, 16))
        pages = max((-(-n // page) for n in k_lengths), default=0)
        pool = pages * N + 1
        k, v = (self.tensor(pool, page, H, d, dtype=dtype, grad=0) for d in (D, Dv))
        order = self.random.sample(range(pool), pages * N)
        kwargs["seqused_k"] = T((N,), "int32", values=tuple(k_lengths))
        kwargs["block_table"] = T((N, pages), "int32", values=tuple(order))
        return Call("varlen_attn", (q, k, v, q_at, None, *longest), kwargs, **self.common())

    def loss_options(self) -> dict:
        one, kwargs = self.one, {}
        if self.chance(0.5):
            kwargs["reduction"] = one(("none", "mean", "sum"))
        if self.chance(0.3):
            kwargs["label_smoothing"] = one((0.0, 0.1, 1.0))
        if self.chance(0.2):
            kwargs["z_loss"] = 0.01
        if self.chance(0.2):
            kwargs["softcap"] = 5.0
        if self.chance(0.2):
            kwargs["return_lse"] = True
        return kwargs

    def target(self, logits: tuple[int, ...], dtype: str, kwargs: dict) -> T:
        C, shape = (logits[0], ()) if len(logits) == 1 else (logits[1], (logits[0], *logits[2:]))
        if self.chance(0.25):
            return self.tensor(*logits, dtype=dtype, grad=0.3, values="uniform", scale=2 / max(C, 1))
        ignore = -100
        if self.chance(0.3):
            ignore = kwargs["ignore_index"] = self.one((-1, 0, -100))
        numbers = [self.random.randrange(max(C, 1)) for _ in range(torch.Size(shape).numel())]
        numbers = tuple(ignore if self.chance(0.1) else n for n in numbers)
        kind = (
            "int64"
            if min(numbers, default=-1) < 0 or C > 255
            else self.one(("int64", "int64", "int32", "uint8"))
        )
        return T(shape, kind, values=numbers, layout=self.one(("contiguous", "strided", "permuted")))

    def cross_entropy(self) -> Call:
        one, dtype, kwargs = self.one, self.one(DTYPES), self.loss_options()
        C, B, rest = (
            one((1, 2, 3, 7, 8, 9, 17, 33, 100, 257)),
            one((None, 0, 1, 2, 5, 40)),
            one(((), (), (2,), (2, 3))),
        )
        shape = (C,) if B is None else (B, C, *rest)
        target = self.target(shape, dtype, kwargs)
        if self.chance(0.2):
            kwargs["weight"] = self.tensor(C, dtype=dtype, grad=0, values="uniform")
        x = self.tensor(*shape, dtype=dtype, scale=one((0.1, 1.0, 30.0)))
        return Call("cross_entropy", (x, target), kwargs, **self.common())

    def linear_cross_entropy(self) -> Call:
        one, dtype, kwargs = self.one, self.one(DTYPES), self.loss_options()
        N, D, C = one((None, 0, 1, 2, 7, 17, 40)), one((0, *SIZES)), one((1, 2, 7, 8, 9, 17, 33, 100))
        rest = () if N is None else one(((), (), (), (2,), (2, 3)))
        target = self.target((C,) if N is None else (N, C, *rest), dtype, kwargs)
        if self.chance(0.4):
            kwargs["linear_bias"] = self.tensor(C, *rest, dtype=dtype)
        if self.chance(0.2):
            kwargs["weight"] = self.tensor(C, dtype=dtype, grad=0, values="uniform")
        x = self.tensor(*(() if N is None else (N,)), D, dtype=dtype)
        w = self.tensor(C, *rest, D, dtype=dtype)
        return Call("linear_cross_entropy", (x, w, target), kwargs, **self.common())

    def gru_options(self, gains: int, H: int, dtype: str, weights: list[T]) -> tuple[dict, list[T]]:
        """Options, and weights that they can be had with: products of equal rows have no norm to compare."""
        kwargs = {}
        if self.chance(0.2):
            kwargs["zoneout"] = self.one((0.3, 1.0))
        if self.chance(0.15):
            kwargs["recurrent_dropout"] = 0.3
        if self.chance(0.25):
            kwargs["layer_norm"] = [self.tensor(3 * H, dtype=dtype) for _ in range(gains)]
            weights = [replace(w, layout="contiguous") for w in weights]
        return kwargs, weights

    def gru(self) -> Call:
        one, dtype = self.one, self.one(DTYPES)
        steps, B, I, H = one((1, 2, 3, 7, 20)), one((0, 1, 2, 3, 5, 9)), one((0, *SIZES)), one(SIZES)
        layers, D, bias, train = one((1, 1, 2, 3)), one((1, 2)), one((True, False)), one((True, False))
        params = []
        for i in range(layers * D):
            width = I if i < D else D * H
            shapes = [(3 * H, width), (3 * H, H)] + [(3 * H,)] * (2 if bias else 0)
            params += [self.tensor(*shape, dtype=dtype, scale=H**-0.5) for shape in shapes]
        kwargs, params = self.gru_options(2 * layers * D, H, dtype, params)
        hx = self.tensor(layers * D, B, H, dtype=dtype)
        rest = (params, bias, layers, one((0.0, 0.0, 0.3)), train, D == 2)
        if self.chance(0.3) and B:
            lengths = sorted((self.random.randint(1, steps) for _ in range(B)), reverse=True)
            sizes = tuple(sum(n > t for n in lengths) for t in range(lengths[0]))
            x = self.tensor(sum(lengths), I, dtype=dtype)
            args = (x, T((len(sizes),), "int64", values=sizes), hx, *rest)
            return Call("gru", args, kwargs, **self.common())
        first = self.chance(0.5)
        x = self.tensor(*((B, steps) if first else (steps, B)), I, dtype=dtype)
        return Call("gru", (x, hx, *rest, first), kwargs, **self.common())

    def gru_cell(self) -> Call:
        one, dtype = self.one, self.one(DTYPES)
        B, I, H = one((0, 1, 2, 3, 5, 9, 17)), one((0, *SIZES)), one(SIZES)
        x, h = self.tensor(B, I, dtype=dtype), self.tensor(B, H, dtype=dtype)
        shapes = [(3 * H, I), (3 * H, H)] + [(3 * H,)] * one((0, 2))
        weights = [self.tensor(*shape, dtype=dtype, scale=H**-0.5) for shape in shapes]
        kwargs, weights = self.gru_options(2, H, dtype, weights)
        if self.chance(0.3):
            kwargs["training"] = False
        return Call("gru_cell", (x, h, *weights), kwargs, **self.common())

    def linear(self) -> Call:
        one, dtype = self.one, self.one(DTYPES)
        K, N, lead = one((0, *SIZES)), one((0, *SIZES)), one(((), (3,), (0,), (2, 5)))
        x, w = self.tensor(*lead, K, dtype=dtype), self.tensor(N, K, dtype=dtype)
        args = (x, w, self.tensor(N, dtype=dtype)) if self.chance(0.5) else (x, w)
        kwargs = {}
        if self.chance(0.3) and K and N:
            numbers = tuple(self.random.randint(-127, 127) for _ in range(N * K))
            args = (args[0], T((N, K), "int8", values=numbers, layout=w.layout), *args[2:])
            kwargs["scale"] = self.tensor(N, dtype=dtype, values="uniform", scale=0.02)
        if self.chance(0.4):
            kwargs["activation"] = one(("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"))
        return Call("linear", args, kwargs, **self.common())

    def module(self) -> Call:
        one, dtype, train = self.one, self.one(("float32", "float64", "bfloat16")), self.one((True, False))
        B, steps, I, H = one((0, 1, 3)), one((1, 2, 9)), one(SIZES), one(SIZES)
        settings = dict(dtype=dtype, train=train)
        match one(
            ("GRU", "GRUCell", "MultiheadAttention", "CrossEntropyLoss", "LinearCrossEntropyLoss", "Linear")
        ):
            case "GRU" as name:
                layers, two, first = one((1, 2)), one((True, False)), one((True, False))
                module = (I, H), dict(num_layers=layers, bidirectional=two, batch_first=first, **settings)
                shape = one(((B, steps, I) if first else (steps, B, I), (steps, I)))
                args = (self.tensor(*shape, dtype=dtype),)
                if self.chance(0.5):
                    lead = (layers * (1 + two),)
                    args += (self.tensor(*(lead if len(shape) == 2 else (*lead, B)), H, dtype=dtype),)
            case "GRUCell" as name:
                module, lead = ((I, H), settings), one(((), (B,)))
                args = (self.tensor(*lead, I, dtype=dtype),)
                if self.chance(0.5):
                    args += (self.tensor(*lead, H, dtype=dtype),)
            case "MultiheadAttention" as name:
                heads = one((1, 2, 3))
                E, first = heads * one((1, 4, 8)), one((True, False))
                extra = one(({}, {}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": I, "vdim": H}))
                module = (E, heads), dict(batch_first=first, **extra, **settings)
                keys, B = one(LENGTHS[1:]), B or 1
                lead = lambda n: one(((B, n),)) if first else (n, B)  # noqa: E731
                args = (
                    self.tensor(*lead(steps), E, dtype=dtype),
                    self.tensor(*lead(keys), extra.get("kdim", E), dtype=dtype),
                    self.tensor(*lead(keys), extra.get("vdim", E), dtype=dtype),
                )
                kwargs = dict(need_weights=self.chance(0.2))
                if self.chance(0.3):
                    kwargs["key_padding_mask"] = T((B, keys), "bool", values=(0,) * (B * keys))
                if self.chance(0.3):
                    kwargs["attn_mask"] = self.tensor(steps, keys, dtype=dtype, grad=0)
                return Call(f"nn.{name}", args, kwargs, module, **self.common())
            case "CrossEntropyLoss" as name:
                kwargs, C = {}, one((1, 3, 17))
                target = self.target((B, C), dtype, kwargs)
                module = (), {**kwargs, **self.loss_options(), **settings}
                args = (self.tensor(B, C, dtype=dtype), target)
            case "LinearCrossEntropyLoss" as name:
                kwargs, C = {}, one((1, 3, 17))
                target = self.target((B, C), dtype, kwargs)
                module = (I, C), {**kwargs, **self.loss_options(), **settings}
                args = (self.tensor(B, I, dtype=dtype), target)
            case "Linear" as name:
                module, args = ((I, H), settings), (self.tensor(*one(((), (B,), (B, 2))), I, dtype=dtype),)
        return Call(f"nn.{name}", args, {}, module, **self.common())

    def nonfinite(self, call: Call) -> Call:
        """The call with NaN or infinity among the values of one argument."""
        parts = [(("args", *path), x) for path, x in leaves(call.args)]
        parts += [(("kwargs", *path), x) for path, x in leaves(call.kwargs)]
        (part, *path), x = self.one(
            [p for p in parts if isinstance(p[1], T) and not isinstance(p[1].values, tuple)]
        )
        x = replace(x, values=self.one(("nan", "inf", "-inf")))
        return replace(call, **{part: replaced(getattr(call, part), tuple(path), x)})

    # ---- alterations ----

    NUMBERS = (
        -1, 0, 1, 2, 3, 7, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63), 2**64, 0.5, -0.5, 1.5, float("nan"),
        float("inf"), -float("inf"), 1e-300, 1e300, True, False, None, "x", "", (), (1,), [2], b"y", {}, 1j,
        T(()), T((2,)), T((), "int64", values=(1,)),
    )  # fmt: skip

    def altered(self, call: Call) -> Call:
        """The call with one argument changed, often to a wrong one."""
        parts = [(("args", *path), value) for path, value in leaves(call.args)]
        parts += [(("kwargs", *path), value) for path, value in leaves(call.kwargs)]
        if not parts:
            return call
        (part, *path), value = self.one(parts)
        tree, path = getattr(call, part), tuple(path)
        if (self.chance(0.03) or isinstance(value, (list, tuple)) and self.chance(0.3)) and (
            len(path) > 1 or part == "kwargs"
        ):
            tree = without(tree, path)
        elif isinstance(value, T):
            tree = replaced(tree, path, self.altered_tensor(value))
        elif isinstance(value, (list, tuple)) and value and self.chance(0.5):
            tree = replaced(tree, path, type(value)((*value, value[0])))
        else:
            tree = replaced(tree, path, self.one(self.NUMBERS))
        return replace(call, **{part: tree}, wrong=(*call.wrong, f"{part}{list(path)}"))

    def altered_tensor(self, x: T):
        shape, one = list(x.shape), self.one
        literal = isinstance(x.values, tuple)
        match one(
            (
                "shape",
                "shape",
                "shape",
                "dtype",
                "dtype",
                "values",
                "values",
                "layout",
                "device",
                "grad",
                "kind",
            )
        ):
            case "shape":
                way = one(("less", "more", "drop", "add", "none", "swap", "double"))
                at = self.random.randrange(len(shape)) if shape else 0
                if not shape or way == "add":
                    shape.insert(at, one((0, 1, 2, 5)))
                elif way == "less":
                    shape[at] = max(0, shape[at] - 1)
                elif way == "more":
                    shape[at] += 1
                elif way == "drop":
                    del shape[at]
                elif way == "none":
                    shape[at] = 0
                elif way == "double":
                    shape[at] *= 2
                else:
                    shape.reverse()
                count = torch.Size(shape).numel()
                values = (
                    (x.values * (count // max(len(x.values), 1) + 1) or (0,) * count)[:count]
                    if literal
                    else x.values
                )
                return replace(x, shape=tuple(shape), values=values)
            case "dtype":
                kinds = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64",
                         "float8_e4m3fn", "int8")  # fmt: skip
                return replace(x, dtype=one(kinds), grad=False)
            case "values" if literal:
                values = list(x.values) or [0]
                values[self.random.randrange(len(values))] = one(
                    (-1, -2, 5, 127, 255, 1000, 2**31 - 1, -(2**31))
                )
                return replace(x, values=tuple(values[: len(x.values)]))
            case "values":
                return replace(x, values=one(("nan", "inf", "-inf", "huge", "tiny", "zero")))
            case "layout":
                return replace(x, layout=one((*LAYOUTS, *STRANGE)), grad=False)
            case "device":
                return replace(x, device="meta")
            case "grad":
                return replace(x, grad=not x.grad)
        return one((*self.NUMBERS, [x], (x, x)))

    def call(self, note=lambda call: None) -> Call:
        """A right call (2 in 5, some with NaN or infinity), a public one with alterations, or one of a raw operator
        with some; `note` gets a call that is run for its raw ones."""
        call, kind = self.right(), self.random.random()
        if self.chance(0.1) and kind < 0.4 and call.name.split(".")[0] != "nn":
            call = replace(call, autocast="bfloat16")
        if kind < 0.3:
            return call
        if kind < 0.4:
            return self.nonfinite(call)
        if kind < 0.7 or call.name.startswith("nn."):
            for _ in range(self.one((1, 1, 2))):
                call = self.altered(call)
            return call
        note(call)
        seen = raw_calls(call)
        if not seen:
            return call
        call = self.one(seen)
        for _ in range(self.one((0, 1, 1, 2, 3))):
            call = self.altered(call)
        return call


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlm":
            self.seen.append((function._schema.name.partition("::")[2], described(list(args))))
        return function(*args, **(kwargs or {}))


def raw_calls(call: Call) -> list[Call]:
    """Calls of the raw operators that a public one makes, forward and backward."""
    from harness import run

    torch.set_num_threads(call.threads)
    fastlm._C.set_isa(call.isa)
    with fastlm.use_backend("cpu"), _Watch() as watch, call.context():
        try:
            run(call.function(), call.arguments(), 0)
        except (RuntimeError, AssertionError):  # what no kernel serves
            pass
    return [Call(f"ops.{name}", tuple(args), isa=call.isa, threads=call.threads) for name, args in watch.seen]
