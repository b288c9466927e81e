"""What hooks and modules do with the values of a branch."""

from mfx.run.watching.derived import Followed, ran, saving
from mfx.run.watching.standing import stand_in

__all__ = ["Followed", "ran", "saving", "stand_in"]
