"""Where a model keeps its keys, and loading of models and text."""

from gainlens.model.loading import load_model
from gainlens.model.sites import KeySites, key_sites
from gainlens.model.text import load_tokens

__all__ = ["KeySites", "key_sites", "load_model", "load_tokens"]
