"""A node's part in its swarm: what joins links, routing, blocks and models with the local engine."""
