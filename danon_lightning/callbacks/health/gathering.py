"""Findings of all ranks on every rank, without pickle, and the same findings of several ranks as one."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from danon_lightning.callbacks.health.finding import Finding
from danon_lightning.callbacks.ranks import gather_texts

__all__ = ["gather", "merge"]

_SEVERITIES = ("error", "warning", "note")
# A report of more text than that is a mistake; it also bounds what a rank asks of the others' memory.
_MOST_BYTES = 1 << 20


def gather(findings: Sequence[Finding], device: torch.device) -> list[list[Finding]]:
    """Return the findings of every rank. A collective operation of the default group, if there is one.

    Args:
        findings: Those of this rank.
        device: Where tensors must be for the group to send them; the processor's memory if its backend is gloo.
    """
    return [_decode(text) for text in gather_texts(_encode(findings), device)]


def _encode(findings: Sequence[Finding]) -> bytes:
    """Findings as JSON, the first ones if all are too many."""
    kept = list(findings)
    while True:
        text = json.dumps([asdict(finding) for finding in kept]).encode()
        if len(text) <= _MOST_BYTES or not kept:
            return text
        kept = kept[: len(kept) // 2]


def _decode(text: bytes) -> list[Finding]:
    return [Finding(**fields) for fields in json.loads(text)]


def merge(by_rank: Sequence[Sequence[Finding]]) -> list[tuple[Finding, str]]:
    """Put together what several ranks have found, and sort it by severity.

    Notes and warnings that differ in numbers only, such as measured times, are the same too; then the numbers are those
    of the first rank that has them.

    Returns:
        Each finding once, with the ranks that have it: "all ranks", "rank 1", "ranks 1, 3", "all ranks (numbers of rank
        0)"; an empty string if there is one rank only. Of the same severity, those come first that a rank has named
        first.
    """
    same: dict[Finding, list[tuple[int, Finding]]] = {}
    orders: dict[Finding, int] = {}
    for rank, findings in enumerate(by_rank):
        for order, finding in enumerate(dict.fromkeys(findings)):
            kind = _without_numbers(finding)
            same.setdefault(kind, []).append((rank, finding))
            orders[kind] = min(order, orders.get(kind, order))
    ordered = sorted(same, key=lambda kind: (_SEVERITIES.index(kind.severity), orders[kind]))
    merged = []
    for kind in ordered:
        # A rank may say several things of one kind: each stays a row of its own.
        rows: list[list[tuple[int, Finding]]] = []
        for rank, finding in same[kind]:
            row = next((row for row in rows if all(rank != other for other, _ in row)), None)
            if row is None:
                rows.append([(rank, finding)])
            else:
                row.append((rank, finding))
        for row in rows:
            ranks = _ranks([rank for rank, _ in row], len(by_rank))
            if len({finding for _, finding in row}) > 1:
                ranks += f" (numbers of rank {row[0][0]})"
            merged.append((row[0][1], ranks))
    return merged


def _without_numbers(finding: Finding) -> Finding:
    """What findings of one kind have in common. Numbers in names, such as ``layers.3``, are no measurements."""
    if finding.severity == "error":
        return finding
    return replace(finding, text=re.sub(r"(?<![\w.])\d[\d.,]*(?:e[+-]?\d+)?(?![\w.]*\w)", "#", finding.text))


def _ranks(ranks: Sequence[int], world_size: int) -> str:
    if world_size == 1:
        return ""
    if len(ranks) == world_size:
        return "all ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
