"""When replicas synchronise, other than at every step before the optimizer moves."""

from danon_lightning.strategies.sync.asynchronous import StaleGradients
from danon_lightning.strategies.sync.periodic import LocalSteps
from danon_lightning.strategies.sync.settings import (
    AsyncSync,
    PeriodicSync,
    check_sync_mode,
    keep_local,
    resolve_sync_mode,
)

__all__ = [
    "AsyncSync",
    "LocalSteps",
    "PeriodicSync",
    "StaleGradients",
    "check_sync_mode",
    "keep_local",
    "resolve_sync_mode",
]
