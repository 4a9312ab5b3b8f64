r"""Chebyshev series of the scalar function of a map from skew to unitary matrices.

A trivialization with the scalar function ``f`` is, of a skew matrix ``T`` with ``|T| <= rho``,

    f(T) = sum_k c_k p_k,    p_0 = 1,  p_1 = B,  p_{k+1} = 2 B p_k + p_{k-1},    B = T / rho.

The matrices ``i^{-k} p_k`` are Chebyshev's polynomials of ``B / i``, whose norms are at most 1. So
``sum_{q > p} |c_q|`` bounds what a series that ends with ``p`` leaves out. For ``exp``,
``c_0 = J_0(rho)`` and ``c_k = 2 J_k(rho)``, Bessel's functions.
"""

from functools import lru_cache

import numpy as np
import torch

from .. import runtime
from .maps import Trivialization, name, some_skew, trivialization

LARGEST_DEGREE = 512
LARGEST_NUMBER_OF_TERMS = 200  # each of them a convolution


@lru_cache(maxsize=256)
def coefficients(triv: str | Trivialization, norm: float) -> np.ndarray:
    """Return ``i^k c_k``, the Chebyshev coefficients of ``f(i norm x)`` on ``[-1, 1]``.

    They are read from values of the map on 1 x 1 matrices. None are returned for a function that no
    polynomial of degree 1024 follows.
    """
    count = 64
    while count <= 4 * LARGEST_DEGREE and norm < 2 * LARGEST_DEGREE:
        x = np.cos(np.pi * (np.arange(count) + 0.5) / count)
        f = _scalar_values(triv, 1j * norm * x)
        # the discrete cosine transform of f, as the Fourier transform of its even extension
        spectrum = np.fft.fft(np.concatenate([f, f[::-1]]))[:count]
        c = spectrum * np.exp(-0.5j * np.pi * np.arange(count) / count) / count
        c[0] /= 2
        c[np.abs(c) < 100 * np.finfo(float).eps * (1 + norm) ** 0.5] = 0  # rounding
        if not c[count // 2 :].any():
            return c[: count // 2]
        count *= 2
    return np.zeros(0, complex)


def _scalar_values(triv: str | Trivialization, z: np.ndarray) -> np.ndarray:
    if triv == "expm":
        return np.exp(z)
    if triv == "cayley":
        return (1 + z / 2) / (1 - z / 2)
    with runtime.untransformed(), torch.device("cpu"):
        return trivialization(triv)(torch.from_numpy(z).reshape(-1, 1, 1)).flatten().numpy()


def tails(triv: str | Trivialization, norm: float) -> np.ndarray:
    """Return ``sum_{q > p} |c_q|`` for each ``p``."""
    c = np.abs(coefficients(triv, norm))
    return np.append(np.cumsum(c[::-1])[::-1][1:], 0.0)[: len(c)]


@lru_cache(maxsize=256)
def series(triv: str | Trivialization, norm: float, tol: float) -> tuple[float, ...] | None:
    """Return ``c_0, ..., c_m``, as many as leave out no more than ``tol``, and three at least.

    Return None if there are more than 200, as for large norms, and for maps with a discontinuity; or if
    they are not real, since the map does not take real matrices to real ones.
    """
    few = np.flatnonzero(tails(triv, norm) <= tol)
    if not len(few) or few[0] > LARGEST_NUMBER_OF_TERMS:
        return None
    m = max(int(few[0]), 2)
    c = coefficients(triv, norm)[: m + 1] * (-1j) ** np.arange(m + 1)
    return tuple(c.real.tolist()) if np.abs(c.imag).max() < 1e-9 else None


def check_series(triv: str | Trivialization) -> None:
    """Raise unless a map has a series: it acts on eigenvalues, and takes real matrices to real ones.

    A map that is given by name is not tried.

    Raises:
        ValueError: then.
    """
    if isinstance(triv, str):
        return
    with torch.no_grad(), torch.device("cpu"):
        A = some_skew(torch.complex128)
        values, V = torch.linalg.eigh(A / 1j)
        of_values = triv((1j * values).reshape(-1, 1, 1)).reshape(values.shape)
        error = ((V * of_values[..., None, :]) @ V.mH - triv(A.clone())).abs().amax().item()
    if not error < 1e-6:
        raise ValueError(
            "between walls triv should be a matrix function, that is act on eigenvalues only, as exp and "
            f"Cayley's map do. Found {name(triv)!r}, off by {error:.1e}"
        )
    if series(triv, 0.25, 1e-4) is None:
        raise ValueError(
            f"between walls triv should be smooth, and map real matrices to real ones. Found {name(triv)!r}"
        )
