"""What the gradient exchange has sent."""

from dataclasses import dataclass


@dataclass
class CommunicationStats:
    """Counts of one rank since the start of training. Bytes are payload, without the transport's headers.

    Attributes:
        steps: Exchanges, one for each synchronised backward pass.
        intra_node_bytes: Bytes sent to ranks of the same node.
        inter_node_bytes: Bytes sent to ranks of other nodes.
        dense_bytes: Bytes of the gradients themselves, uncompressed, as they came.
    """

    steps: int = 0
    intra_node_bytes: int = 0
    inter_node_bytes: int = 0
    dense_bytes: int = 0

    def count(self, intra_node: int, inter_node: int) -> None:
        """Add the bytes of one operation."""
        self.intra_node_bytes += intra_node
        self.inter_node_bytes += inter_node
