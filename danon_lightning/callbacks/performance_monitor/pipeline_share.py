"""The parts of a step in a pipeline, where one training step holds the forward and backward passes of all batches."""

from collections.abc import Mapping, Sequence

from danon_lightning.callbacks.pipelines import Pass

_PART_OF = {
    "forward": "forward",
    "backward": "backward",
    "weights": "backward",
    "communication": "communication",
    "waiting": "pipeline_wait",
}


def split_training_step(
    seconds: Mapping[str, float], batch: Mapping[str, float], own: Sequence[Pass]
) -> dict[str, float]:
    """Share out the time of training steps, in the proportions of one that was measured.

    Args:
        seconds: By part; all of ``training_step`` is called ``"forward"``.
        batch: The same of the measured batch alone.
        own: What this rank has done in it.

    Returns:
        By part, with the same sum.
    """
    shares: dict[str, float] = {}
    measured = batch.get("forward", 0.0)
    for one in own if measured > 0 else ():
        part = _PART_OF[one.kind]
        shares[part] = shares.get(part, 0.0) + (one.end - one.start) / measured
    if not shares:
        return dict(seconds)
    # Cutting the batch, checking it, and telling other ranks the loss. Clocks differ a little.
    total = sum(shares.values())
    shares = {part: share / max(1.0, total) for part, share in shares.items()}
    shares["other"] = max(0.0, 1.0 - total)
    found = {part: value for part, value in seconds.items() if part != "forward"}
    for part, share in shares.items():
        found[part] = found.get(part, 0.0) + share * seconds.get("forward", 0.0)
    return found


def take_out(seconds: Mapping[str, float], part: str, source: str, amount: float) -> dict[str, float]:
    """Call some of the time of one part another part.

    Args:
        seconds: By part.
        part: What it is.
        source: What it was counted as.
        amount: Seconds; no more is moved than there is.

    Returns:
        By part, with the same sum.
    """
    amount = min(max(amount, 0.0), seconds.get(source, 0.0))
    found = dict(seconds)
    found[source] = found.get(source, 0.0) - amount
    found[part] = found.get(part, 0.0) + amount
    return found
