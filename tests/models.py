"""Models as people have them, to be made orthogonal."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import ConvExponential, SplitExponential, orthogonal, retrofit, set_orthogonality
from orthoconv_param.functional import gate_blocks
from orthoconv_param.operators import evaluate


class ConvLSTM(nn.Module):
    """Four gates stacked over [input, state] in one convolution."""

    def __init__(self, mode, inputs=2, hidden=4):
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1, padding_mode=mode)
        self.draw = nn.Conv2d(hidden, 1, 1)

    def forward(self, video):
        h = c = video.new_zeros(video.shape[0], self.hidden, *video.shape[-2:])
        for x in video.unbind(1):
            write, keep, read, value = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = keep.sigmoid() * c + write.sigmoid() * value.tanh()
            h = read.sigmoid() * c.tanh()
        return self.draw(h)


class ConvGRU(nn.Module):
    """Two gates stacked over [input, state], and a candidate of its own."""

    def __init__(self, mode, inputs=2, hidden=4):
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(inputs + hidden, 2 * hidden, 3, padding=1, padding_mode=mode)
        self.candidate = nn.Conv2d(inputs + hidden, hidden, 3, padding=1, padding_mode=mode)

    def forward(self, video):
        h = video.new_zeros(video.shape[0], self.hidden, *video.shape[-2:])
        for x in video.unbind(1):
            reset, update = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
            value = self.candidate(torch.cat([x, reset * h], 1)).tanh()
            h = (1 - update) * h + update * value
        return h


class Residual(nn.Module):
    """Strides, and 1x1 convolutions around them."""

    def __init__(self, mode):
        super().__init__()
        options = {"padding": 1, "padding_mode": mode, "bias": False}
        self.stem = nn.Conv2d(3, 4, 3, **options)
        self.first = nn.Conv2d(4, 4, 3, **options)
        self.down = nn.Conv2d(4, 8, 3, stride=2, **options)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.last = nn.Conv2d(8, 2, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.first(x).relu()
        return self.last((self.down(x) + self.shortcut(x)).relu())


class Separable(nn.Sequential):
    """Depthwise and pointwise in turn."""

    def __init__(self, mode):
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, padding_mode=mode),
            nn.Conv2d(6, 6, 3, padding=1, padding_mode=mode, groups=6),
            nn.Conv2d(6, 8, 1),
            nn.GELU(),
            nn.Conv2d(8, 8, 5, padding=2, padding_mode=mode, groups=8, stride=2),
            nn.Conv2d(8, 4, 1),
        )


def convolutional(convolution, mode):
    """An ordinary stack, of any number of dimensions."""
    return nn.Sequential(
        convolution(2, 4, 3, padding=1, padding_mode=mode),
        nn.Tanh(),
        convolution(4, 4, 3, padding=2, dilation=2, padding_mode=mode),
        nn.Tanh(),
        convolution(4, 3, 1),
    )


class _Twice(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        self.also = self.conv

    def forward(self, x):
        return F.relu(self.also(F.relu(self.conv(x)))) + x


def reached_twice(mode):
    """One convolution, twice in the network, and with two names."""
    return _Twice(mode)


KINDS = [
    "own grid", "any", "domain", "zeros", "retrofitted", "split", "split circular", "walls",
    "walls, exponential",
]  # fmt: skip


def network(kind, dtype=torch.float32):
    """A small network with an orthogonal convolution of one kind, and a batch for it."""
    torch.manual_seed(0)
    if kind == "retrofitted":
        video = torch.randn(2, 2, 2, 6, 6)
        model = ConvLSTM("zeros", hidden=3)
        blocks = {"gates": gate_blocks(hidden=3, gates=4, inputs=2)}
        model = retrofit(model, video, select="gates", blocks=blocks)
        set_orthogonality(model, 0.5)
        return model.to(dtype), video.to(dtype)
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    if kind in ("own grid", "split"):
        plain = ConvExponential() if kind == "own grid" else SplitExponential()
        parametrize.register_parametrization(conv, "weight", plain)
    elif kind == "walls, exponential":
        orthogonal(conv, boundary="walls")
    elif kind in ("split circular", "walls"):
        orthogonal(conv, method="split", boundary="walls" if kind == "walls" else "circular")
    else:
        orthogonal(
            conv,
            domain="any" if kind == "any" else 6,
            boundary="zeros" if kind == "zeros" else "circular",
        )
    return nn.Sequential(conv, nn.Tanh(), nn.Conv2d(3, 2, 1)).to(dtype), torch.randn(2, 3, 6, 6).to(dtype)


def evaluated(monkeypatch, name):
    """From now on operators are evaluated in the way of that name, whatever it costs."""
    (way,) = (evaluator for evaluator in evaluate.EVALUATORS if evaluator.name == name)
    monkeypatch.setattr(evaluate, "choose", lambda *_: way)


def constrained(model):
    """The network's orthogonal convolution."""
    return model.gates if isinstance(model, ConvLSTM) else model[0]


def loss_of(y):
    """One that an orthogonal operator changes."""
    return (
        (y.float() - 0.3).pow(4).mean()
        if y.dtype in (torch.half, torch.bfloat16)
        else (y - 0.3).pow(4).mean()
    )


def steps(model, batches, lr=0.3):
    """Some steps of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x in batches:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
