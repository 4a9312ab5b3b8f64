r"""The exponential of skew-Hermitian matrices, ``Q = exp((A - A^H) / 2)``, which is unitary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..checks import FLOATS, check_dtype
from .closed_forms import expm_1x1
from .derivatives import exponential
from .norms import frobenius
from .products import product, skew

__all__ = ["expm_frame", "expm_skew", "exponential"]

_NARROW = 8  # times as many rows as columns, from which torch's exponential of a small matrix is faster


def expm_skew(A: Tensor) -> Tensor:
    r"""Return the exponential of skew-symmetric or skew-Hermitian matrices, with its analytic derivative.

        Q = exp((A - A^H) / 2),    Q^H Q = I

    Only the skew part of ``A`` is read, so that ``A`` may be any free matrix. First and second
    derivatives, forward mode and ``vmap`` work, at repeated eigenvalues and at zero as anywhere. The result
    may be changed in place, as that of `torch.matrix_exp`.

    Args:
        A: ``(..., n, n)``; float32, float64, complex64, complex128, or half precision, which is
            computed in float32.

    Returns:
        ``(..., n, n)``, of the dtype of ``A``, unitary to ``10 * n * eps`` at every norm up to 1e9 (double
        precision: 1e70; on a GPU see below). Beyond that norm, and where ``A`` is not finite, the result
        is NaN. The error of the values grows as ``eps * norm(A)``, as it must.

        On a GPU nothing waits for the device. Up to size 32 with triton installed, each matrix gets the
        squarings that it needs. Otherwise all get those of norm 1e4, and a larger norm gives NaN.

    Raises:
        TypeError: if ``A`` is no tensor of a floating dtype.
        ValueError: if the matrices are not square.

    Cost: elementwise up to size 2. Beyond, ``3 + s`` products of ``n x n`` matrices forward and
    ``7 + 3 s`` backward, with ``s`` about ``log2(norm(A))``; in double precision ``4 + s`` and
    ``10 + 3 s``; two more forward where ``s > 4``. Memory: the result, and temporaries of a few
    megabytes, off the CPU of up to 128 MB each.

    Source: Bader, Blanes, Casas (2019) and Sastre (2018) for the polynomials; Magnasco,
    arXiv:2302.07396, for their use.

    Example:
        >>> import torch
        >>> from orthoconv_param import expm_skew
        >>> Q = expm_skew(torch.randn(7, 4, 4, dtype=torch.complex128))
        >>> torch.allclose(Q.mH @ Q, torch.eye(4, dtype=Q.dtype))
        True

        It is a trivialization for geotorch's own manifolds:

        >>> import geotorch
        >>> SO = geotorch.SO((4, 4), triv=expm_skew)
        >>> SO.in_manifold(SO(torch.randn(4, 4)))
        True
    """
    check_dtype("A", A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A should be square matrices (..., n, n). Found {tuple(A.shape)}")
    if A.dtype not in FLOATS:
        return expm_skew(A.float()).to(A.dtype)
    return expm_1x1(A) if A.shape[-1] == 1 else exponential(A)


def expm_frame(X: Tensor, norm: float | None = None) -> Tensor:
    """Return the exponential's columns for tall matrices, or rows for wide ones, padded to square by zeros.

    With ``X1`` the square upper part of a tall ``X`` and ``X2`` the rest, ``skew([X, 0])`` takes
    ``(u, X2 v)`` to ``(skew(X1) u - X2^H X2 v / 2, X2 u / 2)``. So the first columns of its exponential are
    ``(U, X2 V)``, where ``(U, V)`` are those of the exponential of a small matrix. Unlike the form
    with a QR factor, that has derivatives where ``X2`` has no full rank.
    """
    rows, columns = X.shape[-2:]
    m = max(rows, columns)
    if m < _NARROW * min(rows, columns) or not runtime.may_wait(X.device):
        Q = exponential(X if rows == columns else F.pad(X, (0, m - columns, 0, m - rows)), norm)
        return Q[..., :rows, :columns]
    if rows < columns:
        return expm_frame(X.mH.resolve_conj()).mH.resolve_conj()
    small = X.to(torch.promote_types(X.dtype, torch.float64))  # its matrix is not normal
    X1, X2 = small[..., :columns, :], small[..., columns:, :]
    gram = product(X2.mH.resolve_conj(), X2)
    with torch.no_grad():  # balances the matrix, and changes nothing
        c = (frobenius(gram).sqrt() / 2).clamp(min=1e-8)[..., None, None]
    eye = torch.eye(columns, dtype=gram.dtype, device=gram.device)
    lower = torch.cat([eye * c, torch.zeros_like(gram)], -1)
    upper = torch.cat([skew(X1), gram / (-4 * c)], -1)
    UV = torch.linalg.matrix_exp(torch.cat([upper, lower], -2))[..., :columns]
    U, V = UV[..., :columns, :], UV[..., columns:, :]
    return torch.cat([U, product(X2, V / (2 * c))], -2).to(X.dtype)
