"""A swarm of nodes on this machine: links of real rates, replicas, joining, a node killed. This file with --help.

The scenarios prefix, chapter and join make network namespaces: they need Linux and root.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import delegates, runner, swarms
from bench.netns import NoNamespaces

SCENARIOS: runner.Scenarios = {
    "prefix": swarms.prefix,
    "chapter": swarms.chapter,
    "remote": delegates.remote,
    "replicas": delegates.replicas,
    "join": swarms.join,
    "arenas": swarms.arenas,
    "kill": delegates.kill,
}

if __name__ == "__main__":
    try:
        runner.run("swarm", SCENARIOS)
    except NoNamespaces as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
