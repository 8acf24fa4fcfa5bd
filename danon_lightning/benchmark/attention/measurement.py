"""Measures cell by cell: at each length all contenders, so that ratios are of the same minutes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from danon_lightning.arguments import format_length
from danon_lightning.benchmark.attention.cell import CellPlan, Measurement, measure_cell
from danon_lightning.benchmark.attention.contenders import Contender, Shape
from danon_lightning.benchmark.attention.memory import available_memory
from danon_lightning.benchmark.attention.results import Direction, Row, StateRow, expected_seconds
from danon_lightning.benchmark.attention.streaming import StreamPlan, StreamPoint, measure_stream
from danon_lightning.benchmark.registered import modules_to_import
from danon_lightning.benchmark.workers import Outcome, run_isolated

# Of what is free, so that the rest of the machine goes on.
_SHARE_OF_MEMORY = 0.9
# Seconds, by the clock, after which a process is ended: for imports and compilers, and so many times its budget, as
# others may use the processors too.
_START_SECONDS = 300.0
_SLACK = 8.0
# Where a run begins with a longer sequence than this, a cell of this length tells what to expect.
_PILOT_LENGTH = 4096


@dataclass(frozen=True)
class Setting:
    """What all cells have in common.

    Attributes:
        heads: Heads H.
        head_dim: Width d of a head.
        device: "cpu" or "cuda".
        repeats: Runs of a cell; fewer where the budget ends, more where they are short.
        budget: A cell whose run would take more seconds is left out.
        memory_limit: Bytes that a process may have beyond the inputs, on CPU; None for most of what is free.
    """

    heads: int
    head_dim: int
    device: str
    repeats: int
    budget: float
    memory_limit: int | None = None

    @property
    def time_limit(self) -> float:
        """Seconds after which a process is ended."""
        return _START_SECONDS + _SLACK * self.budget

    def memory_now(self) -> int | None:
        """Bytes that a process that starts now may have."""
        free = available_memory()
        return self.memory_limit or (None if free is None else int(_SHARE_OF_MEMORY * free))


def measure_length(
    contenders: Sequence[Contender],
    length: int,
    direction: Direction,
    setting: Setting,
    earlier: Sequence[Row],
    show: Callable[[str], None],
) -> list[Row]:
    """Measure all contenders at one length.

    Args:
        contenders: In the order of the rows.
        length: Tokens n.
        direction: "forward" or "both".
        setting: What all cells have in common.
        earlier: Rows of smaller lengths; what failed there or would take too long here is left out.
        show: Is told the name of the contender that is measured.
    """
    rows = []
    for contender in contenders:
        show(contender.name)
        mine = [row for row in earlier if (row.contender, row.direction) == (contender.name, direction)]
        reason = contender.reason(setting.device, direction) or _reason_of_failure(mine)
        reason = reason or _reason_of_time(contender, mine, length, direction, setting)
        if reason is not None:
            rows.append(Row(contender.name, length, direction, "left out", reason))
            continue
        outcome = _run(contender, length, direction, setting)
        figures = {} if outcome.value is None else asdict(outcome.value)
        rows.append(Row(contender.name, length, direction, outcome.status, outcome.message, outcome.detail, **figures))
    return rows


def measure_state(contender: Contender, lengths: Sequence[int], setting: Setting) -> list[StateRow]:
    """Measure the streaming state of one contender after each of the numbers of tokens."""
    reached: list[StreamPoint] = []
    plan = StreamPlan(
        contender.name,
        tuple(sorted(lengths)),
        setting.heads,
        setting.head_dim,
        setting.device,
        setting.budget,
        setting.memory_now(),
        modules_to_import(),
    )
    [outcome] = run_isolated(
        measure_stream, [plan], time_limit=setting.time_limit, told=lambda _, point: reached.append(point)
    )
    rows = [StateRow(contender.name, status="finished", **asdict(point)) for point in reached]
    missing = plan.lengths[len(reached) :]
    if outcome.status == "finished":
        late = f"not reached in {setting.budget:g} s (--budget)"
        return rows + [StateRow(contender.name, length, "left out", late) for length in missing]
    return rows + [
        StateRow(contender.name, length, outcome.status, outcome.message, outcome.detail) for length in missing
    ]


def _run(contender: Contender, length: int, direction: Direction, setting: Setting) -> Outcome[Measurement]:
    """Measure a cell."""
    plan = CellPlan(
        contender.name,
        Shape(length, setting.heads, setting.head_dim, setting.device, direction),
        setting.repeats,
        setting.budget,
        setting.memory_now(),
        modules_to_import(),
    )
    [outcome] = run_isolated(measure_cell, [plan], time_limit=setting.time_limit)
    return outcome


def _reason_of_failure(earlier: Sequence[Row]) -> str | None:
    """Why a contender that failed on a shorter sequence is not tried; None if there is no such."""
    failed = [row for row in earlier if row.status in ("crashed", "killed", "too slow")]
    return f"not tried, as it {_failure(failed[0])} at {format_length(failed[0].length)}" if failed else None


def _reason_of_time(
    contender: Contender, earlier: Sequence[Row], length: int, direction: Direction, setting: Setting
) -> str | None:
    """Why a contender that would take too long is not tried; None if it should not."""
    measured = [(row.length, row.seconds) for row in earlier if row.seconds]
    if not earlier and length > _PILOT_LENGTH:
        pilot = _run(contender, _PILOT_LENGTH, direction, setting).value
        measured = [] if pilot is None else [(_PILOT_LENGTH, pilot.seconds)]
    expected = expected_seconds(measured, length, presumed=contender.growth)
    if expected is None or expected <= setting.budget:
        return None
    return f"would take about {expected:.0f} s a run, more than --budget {setting.budget:g}"


def _failure(row: Row) -> str:
    return "took too long" if row.status == "too slow" else f"{'was ' if row.status == 'killed' else ''}{row.status}"
