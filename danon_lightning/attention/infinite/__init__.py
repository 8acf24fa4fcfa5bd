"""Enhanced infinite attention: a window and summaries for what is near, a linear memory for everything before."""

from danon_lightning.attention.infinite.module import InfiniteAttention, InfiniteAttentionConfig, InfiniteModel

__all__ = ["InfiniteAttention", "InfiniteAttentionConfig", "InfiniteModel"]
