"""What the gradients of a run say about it, in words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from danon_lightning.callbacks.gradient_monitor.history import History
from danon_lightning.callbacks.gradient_monitor.noise import NoiseScale
from danon_lightning.callbacks.health.finding import Finding

# Fewer steps than this tell nothing.
ENOUGH = 5
# A layer's root mean square gradient, as a share of that of the median layer.
VANISHING = 1e-4
# A norm, as a multiple of the median of the run.
EXPLODING = 100.0
# Update to weight, per step. About 1e-3 is what well-tuned runs show.
RATIOS = (1e-4, 1e-2)
# Noise scale, in batches: far outside there is time, or there are samples, to be saved.
NOISE = (0.1, 10.0)
# Clipping that nearly always acts is a learning rate in disguise.
CLIPPED_SHARE = 0.9
_NAMED = 3


def find(history: History, noise: NoiseScale, skipped: int = 0) -> list[Finding]:
    """What is to be said of a run, most important first.

    Args:
        history: The run.
        noise: Its noise scale.
        skipped: Steps that a loss scaler has skipped.

    Returns:
        Nothing if fewer than five steps have been logged.
    """
    if len(history.moments) < ENOUGH:
        return []
    found = [
        *_nonfinite(history),
        *_exploding(history),
        *_dead(history),
        *_vanishing(history),
        *_ratios(history),
        *_noise(noise),
        *_clipping(history),
        *_skipped(skipped),
    ]
    order = ("error", "warning", "note")
    found.sort(key=lambda finding: order.index(finding.severity))
    return found or [_well(history)]


def _nonfinite(history: History) -> list[Finding]:
    if not history.nonfinite:
        return []
    names = sorted(history.nonfinite, key=lambda name: -history.nonfinite[name])
    steps = history.nonfinite[names[0]]
    return [
        Finding(
            "error" if steps > history.logged / 10 else "warning",
            f"gradients of {_list(names)}",
            f"elements that were not finite, in up to {steps} of {history.logged} logged steps",
            "find where they come from with NaNDebugger; a lower learning rate or clipping may prevent them",
        )
    ]


def _exploding(history: History) -> list[Finding]:
    norms = np.array([moment.norm for moment in history.moments])
    norms = np.where(np.isfinite(norms), norms, np.nan)
    if np.isnan(norms).all() or not (median := float(np.nanmedian(norms))):
        return []
    worst = int(np.nanargmax(norms))
    if norms[worst] <= EXPLODING * median:
        return []
    return [
        Finding(
            "warning",
            "gradient norm",
            f"at step {history.moments[worst].step} it was {norms[worst]:.3g}, {norms[worst] / median:.0f} times its "
            f"median of {median:.3g}",
            "clip gradients (Trainer(gradient_clip_val=1.0)), lower the learning rate or lengthen its warm-up, and "
            "look at the samples of that step",
        )
    ]


def _dead(history: History) -> list[Finding]:
    dead = np.flatnonzero((history.active > 0) & (history.zero == history.active))
    if not len(dead):
        return []
    names = [history.layers[index] for index in dead]
    return [
        Finding(
            "warning",
            f"gradients of {_list(names)}",
            f"all zero in every logged step: {_count(len(names))} learns nothing",
            "see whether its output is used, or its activation is saturated (a ReLU whose inputs are all negative)",
        )
    ]


def _vanishing(history: History) -> list[Finding]:
    norms = _median(history.norms())
    sizes = np.sqrt(np.maximum(history.elements, 1))
    spread = norms / sizes
    known = np.isfinite(spread) & (spread > 0)
    if known.sum() < 3:
        return []
    middle = float(np.median(spread[known]))
    names = [history.layers[index] for index in np.flatnonzero(known & (spread < VANISHING * middle))]
    if not names:
        return []
    return [
        Finding(
            "warning",
            f"gradients of {_list(names)}",
            f"vanishing: in {_count(len(names))} an element's gradient is less than {VANISHING:g} of that in the "
            f"median layer ({middle:.2g})",
            "look at the initialisation, and at normalisation and residual connections between this layer and the loss",
        )
    ]


def _ratios(history: History) -> list[Finding]:
    known = [moment.ratio for moment in history.moments if moment.ratio is not None and np.isfinite(moment.ratio)]
    if not known:
        return []
    median = float(np.median(known))
    low, high = RATIOS
    if low <= median <= high:
        return []
    layers = _median(history.ratios())
    order = np.argsort(layers if median < low else -layers)
    names = [history.layers[index] for index in order if np.isfinite(layers[index])]
    return [
        Finding(
            "warning",
            "learning rate",
            f"a step changes the weights by {median:.2g} of their norm, in the median; most of all {_list(names)}"
            if median > high
            else f"a step changes the weights by {median:.2g} of their norm, in the median; least of all "
            f"{_list(names)}",
            f"between {low:g} and {high:g} is usual: try a {'lower' if median > high else 'higher'} learning rate",
        )
    ]


def _noise(noise: NoiseScale) -> list[Finding]:
    batches = noise.in_batches
    if batches is None or noise.updates < ENOUGH or NOISE[0] <= batches <= NOISE[1]:
        return []
    samples = f" ({noise.in_samples:.3g} samples)" if noise.in_samples is not None else ""
    measured = f"the gradient noise scale is {batches:.2g} batches{samples}"
    if batches > NOISE[1]:
        return [
            Finding(
                "note",
                "batch size",
                f"{measured}: the gradient of a batch is mostly noise",
                "a larger batch, with a higher learning rate, would need almost proportionally fewer steps: more "
                "ranks, or accumulate_grad_batches",
            )
        ]
    return [
        Finding(
            "note",
            "batch size",
            f"{measured}: the samples of a batch say mostly the same",
            "a smaller batch would make almost as much of a step from fewer samples",
        )
    ]


def _clipping(history: History) -> list[Finding]:
    pairs = [(m.norm, m.clipped) for m in history.moments if m.clipped is not None and np.isfinite(m.norm)]
    acted = sum(clipped < 0.99 * norm for norm, clipped in pairs)
    if not pairs or acted <= CLIPPED_SHARE * len(pairs):
        return []
    factor = float(np.median([clipped / norm for norm, clipped in pairs if norm]))
    return [
        Finding(
            "note",
            "clipping",
            f"it acted in {acted / len(pairs):.0%} of the logged steps, and left {factor:.2g} of the norm in the "
            "median: rather a scaling than a guard against outliers",
            "raise gradient_clip_val above the usual norm, or know that it sets the learning rate",
        )
    ]


def _skipped(skipped: int) -> list[Finding]:
    if not skipped:
        return []
    return [Finding("note", "loss scaling", f"{_plural(skipped, 'step was', 'steps were')} skipped for an overflow")]


def _well(history: History) -> Finding:
    norms = [moment.norm for moment in history.moments]
    text = f"norm {np.median(norms):.3g} in the median, {max(norms):.3g} at most"
    ratios = [moment.ratio for moment in history.moments if moment.ratio is not None]
    if ratios:
        text += f"; a step changes the weights by {np.median(ratios):.2g} of their norm"
    return Finding("note", "gradients", text)


def _median(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[layers, moments] → [layers], over what is finite; NaN where nothing is."""
    return np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in rows])


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _count(number: int) -> str:
    return _plural(number, "layer", "layers")


def _plural(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
