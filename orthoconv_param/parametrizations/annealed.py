r"""`Annealed`: the way of a kernel from pretrained to orthogonal.

With the polar decomposition ``W = Q P`` of a pretrained operator at each frequency (``Q`` has singular
values 1, ``P = V diag(S) V^H``),

    W_t = Q exp(skew(X)) P^(1 - t)

is the pretrained operator at ``t = 0`` and ``X = 0``, and orthogonal at ``t = 1`` whatever the generator
``X``. (With ``W = U S V^H`` it is ``U exp(A) S^(1 - t) V^H``, where ``A = V^H skew(X) V``. In its own basis
the generator has few taps, and does not depend on how a singular value decomposition was chosen.)
"""

from math import nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Size
from ..matrices.products import product
from ..matrices.unitary import polar_decomposition
from ..torus.lattice import Lattice
from .exponential import ConvExponential, as_reals, from_reals
from .plan import Plan


class Annealed(ConvExponential):
    """Takes `ConvExponential` on a given domain from a pretrained kernel to an orthogonal one.

    ``t`` is a buffer, so that checkpoints hold it. At ``t < 1`` assigning a kernel starts from it, at
    ``t = 0``; at ``t = 1`` the nearest orthogonal one is taken, as ever.
    """

    t: Tensor | None  # None once annealing has ended
    directions: Tensor | None
    values: Tensor | None
    _unitary: ClassVar[tuple[str, ...]] = ("base", "directions")

    def __init__(self, domain: Size, *, stride: int | Size = 1, groups: int = 1) -> None:
        super().__init__(domain, stride=stride, groups=groups)
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("directions", None)
        self.register_buffer("values", None)

    @property
    def progress(self) -> float:
        """Return ``t``; 1 once annealing has ended, and nan on the meta device, where it has no value."""
        if self.t is None:
            return 1.0
        return nan if self.t.is_meta else float(self.t)

    def end(self) -> None:
        """Drop what is not needed once ``t`` is 1."""
        self.t = self.directions = self.values = None

    def _matrices(self, kernel: Tensor, plan: Plan) -> Tensor:
        """Return those of `ConvExponential`, times ``P^(1 - t)``, which is on the left of wide matrices."""
        Q = super()._matrices(kernel, plan)
        if self.t is None:
            return Q
        assert self.directions is not None
        assert self.values is not None
        V = from_reals(self.directions).to(Q.dtype)
        powers = self.values.unsqueeze(-2) ** (1 - self.t)
        if Q.shape[-2] >= Q.shape[-1]:
            return product(product(Q, V) * powers, V.mH.resolve_conj())
        return product(V * powers, product(V.mH.resolve_conj(), Q))

    @torch.no_grad()
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """Do what `ConvExponential` does, at ``t = 1``. Before, take ``W`` itself, and ``t = 0`` again."""
        arrived = self.progress == 1
        generator = super().right_inverse(W, check_in_manifold)
        if arrived and self.t is not None:
            self.t.fill_(1)
        return generator

    def _buffers_of(self, lattice: Lattice, spectrum: Tensor) -> dict[str, Tensor]:
        frame, V, S = lattice.choose(polar_decomposition, spectrum)
        buffers = {"base": as_reals(frame)}
        if self.t is None:
            return buffers
        info = torch.finfo(S.dtype)
        floor = (info.eps * S.amax()).clamp(min=info.tiny)
        return buffers | {
            "directions": as_reals(V),
            "values": S.clamp(min=floor),
            "t": torch.zeros_like(self.t),
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values = {name: state_dict.get(prefix + name) for name in ("t", "directions", "values")}
        if prefix + "base" in state_dict and all(value is None for value in values.values()):
            self.end()  # as it had where the checkpoint was made
        elif self.t is None and self.base is not None:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    like = torch.empty_like(value, dtype=self.base.dtype, device=self.base.device)
                    setattr(self, name, like)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Say what ``print`` says of it."""
        return super().extra_repr() + ("" if self.t is None else f", t={self.progress:.3g}")
