"""What a user would pick instead, and steps of training through each."""

import torch
from orthogonium.layers.conv.adaptiveSOC.fast_skew_ortho_conv import ExpParams, FastSOC
from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal, singular_values

DEFECT_SIDE = 32  # at which every convolution's defect is reported


class CayleyConv2d(nn.Module):
    """The Cayley convolution of Trockman and Kolter (arXiv:2104.07167), as many channels out as in.

    At each frequency ``Q = (I - A) (I + A)^{-1}``, ``A = W - W^H``, of the weight embedded in the image;
    applied there between two Fourier transforms.
    """

    def __init__(self, channels, kernel_size):
        super().__init__()
        like = nn.Conv2d(channels, channels, kernel_size, bias=False)
        self.weight = nn.Parameter(like.weight.detach().clone())

    def forward(self, x):
        size, taps = x.shape[-2:], self.weight.shape[-2:]
        padded = nn.functional.pad(self.weight, (0, size[1] - taps[1], 0, size[0] - taps[0]))
        padded = padded.roll([-(k // 2) for k in taps], (-2, -1))
        W = torch.fft.rfft2(padded).conj().permute(2, 3, 0, 1).resolve_conj()
        A, eye = W - W.mH, torch.eye(len(self.weight), dtype=W.dtype, device=W.device)
        Q = torch.linalg.solve(eye + A, eye - A)
        y = Q @ torch.fft.rfft2(x).permute(2, 3, 1, 0)
        return torch.fft.irfft2(y.permute(3, 2, 0, 1), s=size)


class ConvRNN(nn.Module):
    """``h = tanh(convolution(h) + x)``, whose kernel is computed once for all steps."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, video):
        h = torch.zeros_like(video[0])
        with parametrize.cached():
            for x in video:
                h = (self.convolution(h) + x).tanh()
        return h


def plain(channels, padding_mode="circular", bias=False):
    return nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding_mode, bias=bias)


def aoc(channels, padding_mode="circular", out=None, stride=1):
    options = {"padding": 1, "padding_mode": padding_mode, "stride": stride, "bias": False}
    return AdaptiveOrthoConv2d(channels, out or channels, 3, **options)


def soc(channels, terms):
    """Each term reaches one sample further."""
    return FastSOC(channels, channels, 3, padding=terms, bias=False, exp_params=ExpParams(terms))


def defect(module, side=DEFECT_SIDE):
    """At ``32 x 32``, of the module's own spectrum; of a Cayley convolution from its operator."""
    with torch.no_grad():
        if not isinstance(module, CayleyConv2d):
            return float((singular_values(module, side) - 1).abs().max())
        # it commutes with translations, so that its answer to one impulse for each channel says all
        channels = module.weight.shape[1]
        impulses = torch.zeros(channels, channels, side, side)
        impulses[range(channels), range(channels), 0, 0] = 1
        spectrum = torch.fft.fft2(module(impulses).double()).permute(2, 3, 1, 0)
        return float((torch.linalg.svdvals(spectrum) - 1).abs().max())


def step(module, x, G):
    """Forward and backward, to the input and to the parameters."""

    def run():
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(G)

    return run


def ours(channels, **arguments):
    return orthogonal(nn.Conv2d(channels, channels, 3, padding=1, bias=False), **arguments)
