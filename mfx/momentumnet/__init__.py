"""momentumnet's interface over the same chains."""

from mfx.momentumnet.net import MomentumNet
from mfx.momentumnet.transform import transform_to_momentumnet

__all__ = ["MomentumNet", "transform_to_momentumnet"]
