"""Measure the gain of each key dimension."""

from gainlens.probes.gains import KeyGains, ModelCard
from gainlens.probes.probe import KeyGainProbe, probe_gains

__all__ = ["KeyGainProbe", "KeyGains", "ModelCard", "probe_gains"]
