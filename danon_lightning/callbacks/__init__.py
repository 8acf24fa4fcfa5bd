"""Callbacks: they watch and report. They serve any LightningModule under any strategy."""

from danon_lightning.callbacks.attention_monitor import AttentionMonitor, MeasuresAttention
from danon_lightning.callbacks.health import Finding, HealthReport, ReportsFindings
from danon_lightning.callbacks.pipeline_timeline import PipelineTimeline, draw_timeline
from danon_lightning.callbacks.run_summary import RunSummary
from danon_lightning.callbacks.text_sampler import TextSampler

__all__ = [
    "AttentionMonitor",
    "Finding",
    "HealthReport",
    "MeasuresAttention",
    "PipelineTimeline",
    "ReportsFindings",
    "RunSummary",
    "TextSampler",
    "draw_timeline",
]
