import copy
import sys
from itertools import combinations

import pytest
import torch
from oracles import dense, operator
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal, plot_gradient_norms, plot_spectrum


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def drawn_heights(values):
    """The singular values that are drawn, of one after the other."""
    return [torch.as_tensor(dots.get_offsets().data)[:, 1] for dots in values.collections]


@pytest.mark.parametrize("boundary", ["circular", "zeros", "walls"])
def test_plot_spectrum_draws_the_operators_eigenvalues_and_singular_values(boundary, pyplot):
    torch.manual_seed(0)
    mode = "circular" if boundary == "circular" else "zeros"
    plain = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    options = {"method": "split"} if boundary == "walls" else {"domain": 6}
    conv = orthogonal(copy.deepcopy(plain), boundary=boundary, **options)
    eigenvalues, values = plot_spectrum(conv, 6, before=plain)
    for module, dots, heights in zip(
        (plain, conv), eigenvalues.collections, values.collections, strict=True
    ):
        M = operator(module, (6, 6))
        drawn = torch.view_as_complex(torch.as_tensor(dots.get_offsets().data).double().contiguous())
        apart = (drawn[:, None] - torch.linalg.eigvals(M)).abs()
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-9  # each is drawn, and nothing else
        height = torch.as_tensor(heights.get_offsets().data)[:, 1]
        apart = (height[:, None] - torch.linalg.svdvals(M)).abs()
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-9
    order = "share of the singular values, largest first"
    assert values.get_xlabel() == ("frequency (cycles per pixel)" if boundary == "circular" else order)
    assert "pixels" in values.get_title()
    assert "before: defect" in values.get_legend().get_texts()[0].get_text()


def test_plot_spectrum_draws_in_descending_order_what_is_not_periodic(pyplot):
    torch.manual_seed(0)
    zeros = nn.Conv1d(2, 2, 3, padding=1, dtype=torch.float64)
    kernel = torch.randn(2, 2, 3, dtype=torch.float64)
    _, values = plot_spectrum(zeros, 9, before=kernel)
    for exact, dots in zip((dense(kernel, (9,)), operator(zeros, (9,))), values.collections, strict=True):
        share, height = torch.as_tensor(dots.get_offsets().data).mT
        torch.testing.assert_close(height, torch.linalg.svdvals(exact))
        torch.testing.assert_close(share, torch.linspace(0, 1, 18, dtype=torch.float64))


@pytest.mark.parametrize("boundary", ["circular", "zeros", "walls"])
def test_plot_spectrum_draws_what_removal_leaves(boundary, pyplot):
    conv = orthogonal(nn.Conv2d(3, 3, 3, padding=1), method="split", boundary=boundary)
    (before,) = drawn_heights(plot_spectrum(conv, 5)[1])
    parametrize.remove_parametrizations(conv, "weight")
    (after,) = drawn_heights(plot_spectrum(conv, 5)[1])
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_plot_spectrum_refuses_what_takes_long(pyplot):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"domain should be smaller: .*Found 2048 x 2048\. \(report"):
        plot_spectrum(conv, 16)
    with pytest.raises(ValueError, match="domain should be smaller"):
        plot_spectrum(torch.ones(8, 8, 3, 3), 16, before=conv)
    assert not pyplot.get_fignums()


def test_plot_spectrum_puts_values_over_their_frequency(pyplot):
    blur = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)[None, None]
    values = plot_spectrum(blur, 16)[-1].collections[0].get_offsets().data
    frequency, height = torch.as_tensor(values).mT
    torch.testing.assert_close(height, torch.cos(torch.pi * frequency) ** 2)
    assert frequency.max() == 0.5
    assert len(frequency) == 9


def test_plot_spectrum_of_a_frame_has_singular_values_only(pyplot):
    _, (first, second) = pyplot.subplots(1, 2)
    conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
    assert plot_spectrum(conv, 8, axes=[first]) == (first,)
    strided = orthogonal(nn.Conv1d(2, 4, 3, padding=1, stride=2))
    assert plot_spectrum(strided, 8, axes=[second]) == (second,)
    with pytest.raises(ValueError, match=r"axes should be a sequence of 1 matplotlib axes\. Found 2"):
        plot_spectrum(conv, 8, axes=[first, second])
    for conv in (nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=1, stride=2)):  # the size changes
        assert len(plot_spectrum(conv, 8)) == 1


def test_plot_spectrum_says_what_the_values_are_of(pyplot):
    zeros, periodic = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    line = "\nof what the module computes there, edges included"
    for first, second in ((zeros, None), (zeros, periodic), (periodic, zeros)):
        drawn = plot_spectrum(first, (13, 4), before=second)
        for name, axes in zip(("eigenvalues", "singular values"), drawn, strict=True):
            assert axes.get_title() == f"{name} on images of 13x4 pixels{line}"
    transposed = nn.ConvTranspose2d(2, 2, 3, padding=1, stride=2, output_padding=1)
    (axes,) = plot_spectrum(transposed, 8)
    assert axes.get_title() == f"singular values on outputs of 8x8 pixels{line}"
    assert plot_spectrum(periodic, 8)[0].get_title() == "eigenvalues on images of 8x8 pixels"
    assert plot_spectrum(torch.ones(1, 1, 3), 8)[0].get_title() == "eigenvalues on images of 8 samples"


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    conv.register_forward_hook(lambda module, x, y: 2 * y)
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        nn.ConvTranspose2d(2, 2, 3, padding=1, stride=2),
        Doubled(2, 2, 3, padding=1, padding_mode="circular"),
        hooked(),
    ],
)
def test_plot_spectrum_draws_whatever_a_forward_computes(conv, pyplot):
    (height,) = drawn_heights(plot_spectrum(conv, 8)[-1])
    exact = torch.linalg.svdvals(operator(conv, (8, 8)).double())
    torch.testing.assert_close(height, exact, check_dtype=False, atol=1e-5, rtol=0)


def test_plot_spectrum_names_what_does_not_fit(pyplot):
    with pytest.raises(ValueError, match=r"before should have as many axes of space .*, 1\. Found 2"):
        plot_spectrum(torch.ones(1, 1, 3), 8, before=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="divisible by the stride"):
        plot_spectrum(nn.ConvTranspose1d(2, 2, 3, stride=2), 9)


@pytest.mark.parametrize("mode", ["no layout engine", "constrained"])
@pytest.mark.parametrize("scale", [1.0, 1.001, 0.97, 0.0, 3.0])
def test_plot_spectrum_shows_differences_but_no_rounding(scale, mode, pyplot):
    layout = mode if mode == "constrained" else None
    _, axes = pyplot.subplots(1, 2, layout=layout)
    kernel = scale * torch.eye(2)[..., None]
    _, values = plot_spectrum(kernel, 8, before=torch.eye(2)[..., None], axes=axes)
    low, high = values.get_ylim()
    assert low < min(scale, 1)
    assert high > max(scale, 1)
    span = max(abs(scale - 1), 0.2)
    assert span < high - low < (1.6 if layout is None else 1.2) * span


def overlaps(figure):
    """Return the texts, legends and axes of a figure of which one covers another, or that leave it."""
    figure.canvas.draw()
    boxes = {}
    for i, panel in enumerate(figure.axes):
        legend = panel.get_legend()
        parts = {"title": panel.title, "x": panel.xaxis.label, "y": panel.yaxis.label}
        parts |= {"panel": panel.patch} | ({} if legend is None else {"legend": legend})
        boxes |= {(i, name): part.get_window_extent() for name, part in parts.items()}
        for axis in (panel.xaxis, panel.yaxis):
            ticks = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
            low, high = sorted(axis.get_view_interval())
            for j, label in enumerate(ticks):
                if low <= label.get_position()[axis is panel.yaxis] <= high:
                    boxes[i, f"{axis.axis_name}{j}"] = label.get_window_extent()
    crossing = [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    outside = [name for name, box in boxes.items() if box.x0 < 0 or box.y0 < 0]
    outside += [n for n, box in boxes.items() if box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]
    return crossing + outside


def test_no_text_of_a_plot_lies_on_another_or_on_data(pyplot):
    torch.manual_seed(0)
    zeros = nn.Conv2d(4, 4, 3, padding=1)
    large = orthogonal(copy.deepcopy(zeros), boundary="zeros")
    strided = orthogonal(nn.Conv2d(4, 8, 3, padding=1, stride=2), boundary="zeros")
    x = torch.randn(1, 20, 3)
    several = {f"network number {i} of a long name": Decay(1 - 0.1 * i) for i in range(6)}
    for axes in [
        plot_spectrum(large, 8),
        plot_spectrum(large, 8, before=zeros),
        plot_spectrum(strided, 8, before=nn.Conv2d(4, 8, 3, padding=1, stride=2)),
        plot_spectrum(orthogonal(nn.Conv2d(4, 4, 3, padding=1)), 32),
        plot_spectrum(torch.randn(2, 2, 3), 64, before=torch.randn(2, 2, 3)),
        (plot_gradient_norms(several, x),),
        (plot_gradient_norms({"first": Decay(1.0), "second": Decay(0.9)}, x),),
        (plot_gradient_norms({"last": LastStep(), "recurrent": Decay(1.0)}, x),),
    ]:
        assert not overlaps(axes[0].figure)
        assert axes[-1].get_legend() is not None


class Decay(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.dropout = nn.Dropout()

    def forward(self, x, start=0.0):
        h = start
        for step in x.unbind(1):
            h = self.factor * self.dropout(h) if isinstance(h, torch.Tensor) else h
            h = h + step
        return h


def test_plot_gradient_norms_draws_the_gradient_at_each_step(pyplot):
    models = {"half": Decay(0.5), "one": Decay(1.0)}
    x = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))
    axes = plot_gradient_norms(models, x)
    assert axes.get_yscale() == "log"
    for line, (name, model) in zip(axes.lines, models.items(), strict=True):
        curve = torch.as_tensor(line.get_ydata())
        assert line.get_label() == name
        assert len(curve) == 12
        torch.testing.assert_close(curve[:-1] / curve[1:], model.factor.detach().double().expand(11))
        assert model.factor.grad is None
        assert model.training
    y = models["one"].eval()(x)
    torch.testing.assert_close(float(axes.lines[1].get_ydata()[-1]), (2 * y / y.numel()).norm().item())
    again = plot_gradient_norms(models["half"], {"x": x, "start": 1.0}, loss=lambda y: y.sum(), axes=axes)
    assert again is axes
    assert len(axes.lines) == 3
    assert plot_gradient_norms(models["half"], (x.mT.contiguous(), 0.0), time_axis=2) is not axes


class LastStep(nn.Module):
    def forward(self, x):
        return x[:, -1]


class Weighted(nn.Module):
    """Gives its input, with given factors at the time steps."""

    def __init__(self, factors):
        super().__init__()
        self.register_buffer("factors", torch.as_tensor(factors))

    def forward(self, x):
        return x * self.factors[:, None]


def decades(axes):
    low, high = axes.get_ylim()
    return torch.log10(torch.tensor(high / low)).item()


@pytest.mark.parametrize(
    "curves",
    [
        [[1.0, 1.0, 1.0, 1.0]],
        [[0.99, 1.0, 1.01, 1.0]],
        [[1.0, 1.0, 1.0, 1.0], [1.02, 1.02, 1.01, 1.0]],
        [[1e-30, 1e-30, 1e-30, 1e-30]],
        [[3e20, 3e20, 3.1e20, 3e20]],
        [[0.0, 1.0, 0.0, 0.0]],
        [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 20.0]],
        [[1e-7, 1e-3, 1e-2, 1.0], [1.0, 1.0, 0.0, 1.0]],
    ],
)
@pytest.mark.parametrize(
    "given",
    ["new", *(pytest.param(way, marks=pytest.mark.slow) for way in ("passed", "one after another"))],
)
def test_plot_gradient_norms_spans_the_curves_and_a_decade_but_no_more(curves, given, pyplot):
    x = torch.ones(1, 4, 1, dtype=torch.float64)
    models = {f"curve {i}": Weighted(torch.tensor(c, dtype=torch.float64)) for i, c in enumerate(curves)}
    axes = None if given == "new" else pyplot.subplots()[1]
    if given == "one after another":
        for name, model in models.items():
            plot_gradient_norms({name: model}, x, loss=torch.sum, axes=axes)
    else:
        axes = plot_gradient_norms(models, x, loss=torch.sum, axes=axes)
    points = [value for curve in curves for value in curve if value]
    drawn = torch.log10(torch.tensor(max(points) / min(points))).item()
    assert 1 <= decades(axes) < 1.2 * max(drawn, 1) + (0.5 if given == "one after another" else 0)
    assert axes.get_ylim()[0] < min(points)
    assert axes.get_ylim()[1] > max(points)
    low, high = axes.get_xlim()
    assert low <= 0 < 3 <= high  # all steps
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    labels = axes.yaxis.get_ticklabels(which="both")
    assert sum(low <= t.get_position()[1] <= high and t.get_text() != "" for t in labels) >= 2


def test_plot_gradient_norms_keeps_the_callers_limits(pyplot):
    _, axes = pyplot.subplots()
    axes.set(yscale="log", ylim=(1e-9, 1e9), xlim=(-5, 50))
    plot_gradient_norms(Decay(1.0), torch.randn(1, 4, 2), axes=axes)
    assert axes.get_ylim() == (1e-9, 1e9)
    assert axes.get_xlim() == (-5, 50)


def test_plot_gradient_norms_shows_single_points_and_counts_zeros(pyplot):
    axes = plot_gradient_norms({"last": LastStep(), "recurrent": Decay(0.9)}, torch.randn(1, 20, 3))
    last, recurrent = axes.lines
    assert last.get_label() == "last: zero at 19 of 20 steps"
    assert recurrent.get_label() == "recurrent"
    assert (last.get_marker(), last.get_markevery()) == ("o", [19])
    assert recurrent.get_marker() == "None"
    assert torch.as_tensor(last.get_ydata()).isfinite().tolist() == 19 * [False] + [True]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [last.get_label(), "recurrent"]
    low, high = axes.get_xlim()
    assert low <= 0 < 19 <= high

    gaps = Weighted([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    (line,) = plot_gradient_norms({"gaps": gaps}, torch.ones(1, 7, 2), loss=torch.sum).lines
    assert line.get_markevery() == [0, 5]
    assert line.get_label() == "gaps: zero at 3 of 7 steps"
    (line,) = plot_gradient_norms({"one": LastStep()}, torch.ones(1, 1, 2)).lines
    assert (line.get_label(), line.get_markevery()) == ("one", [0])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_plot_gradient_norms_says_where_gradients_are_not_finite(pyplot):
    model = Weighted([torch.inf, 1.0, torch.nan, 0.0])
    (line,) = plot_gradient_norms({"odd": model}, torch.ones(1, 4, 2), loss=torch.sum).lines
    assert line.get_label() == "odd: zero at 1 of 4 steps and not finite at 2 of 4 steps"
    assert line.get_markevery() == [1]


def test_plot_gradient_norms_takes_no_small_gradient_for_zero(pyplot):
    model = Weighted([1e-30, 1e30, 1.0])  # whose squares float32 does not hold
    (line,) = plot_gradient_norms({"wide": model}, torch.ones(1, 3, 4), loss=torch.sum).lines
    assert line.get_ydata().tolist() == pytest.approx([2e-30, 2e30, 2.0], rel=1e-6)
    assert line.get_label() == "wide"


def test_plot_gradient_norms_draws_no_empty_plot(pyplot):
    x = torch.ones(1, 3, 2)
    silent, models = Weighted([0.0, 0.0, 0.0]), {}
    for models in ({"a": silent}, {"a": silent, "b": silent}):
        found = ", ".join(f"{name}: zero at 3 of 3 steps" for name in models)
        with pytest.raises(
            ValueError, match=f"finite and not zero, at one time step at least. Found {found}"
        ):
            plot_gradient_norms(models, x, loss=torch.sum)
    with pytest.raises(ValueError, match="Found a: not finite at 3 of 3 steps"):
        plot_gradient_norms({"a": Weighted(3 * [torch.nan])}, x, loss=torch.sum)
    assert not pyplot.get_fignums()
    axes = plot_gradient_norms({"a": silent, "b": Decay(1.0)}, x, loss=torch.sum)
    assert axes.lines[0].get_label() == "a: zero at 3 of 3 steps"


def test_plot_gradient_norms_names_a_class_of_any_name(pyplot):
    class _Hidden(LastStep):
        pass

    legend = plot_gradient_norms(_Hidden(), torch.ones(1, 1, 2)).get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_Hidden"]


@pytest.mark.parametrize("layout", [None, "constrained", "tight"])
def test_legends_are_below_the_axes_where_there_is_room(layout, pyplot):
    figure, axes = pyplot.subplots(1, 3, layout=layout, figsize=(15, 5))
    kernel = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    plot_spectrum(kernel, 8, before=kernel, axes=axes[:2])
    plot_gradient_norms({"half": Decay(0.5), "one": Decay(1.0)}, torch.ones(1, 9, 2), axes=axes[2])
    figure.canvas.draw()
    for panel in axes:
        legend = panel.get_legend()
        if legend is None:
            assert layout is None
            assert panel is axes[0]  # the other panel's legend has the colours
            continue
        box = legend.get_window_extent()
        assert box.y0 > 0
        below = box.y1 < panel.bbox.y0
        assert below == (layout is not None)
    if layout is None:
        dots = axes[1].transData.transform(axes[1].collections[0].get_offsets())
        assert dots[:, 1].max() < axes[1].get_legend().get_window_extent().y0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: plot_gradient_norms([], x), TypeError, "model should be"),
        (lambda x: plot_gradient_norms(Decay(1.0), 3), TypeError, "inputs should begin with"),
        (lambda x: plot_gradient_norms(Decay(1.0), x, time_axis=5), ValueError, "time_axis should be"),
        (lambda x: plot_gradient_norms(Decay(1.0), x, loss=lambda y: y), ValueError, "loss should be"),
        (
            lambda x: plot_gradient_norms(Decay(1.0), x, loss=lambda y: torch.ones(())),
            ValueError,
            "depends on the sequence",
        ),
        (
            lambda x: plot_gradient_norms(Decay(1.0), x, loss=lambda y: torch.ones((), requires_grad=True)),
            ValueError,
            "depends on the sequence",
        ),
        (lambda x: plot_gradient_norms(Decay(1.0), ()), TypeError, "inputs should begin with"),
    ],
)
def test_plot_gradient_norms_names_bad_input(call, error, message, pyplot):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 4, 2))


def test_plots_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install orthoconv_param\[plot\]"):
        plot_spectrum(torch.ones(1, 1, 1), 4)
