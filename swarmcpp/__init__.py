"""swarmcpp: a CPU-first swarm node for large language models on llama.cpp."""

__version__ = "0.1.0"
