"""What travels between nodes: blocks of KV, and model files."""
