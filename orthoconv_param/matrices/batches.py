"""Batches of matrices in pieces, whose temporaries stay in a core's cache, or fit in a GPU's memory."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .. import runtime

_CACHE_BYTES = 3 * 2**18  # of one temporary: several fit in a core's cache
_DEVICE_BYTES = 2**27  # so that those of a large spectrum do not fill a GPU


def pieces(batch: Tensor) -> list[slice]:
    """Return slices that cut a batch of matrices ``(count, rows, columns)`` into pieces."""
    if not batch.numel():
        return []
    limit = _CACHE_BYTES if runtime.may_wait(batch.device) else _DEVICE_BYTES
    size = max(1, limit // (batch[0].numel() * batch.element_size()))
    return [slice(start, start + size) for start in range(0, len(batch), size)]


def flatten(X: Tensor) -> Tensor:
    """Return matrices ``(..., rows, columns)`` as ``(count, rows, columns)``."""
    return X.reshape(prod(X.shape[:-2]), *X.shape[-2:])


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to batches ``(..., n, n)`` piece by piece.

    Args:
        function: of pieces ``(count, n, n)``, one of each of the tensors.
        tensors: all of one shape.

    Returns:
        A new tensor of the shape of each: see Note [fresh results].
    """
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    flat, batches = flatten(result), [flatten(x.resolve_conj()) for x in tensors]
    for piece in pieces(flat):
        flat[piece] = function(*(x[piece] for x in batches))
    return result
