"""The kernels for small matrices: on a GPU if there is one, else in triton's interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import random
from scipy.linalg import expm, expm_frechet
from test_exponential import skew_of_norm
from torch.torch_version import TorchVersion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.importorskip("triton")
from orthoconv_param.matrices import fused  # noqa: E402

if not fused.IS_SUPPORTED:
    pytest.skip(f"triton {triton.__version__} does not compile the kernels", allow_module_level=True)

# Before 3.7 it takes an array of one number for a loop's count, which numpy 2.4 refuses.
INTERPRETER_FAILS = (
    DEVICE == "cpu"
    and TorchVersion(triton.__version__) < "3.7"
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)


def runs_kernels(test):
    skip = pytest.mark.skipif(INTERPRETER_FAILS, reason="triton's interpreter does not know numpy 2.4")
    return pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")(skip(test))


@runs_kernels
@pytest.mark.parametrize("norm", [0.0, 1e-12, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("n", [3, 16, 20])
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_values_unitarity_and_gradient(dtype, n, norm):
    A = skew_of_norm(norm, n, dtype)
    A[1] *= 0.01  # which needs fewer squarings
    G = random(*A.shape, dtype=dtype, seed=1)
    Q, D = fused.expm(A.to(DEVICE)).cpu(), fused.expm_vjp(A.to(DEVICE), G.to(DEVICE)).cpu()
    assert Q.dtype == D.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (Q.mH @ Q - torch.eye(n, dtype=dtype)).abs().max() <= 10 * n * eps
    wide = [[x.to(torch.complex128).numpy() for x in X] for X in (A, G)]
    exact = np.stack([expm(a) for a in wide[0]])
    tolerance = 10 * n**0.5 * (eps * max(norm, 1) + 2e-15 * max(norm, 10))
    assert np.abs(Q.numpy() - exact).max() <= tolerance
    exact = np.stack([expm_frechet(a.conj().T, g, compute_expm=False) for a, g in zip(*wide, strict=True)])
    exact = (exact - exact.conj().swapaxes(1, 2)) / 2
    assert np.abs(D.numpy() - exact).max() <= 100 * eps * max(norm, 1) * np.abs(wide[1]).max()


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_every_norm_is_unitary_and_a_bad_matrix_spoils_no_other(dtype):
    A = skew_of_norm(1e8, 5, dtype)
    A[1, 0, 1] = torch.inf
    A[2] = skew_of_norm(1.0, 5, dtype)[2]
    Q = fused.expm(A.to(DEVICE)).cpu()
    eye = torch.eye(5, dtype=dtype)
    assert (Q[[0, 2]].mH @ Q[[0, 2]] - eye).abs().max() <= 50 * torch.finfo(dtype).eps
    assert Q[1].isnan().all()
    assert fused.expm_vjp(A.to(DEVICE), Q.to(DEVICE)).cpu()[2].isfinite().all()


@runs_kernels
def test_only_the_skew_part_is_read_wherever_it_lies():
    X = random(2, 3, 4, 4, dtype=torch.complex128)
    A = (X - X.mH) / 2
    G = random(*X.shape, dtype=X.dtype, seed=1)
    for view in (X, X.mT.contiguous().mT, X.conj().resolve_conj().conj()):
        torch.testing.assert_close(fused.expm(view.to(DEVICE)), fused.expm(A.to(DEVICE)))
        gradient = fused.expm_vjp(view.to(DEVICE), G.mT.contiguous().mT.to(DEVICE))
        torch.testing.assert_close(gradient, fused.expm_vjp(A.to(DEVICE), G.to(DEVICE)))
    assert fused.expm(X[:0].to(DEVICE)).shape == (0, 3, 4, 4)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from orthoconv_param.matrices import fused

for dtype, element in ((torch.complex64, "*fp32"), (torch.complex128, "*fp64")):
    for kernel in (fused.expm_kernel, fused.expm_vjp_kernel):
        constants, options = fused.launch(kernel, 32, dtype)
        signature = {name: "constexpr" if name in constants else element for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        code = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["cubin"]
        print(len(code))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(int(size) > 1000 for size in run.stdout.split())
    assert len(run.stdout.split()) == 4
