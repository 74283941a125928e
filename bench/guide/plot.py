"""Draws the loss curves that train.py wrote. `python -m bench.guide.plot CURVES.json OUT.png`. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(curves: Path, out: Path) -> None:
    """Loss over tokens of both models; logarithmic axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in json.loads(curves.read_text()).items():
        line = [point for point in points if "loss" in point]
        (drawn,) = axes.loglog([point["tokens"] for point in line], [point["loss"] for point in line], label=name)
        end = points[-1]
        axes.plot(end["tokens"], end["held_out"], "o", color=drawn.get_color(), label=f"{name}, held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
