"""Parts of attention models that are of use by themselves."""

from danon_lightning.attention.components.cache import AttentionCache, CacheStats

__all__ = ["AttentionCache", "CacheStats"]
