"""What holds for every test."""

from __future__ import annotations

import signal

from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A parent that ignores Ctrl-C (a background job) hands that down to every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
