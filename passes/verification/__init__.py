"""Every pass is checked numerically the moment it has run: locally in float64, and end to end in the native dtype."""

from graphwright.passes.verification.check import Verification, Verifier

__all__ = ["Verification", "Verifier"]
