"""Callbacks: they watch and report. They serve any LightningModule under any strategy."""

from danon_lightning.callbacks.attention_monitor import AttentionMonitor, MeasuresAttention
from danon_lightning.callbacks.communication_monitor import CommunicationMonitor
from danon_lightning.callbacks.gradient_monitor import GradientMonitor
from danon_lightning.callbacks.health import Finding, HealthReport, ReportsFindings
from danon_lightning.callbacks.nan_debugger import NaNDebugger, NonFiniteError, NumericLimits
from danon_lightning.callbacks.performance_monitor import PerformanceMonitor
from danon_lightning.callbacks.pipeline_timeline import PipelineTimeline, draw_timeline
from danon_lightning.callbacks.run_summary import RunSummary
from danon_lightning.callbacks.text_sampler import TextSampler

__all__ = [
    "AttentionMonitor",
    "CommunicationMonitor",
    "Finding",
    "GradientMonitor",
    "HealthReport",
    "MeasuresAttention",
    "NaNDebugger",
    "NonFiniteError",
    "NumericLimits",
    "PerformanceMonitor",
    "PipelineTimeline",
    "ReportsFindings",
    "RunSummary",
    "TextSampler",
    "draw_timeline",
]
