"""What a measured step is called in the logs."""

from collections.abc import Collection, Mapping

import numpy as np

from danon_lightning.callbacks.gradient_monitor.measurement import Measured, Row, Scalar
from danon_lightning.callbacks.gradient_monitor.noise import NoiseScale, Pieces

# Charts of TensorBoard's page of custom scalars.
LAYOUT = {
    "Gradients": {
        "norm before and after clipping": ["grad/total/norm$", "grad/total/clipped_norm$"],
        "update to weight": ["grad/total/update_ratio$"],
        "update to weight, by layer": ["grad/update_ratio/.*"],
        "norm by layer": ["grad/norm/.*"],
        "norm by stage": ["grad/stage/.*"],
        "zeros and non-finite, share": ["grad/total/zeros$", "grad/total/nonfinite$"],
    },
    "Gradients: noise and exchange": {
        "cosine between gradients": ["grad/cosine/.*"],
        "noise scale, in samples": ["grad/noise/scale$"],
        "noise scale, in batches": ["grad/noise/scale_to_batch$"],
        "owed by compression, to gradient": ["grad/compression/residual_to_gradient$"],
        "loss scale": ["grad/scaler/scale$"],
        "skipped steps": ["grad/scaler/skipped_steps$", "grad/compression/skipped_steps$"],
    },
}


class Leaders:
    """Which layers are charted: those that come first on a running average, so that charts have few gaps.

    Args:
        number: How many; None for all.
    """

    def __init__(self, number: int | None) -> None:
        """See the class."""
        self.number = number
        self._average: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> list[str]:
        """Add the values of a step.

        Args:
            values: By layer. Those that are not finite come first at once, but are forgotten.

        Returns:
            Names of the layers to be charted.
        """
        rank: dict[str, float] = {}
        for name, value in values.items():
            if np.isfinite(value):
                before = self._average.get(name, value)
                rank[name] = self._average[name] = 0.9 * before + 0.1 * value
            else:
                rank[name] = float("inf")
        ordered = sorted(rank, key=lambda name: -rank[name])
        return ordered if self.number is None else ordered[: self.number]


def by_layer(measured: Measured, values: "np.ndarray[tuple[int], np.dtype[np.float64]] | None") -> dict[str, float]:
    """Values of the layers that have a gradient, by name."""
    if values is None:
        return {}
    names = measured.placement.layers
    return {names[index]: float(values[index]) for index in np.flatnonzero(measured.active)}


def total_tags(measured: Measured) -> dict[str, float]:
    """Of the whole model, and of each stage."""
    elements = float(measured.rows[Row.ELEMENTS].sum())
    if not elements:
        return {}
    tags = {
        "grad/total/norm": measured.norm(Row.SQUARE),
        "grad/total/zeros": 1 - float(measured.rows[Row.NONZERO].sum()) / elements,
        "grad/total/nonfinite": float(measured.rows[Row.NONFINITE].sum()) / elements,
    }
    if measured.stepped:
        tags["grad/total/clipped_norm"] = measured.norm(Row.CLIPPED if measured.clips else Row.SQUARE)
    if measured.ratios() is not None:
        tags["grad/total/update_ratio"] = measured.norm(Row.UPDATE) / measured.norm(Row.WEIGHT)
    stages = np.array(measured.placement.stages)
    for stage in sorted(set(measured.placement.stages)):
        square = measured.rows[Row.SQUARE][stages == stage].sum()
        tags[f"grad/stage/{stage}"] = float(np.sqrt(square))
    return tags


def layer_tags(measured: Measured, charted: Collection[str]) -> dict[str, float]:
    """Of each of some layers; and the share of non-finite elements of every layer that has any."""
    rows, elements = measured.rows, np.maximum(measured.rows[Row.ELEMENTS], 1.0)
    groups = {
        "norm": by_layer(measured, measured.norms(Row.SQUARE)),
        "clipped_norm": by_layer(measured, measured.norms(Row.CLIPPED)) if measured.stepped and measured.clips else {},
        "update_ratio": by_layer(measured, measured.ratios()),
        "zeros": by_layer(measured, 1 - rows[Row.NONZERO] / elements),
    }
    tags = {
        f"grad/{group}/{layer}": value
        for group, values in groups.items()
        for layer, value in values.items()
        if layer in charted
    }
    nonfinite = by_layer(measured, rows[Row.NONFINITE] / elements)
    return tags | {f"grad/nonfinite/{layer}": value for layer, value in nonfinite.items() if value}


def noise_tags(pieces: Pieces | None, noise: NoiseScale) -> dict[str, float]:
    """What ranks, or micro-batches, have in common, and the noise scale so far."""
    if pieces is None:
        return {}
    tags = {f"grad/cosine/between_{'ranks' if pieces.between_ranks else 'micro_batches'}": pieces.cosine}
    if noise.in_batches is not None:
        tags["grad/noise/scale_to_batch"] = noise.in_batches
    if noise.in_samples is not None:
        tags["grad/noise/scale"] = noise.in_samples
    return tags


def exchange_tags(measured: Measured) -> dict[str, float]:
    """What compression owes."""
    residual = float(np.sqrt(measured.scalars[Scalar.RESIDUAL]))
    if not residual:
        return {}
    norm = measured.norm(Row.SQUARE)
    tags = {"grad/compression/residual_norm": residual}
    if norm > 0:
        tags["grad/compression/residual_to_gradient"] = residual / norm
    return tags
