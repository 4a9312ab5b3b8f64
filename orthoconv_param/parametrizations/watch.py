"""A warning from compiled code, whose compact kernel has as many taps as at the last ordinary call.

Compilers see no values. An operator that they do not look into does, and returns what it is given.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from .. import runtime


class Watch(runtime.Numbered):
    """Finds a parametrization from compiled code. It is empty until an ordinary call fills it."""

    _look: WeakMethod[Callable[[Tensor, Tensor], None]] | None = None

    def fill(self, look: Callable[[Tensor, Tensor], None]) -> None:
        """Take the method that looks at a generator and its matrices."""
        if self._look is None:
            self._look = WeakMethod(look)

    def look(self, kernel: Tensor, Q: Tensor) -> None:
        """Look at a generator and its matrices."""
        look = None if self._look is None else self._look()
        if look is not None:
            look(kernel, Q)

    def __getstate__(self) -> dict[str, Any]:
        return {}


@torch.library.custom_op("orthoconv_param::watched", mutates_args=())
def watched(Q: Tensor, kernel: Tensor, number: int) -> Tensor:
    """Return the matrices of a generator, and warn if they need more taps than they have."""
    runtime.numbered(number).look(kernel, Q)
    return Q.clone()


@watched.register_fake
def _(Q: Tensor, kernel: Tensor, number: int) -> Tensor:
    return torch.empty_like(Q)


watched.register_autograd(lambda ctx, G: (G, None, None))
