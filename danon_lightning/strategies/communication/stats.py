"""What the gradient exchange has sent, and how long it took."""

from dataclasses import dataclass


@dataclass
class CommunicationStats:
    """Counts of one rank since the start of training. Bytes are payload, without the transport's headers.

    Attributes:
        steps: Exchanges, one for each synchronised backward pass.
        skipped_steps: Exchanges whose gradients were not finite, so that their residuals were rolled back. Counted
            where gradients are compressed.
        intra_node_bytes: Bytes sent to ranks of the same node.
        inter_node_bytes: Bytes sent to ranks of other nodes.
        dense_bytes: Bytes of the gradients themselves, uncompressed, as they came.
        compression_ratio: Bytes that the same exchange would have sent over the compressed level dense, divided by
            those that it has sent there; 1 if it has sent nothing.
        exposed_seconds: Time from the moment when the last bucket was ready until all were averaged: what the exchange
            has added to the steps. Where it goes on beside the next forward pass: time for which that was held up.
        hidden_seconds: Time for which the exchange was at work beside the backward pass, and the forward pass.
        residual_norm: 2-norm of what this rank keeps for later steps, in units of the averaged gradient.
    """

    steps: int = 0
    skipped_steps: int = 0
    intra_node_bytes: int = 0
    inter_node_bytes: int = 0
    dense_bytes: int = 0
    compression_ratio: float = 1.0
    exposed_seconds: float = 0.0
    hidden_seconds: float = 0.0
    residual_norm: float = 0.0

    def count(self, size: int, *, remote: bool) -> None:
        """Add the bytes of one operation."""
        if remote:
            self.inter_node_bytes += size
        else:
            self.intra_node_bytes += size
