"""Locate the keys in a model; load models and text."""

from gainlens.data.loading import load_tokens
from gainlens.model.finding_sites import key_sites
from gainlens.model.loading import load_model
from gainlens.model.sites import KeySites

__all__ = ["KeySites", "key_sites", "load_model", "load_tokens"]
