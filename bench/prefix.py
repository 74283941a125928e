"""The prefix cache against llama-server's, and against its own promises: this file with --help."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import prefixes, runner

SCENARIOS: runner.Scenarios = {
    "repeat": prefixes.repeat,
    "together": prefixes.together,
    "cost": prefixes.cost,
    "eviction": prefixes.eviction,
}

if __name__ == "__main__":
    runner.run("prefix", SCENARIOS)
