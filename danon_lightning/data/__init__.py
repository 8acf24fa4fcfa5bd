"""LightningDataModules and the sampler they share."""

from danon_lightning.data.byte_text import ByteTextDataModule
from danon_lightning.data.sampler import GlobalBatchSampler, ResumableDataLoader

__all__ = ["ByteTextDataModule", "GlobalBatchSampler", "ResumableDataLoader"]
