"""How loud each key dimension is."""

from gainlens.probes.gains import KeyGains, ModelCard
from gainlens.probes.probe import KeyGainProbe, probe_gains

__all__ = ["KeyGainProbe", "KeyGains", "ModelCard", "probe_gains"]
