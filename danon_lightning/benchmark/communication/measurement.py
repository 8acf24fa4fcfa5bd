"""Measures the variants at one rate, in as many jobs as it takes.

All variants share one job with "flat", one after another, so that their ratios are of the same processes and minutes.
Where one fails, the rest go on in a fresh job with a "flat" of its own. What is known to hang has a job to itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from danon_lightning.benchmark.communication.formulas import flat_ring
from danon_lightning.benchmark.communication.job import Measurement, Plan
from danon_lightning.benchmark.communication.job_runner import Report, run_job
from danon_lightning.benchmark.communication.results import Row
from danon_lightning.benchmark.communication.variants import FLAT, VARIANTS, Variant
from danon_lightning.benchmark.communication.workload import Workload
from danon_lightning.testing import EmulatedHosts

# A step may take so long on a busy machine, and so many times what "flat" needs on the wire.
_LEAST_STEP_LIMIT = 30.0
_SLACK = 4.0
_ASSUMED_UNSHAPED_MBIT = 1000.0


@dataclass(frozen=True)
class Setting:
    """All that the variants at one rate have in common.

    Attributes:
        workload: What is exchanged among whom.
        hosts: Emulated hosts, one a node, already at the rate; None for loopback.
        mbit: Their rate in Mbit/s; None for unshaped.
        steps: Measured steps of each variant, after the warm-up.
        step_limit: A step that takes more seconds is a hang.
    """

    workload: Workload
    hosts: EmulatedHosts | None
    mbit: float | None
    steps: int
    step_limit: float


def default_step_limit(workload: Workload, mbit: float | None) -> float:
    """A number of seconds that no step takes which does not hang."""
    egress = flat_ring(workload.elements, workload.nodes, workload.ranks_per_node, 4)
    return _LEAST_STEP_LIMIT + _SLACK * egress * 8 / ((mbit or _ASSUMED_UNSHAPED_MBIT) * 1e6)


def measure_variants(variants: Sequence[Variant], setting: Setting, report: Report) -> list[Row]:
    """Measure variants at one rate.

    Args:
        variants: Without "flat" among them, rows have no ratio.
        setting: What they have in common.
        report: Is told, from another thread, where the measurement is.

    Returns:
        A row for each variant: those with a job to themselves last, otherwise in the given order.
    """
    rows = _measure_together([variant for variant in variants if not variant.isolated], setting, report, None)
    flat = next((row.seconds for row in rows if row.variant == FLAT), None)
    for variant in variants:
        if variant.isolated:
            rows += _measure_together([variant], setting, report, flat)
    return rows


def _measure_together(
    variants: list[Variant], setting: Setting, report: Report, flat_seconds: float | None
) -> list[Row]:
    """Measure variants in one job, and what comes after a failure in another one.

    ``flat_seconds`` is for the ratios of a job that does not measure "flat" itself.
    """
    rows: dict[str, Row] = {}
    pending = variants
    while pending:
        plan = Plan(
            workload=setting.workload,
            variants=tuple((variant.name, variant.attach) for variant in pending),
            steps=setting.steps,
            step_limit=setting.step_limit,
            interface=None if setting.hosts is None else setting.hosts.interface,
        )
        measured, failure = run_job(plan, setting.hosts, report)
        if FLAT in measured:
            flat_seconds = measured[FLAT].seconds
        for variant in pending:
            if variant.name in measured and variant.name not in rows:  # "flat" is measured again after a failure
                rows[variant.name] = _row(variant, setting, measured[variant.name], flat_seconds)
        pending = [variant for variant in pending if variant.name not in measured]
        if failure is None or not pending:
            break
        to_blame = pending[:1] if failure.started else pending
        for variant in to_blame:
            row = Row(variant.name, setting.mbit, failure.status, failure.message, failure.detail)
            rows.setdefault(variant.name, row)
        pending = pending[len(to_blame) :]
        if pending and FLAT in measured:
            pending.insert(0, VARIANTS[FLAT])
    return list(rows.values())


def _row(variant: Variant, setting: Setting, measured: Measurement, flat_seconds: float | None) -> Row:
    return Row(
        variant=variant.name,
        mbit=setting.mbit,
        status="finished",
        flat_seconds=flat_seconds,
        formula_bytes=variant.formula(setting.workload) if setting.workload.nodes > 1 else None,
        **asdict(measured),
    )
