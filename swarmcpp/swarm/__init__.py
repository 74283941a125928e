"""Everything that speaks ZeroMQ."""
