"""Watches gradients: norms, updates, agreement between ranks, and noise."""

from danon_lightning.callbacks.gradient_monitor.monitor import GradientMonitor

__all__ = ["GradientMonitor"]
