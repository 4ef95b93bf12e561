"""Texts: loading, splitting, batches, and which document is which."""
