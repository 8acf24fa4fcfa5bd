"""What a run looks like from a doctor's chair: findings of all callbacks, in one report."""

from danon_lightning.callbacks.health.finding import Finding, ReportsFindings
from danon_lightning.callbacks.health.report import HealthReport

__all__ = ["Finding", "HealthReport", "ReportsFindings"]
