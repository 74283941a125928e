"""Messages between processes and between nodes, and what they may ask for."""
