"""Plans as a table, as JSON, and in words."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from danon_lightning.planner.cluster import Cluster
from danon_lightning.planner.plans import Plan, nearest_feasible
from danon_lightning.planner.prediction import format_bytes
from danon_lightning.planner.profile import Profile

SCHEMA, SCHEMA_VERSION = "danon-plan", 1


def plans_table(plans: Sequence[Plan], *, title: str) -> Table:
    """Feasible plans.

    Args:
        plans: In order.
        title: What stands above.
    """
    right = ("step", "samples/s", "bubble", "exchange", "sent", "memory")
    columns = [Column(name, justify="right", no_wrap=True) for name in right]
    table = Table(
        Column("#", justify="right"), Column("layout", overflow="fold"), *columns,
        title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False,  # 80 columns must do
    )  # fmt: skip
    for number, plan in enumerate(plans, 1):
        table.add_row(
            str(number),
            escape(str(plan.layout)),
            format_seconds(plan.step_seconds),
            f"{plan.samples_per_second:,.4g}",
            f"{plan.bubble:.0%}" if plan.layout.pipeline > 1 else "",
            format_seconds(plan.exchange_seconds) if plan.layout.data > 1 else "",
            format_bytes(plan.leaving_bytes) if plan.nodes > 1 else "",
            format_bytes(plan.memory.total),
        )
    table.caption = (
        "exchange: by how much that of gradients makes a step longer; sent: what leaves a node; "
        "memory: of the rank that needs most"
    )
    return table


def refused_table(refused: Sequence[Plan], plans: list[Plan]) -> Table:
    """Plans that cannot be had, with the reason and what comes nearest.

    Args:
        refused: Those.
        plans: All of them.
    """
    table = Table(Column("layout", overflow="fold"), "why not", "the nearest that can be had", title="cannot be had")
    for plan in refused:
        nearest = nearest_feasible(plan, plans)
        table.add_row(
            escape(str(plan.layout)), escape(plan.reason or ""), escape(str(nearest.layout)) if nearest else "none"
        )
    return table


def assumptions(profile: Profile, cluster: Cluster) -> list[str]:
    """What predictions rest on, in words.

    Args:
        profile: What was measured.
        cluster: What it is for.
    """
    few, many = profile.measured_samples
    found = [
        f"passes: measured on this machine with micro-batches of {few} and {many} samples, and a line through both"
        + ("" if cluster.speed == 1 else f"; a rank of the cluster is taken for {cluster.speed:g} times as fast"),
        f"optimizer: {profile.optimizer.name}, {profile.optimizer.state_bytes_per_element:.3g} bytes of state and "
        f"{profile.optimizer.seconds_per_element * 1e9:.3g} ns a parameter, measured",
        "ranks compute with one thread each, and none disturbs another; loading of data, logging and validation take "
        "no time",
        "zero-bubble schedules: half of a backward pass is for gradients of weights (not measured)",
        "memory: tensors of training alone, without what the process, libraries and fragmentation take",
        *cluster.assumptions,
    ]
    if profile.no_pipeline is not None:
        found.append(f"no pipelines: {profile.no_pipeline}")
    return found


def print_plans(
    plans: list[Plan], profile: Profile, cluster: Cluster, batch_size: int, console: Console, *, top: int
) -> None:
    """All of it.

    Args:
        plans: From :func:`plan_profile`.
        profile: What they rest on.
        cluster: What they are for.
        batch_size: Samples of a step.
        console: Where to print.
        top: How many of either kind.
    """
    feasible = [plan for plan in plans if plan.is_feasible]
    refused = [plan for plan in plans if not plan.is_feasible]
    links = cluster.links
    where = f"{links.nodes} node{'s' * (links.nodes > 1)} × {links.ranks_per_node} ranks"
    if feasible:
        title = f"{where}, {batch_size} samples a step: {len(feasible)} layouts, the best {min(top, len(feasible))}"
        console.print(plans_table(feasible[:top], title=title))
    if refused:
        # Not the same story many times: the fastest of each kind of layout.
        console.print(refused_table(_one_of_each_kind(refused)[:top], plans))
    console.print("assumed:")
    for line in assumptions(profile, cluster):
        console.print(f"  - {line}", markup=False, soft_wrap=True)
    if feasible:
        best = feasible[0]
        console.print("\nthe best as overrides of danon-train, and as a config:")
        console.print(f"  danon-train {' '.join(best.overrides())}", markup=False, soft_wrap=True)
        console.print(best.config_block(), markup=False, soft_wrap=True)
    else:
        least = min(refused, key=lambda plan: plan.memory.total)
        console.print(
            f"\nNo layout can be had. The one that needs the least memory, {format_bytes(least.memory.total)} a rank: "
            f"{least.layout}. More ranks, a smaller batch or more memory would help.",
            markup=False,
            soft_wrap=True,
        )


def plans_json(plans: list[Plan], profile: Profile, cluster: Cluster, batch_size: int) -> dict[str, Any]:
    """All of it, for a program.

    Args:
        plans: From :func:`plan_profile`.
        profile: What they rest on.
        cluster: What they are for.
        batch_size: Samples of a step.
    """
    rows = []
    for plan in plans:
        nearest = None if plan.is_feasible else nearest_feasible(plan, plans)
        rows.append({**plan.to_json(), "nearest_feasible": None if nearest is None else str(nearest.layout)})
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "cluster": {
            "links": cluster.links.to_json(),
            "memory_bytes": cluster.memory_bytes,
            "speed": cluster.speed,
        },
        "batch_size": batch_size,
        "profile": profile.describe(),
        "assumptions": assumptions(profile, cluster),
        "plans": rows,
    }


def format_seconds(seconds: float) -> str:
    """Such as ``1.23 s`` or ``45.6 ms``."""
    if seconds >= 1:
        return f"{seconds:,.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _one_of_each_kind(plans: Sequence[Plan]) -> list[Plan]:
    found: dict[tuple[object, ...], Plan] = {}
    for plan in sorted(plans, key=lambda one: one.step_seconds):
        layout = plan.layout
        found.setdefault((layout.data, layout.checkpointing, layout.sharding), plan)
    return list(found.values())
