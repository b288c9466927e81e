"""The momentumized model: making it, changing its gamma, asking it."""

from mfx.model.anneal import GammaSchedule
from mfx.model.conversion import graph_of, momentumize
from mfx.model.inverse import Chain, chains
from mfx.model.parts import drift, set_gamma

__all__ = ["Chain", "GammaSchedule", "chains", "drift", "graph_of", "momentumize", "set_gamma"]
