r"""`ConvExponential`: a convolution's weight as the exponential of a free skew generator.

On a lattice with spectra ``X`` (generator) and ``B`` (base), padded to ``m x m``,
``m = max(out, in)``,

    weight = B exp(skew(X)),    its first columns if ``out > in``,
    weight = exp(skew(X)) B,    its first rows    if ``out < in``,

at each frequency. ``exp`` may be another map from skew to unitary matrices.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from math import ceil, inf, isfinite, isqrt, log2
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from geotorch.exceptions import InManifoldError
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import trivializations
from .exponential import HALF, check_dtype, expm_frame, norm_bound, polar_frame, product, refine, skew
from .functional import polar, semi_orthogonal
from .lattice import Lattice, Placement, Size, count, pack, per_axis, sampling, unpack

# Norms are rounded up to these many levels per octave, so that K changes rarely, and below the
# smallest of them K stays, so that derivatives at zero are as exact as values.
_LEVELS_PER_OCTAVE = 4
_SMALLEST_LEVEL = 0.25
_SINGLE = (torch.float32, torch.complex64)
_SINGLE_TOL = 2e-7


class ConvExponential(nn.Module):
    r"""Parametrizes a convolution's weight by the exponential of a skew convolution.

    .. math:: \mathrm{weight} = \mathrm{base} \ast \exp(\mathrm{skew}(\mathrm{generator})), \qquad
              W(\omega)^H W(\omega) = I \text{ at each frequency } \omega \text{ of the domain}

    (``W W^H = I`` if it takes more channels than it gives). A kernel that is orthogonal on one grid
    is **far from orthogonal on a larger one**, so choose the domain by what the convolution is fed:

    - ``domain=None``: the kernel's own ``k x k`` grid. The weight keeps its shape. The operator is
      orthogonal on ``k x k`` images only.
    - ``domain=(H, W)``: periodic images of that size. The weight becomes a kernel of
      ``H x W`` taps, so register it with ``unsafe=True``.
    - ``domain="any"``: periodic images of every size, to ``tol``. The weight becomes a compact
      kernel of ``K x K`` taps, also with ``unsafe=True``; ``K`` follows the generator's norm. The
      existing ``k x k`` weight *is* the generator.

    The generator has the shape and dtype of the weight that it replaces. Any values are allowed (with
    ``"any"``, up to norms of several hundred, where ``K`` is 1000: beyond, use raises ``ValueError``). It
    holds the weight's Fourier coefficients on its own ``k x k`` grid (Hartley transform, or
    the unitary DFT of a complex weight), and stays the parameter that an optimizer already holds.

    Args:
        domain: None, a size, a tuple of sizes, or ``"any"``.
        stride: of the convolution. A parametrization sees the weight alone, so this and ``groups`` must be
            those of the convolution.
        groups: of the convolution.
        triv: ``"expm"``, ``"cayley"``, or a callable from skew-Hermitian ``(..., m, m)`` to unitary
            matrices, as geotorch's are. With ``domain="any"`` it must act on eigenvalues, as these do.
        base: whether the weight is a fixed orthogonal kernel times the exponential. Then assigning
            ``conv.weight = W`` sets the base, and ``geotorch.utils.update_base`` works. Default: True,
            except for ``"any"``, which has none. ``False`` (own grid, square kernels): the
            weight is the exponential itself, and assigning takes the logarithm.
        tol: for ``"any"``: bound on the operator's defect, at every size. Default: what the dtype can
            hold, 2e-7, in double precision 1e-12, in half precision 1e-4. A looser one is cheaper: ``K``
            is smaller, and less is computed in double precision (to 2e-7 all of it at norms above 1.6).

    Raises:
        TypeError, ValueError: for arguments that are not as above; on registration, if the weight
            is not a finite floating or complex convolution kernel, does not fit into the domain,
            or if ``stride`` or ``groups`` do not divide what they must. The module is then unchanged.
        geotorch.exceptions.InManifoldError: on assignment with ``base=False``, if the map
            does not reach the weight (as the exponential no determinant -1).

    Half precision is computed in single precision and rounded, which leaves a defect of about 3e-4
    (float16) and 2e-3 (bfloat16).

    Cost: for ``F`` frequencies, about ``3 F m^3`` complex multiplications forward and ``7 F m^3``
    backward at norms up to 1 (see `expm_skew`). ``F`` is half of ``k^2``, or of ``K^2``: with ``"any"``
    no image size appears; on a given domain, in single precision, in products with the base only, as
    long as ``K`` is the smaller.

    Source: Magnasco, arXiv:2302.07396; trivializations: Lezcano-Casado, arXiv:1909.09501.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from orthoconv_param import ConvExponential, orthogonality_defect
        >>> conv = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular").double()
        >>> _ = register_parametrization(conv, "weight", ConvExponential())
        >>> conv.weight.shape
        torch.Size([4, 4, 3, 3])
        >>> orthogonality_defect(conv.weight, domain=3) < 1e-12
        True
        >>> orthogonality_defect(conv.weight, domain=32) > 0.1  # larger images: not at all
        True

        At every size:

        >>> conv = nn.Conv2d(4, 4, 3).double()
        >>> _ = register_parametrization(conv, "weight", ConvExponential("any"), unsafe=True)
        >>> all(orthogonality_defect(conv.weight, domain=n) < 1e-11 for n in (3, 32, 97))
        True
    """

    base: Tensor | None
    _reference: Tensor | None
    _unitary: ClassVar[tuple[str, ...]] = ("base",)  # the buffers of unitary matrices

    def __init__(
        self,
        domain: int | Size | Literal["any"] | None = None,
        *,
        stride: int | Size = 1,
        groups: int = 1,
        triv: str | trivializations.Trivialization = "expm",
        base: bool | None = None,
        tol: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(domain, str):
            if domain != "any":
                raise ValueError(f'domain should be None, a size, or "any". Found {domain!r}')
        elif domain is not None:
            per_axis("domain", domain)
        per_axis("stride", stride)
        count("groups", groups)
        trivializations.trivialization(triv)
        if not (base is None or isinstance(base, bool)):
            raise TypeError(f"base should be None, True or False. Found {base!r}")
        if base and domain == "any":
            raise ValueError('base should be None or False with domain="any", which has no base')
        if base is False and domain not in (None, "any"):
            raise ValueError(
                "base should be None or True with a given domain: the logarithm of a kernel on it "
                "has more taps than the generator"
            )
        if base is False and domain is None and trivializations.inverse(triv) is None:
            raise ValueError(
                f"base=False takes an inverse of triv, which {trivializations.name(triv)} does not have: "
                "triv should be given by name, or base be True"
            )
        if tol is not None and domain != "any":
            raise ValueError('tol should be None unless domain="any": elsewhere nothing is truncated')
        if tol is not None and not (isinstance(tol, float) and 0 < tol < 1):
            raise ValueError(f"tol should be between 0 and 1. Found {tol!r}")

        self.domain = tuple(domain) if isinstance(domain, list) else domain
        self.stride = tuple(stride) if isinstance(stride, list) else stride
        self.groups = groups
        self.triv = triv
        self.tol = tol
        # Of the generator's taps, if they are not centred: `orthogonal` sets it.
        self.placement: Placement | None = None
        self.owner: str | None = None  # the module, in words: whoever knows it says so
        self.size: Size | None = None  # of the generator, once registered
        # With domain="any": the generator's norm, rounded up, and the compact kernel's degree for it.
        self.level: float | None = None
        self.degree: int | None = None
        self._in_flight: tuple[Tensor, torch.cuda.Event] | None = None
        self._waits = False  # for the device, the next time that it reads the norm
        self._has_base = domain != "any" if base is None else base
        # The base's spectrum as real numbers, (groups, frequencies, 2 m^2): `Module.to` drops the imaginary
        # part of complex buffers, and gives those of 4 or 5 axes a memory format.
        self.register_buffer("base", None)
        self.register_buffer("_reference", None, persistent=False)  # an empty tensor: dtype and device

    @property
    def taps(self) -> Size:
        """Taps of the weight: the kernel's own, the domain, or the compact kernel's ``K`` x ``K``.

        Raises:
            RuntimeError: before registration.
        """
        return self._weight_size()[2:]

    def forward(self, X: Tensor) -> Tensor:
        """The orthogonal kernel of a generator.

        Args:
            X: the generator, ``(out, in/groups, *taps)``.

        Returns:
            ``(out, in/groups, *taps)``, with the generator's, the domain's, or the compact kernel's
            ``K`` x ``K`` taps, in the generator's dtype.

        Raises:
            ValueError: if the generator is not of the size that was registered, or not finite (on CUDA
                only under `torch.autograd.set_detect_anomaly`, because reading that waits).
            RuntimeError: if the generator is a part of one, as FSDP keeps it outside of forward.
        """
        lattice, Q = self.spectrum(X)
        with no_autocast(X.device.type):
            return lattice.kernel(Q).to(X.dtype).contiguous()

    def spectrum(
        self, X: Tensor, domain: Size | None = None, dilation: Size = ()
    ) -> tuple[Lattice, Tensor]:
        """The matrices of the orthogonal kernel of a generator, and the lattice on which they are.

        That is the weight's own lattice. With ``domain="any"`` images may be so small that their own
        has no more frequencies: then it is that of the images, where nothing is truncated either.

        Args:
            X: the generator, ``(out, in/groups, *taps)``.
            domain: of the images, for ``domain="any"``.
            dilation: with which the compact kernel is applied to these.

        Returns:
            The lattice, and ``(groups, frequencies, out/groups, in/groups * s^d)``, complex, in
            single precision at least.

        Raises:
            ValueError, RuntimeError: as `forward` does.
        """
        if self.size is None:  # stacked on another parametrization: nothing was inverted here
            self._adopt(X)
        elif X.shape != self.size:
            raise ValueError(f"the generator should be of size {tuple(self.size)}. Found {tuple(X.shape)}")
        self._check_generator(X)
        with no_autocast(X.device.type):
            kernel = unpack(precise(X))
            tol, norm = 1.0, None
            if self.domain == "any":
                norm = self._follow_norm(kernel)
                tol = self._tolerance()
            elif self.triv == "expm" and self.domain is not None and not kernel.is_cuda:
                norm = self._norm(kernel)
            lattice, placement = self._lattice(X.shape, X.is_complex()), self.placement
            if domain is not None and self.domain == "any":
                images = Lattice(domain, lattice.stride, self.groups, X.is_complex())
                # dilation then permutes the phases of a stride, which makes another generator
                permuted = max(dilation) > 1 and max(lattice.stride) > 1
                if self.fits(images) and not permuted:
                    lattice, tol = images, 1.0
                    placement = (placement or Placement.centred(X.shape[2:])).dilated(dilation)
            # Note [rounding below tol]
            # A compact kernel also has to be orthogonal between the frequencies of its torus, where
            # rounding shows more: 1e-6 at single precision. Exact products after a single precision
            # exponential leave eps * norm, and double precision throughout nothing to speak of.
            error = torch.finfo(kernel.dtype).eps
            if error * (self.level or 0) > tol:
                kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float64))
            rows, columns = lattice.blocks(X.shape)
            small = self._smaller(lattice, X.shape, norm) if kernel.dtype in _SINGLE else None
            Q = self._map((small or lattice).spectrum(kernel, placement), norm)
            if small is not None:
                Q = lattice.spectrum(small.kernel(Q))
            if self.base is not None:
                base = unpacked(self.base).to(Q.dtype)
                Q = product(base, Q) if rows >= columns else product(Q, base)
            if Q.dtype == torch.complex64 and 10 * error > tol:
                Q = refine(Q)
            return lattice, Q

    def _check_generator(self, X: Tensor) -> None:
        """That a generator is whole, and finite where reading that waits for nothing."""
        if torch.compiler.is_compiling() or X.is_meta:
            return
        of = "" if self.owner is None else f" of {self.owner}"
        if hasattr(X, "full_tensor"):
            raise RuntimeError(
                f"the generator{of} should be whole. Found a part of it (a DTensor): a model that "
                "`fully_shard` has taken has its weights in forward only, or between `model.unshard()` and "
                "`model.reshard()`"
            )
        if X.is_cuda and not torch.is_anomaly_enabled():
            return
        try:
            finite = bool(torch.isfinite(X.detach()).all())
        except RuntimeError:  # vmap
            return
        if not finite:
            raise ValueError(
                f"the generator{of} should be finite. Found nan or inf: a step of the optimizer was too "
                "large, or the gradient that it took was not finite"
            )

    def _smaller(self, lattice: Lattice, size: Size, norm: float | None) -> Lattice | None:
        """A torus whose exponential has all the taps that count on a given one, at half the cost."""
        if norm is None or not norm < 16 or self.domain == "any" or max(lattice.blocks(size)) < 8:
            return None
        reach, stride = self._reach(size)
        degree = trivializations.degree(self.triv, _level(norm), _SINGLE_TOL, reach)
        small = Lattice.of_degree(degree, reach, stride, self.groups, lattice.is_complex)
        return small if 2 * small.frequencies < lattice.frequencies else None

    def _map(self, spectrum: Tensor, norm: float | None = None) -> Tensor:
        """The unitary matrices, or frames, of a spectrum's skew part, of which the norm may be known."""
        rows, columns = spectrum.shape[-2:]
        if self.triv == "expm" and max(rows, columns) > 1:
            return expm_frame(spectrum, norm)
        return trivializations.trivialization(self.triv)(skew(_square(spectrum)))[..., :rows, :columns]

    def fits(self, images: Lattice) -> bool:
        """Whether images have no more frequencies than the torus of the compact kernel, nor it just one."""
        size, reference = self._registered()
        return 1 < self._lattice(size, reference.is_complex()).frequencies >= images.frequencies

    @torch.no_grad()
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """The generator whose kernel is ``W``, or the orthogonal kernel nearest to it.

        With a base, the base becomes that kernel and the generator is zero. Without (own grid), the
        generator is its logarithm. With ``domain="any"``, ``W`` means a generator: it is only packed.

        Args:
            W: ``(out, in/groups, *taps)``, with the generator's taps or those of the domain.
            check_in_manifold: whether to refuse a kernel that is not orthogonal. Not with
                ``domain="any"``.

        Returns:
            ``(out, in/groups, *taps)``: the generator, of the dtype of ``W``.

        Raises:
            TypeError: if ``W`` is not of the registered dtype, or not of a floating or complex one.
            ValueError: if it is not finite, or of another size.
            geotorch.exceptions.InManifoldError: if it is to be orthogonal and is not, or if no generator
                reaches it.
            RuntimeError: if it is assigned where FSDP keeps a part of the generator only.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse_parts()
        if check_in_manifold and self.domain == "any":
            raise ValueError('check_in_manifold should be False with domain="any": W is a generator')
        if check_in_manifold:
            self._check(W)
            if not semi_orthogonal(self._spectrum_of(W)[1], 1e-4):
                raise InManifoldError(W, self)
        generator, buffers = self.preimage(W)
        for name, value in buffers.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else old.copy_(value))
        self._adopt(generator)
        if self.domain == "any":
            self._follow_norm(precise(W))
        return generator

    @torch.no_grad()
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator that `right_inverse` returns, and the buffers that it sets; nothing is changed.

        Raises:
            TypeError, ValueError, geotorch.exceptions.InManifoldError: as `right_inverse` does.
        """
        self._check(W)
        if self.domain == "any":
            return pack(precise(W)).to(W.dtype), {}
        zero = W.new_zeros(W.shape if self.size is None else self.size)
        lattice, spectrum = self._spectrum_of(W)
        if not self._has_base:
            return self._logarithm(W, lattice, polar(spectrum, lattice)), {}
        return zero, self._buffers_of(lattice, spectrum)

    def _spectrum_of(self, W: Tensor) -> tuple[Lattice, Tensor]:
        size = W.shape if self.size is None else self.size
        # A generator's taps stand where it says; a kernel that was read from the weight is centred.
        placement = self.placement if self.size is None or W.shape != self._weight_size() else None
        lattice = self._lattice(size, W.is_complex())
        return lattice, lattice.spectrum(precise(W), placement)

    def _buffers_of(self, lattice: Lattice, spectrum: Tensor) -> dict[str, Tensor]:
        return {"base": packed(lattice.choose(polar_frame, spectrum))}

    def in_manifold(self, W: Tensor, eps: float = 1e-4) -> bool:
        """Whether ``W`` is an orthogonal kernel on the domain, to ``eps`` in each entry of ``W^H W``.

        With ``domain="any"``: on every domain. (``W^H W`` has ``2 K - 1`` taps, so a torus
        of that size sees all of it.)

        Raises:
            RuntimeError: before registration.
        """
        size, reference = self._registered()
        if W.shape[:2] != size[:2] or W.ndim != len(size) or W.is_complex() != reference.is_complex():
            return False
        lattice = self._lattice(size, W.is_complex())
        if self.domain == "any":
            stride = lattice.stride
            points = tuple(2 * ceil(k / s) + 1 for k, s in zip(W.shape[2:], stride, strict=True))
            lattice = lattice.resolution(points)
        elif W.shape[2:] != lattice.domain:
            return False
        return semi_orthogonal(lattice.spectrum(precise(W)), eps)

    @torch.no_grad()
    def sample(self, distribution: str = "uniform", init_: Any = None) -> Tensor:
        r"""A random orthogonal kernel on the domain, to be assigned to the weight.

        - ``"uniform"``: Haar's measure at each frequency; at real ones both determinants.
        - ``"torus"``: ``triv`` of skew matrices with angles drawn by ``init_``, on the
          diagonal, or at real frequencies in ``2 x 2`` blocks. What recurrent kernels start from.
        - ``"identity"``, or near it: ``triv`` of a generator that ``init_`` draws.

        (For the kernel nearest to a pretrained one, assign that.)

        Args:
            distribution: one of these. With ``domain="any"`` only ``"identity"``, returned as
                the generator: random matrices at each frequency have no compact kernel.
            init_: fills a tensor in place. Of ``"torus"``, one of angles; default: uniform on
                ``[-pi, pi]`` (Henaff, Szlam, LeCun, arXiv:1602.06662). Of ``"identity"``, the generator's
                taps, ``(out, in/groups, *taps)``, whose size is the distance to it; default: zero.

        Raises:
            RuntimeError: before registration.
            ValueError: if there is no such distribution.
        """
        size, reference = self._registered()
        lattice = self._lattice(size, reference.is_complex())
        known = ("identity",) if self.domain == "any" else ("uniform", "torus", "identity")
        if distribution not in known:
            raise ValueError(
                f"distribution should be one of {known} with domain={self.domain!r}. Found {distribution!r}"
            )
        if init_ is not None and distribution == "uniform":
            raise ValueError('init_ should be None with distribution="uniform", which is one measure')
        rows, columns = lattice.blocks(size)
        m = max(rows, columns)
        like = precise(reference)
        if distribution == "identity":
            generator = like.new_zeros(size)
            if init_ is not None:
                init_(generator)
            if self.domain == "any":
                return generator.to(reference.dtype)
            spectrum = lattice.spectrum(generator, self.placement)
            return lattice.kernel(self._map(spectrum)).to(reference.dtype)
        dtype = torch.promote_types(like.dtype, torch.complex64)
        empty = like.new_empty(self.groups, lattice.frequencies, m, m, dtype=dtype)
        if distribution == "uniform":
            Q = lattice.choose(haar, empty)
            return lattice.kernel(Q[..., :rows, :columns]).to(reference.dtype)
        A = lattice.choose(lambda like: _torus(like, init_), empty)
        return lattice.kernel(self._map(A)[..., :rows, :columns]).to(reference.dtype)

    def extra_repr(self) -> str:
        """What ``print(conv)`` says of the parametrization."""
        size = "" if self.size is None else f"{tuple(self.size)}, "
        taps = f", taps={self.taps}" if self.domain == "any" and self.size is not None else ""
        optional = "".join(
            f", {key}={value}"
            for key, value in (("stride", self.stride), ("groups", self.groups))
            if max(per_axis(key, value)) > 1
        )
        tol = "" if self.tol is None else f", tol={self.tol}"
        return (
            f"{size}domain={self.domain!r}{taps}{optional}, "
            f"triv={trivializations.name(self.triv)}, base={self._has_base}{tol}"
        )

    def _lattice(self, size: Size, is_complex: bool) -> Lattice:
        if self.domain != "any":
            dilation = None if self.placement is None else self.placement.dilation
            return Lattice.of_kernel(size, is_complex, self.domain, self.stride, self.groups, dilation)
        if self.degree is None:
            raise RuntimeError(
                'K is not known: with domain="any", call the module once outside of torch.compile and vmap'
            )
        reach, stride = self._reach(size)
        return Lattice.of_degree(self.degree, reach, stride, self.groups, is_complex)

    def _reach(self, size: Size) -> tuple[Size, Size]:
        """The reach of a generator of that size, and the stride on each axis."""
        taps = tuple(size[2:])
        stride = per_axis("stride", self.stride, len(taps))
        return (self.placement or Placement.centred(taps)).reach(taps, stride), stride

    def _weight_size(self) -> Size:
        size, reference = self._registered()
        return (*size[:2], *self._lattice(size, reference.is_complex()).taps)

    def _registered(self) -> tuple[Size, Tensor]:
        if self.size is None or self._reference is None:
            raise RuntimeError(
                "size, dtype and device are known once the parametrization is registered on a weight"
            )
        return self.size, self._reference

    def _adopt(self, X: Tensor) -> None:
        if self.size is None:
            self._check(X, finite=False)
            self.size = X.shape
            self._reference = X.new_empty(0)

    def _check(self, W: Tensor, finite: bool = True) -> None:
        """Raises what is wrong with a weight, before anything is changed."""
        check_dtype("the weight", W)
        size = W.shape if self.size is None else self.size
        if self.domain == "any":
            # its own lattice is any; this one is for the checks of groups and channels
            lattice = Lattice.of_kernel(size, W.is_complex(), None, 1, self.groups)
            per_axis("stride", self.stride, len(size) - 2)
            allowed = {tuple(size)}
        else:
            lattice = self._lattice(size, W.is_complex())
            allowed = {tuple(size), (*size[:2], *lattice.domain)}
        if tuple(W.shape) not in allowed:
            note = (
                ': with domain="any" it is a generator, not the compact kernel'
                if self.domain == "any"
                else ""
            )
            raise ValueError(
                f"the weight should be of size {' or '.join(map(str, sorted(allowed)))}{note}. "
                f"Found {tuple(W.shape)}"
            )
        if self._reference is not None and W.dtype != self._reference.dtype:
            raise TypeError(f"the weight should be of dtype {self._reference.dtype}. Found {W.dtype}")
        if finite and not W.is_meta and not bool(torch.isfinite(W).all()):
            raise ValueError("the weight should be finite. Found nan or inf")

    def _logarithm(self, W: Tensor, lattice: Lattice, spectrum: Tensor) -> Tensor:
        rows, columns = spectrum.shape[-2:]
        if rows != columns:
            raise ValueError(
                "base=False should only be used where each group gives as many channels as it takes: "
                f"a frame has no logarithm. Found {rows} and {columns}"
            )
        inverse = trivializations.inverse(self.triv)
        assert inverse is not None  # checked by the constructor
        try:
            A = lattice.choose(inverse, spectrum)
        except ValueError as error:
            raise InManifoldError(W, f"the image of {self}: {error}") from error
        return pack(lattice.kernel(A)).to(W.dtype)

    def _set_level(self, level: float) -> None:
        reach, _ = self._reach(self._registered()[0])
        self.degree = trivializations.degree(self.triv, level, self._tolerance(), reach)
        self.level = level

    def _tolerance(self) -> float:
        dtype = self._registered()[1].dtype
        if self.tol is not None:
            return self.tol
        if dtype in HALF:
            return 1e-4
        return 1e-12 if dtype in (torch.float64, torch.complex128) else _SINGLE_TOL

    def _follow_norm(self, kernel: Tensor) -> float | None:
        """Sets the compact kernel's degree from a bound on the norm of the generator's skew part.

        Under `torch.compile`, `vmap` and graph capture a value cannot be read: the degree stays.

        Returns:
            The bound, if it is known.
        """
        norm = self._norm(kernel)
        if kernel.is_meta:
            self._set_level(self.level or _SMALLEST_LEVEL)
        unknown = norm is None or norm != norm or (norm == inf and kernel.is_cuda)
        if norm is None or (unknown and self.degree is not None):
            return None  # not there yet, or a generator that is not finite: its kernel says so
        level = _level(norm)
        if level != self.level:
            self._set_level(level)
        return norm

    def _norm(self, kernel: Tensor) -> float | None:
        """A bound on the norm of a generator's skew part at all frequencies, if it can be read."""
        if torch.compiler.is_compiling() or kernel.is_meta:
            return None
        if kernel.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        reach, stride = self._reach(kernel.shape)
        points, factor = sampling(reach)
        with torch.no_grad():
            lattice = Lattice(points, stride, self.groups, kernel.is_complex()).resolution(points)
            spectrum = lattice.spectrum(kernel.detach(), self.placement)
            bound = norm_bound(skew(_square(spectrum))).amax() * factor
            try:
                return self._read(bound)
            except RuntimeError:  # vmap
                return None

    def _read(self, bound: Tensor) -> float | None:
        """The value of a scalar; on a GPU the last one that has arrived, without waiting for it."""
        if not bound.is_cuda or self.degree is None or self._waits:
            self._waits = False
            return float(bound)
        arrived = None
        if self._in_flight is not None and self._in_flight[1].query():
            arrived, self._in_flight = float(self._in_flight[0]), None
        if self._in_flight is None:
            host = torch.empty((), dtype=bound.dtype, pin_memory=True)
            host.copy_(bound, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._in_flight = host, event
        return arrived

    def loaded(self, generator: Tensor) -> None:
        """That this generator has been loaded: with ``domain="any"`` it sets ``K``."""
        size, reference = self._registered()
        if self.domain == "any" and generator.shape == size:
            self._in_flight, self._waits = None, True
            self._follow_norm(unpack(precise(generator.detach().to(reference.device, reference.dtype))))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # The generator is the parent's: at the next forward its norm is read, whatever that waits for.
        self._in_flight, self._waits = None, True

    def _apply(self, fn: Any, recurse: bool = True) -> "ConvExponential":
        old = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in old.items():
            after = self._buffers[name]
            if name == "_reference" or before is None or after is None:
                continue
            dtype = torch.promote_types(after.dtype.to_real(), torch.float32)
            if after.dtype != dtype:  # never below float32, nor complex
                after = self._buffers[name] = before.to(after.device, dtype)
            rises = torch.finfo(dtype).eps < torch.finfo(before.dtype).eps
            if rises and name in self._unitary and not after.is_meta:
                size, reference = self._registered()
                lattice = self._lattice(size, reference.is_complex())
                self._buffers[name] = packed(lattice.choose(polar_frame, unpacked(after)))
        if self.level is not None:
            self._in_flight = None
            self._set_level(self.level)  # the tolerance may have changed
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_flight": None}  # an event is of this process and this copy


def generators(model: nn.Module) -> list[nn.Parameter]:
    """The free parameters of a model's orthogonal convolutions, for an optimizer's own group.

    Args:
        model: any module.

    Returns:
        Each parameter once, in the order of ``model.modules()``. Of a weight of which only blocks are
        orthogonal, theirs: the rest of it is an ordinary parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from orthoconv_param import ConvExponential, generators
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> _ = register_parametrization(model[0], "weight", ConvExponential())
        >>> slow = generators(model)
        >>> rest = [p for p in model.parameters() if all(p is not g for g in slow)]
        >>> optimizer = torch.optim.Adam([{"params": slow, "lr": 1e-4}, {"params": rest}], lr=1e-3)
    """
    found: dict[int, nn.Parameter] = {}
    for parametrizations in model.modules():
        if not isinstance(parametrizations, ParametrizationList):
            continue
        free = list(parametrizations.parameters(recurse=False))
        if not any(isinstance(p, ConvExponential) for p in parametrizations):
            # one that has the exponential as a part takes the generator first
            inside = any(isinstance(p, ConvExponential) for p in parametrizations.modules())
            free = free[:1] if inside else []
        found |= {id(parameter): parameter for parameter in free}
    return list(found.values())


def _refuse_parts() -> None:
    """That what is assigned to is whole.

    Raises:
        RuntimeError: if it is not.
    """
    # A parametrization is given the value alone, and torch notices only when it has changed. The parameter
    # is that of the list in whose `right_inverse` this is called.
    frame = inspect.currentframe()
    while frame is not None:
        stack = frame.f_locals.get("self")
        if isinstance(stack, ParametrizationList):
            if any(hasattr(parameter, "full_tensor") for parameter in stack.parameters(recurse=False)):
                raise RuntimeError(
                    "weight should be assigned before `fully_shard`, while the generator is whole. Found a "
                    "part of it (a DTensor)"
                )
            return
        frame = frame.f_back


def _level(norm: float) -> float:
    """A norm, rounded up."""
    if not isfinite(norm):
        return inf
    if norm <= _SMALLEST_LEVEL:
        return _SMALLEST_LEVEL
    return 2 ** (ceil(_LEVELS_PER_OCTAVE * log2(norm)) / _LEVELS_PER_OCTAVE)


def _square(spectrum: Tensor) -> Tensor:
    """A spectrum's blocks, padded to square ones by zeros."""
    rows, columns = spectrum.shape[-2:]
    m = max(rows, columns)
    return spectrum if rows == columns else F.pad(spectrum, (0, m - columns, 0, m - rows))


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Real products are not to be taken to half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def packed(spectrum: Tensor) -> Tensor:
    """Square matrices at each frequency as the real numbers ``(groups, frequencies, 2 m^2)``."""
    return torch.view_as_real(spectrum.resolve_conj().contiguous()).flatten(2)


def unpacked(numbers: Tensor) -> Tensor:
    """The inverse of `packed`."""
    m = isqrt(numbers.shape[-1] // 2)
    return torch.view_as_complex(numbers.unflatten(-1, (m, m, 2)))


def precise(X: Tensor) -> Tensor:
    """In single precision at least."""
    return X.float() if X.dtype in HALF else X


def haar(like: Tensor) -> Tensor:
    """Unitary (orthogonal) matrices that are Haar distributed, as many and of the kind of ``like``."""
    Q, R = torch.linalg.qr(torch.randn_like(like))
    return Q * torch.sgn(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


def _torus(like: Tensor, init_: Any) -> Tensor:
    """Skew matrices of given angles: the Lie algebra of a maximal torus of U(m), or of SO(m)."""
    m = like.shape[-1]
    pairs = like.is_complex()
    angles = torch.empty(
        *like.shape[:-2], m if pairs else m // 2, dtype=like.real.dtype, device=like.device
    )
    if init_ is None:
        nn.init.uniform_(angles, -torch.pi, torch.pi)
    else:
        init_(angles)
    if like.is_complex():
        return torch.diag_embed(1j * angles)
    subdiagonal = angles.new_zeros(*angles.shape[:-1], max(m - 1, 0))
    subdiagonal[..., ::2] = angles
    lower = torch.diag_embed(subdiagonal, offset=-1)
    return lower - lower.mT
