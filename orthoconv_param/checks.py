"""Checks of arguments and dtypes: errors name the argument, what was given, and what would be right."""

import operator
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

Size: TypeAlias = tuple[int, ...]

FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)  # computed in single precision


def check_dtype(name: str, X: Any) -> None:
    """Raise unless a tensor is of a dtype that is computed with.

    Raises:
        TypeError: if it is not, or no tensor.
    """
    if isinstance(X, Tensor) and X.dtype in (*FLOATS, *HALF):
        return
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *HALF))
    found = str(X.dtype) if isinstance(X, Tensor) else f"{type(X).__module__}.{type(X).__qualname__}"
    way_out = ". Convert it by torch.from_numpy" if found == "numpy.ndarray" else ""
    raise TypeError(
        f"{name} should be a tensor of a floating or complex dtype: {allowed}. "
        f"Found {found.removeprefix('builtins.')}{way_out}"
    )


def check_finite(name: str, X: Tensor) -> None:
    """Raise if a tensor has values and not all of them are finite.

    Raises:
        ValueError: then.
    """
    if not X.is_meta and not bool(torch.isfinite(X).all()):
        raise ValueError(f"{name} should be finite. Found nan or inf")


def at_least_single(X: Tensor) -> Tensor:
    """Return half precision as single precision, and anything else as it is."""
    return X.float() if X.dtype in HALF else X


def integer(name: str, value: Any) -> int:
    """Return an integer, also one of numpy's, as Python's.

    Raises:
        TypeError: if it is none.
    """
    if type(value) is int:
        return value
    if isinstance(value, SupportsIndex) and not isinstance(value, (bool, Tensor)):
        return operator.index(value)
    raise TypeError(f"{name} should be an integer. Found {value!r}")


def count(name: str, value: Any) -> int:
    """Return a positive integer.

    Raises:
        TypeError, ValueError: if it is none.
    """
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} should be a positive integer. Found {value!r}")
    return number


def per_axis(name: str, value: Any, axes: int | None = None) -> Size:
    """Return one positive integer for each axis.

    Raises:
        TypeError: if ``value`` is neither an integer nor a tuple or list of integers.
        ValueError: if one is not positive, or there are not as many as ``axes``.
    """
    each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * (axes or 1)
    try:
        numbers = tuple(integer(name, n) for n in each)
    except TypeError:
        raise TypeError(f"{name} should be an integer, or a tuple of them. Found {value!r}") from None
    if not numbers or min(numbers) < 1 or (axes is not None and len(numbers) != axes):
        several = "a tuple of them" if axes is None else f"one for each of the kernel's {axes} axes"
        raise ValueError(f"{name} should be a positive integer, or {several}. Found {value!r}")
    return numbers
