"""The largest batch, or sequence, that fits a memory: foreseen, and where there is a device, tried."""

from mfx.view.fits.fitting import Fit, fit

__all__ = ["Fit", "fit"]
