"""What a person sees: the report before, the verification after."""

from mfx.view.fits import Fit, fit
from mfx.view.reporting import report
from mfx.view.rows import Report
from mfx.view.verification import verify
from mfx.view.verified import ChainVerification, Verification

__all__ = ["ChainVerification", "Fit", "Report", "Verification", "fit", "report", "verify"]
