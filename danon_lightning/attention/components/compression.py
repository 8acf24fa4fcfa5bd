"""Sequences in fewer cells: pooled by attention, expanded through a learned map.

A sequence of L tokens becomes L' = ceil(L / c) cells, with c = clip(alpha · ln L, 1 / max, 1 / min): long sequences are
compressed more, between two limits. What is lost is measured, as the share of the energy ‖x‖² that expanding the cells
does not give back.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danon_lightning.attention.components.cache import AttentionCache
from danon_lightning.attention.components.cells import (
    CompressedSequence,
    CompressionStats,
    energy_retained,
    even_assignment,
    quantize_rows,
    set_apart,
    tendency_of,
)

__all__ = ["DynamicCompression"]

# The adaptive factor c moves in steps of 2^(1/4): four of them double it.
STEPS_PER_DOUBLING = 4


class DynamicCompression(nn.Module):
    """Compresses sequences to a share of their length that depends on the length, and expands them again.

    Cells are weighted means of their tokens, with weights softmax(u · x / ‖x‖) over the tokens of a cell; u is learned
    and zero at first, so they start as plain means. Expansion repeats each cell over its tokens, as T c + S t: T is
    learned and the identity at first; S is learned and zero at first, and t is the tendency of the cells around, the
    difference of the next cell and the one before over the tokens between them, times the distance of the token from
    the middle of its cell. (With the mean of a cell alone there would be nothing to learn: no other cell, and no other
    map of it, has a smaller error.)

    Args:
        dim: Width D of a token.
        min_compression_ratio: Least share of the length that is kept, in (0, 1].
        max_compression_ratio: Largest share of the length that is kept, up to rounding up to whole cells, in (0, 1].
        cache_size: Number of inputs whose cells are remembered and given back when the same input comes again, in
            evaluation mode and where no gradient is recorded; 0 remembers none. An input is told by a digest of its
            bytes, which costs about half of compressing it on a CPU, and a copy to the CPU elsewhere: this pays where
            inputs do repeat.
        enable_adaptive_compression: Whether the ratio follows the energy: after each compression in training mode, c
            falls by a step of 2^(1/4) if less energy than ``energy_band`` was retained, and rises by one if more was.
            The steps taken are kept in the state dict.
        importance_threshold: Tokens whose importance exceeds it keep a cell of their own, the most important ones
            first, up to half of all cells. The importance of a token is its distance from the mean of the cell it would
            share otherwise, in units of the root mean square length of the tokens of its sequence: 0 for one that
            equals the mean, about 1 for one that the mean tells nothing about. ``None`` divides every sequence evenly.
        use_quantization: Whether cells are returned in int8 with a scale each; the error of an element is at most
            1/254 of the largest one of its cell (and rounding to the dtype). Gradients pass through ``forward`` only.
        alpha: Factor of ln L in c.
        energy_band: Least and largest share of the energy at which the adaptive ratio stays where it is.

    Raises:
        ValueError: If a setting is out of range.
    """

    ratio_steps: Tensor

    def __init__(
        self,
        dim: int,
        min_compression_ratio: float = 0.1,
        max_compression_ratio: float = 0.9,
        cache_size: int = 0,
        enable_adaptive_compression: bool = True,
        importance_threshold: float | None = None,
        use_quantization: bool = False,
        *,
        alpha: float = 1.0,
        energy_band: tuple[float, float] = (0.8, 0.95),
    ) -> None:
        """Create the learned parts."""
        super().__init__()
        for name, size, least in (("dim", dim, 1), ("cache_size", cache_size, 0)):
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name}={size!r} must be an integer of at least {least}")
        if not 0 < min_compression_ratio <= max_compression_ratio <= 1:
            raise ValueError(
                f"min_compression_ratio={min_compression_ratio} and max_compression_ratio={max_compression_ratio} must "
                "be shares of the length in (0, 1], the first not above the second"
            )
        if importance_threshold is not None and not importance_threshold >= 0:
            raise ValueError(f"importance_threshold={importance_threshold} must not be negative, or None for none")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha} must be positive")
        if not 0 <= energy_band[0] < energy_band[1] <= 1:
            raise ValueError(f"energy_band={energy_band} must be two shares in [0, 1], the first below the second")
        self.dim = dim
        self.min_compression_ratio = min_compression_ratio
        self.max_compression_ratio = max_compression_ratio
        self.enable_adaptive_compression = enable_adaptive_compression
        self.importance_threshold = importance_threshold
        self.use_quantization = use_quantization
        self.alpha = alpha
        self.energy_band = energy_band
        self.cache = AttentionCache(max_entries=cache_size) if cache_size else None
        self.pool_query = nn.Parameter(torch.empty(dim))
        self.token_map = nn.Parameter(torch.empty(dim, dim))
        self.tendency_map = nn.Parameter(torch.empty(dim, dim))
        self.register_buffer("ratio_steps", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from plain means, repeated, and the ratio that follows from the length alone."""
        with torch.no_grad():
            self.pool_query.zero_()
            self.tendency_map.zero_()
            nn.init.eye_(self.token_map)
            self.ratio_steps.zero_()

    def num_cells(self, length: int) -> int:
        """Return the number of cells L' that ``length`` tokens become now."""
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        return math.ceil(length / self._factor(length, int(self.ratio_steps)))

    def compress(
        self, x: Tensor, return_stats: bool = False
    ) -> CompressedSequence | tuple[CompressedSequence, CompressionStats]:
        """Compress a batch of sequences.

        Args:
            x: Tokens ``[b, L, D]``, floating point, none of them padding.
            return_stats: Whether to measure what was kept.

        Returns:
            The cells, of which there are ``num_cells(L)``, and the statistics if asked for.

        Raises:
            ValueError: If ``x`` has the wrong shape or dtype.
        """
        self._check(x)
        compressed = self._remembered(x)
        adapting = self.enable_adaptive_compression and self.training
        if not (return_stats or adapting):
            return compressed
        with torch.no_grad():
            retained = energy_retained(x, self.decompress(compressed, x.shape))
        if adapting:
            self._adapt(x.shape[1], retained)
        if not return_stats:
            return compressed
        ratio = compressed.shape[1] / x.shape[1]
        return compressed, CompressionStats(ratio, float(retained), compressed.nbytes / x.nbytes)

    def decompress(self, compressed: CompressedSequence | Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Expand cells to tokens.

        Args:
            compressed: From ``compress``; or cells alone ``[b, L', D]``, for a sequence that was divided evenly.
            shape: The shape ``(b, L, D)`` of the tokens.

        Returns:
            ``[b, L, D]``, floating point.

        Raises:
            ValueError: If the cells cannot come from tokens of that shape.
        """
        if not isinstance(compressed, CompressedSequence):
            compressed = CompressedSequence(compressed, self._even_assignment(compressed, shape))
        batch, _, width = compressed.shape
        if tuple(shape) != (batch, compressed.assignment.shape[-1], width) or width != self.dim:
            raise ValueError(
                f"shape={tuple(shape)} does not fit cells of shape {list(compressed.shape)} of "
                f"{compressed.assignment.shape[-1]} tokens; with dim={self.dim} it must be "
                f"{(batch, compressed.assignment.shape[-1], self.dim)}"
            )
        return self.expand(compressed.dequantized(), compressed.assignment)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x [b, L, D]`` compressed and expanded again; gradients pass quantization as if it were not there."""
        self._check(x)
        cells, assignment = self.pool(x)
        return self.expand(cells, assignment)

    def update_compression_params(self, x: Tensor, loss: Tensor | None = None, *, learning_rate: float = 0.5) -> float:
        """Take one step of gradient descent on the relative reconstruction error of ``x``, plus ``loss``.

        The step is in proportion to the curvature of that error, so that the default size lowers it for any data. Each
        process steps by itself: in distributed training let an optimizer train the error of ``forward`` instead.

        Args:
            x: Tokens ``[b, L, D]``; they receive no gradient.
            loss: A scalar computed through this module, such as the loss of a task; its graph is used up.
            learning_rate: Size of the step.

        Returns:
            The relative error ‖x − x̂‖² / ‖x‖² before the step.

        Raises:
            ValueError: If ``loss`` is not a scalar that depends on the parameters, or the size is not positive.
        """
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate} must be positive")
        if loss is not None and (loss.numel() != 1 or not loss.requires_grad):
            raise ValueError(
                f"loss has shape {list(loss.shape)} and requires_grad={loss.requires_grad}; it must be a scalar "
                "computed through this module, or None for the reconstruction error alone"
            )
        x = x.detach()
        parameters = [self.pool_query, self.token_map, self.tendency_map]
        with torch.enable_grad():
            error = 1 - energy_retained(x, self(x))
            objective = error if loss is None else error + loss.to(error.dtype).reshape(())
            gradients = torch.autograd.grad(objective, parameters)
        with torch.no_grad():
            curvatures = [1.0, 1.0, self._tendency_energy(x)]
            for parameter, gradient, curvature in zip(parameters, gradients, curvatures, strict=True):
                parameter.sub_(gradient / curvature, alpha=learning_rate)
        return float(error.detach())

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cells ``[b, L', D]`` of ``x [b, L, D]`` in floating point, and the assignment ``[b, L]``.

        With quantization the cells are rounded, and gradients pass as if they were not.
        """
        cells, assignment = self._pool(x)
        if self.use_quantization:
            rounded, scales = quantize_rows(cells.detach())
            cells = cells + (rounded * scales - cells.detach())
        return cells, assignment

    def expand(self, cells: Tensor, assignment: Tensor) -> Tensor:
        """Return tokens ``[b, L, D]`` of floating-point cells ``[b, L', D]``, given the assignment ``[b, L]``."""
        tendency, distance = tendency_of(cells, assignment)
        repeated = F.linear(cells, self.token_map.to(cells.dtype))
        inclined = F.linear(tendency, self.tendency_map.to(cells.dtype))
        index = assignment.unsqueeze(-1).expand(-1, -1, self.dim)
        return repeated.gather(1, index) + distance.unsqueeze(-1).to(inclined.dtype) * inclined.gather(1, index)

    def _tendency_energy(self, x: Tensor) -> float:
        """Return the energy of what the tendency map is applied to, as a share of that of ``x``.

        It bounds the curvature of the relative error in that map as 1 does in the other one; where tokens change slowly
        it is small, and the map would hardly learn with the same step.
        """
        cells, assignment = self.pool(x)
        tendency, distance = tendency_of(cells.to(torch.promote_types(x.dtype, torch.float32)), assignment)
        energy = (distance.square() * tendency.square().sum(dim=-1).gather(1, assignment)).sum()
        share = energy / x.to(energy.dtype).square().sum().clamp_min(torch.finfo(energy.dtype).tiny)
        return max(float(share), torch.finfo(energy.dtype).eps)

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cells before any rounding, and the assignment."""
        num_cells = self.num_cells(x.shape[1])
        assignment = even_assignment(x.shape[1], num_cells, x.device).expand(x.shape[0], -1)
        if self.importance_threshold is not None:
            assignment = set_apart(x, assignment, num_cells, self.importance_threshold)
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        # Of unit length, so that the curvature in u does not depend on the scale of the data.
        scores = (F.normalize(wide, dim=-1) * self.pool_query.to(dtype)).sum(dim=-1)
        top = scores.new_full((x.shape[0], num_cells), -torch.inf)
        top = top.scatter_reduce(1, assignment, scores.detach(), "amax")
        masses = (scores - top.gather(1, assignment)).exp()
        totals = torch.zeros_like(top).scatter_add(1, assignment, masses)
        weighted = (masses / totals.gather(1, assignment)).unsqueeze(-1) * wide
        index = assignment.unsqueeze(-1).expand_as(weighted)
        cells = weighted.new_zeros(x.shape[0], num_cells, x.shape[2]).scatter_add(1, index, weighted)
        return cells.to(x.dtype), assignment

    def _compress(self, x: Tensor) -> CompressedSequence:
        cells, assignment = self._pool(x)
        if not self.use_quantization:
            return CompressedSequence(cells, assignment)
        rounded, scales = quantize_rows(cells.detach())
        return CompressedSequence(rounded, assignment, scales)

    def _remembered(self, x: Tensor) -> CompressedSequence:
        """Compress, or find the cells of the same input under the same settings in the cache."""
        if self.cache is None or self.training or torch.is_grad_enabled():
            return self._compress(x)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (x, self.pool_query, self.ratio_steps.reshape(1)):
            digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
        key = (tuple(x.shape), x.dtype, x.device, digest.digest())
        found = self.cache.get(key)
        if found is None:
            compressed = self._compress(x)
            found = tuple(tensor.clone() for tensor in compressed if tensor is not None)
            self.cache.put(key, found)
        # Copies, since what is handed out may be changed.
        return CompressedSequence(*(tensor.clone() for tensor in found))

    def _factor(self, length: int, steps: int) -> float:
        """Return c after ``steps`` steps of adaptation."""
        least, largest = 1 / self.max_compression_ratio, 1 / self.min_compression_ratio
        # Within the limits before the steps too, so that the first one takes effect.
        start = min(max(self.alpha * math.log(length), least), largest)
        return min(max(start * 2 ** (steps / STEPS_PER_DOUBLING), least), largest)

    @torch.no_grad()
    def _adapt(self, length: int, retained: Tensor) -> None:
        low, high = self.energy_band
        steps = int(self.ratio_steps)
        factor = self._factor(length, steps)
        # No steps beyond the limits of c: the way back would be long.
        if retained < low and factor > 1 / self.max_compression_ratio:
            self.ratio_steps.fill_(steps - 1)
        elif retained > high and factor < 1 / self.min_compression_ratio:
            self.ratio_steps.fill_(steps + 1)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim or 0 in x.shape:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, tokens, {self.dim}], none of them zero")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; it must be floating point")

    @staticmethod
    def _even_assignment(cells: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        if cells.dim() != 3 or not cells.is_floating_point() or len(shape) != 3 or shape[1] < cells.shape[1]:
            raise ValueError(
                f"cells have shape {list(cells.shape)} and dtype {cells.dtype}; they must be floating point "
                f"[batch, cells, dim], with at most as many cells as there are tokens in shape={tuple(shape)}"
            )
        return even_assignment(shape[1], cells.shape[1], cells.device).expand(cells.shape[0], -1)
