"""What can be wrong with the arguments."""

from collections.abc import Sequence


def check_arguments(
    *,
    every_n_steps: int,
    draw_every_n_steps: int,
    histogram_every_n_steps: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    top_k: int | None,
    top_by: str,
    update_ratio: bool,
    noise_decay: float,
) -> None:
    """Refuse arguments of :class:`GradientMonitor` that are out of range.

    Raises:
        ValueError: Naming the argument, the value and the remedy.
    """
    for name, number in {
        "every_n_steps": every_n_steps,
        "draw_every_n_steps": draw_every_n_steps,
        "histogram_every_n_steps": histogram_every_n_steps,
    }.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    for name, patterns in {"include": include, "exclude": exclude}.items():
        if isinstance(patterns, str):
            raise ValueError(f"{name}={patterns!r} must be a list of patterns: [{patterns!r}]")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative; None is for all layers, 0 for none")
    if top_by not in ("norm", "update_ratio"):
        raise ValueError(f"top_by={top_by!r} must be 'norm' or 'update_ratio'")
    if top_by == "update_ratio" and not update_ratio:
        raise ValueError("top_by='update_ratio' needs update_ratio=True")
    if not 0 <= noise_decay < 1:
        raise ValueError(f"noise_decay={noise_decay} must be at least 0 and less than 1")
