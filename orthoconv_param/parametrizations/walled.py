r"""`WalledGenerator`: the weight of a convolution whose skew part is exponentiated between walls.

Between walls ``exp(T)``, with ``T`` the zero-padded convolution with the weight's skew part, is no
convolution. So there is no kernel: the weight is the generator, in space.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..action.generator import Generator
from ..action.skew import Layout, coarse_kernel
from ..checks import at_least_single, check_dtype, check_finite
from ..matrices import maps
from ..matrices.chebyshev import check_series
from ..matrices.unitary import polar_frame
from ..torus.geometry import Geometry
from ..torus.lattice import pack, unpack
from . import signature
from .degree import Degree, default_tolerance
from .plan import follow, norm_of
from .registered import Registered


class Norm(runtime.Numbered):
    """Follows the norm of a generator: what it is at most, and how many terms that takes.

    Args:
        geometry: of the generator.
        triv: from skew to unitary matrices.
    """

    def __init__(self, geometry: Geometry, triv: str | maps.Trivialization) -> None:
        super().__init__()
        self.geometry = geometry
        self.triv = triv
        self.degree: Degree | None = None
        self.reader = runtime.LateReader()

    def generator(self, kernel: Tensor, dtype: torch.dtype, coin: Tensor | None) -> Generator:
        """Return what is exponentiated of a generator in space, which is of a dtype as it is trained.

        Raises:
            ValueError: if its norm needs more than 200 terms.
            RuntimeError: if the norm is not known, since there has been no ordinary call.
        """
        tol = default_tolerance(dtype)
        if self.degree is not None and self.degree.tol != tol:
            self.degree = Degree.of_series(self.triv, tol, self.degree.level)
        self.degree = self._followed(kernel, tol)
        if self.degree is None:
            raise RuntimeError(
                "the generator's norm is not known: call the module once outside of torch.compile"
            )
        number = self.number if runtime.is_compiled_whole() and runtime.may_wait(kernel.device) else None
        return Generator(kernel, self.geometry, self.degree.level, self.degree.coefficients, coin, number)

    def level(self, kernel: Tensor) -> float:
        """Return the norm of a generator, rounded up; the one that is known stays what it is."""
        assert self.degree is not None
        degree = self._followed(kernel, self.degree.tol)
        return self.degree.level if degree is None else degree.level

    def coefficients(self, level: float) -> tuple[float, ...]:
        """Return those of the series for a norm."""
        assert self.degree is not None
        return Degree.of_series(self.triv, self.degree.tol, level).coefficients

    def _followed(self, kernel: Tensor, tol: float) -> Degree | None:
        def needed(norm: float) -> Degree:
            return Degree.of_series(self.triv, tol, norm)

        def read(norm: Tensor) -> float | None:  # under vmap that of all members
            return self.reader(runtime.largest(norm))

        return follow(needed, self.degree, norm_of(self.geometry, kernel, read), kernel)[1]


class WalledGenerator(Registered):
    """Parametrizes a weight by its Fourier coefficients; the module exponentiates its skew part.

    Args:
        geometry: of the convolution.
        owner: the module, in words, for errors.
        context: what tells checkpoints of the module apart.
        triv: the map from skew to unitary matrices, a matrix function.
        base: True if an orthogonal matrix acts on each pixel too: at first the one nearest to the weight.
    """

    def __init__(
        self,
        geometry: Geometry,
        owner: str | None,
        context: Mapping[str, str],
        *,
        triv: str | maps.Trivialization = "expm",
        base: bool | None = None,
    ) -> None:
        super().__init__(geometry.stride, geometry.groups, triv, bool(base) if base is None else base)
        check_series(triv)
        self.placement, self.owner, self.context = geometry.placement, owner, dict(context)
        self.norm = Norm(geometry, triv)
        self._placed = geometry
        self._issued = runtime.LastIssued()

    @property
    def taps(self) -> tuple[int, ...]:
        """Taps of the weight."""
        return self._placed.taps

    @runtime.in_full_precision
    def forward(self, X: Tensor) -> Tensor:
        """Return the generator in space.

        Args:
            X: its Fourier coefficients, ``(out, in/groups, *taps)``.

        Returns:
            ``(out, in/groups, *taps)``, in its dtype.

        Raises:
            ValueError: if it is not of the registered size, or not finite.
            RuntimeError: if it is sharded, as under FSDP outside of forward.
        """
        self.check_generator(X, self._registered()[0].size)
        W = unpack(X).to(X.dtype).contiguous()
        self._issued.note(W)
        return W

    @runtime.in_full_precision
    def generator(self, X: Tensor) -> Generator:
        """Return what is exponentiated.

        Raises:
            ValueError, RuntimeError: as `forward` does, and `Norm.generator`.
        """
        self.check_generator(X, self._registered()[0].size)
        kernel = unpack(X)
        return self.norm.generator(kernel, X.dtype, self.coin(kernel.dtype))

    def coin(self, dtype: torch.dtype) -> Tensor | None:
        """Return the matrices that act on each pixel, ``(groups, m, m)``, in a dtype."""
        if self.base is None:
            return None
        return coin_of(self.base, dtype)

    def has_issued(self, W: Tensor) -> bool:
        """Return True if a tensor shares the memory of the weight that was computed last."""
        return self._issued.is_seen_in(W)

    # From a weight to the generator

    @torch.no_grad()
    @runtime.in_full_precision
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """Return the Fourier coefficients of a generator.

        On registration with a base, the generator is zero, and the base the nearest matrix to the weight
        that acts on each pixel.

        Args:
            W: ``(out, in/groups, *taps)``.
            check_in_manifold: changes nothing: every weight is the generator of an orthogonal operator.

        Raises:
            TypeError: if ``W`` is not of the registered dtype, or not of a floating or complex one.
            ValueError: if it is not finite, or of another size; if its norm needs more than 200 terms.
            RuntimeError: if the generator is sharded (FSDP).
        """
        runtime.refuse_assigning_to_parts()
        if self.geometry is not None:
            self._check(W)
            generator = pack(at_least_single(W)).to(W.dtype)
            check_finite("the weight, and the sums of its taps,", generator)
            self._follow(W)
            return generator
        generator, buffers = self.preimage(W)
        for name, value in buffers.items():
            setattr(self, name, value)
        self.geometry, self._reference = self._placed, W.new_empty(0)
        self._follow(torch.zeros_like(W) if self.has_base else W)
        return generator

    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return generator and buffers of a module that starts from a weight; change nothing.

        Raises:
            TypeError, ValueError: as `right_inverse` does.
        """
        self._check(W)
        if not self.has_base:
            return pack(at_least_single(W)).to(W.dtype), {}
        layout = Layout.of(self._placed, self._placed.placement)
        kernel = coarse_kernel(at_least_single(W), layout.numbers)
        coin = polar_frame(kernel.flatten(3)[..., prod(layout.taps) // 2])  # of the tap in the middle
        return torch.zeros_like(W), {"base": reals_of(coin)}

    def loaded(self, generator: Tensor, state: Any) -> None:
        """Take note of a generator that has been loaded: its norm sets the number of terms."""
        geometry, reference = self._registered()
        if tuple(generator.shape) == geometry.size:
            self.norm.reader.restart()
            generator = generator.detach().to(reference.device, reference.dtype)
            self._follow(unpack(generator))

    def _follow(self, W: Tensor) -> None:
        self.norm.generator(at_least_single(W), W.dtype, None)

    def _check(self, W: Tensor) -> None:
        check_dtype("the weight", W)
        if tuple(W.shape) != self._placed.size:
            raise ValueError(f"the weight should be of size {self._placed.size}. Found {tuple(W.shape)}")
        if self._reference is not None and W.dtype != self._reference.dtype:
            raise TypeError(f"the weight should be of dtype {self._reference.dtype}. Found {W.dtype}")
        check_finite("the weight", W)

    # The other verbs of a manifold

    def in_manifold(self, W: Tensor, eps: float = 1e-4) -> bool:
        """Return True if ``W`` has the weight's size: every generator is one of an orthogonal operator.

        Raises:
            RuntimeError: before registration.
        """
        geometry, _ = self._registered()
        return tuple(W.shape) == geometry.size and W.is_complex() == geometry.is_complex

    @torch.no_grad()
    def sample(self, distribution: str = "identity", init_: Any = None) -> Tensor:
        """Return a generator, to be assigned to the weight.

        Args:
            distribution: ``"identity"``, or near it.
            init_: fills the generator's taps in place: small ones stay near the identity, or the base.
                Default: zero.

        Raises:
            RuntimeError: before registration.
            ValueError: if there is no such distribution.
        """
        geometry, reference = self._registered()
        if distribution != "identity":
            raise ValueError(f"distribution should be 'identity' between walls. Found {distribution!r}")
        generator = at_least_single(reference).new_zeros(geometry.size)
        if init_ is not None:
            init_(generator)
        return generator.to(reference.dtype)

    # Being a module

    def extra_repr(self) -> str:
        """Say what ``print(conv)`` says of the parametrization."""
        rest = [f"triv={maps.name(self.triv)}", f"base={self.has_base}"]
        return ", ".join([str(self._placed.size), "its skew part is exponentiated", *self.options(), *rest])

    def signature(self) -> dict[str, str]:
        """Return the settings that a checkpoint must match."""
        words = {
            "method": "exponential",
            "domain": "any",
            "taps": signature.by_axis(self._placed.taps),
            "base": str(self.has_base),
            **({"triv": self.triv} if isinstance(self.triv, str) else {}),
        }
        return {**words, **self.context}

    def _projected(self, buffer: Tensor) -> Tensor:
        return projected(buffer, self._placed.is_complex)

    def _loaded_or_moved(self, moved: bool) -> None:
        self.norm.reader.restart(wait=not moved)  # the generator is the parent's


def reals_of(coin: Tensor) -> Tensor:
    """Return matrices ``(groups, m, m)`` as real numbers, of which moves drop no imaginary part."""
    return torch.view_as_real(coin).flatten(2) if coin.is_complex() else coin


def coin_of(reals: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrices of `reals_of`, in a dtype."""
    return (torch.view_as_complex(reals.unflatten(-1, (-1, 2))) if dtype.is_complex else reals).to(dtype)


def projected(reals: Tensor, is_complex: bool) -> Tensor:
    """Return the unitary matrices nearest to those of `reals_of`."""
    dtype = torch.promote_types(reals.dtype, torch.complex64) if is_complex else reals.dtype
    return reals_of(polar_frame(coin_of(reals, dtype)))
