"""The models that come with the package: a small one that knows swarmcpp and stories, and its draft."""

from __future__ import annotations

from pathlib import Path

import swarmcpp

GUIDE = "swarmcpp-guide"
DRAFT = "swarmcpp-guide-draft"
"""Guesses what GUIDE says next; with the same vocabulary."""

NAMES = (GUIDE, DRAFT)

ABOUT = (
    "no model was named, so this is swarmcpp-guide: 11 million parameters, knows swarmcpp, small sums and stories, and "
    "nothing else. A bigger one: swarmcpp serve qwen2.5-0.5b (swarmcpp models lists more), or swarmcpp serve FILE.gguf"
)
"""What is said where GUIDE is taken because nothing was asked for."""


def embedded_file(name: str = GUIDE) -> Path:
    """The GGUF of GUIDE or DRAFT. Raises KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return Path(swarmcpp.__file__).parent / "guide" / f"{name}.gguf"
