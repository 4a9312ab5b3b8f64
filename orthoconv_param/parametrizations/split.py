r"""`SplitExponential`: a convolution's weight as a product of exponentials of finite support.

    weight = C_n L exp(S_n) L^H C_(n-1) ... L exp(S_1) L^H C_0,    C_i = B_i exp(skew(X_i)),

see `split.chain`. ``exp`` may be another map from skew to unitary matrices.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from geotorch.exceptions import InManifoldError
from torch import Tensor

from .. import runtime
from ..checks import Size, at_least_single, check_dtype, check_finite
from ..matrices import maps
from ..matrices.products import skew
from ..matrices.unitary import haar, polar
from ..split import fast
from ..split.chain import Chain, Factors
from ..split.compose import kernel
from ..split.generators import factors, folded, identities, join_bases
from ..split.reading import logarithms, read
from ..torus.geometry import Geometry
from . import signature
from .registered import Registered


class SplitExponential(Registered):
    r"""Parametrizes a convolution's weight by exponentials of antisymmetric kernels, all of finite support.

        weight = C_n S_n C_(n-1) ... S_1 C_0,    W(w)^H W(w) = I at every frequency w

    (``W W^H = I`` where that is wide). The coins ``C = base * exp(skew(X))`` act on one pixel's channels.
    The pairs ``S = L exp([[0, -Y^H], [Y, 0]]) L^H`` (``Y`` free; ``L`` shifts half of the channels by a
    pixel) join the two halves. Each pair has three taps on one axis of space, so that the
    weight keeps its ``k x k`` taps, and its operator is orthogonal on periodic images of **every** size:

        register_parametrization(conv, "weight", SplitExponential())

    is all that a convolution with circular padding needs. With zero padding the operator never expands, but
    it is **not orthogonal**: see ``orthogonal(conv, method="split", boundary="walls")``.

    The family has about ``1.5 m^2`` dimensions for 3x3 kernels of ``m`` channels, where the exponential has
    ``4.5 m^2``. It contains the identity if ``k`` is odd, in and out channels are equal and the stride is
    1. One channel per group would leave only shifts: use `ConvExponential`.

    The generator, the trained parameter, is one tensor of one axis for all factors, of the dtype of the
    weight that it replaces. It may have any values. Its size is not the weight's. So call
    ``zero_grad(set_to_none=True)`` before registration and before ``remove_parametrizations``, and make a
    new optimizer afterwards.

    Args:
        stride: of the convolution. A parametrization sees the weight alone, so this and ``groups`` must be
            those of the convolution. With a stride ``s`` the weight is a kernel of stride 1, then an
            orthogonal map of each ``s x s`` patch; unused taps are zero.
        groups: of the convolution.
        triv: ``"expm"``, ``"cayley"``, or a callable from skew-Hermitian ``(..., m, m)`` to unitary
            matrices, as geotorch's are; it is tried once on small ones.
        base: whether each coin is a fixed orthogonal matrix times the exponential. Then
            ``geotorch.utils.update_base`` works. Default: True. ``False``: assigning takes the logarithm,
            and all coins must be square, as with stride 1 and equal channels.

    Raises:
        TypeError, ValueError: for arguments that are not as above, or a ``triv`` that does not give unitary
            matrices; on registration, if the weight is not a finite floating or complex convolution kernel,
            has no split kernels, or has a gradient. The module is then unchanged.
        geotorch.exceptions.InManifoldError: on assignment with ``base=False``, if the map does not reach
            the coins (``"expm"``: if a determinant is -1).

    Assigning ``conv.weight = W`` sets the weight to ``W`` if that is in the family (of seven taps and more
    to about 1e-7), else to a kernel near it, found by a deterministic descent. Assigning the present weight
    keeps its pairs, and moves the coins into the base. Copy a module between walls by its ``state_dict``,
    not by its weight: one kernel may have several sets of factors, which differ at the walls, and
    assignment finds those whose pairs rotate by at most ``pi/2``.

    Half precision is computed in single precision and rounded, which leaves a defect of about 3e-4
    (float16) and 2e-3 (bfloat16).

    Cost: for 3x3 kernels five exponentials of ``m x m`` matrices (see `expm_skew`), and products of ``13
    m^3`` multiplications forward, twice that backward. Convolving costs what the plain weight does.

    Source: exponentials of convolutions, Magnasco, arXiv:2302.07396; products of such factors are the
    lattice structures of paraunitary filter banks (Vaidyanathan, Multirate Systems and Filter Banks, 1993).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from orthoconv_param import SplitExponential, orthogonality_defect
        >>> conv = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular").double()
        >>> _ = register_parametrization(conv, "weight", SplitExponential())
        >>> conv.weight.shape
        torch.Size([4, 4, 3, 3])
        >>> all(orthogonality_defect(conv, domain=n) < 1e-11 for n in (1, 3, 32, 97))
        True
    """

    def __init__(
        self,
        *,
        stride: int | Size = 1,
        groups: int = 1,
        triv: str | maps.Trivialization = "expm",
        base: bool | None = None,
    ) -> None:
        super().__init__(stride, groups, triv, base)
        self.check_inverse()
        self.between_walls = False
        self.chain: Chain | None = None  # once registered
        self.given = runtime.LastGiven()

    @classmethod
    def placed(
        cls,
        geometry: Geometry,
        between_walls: bool,
        owner: str | None,
        context: Mapping[str, str],
        **options: Any,
    ) -> "SplitExponential":
        """Return the parametrization of a convolution whose geometry and owner are known.

        Args:
            geometry: of the convolution.
            between_walls: whether its operator is to be orthogonal between walls, too.
            owner: the module, in words, for errors.
            context: what tells checkpoints of the module apart.
            options: further ones of the constructor.
        """
        self = cls(stride=geometry.stride, groups=geometry.groups, **options)
        self.placement, self.owner, self.context = geometry.placement, owner, dict(context)
        self.between_walls = between_walls
        return self

    # From the generator to the kernel

    @property
    def taps(self) -> Size:
        """Taps of the weight.

        Raises:
            RuntimeError: before registration.
        """
        return self.chain_or_raise().taps

    @runtime.in_full_precision
    def forward(self, X: Tensor) -> Tensor:
        """Return the orthogonal kernel of a generator.

        Args:
            X: the generator, of one axis.

        Returns:
            ``(out, in/groups, *taps)``, in the generator's dtype.

        Raises:
            RuntimeError: before registration; or if the generator is sharded, as under FSDP outside of
                forward.
            ValueError: if the generator is not of the registered size, or not finite (on CUDA checked only
                under `torch.autograd.set_detect_anomaly`, since that waits for the device).
        """
        chain = self.chain_or_raise()
        self.check_generator(X, (chain.groups * chain.numbers,))
        Y = at_least_single(X)
        W = fast.weight(chain, Y, self._bases(Y), self.triv).to(X.dtype)
        self.given.note(X)
        return W

    @runtime.in_full_precision
    def factors(self, X: Tensor) -> Factors:
        """Return the coins and pairs of a generator, in single precision at least.

        Raises:
            RuntimeError, ValueError: as `forward` does.
        """
        chain = self.chain_or_raise()
        self.check_generator(X, (chain.groups * chain.numbers,))
        X = at_least_single(X)
        return fast.factors(chain, X, self._bases(X), self.triv)

    def _bases(self, like: Tensor) -> Tensor | None:
        """Return the coins' bases, which the buffer holds as real numbers, in a tensor's dtype."""
        if self.base is None:
            return None
        return (_as_complex(self.base) if like.is_complex() else self.base).to(like.dtype)

    # From a kernel to the generator

    @torch.no_grad()
    @runtime.in_full_precision
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """Return the generator whose kernel is ``W``, or one near it.

        The generator holds the pairs. With a base, that takes the coins, and theirs are zero. Without, the
        generator holds their logarithms too.

        Args:
            W: ``(out, in/groups, *taps)``.
            check_in_manifold: True to raise for a kernel that is not of the family.

        Returns:
            The generator, of one axis, of the dtype of ``W``.

        Raises:
            TypeError: if ``W`` is not of the registered dtype, or not of a floating or complex one.
            ValueError: if it is not finite, of another size, or has no split kernels.
            geotorch.exceptions.InManifoldError: if ``check_in_manifold`` and ``W`` is not of the family, or
                if no generator gives its coins.
            RuntimeError: if the generator is sharded (FSDP).
        """
        runtime.refuse_assigning_to_parts()
        chain = self._check(W)
        if check_in_manifold and not self._is_of(chain, W, 1e-4):
            raise InManifoldError(W, self)
        generator, buffers = self.preimage(W)
        for name, value in buffers.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else old.copy_(value))
        if self.geometry is None:
            self.geometry, self.chain, self._size = self._geometry_of(W), chain, tuple(W.shape)
            self._reference = W.new_empty(0)
        return generator

    @runtime.out_of_inference_mode
    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator of `right_inverse`, and the buffers that it sets; change nothing.

        Raises:
            TypeError, ValueError, geotorch.exceptions.InManifoldError: as `right_inverse` does.
        """
        chain = self._check(W)
        X, base = self._present(chain, W) or self._read(chain, W)
        if not self.has_base:
            try:
                return logarithms(chain, X, base, self.triv).to(W.dtype), {}
            except ValueError as error:
                raise InManifoldError(W, f"the image of {self}: {error}") from error
        return X.to(W.dtype), {"base": self._base_of(base, W)}

    def loaded(self, generator: Tensor, state: Any) -> None:
        """Take note of a generator that has been loaded: nothing follows from it."""

    def _read(self, chain: Chain, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return a generator, and the coins' bases, of a kernel near ``W``, in double precision."""
        eps = torch.finfo(at_least_single(W).dtype).eps
        proper = not self.has_base and not W.is_complex()
        return read(chain, _fitting(W, chain).to(_double(W)), self.triv, eps, proper)

    def _present(self, chain: Chain, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the present generator and bases, folded and in double precision, if ``W`` is their kernel.

        A parametrization is not told its generator when a weight is assigned: it remembers the last one.
        """
        X = self.given()
        if X is None or self.geometry is None or X.is_meta or tuple(W.shape) != self.geometry.size:
            return None
        X = X.detach()
        if not self._is_near(kernel(chain, self.factors(X)), _fitting(W, chain)):
            return None
        return self._folded(X, W)

    def _is_near(self, Q: Tensor, W: Tensor) -> bool:
        """Return True if a kernel equals a weight but for rounding."""
        return bool((Q.to(W.dtype) - W).abs().amax() <= 8 * torch.finfo(W.dtype).eps)

    def _folded(self, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return a generator and its bases in double precision, the coins in the bases."""
        chain, X = self.chain_or_raise(), X.to(_double(W))
        bases = self._bases(X)
        return folded(chain, X, identities(chain, X) if bases is None else bases, self.triv)

    def _base_of(self, base: Tensor, W: Tensor) -> Tensor:
        """Return bases as the buffer holds them."""
        return _as_reals(base).to(at_least_single(W).dtype.to_real())

    def chain_or_raise(self) -> Chain:
        """Return the chain of the kernel's factors.

        Raises:
            RuntimeError: before registration.
        """
        self._registered()
        assert self.chain is not None
        return self.chain

    def _geometry_of(self, W: Tensor) -> Geometry:
        """Return the geometry of a first weight, as it will be.

        Raises:
            ValueError: if there is none.
        """
        size = tuple(W.shape)
        geometry = Geometry.of_weight(size, W.is_complex(), self.stride, self.groups, self.placement, None)
        taps = Chain.of(geometry, self.between_walls).taps
        return replace(geometry, size=(*size[:2], *taps))

    def _check(self, W: Tensor) -> Chain:
        """Raise what is wrong with a weight, before anything is changed; return its chain."""
        check_dtype("the weight", W)
        if self.geometry is None:
            chain = Chain.of(self._geometry_of(W), self.between_walls)
            if W.is_leaf and W.grad is not None:
                raise ValueError(
                    "the weight should have no gradient, since the generator has another shape: "
                    "call zero_grad(set_to_none=True) before. Found one"
                )
        else:
            chain = self.chain_or_raise()
            sizes = {self.geometry.size, self._size}
            if tuple(W.shape) not in sizes:
                allowed = " or ".join(map(str, sorted(sizes)))
                raise ValueError(f"the weight should be of size {allowed}. Found {tuple(W.shape)}")
        if not self.has_base and any(rows != columns for rows, columns in chain.coins):
            raise ValueError(
                "base=False should only be used where all coins are square: other matrices have no "
                f"logarithm. Found coins of sizes {chain.coins}"
            )
        if self._reference is not None and W.dtype != self._reference.dtype:
            raise TypeError(f"the weight should be of dtype {self._reference.dtype}. Found {W.dtype}")
        check_finite("the weight", W)
        return chain

    # The other verbs of a manifold

    @torch.no_grad()
    def in_manifold(self, W: Tensor, eps: float = 1e-4) -> bool:
        """Return True if ``W`` is a kernel of the family, to ``eps`` in each entry.

        Raises:
            RuntimeError: before registration.
        """
        geometry, reference = self._registered()
        same = tuple(W.shape) == geometry.size and W.is_complex() == reference.is_complex()
        return same and self._is_of(self.chain_or_raise(), W, eps)

    def _is_of(self, chain: Chain, W: Tensor, eps: float) -> bool:
        X, base = self._read(chain, W)
        error = kernel(chain, factors(chain, X, base, self.triv)) - _fitting(W, chain)
        return bool(error.abs().amax() <= eps)

    @torch.no_grad()
    def sample(self, distribution: str = "uniform", init_: Any = None) -> Tensor:
        r"""Return a random orthogonal kernel of the family, to be assigned to the weight.

        - ``"uniform"``: every factor is drawn from Haar's measure.
        - ``"torus"``: coins are ``triv`` of skew matrices with angles drawn by ``init_``, on the diagonal
          or, for real kernels, in ``2 x 2`` blocks; pairs rotate each channel of one half with one of the
          other by such an angle.
        - ``"identity"``, or near it: ``triv`` of generators that ``init_`` draws, with bases of one.

        Args:
            distribution: one of these.
            init_: fills a tensor of one axis in place: for ``"torus"`` the angles (default: uniform on
                ``[-pi, pi]``); for ``"identity"`` the generator (default: zero).

        Raises:
            RuntimeError: before registration.
            ValueError: if there is no such distribution.
        """
        _, reference = self._registered()
        chain, like = self.chain_or_raise(), at_least_single(reference)
        known = ("uniform", "torus", "identity")
        if distribution not in known:
            raise ValueError(f"distribution should be one of {known}. Found {distribution!r}")
        if init_ is not None and distribution == "uniform":
            raise ValueError('init_ should be None with distribution="uniform", which does not use it')
        m, sizes = chain.channels, chain.coins
        pairs = like.new_empty(chain.groups, chain.pairs, m, m)
        if distribution == "identity":
            X = like.new_zeros(chain.groups * chain.numbers)
            if init_ is not None:
                init_(X)
            return kernel(chain, factors(chain, X, None, self.triv)).to(reference.dtype)
        squares = [like.new_empty(chain.groups, max(size), max(size)) for size in sizes]
        if distribution == "uniform":
            squares, pairs = [*map(haar, squares)], haar(pairs)
        else:
            apply = maps.trivialization(self.triv)
            squares = [apply(maps.skew_of_angles(square, init_)) for square in squares]
            angles = torch.empty_like(pairs.real[..., : m // 2, 0])
            maps.fill_angles(angles, init_)
            K = F.pad(torch.diag_embed(angles), (0, 0, 0, m % 2)).to(like.dtype)
            pairs = apply(skew(chain.skew_pairs(K)))
        coins = [Q[:, :rows, :columns] for Q, (rows, columns) in zip(squares, sizes, strict=True)]
        W = kernel(chain, Factors(tuple(coins), pairs))
        return W.to(reference.dtype)

    # Being a module

    def extra_repr(self) -> str:
        """Say what ``print(conv)`` says of the parametrization."""
        size = [] if self.geometry is None else [str(self.geometry.size)]
        walls = ["between_walls=True"] if self.between_walls else []
        rest = [f"triv={maps.name(self.triv)}", f"base={self.has_base}"]
        return ", ".join([*size, *self.options(), *walls, *rest])

    def signature(self) -> dict[str, str]:
        """Return the settings that a checkpoint must match."""
        geometry, _ = self._registered()
        words = {
            "method": "split",
            "domain": "any",
            "taps": signature.by_axis(geometry.taps),
            **({"triv": self.triv} if isinstance(self.triv, str) else {}),
        }
        return {**words, **self.context}

    def _projected(self, buffer: Tensor) -> Tensor:
        geometry, _ = self._registered()
        bases = self.chain_or_raise().bases(_as_complex(buffer) if geometry.is_complex else buffer)
        return _as_reals(join_bases([polar(B) for B in bases]))

    def _loaded_or_moved(self, moved: bool) -> None:
        """Forget what was given: it may be of another dtype, or on another device."""
        self.given.forget()


def _double(W: Tensor) -> torch.dtype:
    return torch.complex128 if W.is_complex() else torch.float64


def _as_reals(numbers: Tensor) -> Tensor:
    return torch.view_as_real(numbers).flatten(1) if numbers.is_complex() else numbers


def _as_complex(reals: Tensor) -> Tensor:
    return torch.view_as_complex(reals.unflatten(1, (-1, 2)))


def _fitting(W: Tensor, chain: Chain) -> Tensor:
    """Return a weight without the last tap of an even kernel that is to be between walls."""
    for axis, k in enumerate(chain.taps, start=2):
        W = W.narrow(axis, 0, k)
    return W
