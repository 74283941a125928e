"""Blocks of KV: their keys, the arena that holds them, and what a node knows of them."""
