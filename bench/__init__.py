"""Measurements against llama-server built from the same llama.cpp source; `make bench` runs `serve.py`."""
