r"""`OrthogonalKernels`: the orthogonal kernels on a domain as a manifold, for geoopt's optimizers.

A kernel is a point if its matrices ``Q(w)`` at the frequencies of the domain have orthonormal columns
(rows, if they are wide). The metric is that of the operators, as dense matrices: with ``N`` coarse points,

    <U, V> = N Re sum conj(U) * V    for as many rows as columns,

and for frames that of the shortest skew lifts ``A Q = V``, ``|A|^2 = |Q^H V|^2 + 2 |V - Q Q^H V|^2``, in
which geodesics are ``exp(A) Q``. It needs geoopt, which is imported with this module.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

try:
    from geoopt import Manifold, ManifoldTensor
    from geoopt.utils import size2shape
except ImportError as error:  # pragma: no cover
    raise ImportError('manifold needs geoopt: pip install "orthoconv_param[geoopt]"') from error

from . import trivializations
from .exponential import HALF, expm_skew, log_unitary, polar_frame
from .functional import identity, polar
from .lattice import Lattice, Size, count, per_axis
from .parametrization import haar
from .trivializations import retract

__all__ = ["OrthogonalKernels"]

_LONGEST_ITERATION = 500


class OrthogonalKernels(Manifold):
    r"""Kernels whose convolution is orthogonal (complex: unitary) on periodic images of one size.

    .. math:: Q(\omega)^H Q(\omega) = I \text{ at each frequency } \omega \text{ of the domain}

    (``Q Q^H = I`` if they take more channels than they give.) Points and tangent vectors are kernels
    ``(out, in/groups, *domain)``, real or complex, as ``functional`` returns them and as
    `ConvExponential` makes them; ``functional.spectral_conv`` applies them.

    Args:
        domain: a tuple, one size for each axis.
        stride: of the convolution.
        groups: of the convolution.
        retraction: ``"expm"`` (geodesics), ``"cayley"``, ``"polar"`` or ``"qr"``: what optimizers step
            along. All but ``"qr"`` are of second order.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    The metric is that of the operators as dense matrices, whose gradient is ``1/N`` of the projected
    gradient of the kernel, ``N`` the points of the domain over the stride: in ``RiemannianSGD`` a learning
    rate of ``N * lr`` is what ``lr`` is in ``SGD``; ``RiemannianAdam`` moves by ``lr``, in the metric.

    Cost: of a step, the exponential (or what replaces it) of ``m x m`` matrices, ``m = max(out, in)``, and
    the transforms of some ten kernels.

    Example:
        >>> import geoopt
        >>> import torch
        >>> from orthoconv_param import functional, manifold
        >>> kernels = manifold.OrthogonalKernels((8, 8))
        >>> _ = torch.manual_seed(0)
        >>> target = kernels.random(4, 4, 8, 8)
        >>> weight = geoopt.ManifoldParameter(kernels.origin(4, 4, 8, 8), manifold=kernels)
        >>> optimizer = geoopt.optim.RiemannianSGD([weight], lr=32.0)
        >>> x = torch.randn(16, 4, 8, 8)
        >>> y = functional.spectral_conv(x, target)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss = (functional.spectral_conv(x, weight) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> kernels.check_point_on_manifold(weight)
        True
    """

    name = "OrthogonalKernels"
    reversible = False

    def __init__(
        self, domain: Size, *, stride: int | Size = 1, groups: int = 1, retraction: str = "expm"
    ) -> None:
        super().__init__()
        if not isinstance(domain, (tuple, list)):
            raise TypeError(f"domain should be a tuple, one size for each axis. Found {domain!r}")
        self.domain = per_axis("domain", domain)
        self.stride = per_axis("stride", stride, len(self.domain))
        if any(n % s for n, s in zip(self.domain, self.stride, strict=True)):
            raise ValueError(f"domain={self.domain} should be divisible by the stride. Found {self.stride}")
        self.groups = count("groups", groups)
        trivializations.retraction(retraction)  # that there is one
        self.retraction = retraction
        self.ndim = 2 + len(self.domain)

    # Points

    def projx(self, x: Tensor) -> Tensor:
        """The nearest orthogonal kernel, whose matrices are the polar factors of those of ``x``."""
        lattice, X = self._spectrum(x)
        return lattice.kernel(polar(X, lattice)).to(x.dtype)

    def random(self, *size: int, dtype: Any = None, device: Any = None, **unused: Any) -> Tensor:
        """A kernel ``(out, in/groups, *domain)`` that is Haar distributed at each frequency."""
        lattice, shape = self._lattice_of(size, dtype)
        rows, columns = lattice.blocks(shape)
        m = max(rows, columns)
        like = torch.empty(shape, dtype=dtype, device=device)
        matrices = torch.promote_types(like.dtype, torch.complex64)
        empty = like.new_empty(self.groups, lattice.frequencies, m, m, dtype=matrices)
        Q = lattice.choose(haar, empty)[..., :rows, :columns]
        return ManifoldTensor(lattice.kernel(Q).to(like.dtype), manifold=self)

    def origin(self, *size: int, dtype: Any = None, device: Any = None, seed: Any = None) -> Tensor:
        """The identity; where channels differ, the first columns of it. ``seed`` is not needed."""
        _, shape = self._lattice_of(size, dtype)
        kernel = identity(
            shape, self.domain, stride=self.stride, groups=self.groups, dtype=dtype, device=device
        )
        return ManifoldTensor(kernel, manifold=self)

    # Tangent vectors

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector at ``x`` nearest to ``u``: ``u - Q sym(Q^H u)``."""
        return self._of(lambda Q, U: U - Q @ _symmetric(Q.mH @ U), x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The gradient in the manifold's metric, ``(u - Q u^H Q) / 2N``, where ``u`` is that in torch's."""
        return self._of(lambda Q, U: (U - Q @ (U.mH @ Q)) / (2 * self._points), x, u)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """The inner product of tangent vectors; one number, ``keepdim`` with as many axes as a kernel."""
        product = (u.conj() * self._lifted(x, u if v is None else v)).sum().real
        return self._shaped(product, x, keepdim)

    def _lifted(self, x: Tensor, v: Tensor) -> Tensor:
        """The metric as a map: what is to be multiplied, number by number, with the other vector."""
        rows, columns = self._lattice(x).blocks(x.shape)
        lifted = v if rows == columns else self._of(lambda Q, V: 2 * V - Q @ (Q.mH @ V), x, v)
        return self._points * lifted

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """``Q_y Q_x^H v``, an isometry, for as many rows as columns; of frames the projection on ``y``."""
        rows, columns = self._lattice(x).blocks(x.shape)
        if rows != columns:
            return self.proju(y, v)
        return self._of(lambda X, Y, V: Y @ (X.mH @ V), x, y, v)

    # Curves

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The retraction that was chosen."""
        return self._of(lambda Q, U: retract(self.retraction, Q, U), x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic ``exp(A) Q`` from ``x`` with velocity ``u``, at time 1."""
        return self._of(lambda Q, U: retract("expm", Q, U), x, u)

    @torch.no_grad()
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The velocity of a shortest geodesic from ``x`` to ``y``: `expmap`'s inverse where that is unique.

        Of frames it is that of a geodesic which an iteration finds: the shortest one if they are near to
        each other. Not differentiable; `dist` and `dist2` are.

        Raises:
            ValueError: if no geodesic connects them: real kernels whose determinants differ in sign at a
                frequency equal to its own negative; or if, for frames that are far from each other, none is
                found.
        """
        lattice, X = self._spectrum(x)
        Y = self._matrices(lattice, x, y)
        if X.shape[-2] < X.shape[-1]:
            return lattice.kernel(lattice.each(lambda P, Q: _log(P.mH, Q.mH).mH, X, Y)).to(x.dtype)
        return lattice.kernel(lattice.each(_log, X, Y)).to(x.dtype)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The square of `dist`. Its gradient in this metric is ``-2 logmap``; it has no second one."""
        value, slope = self._squared(x, y)
        return self._shaped(value + slope - slope.detach(), x, keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The length of the geodesic of `logmap`; ``|log(Q_x^H Q_y)|`` of the dense matrices, if square.

        Infinite between points that none connects. Raises as `logmap` where it is not found. Its gradient
        is that of ``dist2`` over ``2 dist``, and 0 at distance 0.
        """
        value, slope = self._squared(x, y)
        length = value.sqrt()
        change = torch.where(length > 0, (slope - slope.detach()) / (2 * length).clamp(min=1e-30), 0)
        return self._shaped(length + change, x, keepdim)

    def _squared(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The squared distance, and a function of ``x`` and ``y`` that has its derivatives."""
        here, there = (z.detach().as_subclass(Tensor) for z in (x, y))
        slope = torch.zeros((), dtype=here.real.dtype, device=here.device)
        try:
            u = self.logmap(here, there)
        except ValueError as error:
            if "determinant" not in str(error):
                raise
            return torch.full_like(slope, torch.inf), slope
        for z, base, other in ((x, here, there), (y, there, here)):
            if z.requires_grad and torch.is_grad_enabled():
                v = u if z is x else self.logmap(base, other)
                moved = z.as_subclass(Tensor)
                slope = slope - 2 * (self._lifted(base, v).conj() * moved).sum().real
        return self.inner(here, u), slope

    def _shaped(self, value: Tensor, x: Tensor, keepdim: bool) -> Tensor:
        return value.reshape((1,) * x.ndim) if keepdim else value

    # Checks

    def _check_shape(self, shape: Size, name: str) -> tuple[bool, str | None]:
        ok = len(shape) == self.ndim and tuple(shape[2:]) == self.domain and 0 not in shape
        if ok and shape[0] % self.groups == 0:
            return True, None
        groups = f", out divisible by {self.groups}" if self.groups > 1 else ""
        return False, f"`{name}` should be (out, in/groups, *{self.domain}){groups}. Found {tuple(shape)}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        _, Q = self._spectrum(x)
        Q = Q if Q.shape[-2] >= Q.shape[-1] else Q.mH
        largest = (Q.mH @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().max().item()
        ok = largest <= atol + rtol + _rounding(x)
        return (True, None) if ok else (False, f"`Q^H Q != I` by {largest:.1e}")

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        lattice, Q = self._spectrum(x)
        U = self._matrices(lattice, x, u)
        product = Q.mH @ U if Q.shape[-2] >= Q.shape[-1] else U @ Q.mH
        largest = _symmetric(product).abs().max().item()
        ok = largest <= atol + _rounding(u) + rtol * product.abs().max().item()
        return (True, None) if ok else (False, f"`Q^H u + u^H Q != 0` by {2 * largest:.1e}")

    def extra_repr(self) -> str:
        """What ``print`` says of it."""
        details = [f"domain={self.domain}", f"retraction={self.retraction!r}"]
        details += [f"stride={self.stride}"] if max(self.stride) > 1 else []
        details += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join(details)

    # Kernels and their matrices

    @property
    def _points(self) -> int:
        return prod(self.domain) // prod(self.stride)

    def _lattice(self, x: Tensor) -> Lattice:
        return Lattice(self.domain, self.stride, self.groups, x.is_complex())

    def _lattice_of(self, size: tuple[Any, ...], dtype: Any) -> tuple[Lattice, Size]:
        shape = tuple(size2shape(*size))
        self._assert_check_shape(shape, "x")
        return self._lattice(torch.empty(0, dtype=dtype)), shape

    def _spectrum(self, x: Tensor) -> tuple[Lattice, Tensor]:
        self._assert_check_shape(tuple(x.shape), "x")
        lattice = self._lattice(x)
        return lattice, lattice.spectrum(_plain(x))

    def _matrices(self, lattice: Lattice, x: Tensor, u: Tensor) -> Tensor:
        if u.shape != x.shape or u.dtype != x.dtype:
            alike, found = (f"{tuple(z.shape)}, {z.dtype}" for z in (x, u))
            raise ValueError(f"points and vectors should be alike: {alike}. Found {found}")
        return lattice.spectrum(_plain(u))

    def _of(self, function: Any, x: Tensor, *others: Tensor) -> Tensor:
        """The kernel of a function of matrices, which sees wide ones as their adjoints."""
        lattice, X = self._spectrum(x)
        matrices = [X, *(self._matrices(lattice, x, y) for y in others)]
        if X.shape[-2] >= X.shape[-1]:
            return lattice.kernel(function(*matrices)).to(x.dtype)
        return lattice.kernel(function(*(M.mH for M in matrices)).mH).to(x.dtype)


def _plain(x: Tensor) -> Tensor:
    """Of torch's own class, whose functions then are torch's own; in single precision at least."""
    return x.as_subclass(Tensor).to(torch.promote_types(x.dtype, torch.float32))


def _rounding(x: Tensor) -> float:
    """What storing kernels in half precision takes away from them."""
    return 4 * torch.finfo(x.dtype).eps if x.dtype in HALF else 0.0


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mH) / 2


def _log(X: Tensor, Y: Tensor) -> Tensor:
    """The velocity at time 0 of the geodesic from ``X`` to ``Y`` that is at ``Y`` at time 1."""
    if X.shape[-2] == X.shape[-1]:
        return X @ log_unitary(X.mH @ Y)
    return _log_frames(X, Y)


def _log_frames(X: Tensor, Y: Tensor) -> Tensor:
    """`_log` of frames, by Zimmermann's iteration (SIAM J. Matrix Anal. Appl. 38 (2017) 322).

    In the basis of ``X`` and of a complement ``Z`` of it that contains ``Y``, a unitary matrix whose first
    columns are those of ``Y`` has the logarithm ``[[A, -B^H], [B, C]]``. Its other columns are free: they
    are turned by ``exp(-C)`` until ``C`` is zero.

    Raises:
        ValueError: if that does not converge, as between frames that are far from each other.
    """
    k = X.shape[-1]
    Z = polar_frame(X)[..., k:]
    if Z.shape[-1] > k:
        Z = Z @ polar_frame(Z.mH @ Y)[..., :k]
    W = polar_frame(torch.cat([X.mH @ Y, Z.mH @ Y], -2))
    # at first they are turned to be as near to the identity as possible
    U, _, Vh = torch.linalg.svd(W[..., k:, k:])
    turned = W[..., k:] @ (Vh.mH @ U.mH)
    if not W.is_complex():  # by a rotation
        sign = torch.linalg.det(torch.cat([W[..., :k], turned], -1)).sign()
        U = torch.cat([U[..., :-1], U[..., -1:] * sign[..., None, None]], -1)
        turned = W[..., k:] @ (Vh.mH @ U.mH)
    W = torch.cat([W[..., :k], turned], -1)
    batch, tolerance = W.shape[:-2], 20 * torch.finfo(X.dtype).eps * k
    W = W.flatten(0, -3)
    L, left = torch.empty_like(W), torch.arange(len(W), device=W.device)
    for _ in range(_LONGEST_ITERATION):
        L[left] = log_unitary(W[left])
        C = L[left, k:, k:]
        open_ = C.abs().amax((-2, -1)) >= tolerance
        left, C = left[open_], C[open_]
        if not len(left):
            L = L.unflatten(0, batch)
            return X @ L[..., :k, :k] + Z @ L[..., k:, :k]
        W[left, :, k:] = W[left, :, k:] @ expm_skew(-C)
    raise ValueError("no geodesic was found between these frames, which are far from each other")
