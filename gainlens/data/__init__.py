"""Texts: loading, splitting, batching and document identity."""
