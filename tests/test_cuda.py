"""On a GPU: the same numbers as on the CPU, without waiting for it, and as a CUDA graph."""

import pytest
import torch
from oracles import random
from test_exponential import DTYPES, skew_of_norm
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import ConvExponential, SplitExponential, expm_skew, orthogonal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("norm", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 5, 20, 40, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exponential_is_that_of_the_cpu(dtype, n, norm):
    A, G = skew_of_norm(norm, n, dtype), random(3, n, n, dtype=dtype, seed=1)
    results = []
    for device in ("cpu", "cuda"):
        X = A.to(device).detach().requires_grad_()
        Q = expm_skew(X)
        (gradient,) = torch.autograd.grad(Q, X, G.to(device))
        results.append((Q.detach().cpu(), gradient.cpu()))
    tolerance = 20 * n**0.5 * torch.finfo(dtype).eps * max(norm, 1)
    torch.testing.assert_close(*(r[0] for r in results), atol=tolerance, rtol=0)
    torch.testing.assert_close(*(r[1] for r in results), atol=20 * tolerance, rtol=0)


def module(kind, channels=20):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding="same", padding_mode="circular")
    if kind == "own grid":
        parametrize.register_parametrization(conv, "weight", ConvExponential())
        return conv
    if kind == "split":
        parametrize.register_parametrization(conv, "weight", SplitExponential())
        return conv
    if kind == "walls, exponential":
        return orthogonal(conv, boundary="walls")
    if kind in ("split circular", "walls"):
        return orthogonal(conv, method="split", boundary=kind.removeprefix("split "))
    if kind == "zeros":
        conv.padding_mode = "zeros"
        return orthogonal(conv, domain=16, boundary="zeros")
    return orthogonal(conv, domain="any" if kind == "any" else 16)


KINDS = [
    "own grid", "any", "domain", "zeros", "split", "split circular", "walls", "walls, exponential",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_that_of_the_cpu(kind):
    x, results = random(4, 20, 16, 16, dtype=torch.float32), []
    for device in ("cpu", "cuda"):
        conv = module(kind).to(device)
        y = conv(x.to(device))
        y.square().mean().backward()
        results.append((y.detach().cpu(), *(p.grad.cpu() for p in conv.parameters())))
    for of_cpu, of_cuda in zip(*results, strict=True):
        torch.testing.assert_close(of_cuda, of_cpu, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [2, 20, 40])
def test_nothing_waits_for_the_device(kind, channels):
    conv = module(kind, channels).cuda()
    optimizer = torch.optim.Adam(conv.parameters(), lr=1e-3)
    x = torch.randn(4, channels, 16, 16, device="cuda", requires_grad=True)

    def step():
        optimizer.zero_grad()
        with parametrize.cached():
            y = conv(conv(x))
        y.square().mean().backward()
        optimizer.step()

    step()  # compiles, and fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_captured_as_a_graph(kind):
    x, results = torch.randn(4, 20, 16, 16, device="cuda"), []
    for captured in (False, True):
        conv = module(kind).cuda()
        optimizer = torch.optim.SGD(conv.parameters(), lr=1e-2)

        def step(conv=conv, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)
            conv(x).pow(4).mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            graph.replay() if captured else step()
        results.append([p.detach().cpu() for p in conv.parameters()])
    for plain, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=1e-4)
