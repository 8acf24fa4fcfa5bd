"""A short depthwise convolution over the projected queries, keys and values.

It lets a head compare neighbouring tokens directly, which attention alone needs two layers for.

Reference:
    So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling", which finds the same place
    for a depthwise convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DepthwiseConv"]

CAUSAL_WIDTH = 4
SYMMETRIC_WIDTH = 3


class DepthwiseConv(nn.Module):
    """Convolution along the sequence, one filter a channel, the identity at first.

    Args:
        channels: Number of channels C.
        causal: ``True`` mixes each token with the three before it, ``False`` with its two neighbours.
    """

    def __init__(self, channels: int, *, causal: bool) -> None:
        """Create the filters."""
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(channels, CAUSAL_WIDTH if causal else SYMMETRIC_WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every filter to the identity."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, -1 if self.causal else SYMMETRIC_WIDTH // 2] = 1.0

    def init_state(self, batch_size: int) -> Tensor:
        """Return the state before the first token: the zeros that the parallel form pads with.

        Args:
            batch_size: Number of sequences b.

        Returns:
            ``[b, width - 1, C]``.
        """
        if not self.causal:
            raise ValueError("causal=False has no streaming form: a token would wait for its right neighbour")
        return self.weight.new_zeros(batch_size, self.weight.shape[1] - 1, self.weight.shape[0])

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Convolve ``x``, after the tokens of ``state`` if there is one.

        Args:
            x: Input ``[b, n, C]``, zero at padded positions.
            state: The last ``width - 1`` inputs before ``x``, from ``init_state`` or an earlier call.

        Returns:
            The output ``[b, n, C]``, and the new state if one was given.
        """
        outer = self.weight.shape[1] - 1
        if state is not None:
            padded = torch.cat([state.to(x.dtype), x], dim=1)
        elif self.causal:
            padded = F.pad(x, (0, 0, outer, 0))
        else:
            padded = F.pad(x, (0, 0, outer // 2, outer // 2))
        output = F.conv1d(padded.transpose(1, 2), self.weight.unsqueeze(1), groups=self.weight.shape[0])
        # A copy, so that the state does not keep the whole chunk alive.
        new_state = None if state is None else padded[:, -outer:].clone()
        # Contiguous channels: without them scaled_dot_product_attention falls back to its slow form.
        return output.transpose(1, 2).contiguous(), new_state
