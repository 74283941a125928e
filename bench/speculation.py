"""Guesses that are verified in one pass against plain decoding and llama-server's own kinds: this file with --help."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import chainguesses, draftpairs, guesses, runner, sameness

SCENARIOS: runner.Scenarios = {
    "copy": guesses.copy,
    "shuffled": guesses.shuffled,
    "prediction": guesses.prediction,
    "speckled": guesses.speckled,
    "novel": guesses.novel,
    "users": guesses.users,
    "chain-copy": chainguesses.copy,
    "chain-novel": chainguesses.novel,
    "pair": draftpairs.pair,
    "chain-pair": chainguesses.pair,
    "guide": draftpairs.guide,
    "skip": draftpairs.skip,
    "same": sameness.same,
}

if __name__ == "__main__":
    runner.run("speculation", SCENARIOS)
