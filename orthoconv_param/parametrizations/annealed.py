r"""The way of a kernel from pretrained to orthogonal.

**On a torus of one size**, `Annealed` takes the polar decomposition ``W = Q P`` of a pretrained operator at
each frequency (``Q`` has singular values 1, ``P = V diag(S) V^H``), and

    W_t = Q exp(skew(X)) P^(1 - t),

which is the pretrained operator at ``t = 0`` and ``X = 0``, and orthogonal at ``t = 1`` whatever the
generator ``X``. (With ``W = U S V^H`` it is ``U exp(A) S^(1 - t) V^H``, where ``A = V^H skew(X) V``. In its
own basis the generator has few taps, and does not depend on how a singular value decomposition was chosen.)

**Elsewhere** there is no polar path, and the operator is

    W_t = (1 - t) W + t Q,

the pretrained one at ``t = 0`` whatever ``Q`` is, and orthogonal at ``t = 1``. ``Q`` starts near ``W``.
"""

from collections.abc import Mapping
from math import nan
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..checks import Size, at_least_single
from ..matrices.products import product
from ..matrices.unitary import polar_decomposition
from ..torus.geometry import Geometry
from ..torus.lattice import Lattice
from .exponential import ConvExponential, as_reals, from_reals
from .plan import Plan
from .registered import Registered
from .split import SplitExponential
from .walled import WalledGenerator


class Annealing(Registered):
    """A parametrization that comes from a pretrained weight. Mixed into one of orthogonal operators.

    ``t`` is a buffer, so that checkpoints hold it. At ``t < 1`` assigning a kernel starts from it, at
    ``t = 0``; at ``t = 1`` one near it is taken, as ever.
    """

    t: Tensor | None  # None once annealing has ended
    _way: ClassVar[tuple[str, ...]]  # the buffers that serve the way only, besides ``t``

    anneals = True  # False of what never was on the way

    def _start(self) -> None:
        """Make the buffers; called once by the constructor."""
        self.register_buffer("t", torch.zeros(()))
        for name in self._way:
            self.register_buffer(name, None)

    @property
    def progress(self) -> float:
        """Return ``t``; 1 once annealing has ended, and nan on the meta device, where it has no value."""
        if self.t is None:
            return 1.0
        return nan if self.t.is_meta else float(self.t)

    def never(self) -> None:
        """Be at the end from the start, before registration."""
        self.anneals = False
        self.end()

    def difference(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say how a checkpoint differs from this parametrization; None if it does not."""
        ways = [name for name in ("t", *self._way) if prefix + name in state_dict]
        if ways and not self.anneals:
            return self.on_its_way(ways)
        return super().difference(state_dict, prefix)

    def end(self) -> None:
        """Drop what is not needed once ``t`` is 1."""
        for name in ("t", *self._way):
            setattr(self, name, None)

    @torch.no_grad()
    @runtime.in_full_precision
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """At ``t = 1``, do what the parametrization does. Before, take ``W`` itself, and ``t = 0``."""
        arrived = self.progress == 1
        generator = super().right_inverse(W, check_in_manifold)  # type: ignore[misc]
        if arrived and self.t is not None:
            self.t.fill_(1)
        return generator

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values = {name: state_dict.get(prefix + name) for name in ("t", *self._way)}
        if self.difference(state_dict, prefix) is not None:
            pass  # which is refused
        elif prefix + "base" in state_dict and all(value is None for value in values.values()):
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


class Annealed(Annealing, ConvExponential):
    """Takes `ConvExponential` on a given domain from a pretrained kernel to an orthogonal one."""

    directions: Tensor | None
    values: Tensor | None
    _unitary: ClassVar[tuple[str, ...]] = ("base", "directions")
    _way = ("directions", "values")

    def __init__(self, domain: Size, *, stride: int | Size = 1, groups: int = 1) -> None:
        super().__init__(domain, stride=stride, groups=groups)
        self._start()

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


class Interpolating(Annealing):
    """Takes a parametrization from a pretrained weight to its own, ``(1 - t) W + t Q``."""

    pretrained: Tensor | None  # W, as real numbers
    _way = ("pretrained",)

    def pretrained_share(self, dtype: torch.dtype) -> Tensor | None:
        """Return ``(1 - t) W`` in a dtype; None once annealing has ended."""
        if self.t is None or self.pretrained is None:
            return None
        W = torch.view_as_complex(self.pretrained) if dtype.is_complex else self.pretrained
        return (1 - self.t) * W.to(dtype)

    def _buffers_of_way(self, W: Tensor) -> dict[str, Tensor]:
        if self.t is None:
            return {}
        W = at_least_single(W).clone()
        reals = torch.view_as_real(W).contiguous() if W.is_complex() else W.contiguous()
        return {"pretrained": reals, "t": torch.zeros_like(self.t)}

    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator that `right_inverse` starts from, and the buffers; change nothing."""
        generator, buffers = super().preimage(W)  # type: ignore[misc]
        return generator, buffers | self._buffers_of_way(W)


class AnnealedSplit(Interpolating, SplitExponential):
    """Takes a weight from a pretrained one to a split kernel."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._start()

    @property
    def taps(self) -> Size:
        """Taps of the weight: as many as it had, where a split kernel between walls has one less, too."""
        geometry, _ = self._registered()
        return geometry.taps

    @runtime.in_full_precision
    def forward(self, X: Tensor) -> Tensor:
        """Return ``(1 - t) W + t Q``, of the generator ``X`` of ``Q``; see `SplitExponential`."""
        Q = self._padded(super().forward(X))
        W = self.pretrained_share(Q.dtype)
        return Q if W is None or self.t is None else W + self.t * Q

    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator that `right_inverse` starts from, and the buffers; change nothing.

        The present weight keeps ``t`` and the pretrained one, so that its operator stays, at walls too.
        """
        found = self._on_its_way(W)
        if found is None:
            return super().preimage(W)
        X, base = found
        return X.to(W.dtype), {"base": self._base_of(base, W)}

    def _on_its_way(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the present generator and bases, folded, if ``W`` is the weight that they give now."""
        X = self.given()
        if X is None or self.t is None or self.geometry is None or W.shape != self.geometry.size:
            return None
        if X.is_meta or not self._is_near(self.forward(X.detach()), W):
            return None
        return self._folded(X.detach(), W)

    def sample(self, distribution: str = "uniform", init_: Any = None) -> Tensor:
        """Return a random kernel of the family, as `SplitExponential.sample`."""
        return self._padded(super().sample(distribution, init_))

    def _padded(self, Q: Tensor) -> Tensor:
        missing = [t - q for t, q in zip(self.taps, Q.shape[2:], strict=True)]
        return F.pad(Q, [n for m in missing[::-1] for n in (0, m)]) if any(missing) else Q

    def _geometry_of(self, W: Tensor) -> Geometry:
        size = tuple(W.shape)
        return Geometry.of_weight(size, W.is_complex(), self.stride, self.groups, self.placement, None)


class AnnealedGenerator(Interpolating, WalledGenerator):
    """Takes an operator from a pretrained convolution to the exponential of its weight's skew part.

    The weight is the generator. What the operator is on the way, evaluators ask for.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._start()
