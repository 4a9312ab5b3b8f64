"""Models as people have them, to be made orthogonal."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import (
    ConvExponential,
    SplitExponential,
    orthogonal,
    retrofit,
    runtime,
    set_orthogonality,
)
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


def gates(hidden, count, inputs=0):
    """The blocks of gates that are stacked, whose state stands after so many inputs."""
    return gate_blocks(hidden, count, inputs)


class StateFirst(nn.Module):
    """Four gates over [state, input], written as a cell, and a loop that holds a list of states."""

    class Cell(nn.Module):
        def __init__(self, mode, inputs, hidden):
            super().__init__()
            self.conv = nn.Conv2d(hidden + inputs, 4 * hidden, 3, padding=1, padding_mode=mode)

        def forward(self, x, state):
            h, c = state
            i, f, o, g = torch.split(self.conv(torch.cat((h, x), dim=1)), h.shape[1], dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

    def __init__(self, mode, inputs=2, hidden=4, layers=2):
        super().__init__()
        sizes = [inputs] + layers * [hidden]
        self.cells = nn.ModuleList(self.Cell(mode, a, hidden) for a in sizes[:-1])

    def forward(self, video, states):
        states = list(states)
        for x in video.unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(x, states[i])
                x = states[i][0]
        return x, states


class Peepholes(nn.Module):
    """A convolution for each gate and for each of input and state; peepholes made at the first call."""

    def __init__(self, mode, inputs=2, hidden=4):
        super().__init__()
        self.hidden = hidden
        options = {"padding": 1, "padding_mode": mode}
        for gate in "ifco":
            setattr(self, f"Wx{gate}", nn.Conv2d(inputs, hidden, 3, **options))
            setattr(self, f"Wh{gate}", nn.Conv2d(hidden, hidden, 3, bias=False, **options))
        self.Wci = self.Wcf = self.Wco = None

    def forward(self, video):
        h = c = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        if self.Wci is None:
            self.Wci, self.Wcf, self.Wco = (torch.zeros_like(c[:1]) for _ in range(3))
        for x in video.unbind(1):
            i = torch.sigmoid(self.Wxi(x) + self.Whi(h) + c * self.Wci)
            f = torch.sigmoid(self.Wxf(x) + self.Whf(h) + c * self.Wcf)
            c = f * c + i * torch.tanh(self.Wxc(x) + self.Whc(h))
            h = torch.sigmoid(self.Wxo(x) + self.Who(h) + c * self.Wco) * torch.tanh(c)
        return h


class Pyramid(nn.Module):
    """Stages of strided convolutions, each with a recurrent cell whose gates are normalised in groups."""

    class Stage(nn.Module):
        def __init__(self, mode, inputs, hidden):
            super().__init__()
            options = {"padding": 1, "padding_mode": mode}
            self.down = nn.Sequential(nn.Conv2d(inputs, hidden, 3, 2, **options), nn.LeakyReLU())
            self.conv = nn.Sequential(
                nn.Conv2d(2 * hidden, 4 * hidden, 3, **options), nn.GroupNorm(hidden, 4 * hidden)
            )

        def forward(self, frames):
            outputs, state = [], None
            for x in frames:
                x = self.down(x)
                h, c = (torch.zeros_like(x), torch.zeros_like(x)) if state is None else state
                i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                state = h, c
                outputs.append(h)
            return outputs

    def __init__(self, mode, inputs=2, hidden=4):
        super().__init__()
        self.stages = nn.ModuleList([self.Stage(mode, inputs, hidden), self.Stage(mode, hidden, hidden)])
        self.head = nn.Conv2d(hidden, inputs, 1)

    def forward(self, video):
        frames = list(video.unbind(1))
        for stage in self.stages:
            frames = stage(frames)
        return torch.stack([self.head(frame) for frame in frames], 1)


class SpatioTemporal(nn.Module):
    """Two memories, of which one goes up through the layers, and normalised convolutions (ST-LSTM)."""

    class Cell(nn.Module):
        def __init__(self, mode, inputs, hidden, size):
            super().__init__()

            def convolution(taken, given, k=3):
                conv = nn.Conv2d(taken, given, k, padding=k // 2, bias=False, padding_mode=mode)
                return nn.Sequential(conv, nn.LayerNorm([given, *size]))

            self.hidden = hidden
            self.conv_x, self.conv_h = convolution(inputs, 7 * hidden), convolution(hidden, 4 * hidden)
            self.conv_m, self.conv_o = convolution(hidden, 3 * hidden), convolution(2 * hidden, hidden)
            self.conv_last = nn.Conv2d(2 * hidden, hidden, 1, bias=False)

        def forward(self, x, h, c, m):
            ix, fx, gx, im, fm, gm, ox = self.conv_x(x).split(self.hidden, 1)
            ih, fh, gh, oh = self.conv_h(h).split(self.hidden, 1)
            i, f, g = self.conv_m(m).split(self.hidden, 1)
            c = (fx + fh + 1).sigmoid() * c + (ix + ih).sigmoid() * (gx + gh).tanh()
            m = (fm + f + 1).sigmoid() * m + (im + i).sigmoid() * (gm + g).tanh()
            memory = torch.cat([c, m], 1)
            return (ox + oh + self.conv_o(memory)).sigmoid() * self.conv_last(memory).tanh(), c, m

    def __init__(self, mode, inputs=2, hidden=4, size=(6, 5)):
        super().__init__()
        self.cells = nn.ModuleList(self.Cell(mode, n, hidden, size) for n in (inputs, hidden))
        self.last = nn.Conv2d(hidden, inputs, 1)
        self.hidden = hidden

    def forward(self, video):
        zero = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        h, c, m, frames = [zero, zero], [zero, zero], zero, []
        for x in video.unbind(1):
            for i, cell in enumerate(self.cells):
                h[i], c[i], m = cell(x if i == 0 else h[0], h[i], c[i], m)
            frames.append(self.last(h[-1]))
        return torch.stack(frames, 1)


class SeparateGates(nn.Module):
    """A GRU with a convolution for each gate, over [state, input], that updates in place."""

    def __init__(self, mode, inputs=2, hidden=4):
        super().__init__()
        options = {"padding": 1, "padding_mode": mode}
        self.reset_gate = nn.Conv2d(inputs + hidden, hidden, 3, **options)
        self.update_gate = nn.Conv2d(inputs + hidden, hidden, 3, **options)
        self.out_gate = nn.Conv2d(inputs + hidden, hidden, 3, **options)
        self.hidden = hidden

    def forward(self, video):
        h = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        for x in video.unbind(1):
            stacked = torch.cat([h, x], 1)
            update, reset = self.update_gate(stacked).sigmoid_(), self.reset_gate(stacked).sigmoid_()
            value = self.out_gate(torch.cat([h * reset, x], 1)).tanh_()
            h = h * (1 - update) + value * update
        return h


class SeparableGRU(nn.Module):
    """A GRU along rows, then one along columns, around an encoder, at each of some iterations."""

    def __init__(self, mode, inputs=2, hidden=4, iterations=3):
        super().__init__()
        self.encode = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.iterations = iterations
        for i, (size, padding) in enumerate((((1, 5), (0, 2)), ((5, 1), (2, 0))), start=1):
            for gate in "zrq":
                conv = nn.Conv2d(hidden + inputs, hidden, size, padding=padding, padding_mode=mode)
                setattr(self, f"conv{gate}{i}", conv)
        self.flow = nn.Conv2d(hidden, 2, 3, padding=1)

    def forward(self, h, x):
        for _ in range(self.iterations):
            motion = self.encode(x)
            for i in "12":
                hx = torch.cat([h, motion], 1)
                z, r = (getattr(self, f"conv{gate}{i}")(hx).sigmoid() for gate in "zr")
                q = getattr(self, f"convq{i}")(torch.cat([r * h, motion], 1)).tanh()
                h = (1 - z) * h + z * q
            x = x + self.flow(h)
        return h, x


class Sampler(nn.Module):
    """A generator of frames with spectral norms, whose GRU is fed noise by keyword."""

    def __init__(self, mode, norm=nn.utils.spectral_norm, hidden=4):
        super().__init__()

        def convolution(taken, given, k=3):
            return norm(nn.Conv2d(taken, given, k, padding=k // 2, padding_mode=mode))

        self.read_gate, self.update_gate = convolution(2 * hidden, hidden), convolution(2 * hidden, hidden)
        self.output = convolution(2 * hidden, hidden)
        self.up = nn.Sequential(convolution(hidden, hidden), nn.ReLU(), convolution(hidden, 1, 1))

    def forward(self, latent, steps=3):
        frames, h = [], torch.zeros_like(latent)
        for _ in range(steps):
            both = torch.cat([latent + 0.1 * torch.randn_like(latent), h], 1)
            reset, update = self.read_gate(both).sigmoid(), self.update_gate(both).sigmoid()
            value = self.output(torch.cat([latent, reset * h], 1)).relu()
            h = update * h + (1 - update) * value
            frames.append(self.up(h))
        return torch.stack(frames, 1)


class Warped(nn.Module):
    """A GRU that reads its state at several places at once (TrajGRU)."""

    def __init__(self, mode, inputs=2, hidden=4, links=5):
        super().__init__()
        options = {"padding_mode": mode}
        self.i2h = nn.Conv2d(inputs, 3 * hidden, 3, padding=1, **options)
        self.flows = nn.Conv2d(hidden, 2 * links, 5, padding=2, **options)
        self.ret = nn.Conv2d(links * hidden, 3 * hidden, 1)
        self.hidden = hidden

    def forward(self, video):
        h = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        for x in video.unbind(1):
            rows = torch.linspace(-1, 1, x.shape[-2]).to(x)
            columns = torch.linspace(-1, 1, x.shape[-1]).to(x)
            grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
            places = (grid + 0.1 * flow.movedim(1, -1) for flow in self.flows(h).split(2, 1))
            warped = [F.grid_sample(h, place, align_corners=True) for place in places]
            r, u, value = self.ret(torch.cat(warped, 1)).chunk(3, 1)
            reset, update, new = self.i2h(x).chunk(3, 1)
            update = (update + u).sigmoid()
            h = update * h + (1 - update) * F.leaky_relu(new + (reset + r).sigmoid() * value)
        return h


class Keeps(nn.Module):
    """A wrapper that keeps the state of its network on itself, in a list, and counts."""

    def __init__(self, mode, hidden=4):
        super().__init__()
        self.inner = nn.Conv2d(2, hidden, 3, padding=1, padding_mode=mode)
        self.recur = nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode=mode, bias=False)
        self.state, self.seen, self.log = None, 0, []

    def forward(self, video):
        for x in video.unbind(1):
            state = torch.zeros_like(self.inner(x)) if self.state is None else self.state
            self.state = torch.tanh(self.inner(x) + self.recur(state))
            self.log.append(self.state)
            self.seen += 1
        return self.state


def states(layers=2, hidden=4, size=(6, 5)):
    """A list of states of `StateFirst`."""
    return [(torch.zeros(2, hidden, *size), torch.zeros(2, hidden, *size)) for _ in range(layers)]


VIDEO = torch.linspace(-1, 1, 2 * 4 * 2 * 6 * 5).sin().reshape(2, 4, 2, 6, 5)
LATENT = torch.linspace(-1, 1, 2 * 4 * 6 * 5).cos().reshape(2, 4, 6, 5)
WHOLE = gates(4, 1)

# constructor, example, and the blocks as one would write them by hand
RECURRENT = {
    "stacked [x, h]": (ConvLSTM, VIDEO, {"gates": gates(4, 4, 2)}),
    "stacked [h, x], two layers, a list of states": (
        StateFirst, (VIDEO, states()), {"cells.0.conv": gates(4, 4), "cells.1.conv": gates(4, 4)},
    ),
    "separate convolutions, peepholes": (Peepholes, VIDEO, {f"Wh{gate}": WHOLE for gate in "ifco"}),
    "pyramid": (
        Pyramid, VIDEO[..., :4, :4], {f"stages.{i}.conv.0": gates(4, 4, 4) for i in range(2)},
    ),
    "ST-LSTM": (
        SpatioTemporal, VIDEO,
        {f"cells.{i}.conv_{part}.0": gates(4, n) for i in range(2) for part, n in (("h", 4), ("m", 3))},
    ),
    "GRU": (ConvGRU, VIDEO, {"gates": gates(4, 2, 2), "candidate": gates(4, 1, 2)}),
    "GRU, separate gates": (
        SeparateGates, {"video": VIDEO}, {f"{gate}_gate": WHOLE for gate in ("reset", "update", "out")},
    ),
    "GRU, separable": (
        SeparableGRU, [LATENT, VIDEO[:, 0]], {f"conv{gate}{i}": WHOLE for gate in "zrq" for i in "12"},
    ),
    "sampler": (
        lambda mode: Sampler(mode, nn.Identity()), {"latent": LATENT, "steps": 4},
        {name: gates(4, 1, 4) for name in ("read_gate", "update_gate", "output")},
    ),
    "state on self": (Keeps, VIDEO, {"recur": WHOLE}),
}  # fmt: skip


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


def tells_compiling_from_exporting():
    """Whether torch tells its compiler whether it is to export: 2.7 does not."""
    torch.compiler.reset()
    return bool(torch.compile(lambda x: x + runtime.is_compiled_whole(), backend="eager")(torch.zeros(1)))


def constrained(model):
    """The network's orthogonal convolution."""
    return model.gates if isinstance(model, ConvLSTM) else model[0]


def graphs_and_backend():
    """A backend of `torch.compile` that runs graphs as they are, and the graphs that it has been given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


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
