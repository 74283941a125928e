"""Where a request goes: pure functions of what is known of the swarm and of the time."""
