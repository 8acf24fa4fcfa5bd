"""From norms of local gradients to what the ranks, or the micro-batches, have in common."""

from danon_lightning.callbacks.gradient_monitor.measurement import Measured, Row, Scalar
from danon_lightning.callbacks.gradient_monitor.noise import Pieces


def pieces_of(measured: Measured, accumulated: int) -> Pieces | None:
    """What can be told from a step.

    Loss functions are means, so the gradient that a backward pass brings is that of its micro-batch, divided by their
    number; Lightning divides by ``accumulate_grad_batches``, a pipeline by its micro-batches too.

    Args:
        measured: The step.
        accumulated: Number of batches that Lightning divides the loss by.

    Returns:
        None if there is nothing to be compared: a single piece, or pieces that do not add up to the gradient: an
        epoch's last and incomplete accumulation, backward passes that differ from rank to rank, lossy compression with
        residuals of earlier steps in the gradient, replicas that synchronise late or in periods.
    """
    passes = float(measured.scalars[Scalar.PASSES])
    differ = abs(float(measured.scalars[Scalar.PASSES_SQUARED]) - passes**2) > 1e-6 * passes**2
    in_stages = bool(measured.placement.stages)
    complete = passes > 0 and (passes % accumulated == 0 if in_stages else passes == accumulated)
    number = passes * measured.placement.replicas
    if measured.stale or differ or not complete or number < 2 or measured.scalars[Scalar.RESIDUAL] > 0:
        return None
    return Pieces(
        square_of_piece=passes * float(measured.rows[Row.PIECES].sum()) / measured.loss_scale**2,
        square_of_mean=float(measured.rows[Row.WHOLE].sum()),
        number=number,
        between_ranks=passes == 1,
        samples=float(measured.scalars[Scalar.SAMPLES]) / passes,
    )
