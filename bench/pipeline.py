"""A model whose layers two boxes of one core share: stages of a swarm against llama.cpp's RPC. This file with --help.

The scenarios delay, narrow and prefill make network namespaces: they need Linux and root.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import failovers, longprompts, pipelines, runner
from bench.netns import NoNamespaces

SCENARIOS: runner.Scenarios = {
    "decode": pipelines.decode,
    "delay": pipelines.delay,
    "narrow": pipelines.narrow,
    "prefill": longprompts.prefill,
    "single": longprompts.single,
    "memory": failovers.memory,
    "agreement": pipelines.agreement,
    "kill": failovers.kill,
    "recover": failovers.recover,
    "rpc": pipelines.rpc,
}

if __name__ == "__main__":
    try:
        runner.run("pipeline", SCENARIOS)
    except NoNamespaces as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
