"""One colour for one network, in all figures."""

_NAMES = {
    "C0": ("orthogonal", "orthogonal ConvRNN", "circular, exponential"),
    "deepskyblue": ("orthogonal ConvRNN, no phi",),
    "C9": ("orthogonal ConvRNN, exponential", "walls, exponential"),
    "navy": ("orthogonal ConvRNN, split", "walls, split", "all blocks"),
    "C1": ("unitary ConvRNN", "unitary ConvRNN, exponential"),
    "goldenrod": ("unitary ConvRNN, split",),
    "magenta": ('zeros, exponential, domain="any"',),
    "crimson": ("zeros, exponential, domain=16",),
    "C2": ("ConvLSTM", "original"),
    "C3": ("ConvLSTM (chrono)",),
    "C4": ("ConvGRU",),
    "C5": ("plain ConvRNN", "plain zero-padded convolution", "nn.Conv2d"),
    "C6": ("plain ConvRNN (identity)",),
    "C7": ("expRNN, dense",),
    "C8": ("memory path", "memory path and candidate's block"),
    "slateblue": ("candidate's block",),
    "black": ("moving memory",),
}
COLOURS = {name: colour for colour, names in _NAMES.items() for name in names}


def colour_of(name: str) -> str:
    """Return the colour of a network; one that is a variant of another has the other's."""
    base = name.removeprefix("circular: ").partition(", ")[0]
    return COLOURS.get(name) or COLOURS[base]
