"""A node's engine processes: launched, fed, restarted when they die, and what requests run on there."""
