"""Callbacks: they watch and report. They serve any LightningModule under any strategy."""

from danon_lightning.callbacks.run_summary import RunSummary
from danon_lightning.callbacks.text_sampler import TextSampler

__all__ = ["RunSummary", "TextSampler"]
