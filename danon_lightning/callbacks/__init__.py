"""Callbacks: they watch and report. They serve any LightningModule under any strategy."""

from danon_lightning.callbacks.communication_monitor import CommunicationMonitor
from danon_lightning.callbacks.performance_monitor import PerformanceMonitor
from danon_lightning.callbacks.pipeline_timeline import PipelineTimeline, draw_timeline
from danon_lightning.callbacks.run_summary import RunSummary
from danon_lightning.callbacks.text_sampler import TextSampler

__all__ = [
    "CommunicationMonitor",
    "PerformanceMonitor",
    "PipelineTimeline",
    "RunSummary",
    "TextSampler",
    "draw_timeline",
]
