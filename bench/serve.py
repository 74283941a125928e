"""`swarmcpp serve` against llama-server of the same source, on one machine: `make bench`, or this file with --help."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import exactness, latency, rates, runner

SCENARIOS: runner.Scenarios = {
    "decode": rates.decode,
    "agreement": exactness.agreement,
    "stall": latency.stall,
    "cancel": latency.cancel,
    "beside": exactness.beside,
}

if __name__ == "__main__":
    runner.run("serve", SCENARIOS)
