"""Slim models of vLLM: each family's own class with ``SlimAttention`` in every layer."""
