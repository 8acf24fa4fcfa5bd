"""Where the time of a training step goes, and how much memory it takes."""

from danon_lightning.callbacks.performance_monitor.monitor import PerformanceMonitor

__all__ = ["PerformanceMonitor"]
