"""What attention attends to: numbers and maps of any module that tells them."""

from danon_lightning.callbacks.attention_monitor.figures import byte_tokens, draw_map
from danon_lightning.callbacks.attention_monitor.monitor import AttentionMonitor
from danon_lightning.callbacks.attention_monitor.protocol import MeasuresAttention

__all__ = ["AttentionMonitor", "MeasuresAttention", "byte_tokens", "draw_map"]
