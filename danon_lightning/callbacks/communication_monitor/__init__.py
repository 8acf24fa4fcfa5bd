"""What ranks send each other, and what that costs."""

from danon_lightning.callbacks.communication_monitor.monitor import CommunicationMonitor

__all__ = ["CommunicationMonitor"]
