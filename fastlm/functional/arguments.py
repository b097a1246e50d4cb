"""Kinds of arguments, as the public functions ask for them: an error names the function, the argument, what is
required and what came."""

import numbers

import torch
from torch import Tensor


class UnfitValue(ValueError, RuntimeError):
    """A ValueError, and the RuntimeError that PyTorch's function raises for these arguments."""


class UnfitType(TypeError, RuntimeError):
    """The same for dtypes."""


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_INTEGERS = (int, torch.SymInt)


def check_number(function: str, name: str, value) -> None:
    """``TypeError`` unless it is one number; a tensor without dimensions is, as for PyTorch."""
    if isinstance(value, _NUMBERS) or isinstance(value, numbers.Real):
        return
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return
    raise TypeError(f"{function}: {name} is {described(value)}, expected a number")


def check_integer(function: str, name: str, value) -> None:
    """``TypeError`` unless it is an integer, ``ValueError`` unless 64 bits hold it."""
    if not isinstance(value, _INTEGERS) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}: {name} is {described(value)}, expected an integer")
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{function}: {name} is {value}, expected an integer of 64 bits")


def check_flag(function: str, name: str, value) -> None:
    """``TypeError`` unless it is True or False, or an integer."""
    if not isinstance(value, (int, torch.SymBool)):
        raise TypeError(f"{function}: {name} is {described(value)}, expected True or False")


def check_tensor(function: str, name: str, x) -> None:
    """``TypeError`` unless it is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} is {type(x).__name__}, expected a Tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{function}: {name} is {kind}, expected a dense Tensor")


def described(value) -> str:
    """A value in a message."""
    return f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
