"""Everything that touches llama.cpp: owners of its objects, text, samplers, and the CPU probe."""
