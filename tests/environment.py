"""What the environment asks of the tests alone. It is taken out: swarmcpp refuses variables that it does not know."""

from __future__ import annotations

import os

STORIES = os.environ.pop("SWARMCPP_STORIES", None)
"""Where stories260K.gguf is."""

KILLS = int(os.environ.pop("SWARMCPP_E2E_KILLS", "4"))
"""Of each test that kills engines, stages or nodes again and again."""
