"""Finds where a NaN or an infinity came from: the operation, the module, the parameter, the sample."""

from danon_lightning.callbacks.nan_debugger.callback import NaNDebugger
from danon_lightning.callbacks.nan_debugger.policies import NonFiniteError
from danon_lightning.callbacks.nan_debugger.thresholds import NumericLimits

__all__ = ["NaNDebugger", "NonFiniteError", "NumericLimits"]
