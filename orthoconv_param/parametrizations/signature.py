"""The settings that a checkpoint must match: a few words in it, compared when it is loaded.

They are one tensor of bytes in the ``state_dict``, so that every format of checkpoints holds them.
Checkpoints without them load as well.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import Size


def encode(words: Mapping[str, str]) -> Tensor:
    """Return words as bytes."""
    text = "\n".join(f"{key}={value}" for key, value in words.items())
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def decode(state: Any) -> dict[str, str]:
    """Return the words of bytes, none if they are not readable."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.is_meta:
        return {}
    lines = bytes(state.tolist()).decode(errors="replace").split("\n")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Say how a checkpoint differs; None if in nothing that both name."""
    keys = [key for key in here if key in there and here[key] != there[key]]
    if not keys:
        return None
    of, wanted = (", ".join(f"{key} {words[key]}" for key in keys) for words in (there, here))
    return f"the checkpoint should be of a convolution with {wanted}. Found one with {of}"


def by_axis(size: Size) -> str:
    """Return ``12x8`` for ``(12, 8)``."""
    return "x".join(map(str, size))
