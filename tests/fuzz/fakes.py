"""Whether the operators' fake kernels, which torch.compile and torch.export take for the real ones, describe what
those return: shapes, dtypes, strides, devices."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Fakes(TorchDispatchMode):
    """Runs the fake kernel of every operator of ours that runs; `problem` is what it got wrong, if anything."""

    problem: str | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "fastlm" and self.problem is None:
            self.problem = _wrong(function, args, kwargs or {}, results)
        return results


def _wrong(function, args, kwargs, results) -> str | None:
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            fake = function(*args, **kwargs)
        except Exception as error:
            return f"the fake kernel of {function} refuses what the real one takes: {error}"
    described, expected = tree_map_only(Tensor, _description, (fake, results))
    return (
        None if described == expected else f"the fake kernel of {function}: {described}, but it is {expected}"
    )


def _description(x: Tensor) -> tuple:
    """Of dimensions of one element, and of tensors without any, the strides say nothing."""
    strides = [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1] if x.numel() else []
    return tuple(x.shape), x.dtype, strides, x.device
