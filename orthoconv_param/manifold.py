"""`OrthogonalKernels`: the orthogonal kernels on a domain as a manifold, for geoopt.

A kernel is a point if its matrices ``Q(w)`` at the frequencies of the domain have orthonormal columns
(rows, if they are wide). The metric is that of the operators, as dense matrices: with
``N = prod(domain) / prod(stride)``,

    <U, V> = N Re sum conj(U) * V    for as many rows as columns,

and for frames (rectangular ones) that of the shortest skew lifts ``A Q = V``,
``|A|^2 = |Q^H V|^2 + 2 |V - Q Q^H V|^2``, in which geodesics are ``exp(A) Q``. A batch of kernels is
computed as the groups of one convolution.

The module needs geoopt, which is imported with it.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

try:
    from geoopt import Manifold, ManifoldTensor
    from geoopt.utils import size2shape
except ImportError as error:  # pragma: no cover
    raise ImportError('manifold needs geoopt: pip install "orthoconv_param[geoopt]"') from error

from .checks import HALF, Size, count, per_axis
from .functional import identity
from .matrices import maps
from .matrices.expm import expm_skew
from .matrices.unitary import haar, log_unitary, polar, polar_frame, polish
from .torus.lattice import Lattice

__all__ = ["OrthogonalKernels"]

_LONGEST_ITERATION = 500
_REVERSIBLE = ("expm", "cayley", "polar")  # maps with R(-A) = R(A)^-1


class OrthogonalKernels(Manifold):
    """The manifold of kernels that are orthogonal (complex: unitary) on periodic images of a size.

    A kernel is a point if its matrices have ``Q^H Q = I`` at each frequency of the domain (``Q Q^H = I`` if
    they are wide). Rectangular ones are called frames. Points and tangent vectors are kernels
    ``(..., out, in/groups, *domain)``, real or complex. `functional.nearest_orthogonal` and
    `ConvExponential` make such kernels, ``functional.spectral_conv`` applies them. The axes before ``out``
    are a batch. Methods treat its kernels one by one, and batches broadcast. Their formulas are those of
    the matrices at each frequency (of wide ones: of the adjoints).

    Args:
        domain: a tuple, one size for each axis.
        stride: of the convolution.
        groups: of the convolution.
        retraction: the map along which optimizers step: ``"expm"`` (geodesics), ``"cayley"``, ``"polar"``
            or ``"qr"``. All but ``"qr"`` are of second order, and `reversible`.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    The metric is that of the operators as dense matrices. Its gradient is ``1/N`` of the kernel's projected
    gradient, where ``N = prod(domain) / prod(stride)``. So ``RiemannianSGD`` needs ``N`` times the learning
    rate of ``SGD``. ``RiemannianAdam`` takes steps of length ``lr`` in the metric.

    geoopt's samplers accept the manifold if it is `reversible`; ``RHMC`` takes real kernels only. They
    measure momenta by the kernel's numbers, not by this metric. If ``log_prob`` is constant they draw
    uniformly, from the component in which they start. Otherwise they draw from ``exp(log_prob)``, up to an
    error that vanishes with the step, only for real square matrices, and only by ``RSGLD`` given
    ``log_prob / N``, or by ``RHMC`` if ``N = 1``.

    Cost: for a step, the exponential (or another retraction's map) of ``m x m`` matrices,
    ``m = max(out, in)``, and the transforms of some ten kernels.

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
        maps.retraction(retraction)  # raises if there is none
        self.retraction = retraction
        self.ndim = 2 + len(self.domain)

    @property
    def reversible(self) -> bool:
        """Return True if the step back undoes a step: for every retraction but ``"qr"``.

        If ``y, v = retr_transp(x, u, u)``, then ``retr_transp(y, -v, v)`` is ``x, u``, for frames as for
        square matrices.
        """
        return self.retraction in _REVERSIBLE

    # Points

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest orthogonal kernel, whose matrices are the polar factors of those of ``x``."""
        lattice, (X,), shape = self._spectra(x)
        # geoopt's ProductManifold makes a view of it
        return self._kernel(lattice, lattice.choose(polar, X), shape, x.dtype).contiguous()

    def random(self, *size: int, dtype: Any = None, device: Any = None, **unused: Any) -> Tensor:
        """Draw kernels ``(..., out, in/groups, *domain)`` that are Haar distributed at each frequency."""
        like = torch.empty(self._shape_of(size), dtype=dtype, device=device)
        lattice = self._lattice(like.is_complex(), like.shape[: -self.ndim])
        rows, columns = self._blocks(like)
        m = max(rows, columns)
        matrices = torch.promote_types(like.dtype, torch.complex64)
        empty = like.new_empty(lattice.groups, lattice.frequencies, m, m, dtype=matrices)
        Q = lattice.choose(haar, empty)[..., :rows, :columns]
        return ManifoldTensor(self._kernel(lattice, Q, like.shape, like.dtype), manifold=self)

    def origin(self, *size: int, dtype: Any = None, device: Any = None, seed: Any = None) -> Tensor:
        """Return the identity's kernel; where channels differ, the identity matrix's first columns or rows.

        ``seed`` is not used.
        """
        shape = self._shape_of(size)
        options = {"stride": self.stride, "groups": self.groups, "dtype": dtype, "device": device}
        kernel = identity(shape[-self.ndim :], self.domain, **options)
        return ManifoldTensor(kernel.expand(shape).contiguous(), manifold=self)

    # Tangent vectors

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector at ``x`` nearest to ``u``: ``u - x sym(x^H u)``."""
        return self._of(lambda Q, U: U - Q @ _symmetric(Q.mH @ U), x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the gradient in the manifold's metric, ``(u - x u^H x) / 2N``, if ``u`` is torch's."""
        return self._of(lambda Q, U: (U - Q @ (U.mH @ Q)) / (2 * self._points), x, u)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return the inner product of tangent vectors, ``u`` with itself by default.

        Returns:
            One number for each kernel of the batch; ``keepdim`` keeps a kernel's axes, of size 1.
        """
        x, u, v = self._alike(x, u, u if v is None else v)
        return self._sum(u.conj() * self._lifted(x, v), keepdim)

    def _lifted(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the vector ``w`` with ``inner(x, u, v) = Re sum(conj(u) * w)`` for every ``u``."""
        rows, columns = self._blocks(x)
        lifted = v if rows == columns else self._of(lambda Q, V: 2 * V - Q @ (Q.mH @ V), x, v)
        return self._points * lifted

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return ``y x^H v`` for square matrices, an isometry; for frames, `proju` of ``v`` at ``y``.

        `retr_transp`, which knows the step from ``x`` to ``y``, is an isometry for frames too.
        """
        x, y, v = self._alike(x, y, v)
        rows, columns = self._blocks(x)
        if rows != columns:
            return self.proju(y, v)
        return self._of(lambda X, Y, V: Y @ (X.mH @ V), x, y, v)

    # Curves

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``R(A) x`` with the chosen retraction ``R``, and the least skew ``A`` with ``A x = u``."""
        return self._of(lambda Q, U: maps.retract(self.retraction, Q, U), x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the geodesic ``exp(A) x`` from ``x`` with velocity ``u = A x``, at time 1."""
        return self._of(lambda Q, U: maps.retract("expm", Q, U), x, u)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point ``R(A) x`` of `retr`, and ``v`` transported isometrically: ``R(A) v``."""
        return self._turned(self.retraction, x, u, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point ``exp(A) x`` of `expmap`, and ``v`` transported isometrically: ``exp(A) v``."""
        return self._turned("expm", x, u, v)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the vector of `retr_transp`."""
        return self.retr_transp(x, u, v)[1]

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the vector of `expmap_transp`."""
        return self.expmap_transp(x, u, v)[1]

    def _turned(self, name: str, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, moved = self._each_of(lambda Q, U, V: _turn(name, Q, U, V), x, u, v)
        return y, moved

    @torch.no_grad()
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the velocity of a shortest geodesic from ``x`` to ``y``.

        Where that is unique, this is the inverse of `expmap`. For frames, an iteration finds a geodesic:
        the shortest one if they are near to each other. Not differentiable; `dist` and `dist2` are.

        Raises:
            ValueError: if no geodesic connects them: real kernels whose determinants differ in sign at a
                frequency equal to its own negative; or if, for frames that are far from each other, none is
                found. One such pair in a batch is enough.
        """
        lattice, (X, Y), shape = self._spectra(x, y)
        if X.shape[-2] < X.shape[-1]:
            V = lattice.each(lambda P, Q: _log(P.mH, Q.mH).mH, X, Y)
        else:
            V = lattice.each(_log, X, Y)
        return self._kernel(lattice, V, shape, x.dtype)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the square of `dist`. Its gradient in this metric is ``-2 logmap``; it has no Hessian."""
        value, slope = self._squared(x, y, keepdim)
        return value + slope - slope.detach()

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of `logmap`'s geodesic; ``|log(x^H y)|`` of the dense matrices, if square.

        Its gradient is that of ``dist2`` over ``2 dist``, and 0 at distance 0.

        Returns:
            One number for each pair of the batch, as `inner` returns them: infinite if no geodesic
            connects the pair.

        Raises:
            ValueError: as `logmap`, if a geodesic is not found.
        """
        value, slope = self._squared(x, y, keepdim)
        length = value.sqrt()
        change = torch.where(length > 0, (slope - slope.detach()) / (2 * length).clamp(min=1e-30), 0)
        return length + change

    def _squared(self, x: Tensor, y: Tensor, keepdim: bool) -> tuple[Tensor, Tensor]:
        """Return the squared distance, and a function of ``x`` and ``y`` that has its derivatives."""
        here, there = self._alike(*(z.detach().as_subclass(Tensor) for z in (x, y)))
        connected = self._connected(here, there)
        # pairs that no geodesic connects are replaced by pairs at distance 0
        there = torch.where(self._kept(connected), there, here)
        connected = self._kept(connected) if keepdim else connected
        u = self.logmap(here, there)
        value = torch.where(connected, self.inner(here, u, keepdim=keepdim), torch.inf)
        slope = torch.zeros_like(value)
        for z, base, other in ((x, here, there), (y, there, here)):
            if z.requires_grad and torch.is_grad_enabled():
                v = u if z is x else self.logmap(base, other)
                moved = self._lifted(base, v).conj() * z.as_subclass(Tensor)
                slope = slope - 2 * torch.where(connected, self._sum(moved, keepdim), 0)
        return value, slope

    def _connected(self, x: Tensor, y: Tensor) -> Tensor:
        """Return a truth value for each pair of the batch: True if a geodesic connects it.

        Only real square matrices have several components, told apart by the sign of the determinant.
        """
        lattice, (X, Y), shape = self._spectra(x, y)
        batch = shape[: -self.ndim]
        if x.is_complex() or X.shape[-2] != X.shape[-1]:
            return torch.ones(batch, dtype=torch.bool, device=x.device)
        return (lattice.each(_side, X, Y).real > 0).reshape(*batch, -1).all(-1)

    # Checks

    def _check_shape(self, shape: Size, name: str) -> tuple[bool, str | None]:
        ok = len(shape) >= self.ndim and tuple(shape[2 - self.ndim :]) == self.domain and 0 not in shape
        if ok and shape[-self.ndim] % self.groups == 0:
            return True, None
        groups = f" with out divisible by {self.groups}" if self.groups > 1 else ""
        expected = f"(..., out, in/groups, {', '.join(map(str, self.domain))}){groups}"
        return False, f"`{name}` should have shape {expected}. Found {tuple(shape)}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        _, (Q,), _ = self._spectra(x)
        Q = Q if Q.shape[-2] >= Q.shape[-1] else Q.mH
        largest = (Q.mH @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().max().item()
        ok = largest <= atol + rtol + _rounding(x)
        return (True, None) if ok else (False, f"`Q^H Q != I` by {largest:.1e}")

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        _, (Q, U), shape = self._spectra(x, u)
        product = Q.mH @ U if Q.shape[-2] >= Q.shape[-1] else U @ Q.mH
        each = prod(shape[: -self.ndim])  # a long vector of the batch does not excuse another one
        defect, size = (M.reshape(each, -1).abs().amax(-1) for M in (_symmetric(product), product))
        ok = bool((defect <= atol + _rounding(u) + rtol * size).all())
        return (True, None) if ok else (False, f"`Q^H u + u^H Q != 0` by {2 * defect.max().item():.1e}")

    def extra_repr(self) -> str:
        """Return the options as text, for ``print``."""
        details = [f"domain={self.domain}", f"retraction={self.retraction!r}"]
        details += [f"stride={self.stride}"] if max(self.stride) > 1 else []
        details += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join(details)

    # Kernels and their matrices

    @property
    def _points(self) -> int:
        return prod(self.domain) // prod(self.stride)

    def _lattice(self, is_complex: bool, batch: Size = ()) -> Lattice:
        """Return the torus, with the kernels of a batch as the groups of one convolution."""
        return Lattice(self.domain, self.stride, prod(batch) * self.groups, is_complex)

    def _blocks(self, x: Tensor) -> Size:
        """Return the size of a kernel's matrix, of one group, at each frequency."""
        return self._lattice(x.is_complex()).blocks(x.shape[-self.ndim :])

    def _shape_of(self, size: tuple[Any, ...]) -> Size:
        shape = tuple(size2shape(*size))
        self._assert_check_shape(shape, "x")
        return shape

    def _alike(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Broadcast the batches of points and vectors.

        Raises:
            ValueError: if they are not kernels of one size and dtype.
            RuntimeError: if their batches do not broadcast.
        """
        self._assert_check_shape(tuple(x.shape), "x")
        for y in others:
            if y.shape[-self.ndim :] != x.shape[-self.ndim :] or y.dtype != x.dtype:
                alike, found = (f"{tuple(z.shape)}, {z.dtype}" for z in (x, y))
                raise ValueError(f"points and vectors should be alike: {alike}. Found {found}")
        return tuple(torch.broadcast_tensors(x, *others))

    def _spectra(self, *kernels: Tensor) -> tuple[Lattice, list[Tensor], Size]:
        """Return the torus of points and vectors, the matrices of each of them, and their common shape.

        The matrices are ``(batch * groups, frequencies, out/groups, in/groups * s^d)``.
        """
        kernels = self._alike(*kernels)
        shape = tuple(kernels[0].shape)
        lattice = self._lattice(kernels[0].is_complex(), shape[: -self.ndim])
        return lattice, [lattice.spectrum(_plain(x).flatten(0, -self.ndim)) for x in kernels], shape

    def _kernel(self, lattice: Lattice, matrices: Tensor, shape: Size, dtype: torch.dtype) -> Tensor:
        """Return the kernels of `_spectra`'s matrices."""
        return lattice.kernel(matrices).reshape(shape).to(dtype)

    def _of(self, function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """Return the kernel of a function of matrices, which sees wide ones as their adjoints."""
        return self._each_of(lambda *matrices: (function(*matrices),), x, *others)[0]

    def _each_of(
        self, function: Callable[..., tuple[Tensor, ...]], x: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the kernels of a function with several values, as `_of`."""
        lattice, matrices, shape = self._spectra(x, *others)
        if matrices[0].shape[-2] >= matrices[0].shape[-1]:
            values = function(*matrices)
        else:
            values = tuple(M.mH for M in function(*(M.mH for M in matrices)))
        return tuple(self._kernel(lattice, M, shape, x.dtype) for M in values)

    # One number for each kernel

    def _sum(self, x: Tensor, keepdim: bool) -> Tensor:
        return x.sum(tuple(range(-self.ndim, 0)), keepdim=keepdim).real

    def _kept(self, numbers: Tensor) -> Tensor:
        """Return numbers of kernels with the axes of a kernel, of size 1."""
        return numbers.reshape(*numbers.shape, *(1,) * self.ndim)


def _plain(x: Tensor) -> Tensor:
    """Return a tensor of torch's own class, with torch's own functions, in single precision at least."""
    return x.as_subclass(Tensor).to(torch.promote_types(x.dtype, torch.float32))


def _rounding(x: Tensor) -> float:
    """Return a bound on the rounding error of storing kernels in half precision; 0 in other dtypes."""
    return 4 * torch.finfo(x.dtype).eps if x.dtype in HALF else 0.0


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mH) / 2


def _turn(name: str, Q: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``R(A) Q`` and ``R(A) V`` of the retraction of that name, where ``A Q = U``.

    ``R(A)`` is unitary: the second is tangent at the first, and as long as ``V``. There ``R(A) U`` has the
    lift ``R(A) A R(A)^H``, which is ``A`` where ``R(A)`` commutes with it; the step back is then ``R(-A)``.
    """
    R = maps.retraction(name).apply(maps.lift(Q, U))
    return polish(R @ Q), R @ V


def _side(X: Tensor, Y: Tensor) -> Tensor:
    """Return the determinant of ``X^H Y``, which is 1 or -1, of real matrices; of complex ones 1."""
    determinant = torch.linalg.det(X.mH @ Y)
    return torch.ones_like(determinant) if X.is_complex() else determinant


def _log(X: Tensor, Y: Tensor) -> Tensor:
    """Return the velocity at time 0 of the geodesic from ``X`` to ``Y`` that is at ``Y`` at time 1."""
    if X.shape[-2] == X.shape[-1]:
        return X @ log_unitary(X.mH @ Y)
    return _log_frames(X, Y)


def _log_frames(X: Tensor, Y: Tensor) -> Tensor:
    """Compute `_log` of frames, by Zimmermann's iteration (SIAM J. Matrix Anal. Appl. 38 (2017) 322).

    In the basis of ``X`` and of a complement ``Z`` of it that contains ``Y``, a unitary matrix whose first
    columns are those of ``Y`` has the logarithm ``[[A, -B^H], [B, C]]``. Its other columns are free: they
    are turned by ``exp(-C)`` until ``C`` is zero.

    Raises:
        ValueError: if the iteration does not converge, as between frames that are far from each other.
    """
    k = X.shape[-1]
    Z = polar_frame(X)[..., k:]
    if Z.shape[-1] > k:
        Z = Z @ polar_frame(Z.mH @ Y)[..., :k]
    W = polar_frame(torch.cat([X.mH @ Y, Z.mH @ Y], -2))
    # at first the other columns are turned to be as near to the identity as possible
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
