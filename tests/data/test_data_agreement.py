from types import SimpleNamespace
from typing import Any

import pytest
import torch

from danon_lightning.data.agreement import agree, differences

Outcome = dict[str, Any] | ValueError | OSError


def _outcomes_of_ranks(monkeypatch: pytest.MonkeyPatch, ranks: list[Outcome]) -> list[Exception | None]:
    """Run every rank twice: once to see what it sends, once with what all have sent."""
    sent: list[torch.Tensor] = []

    def first(payload: torch.Tensor) -> torch.Tensor:
        sent.append(payload)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=first)
    trainer: Any = SimpleNamespace(world_size=len(ranks), strategy=strategy)
    results: list[Exception | None] = []

    def call(rank: Outcome) -> None:
        identity, error = (rank, None) if isinstance(rank, dict) else ({}, rank)
        agree(trainer, identity, error)

    for rank in ranks:
        with pytest.raises(KeyboardInterrupt):
            call(rank)
    strategy.all_gather = lambda payload: torch.stack(sent)
    for rank in ranks:
        try:
            call(rank)
            results.append(None)
        except (ValueError, OSError) as error:
            results.append(error)
    return results


def test_equal_ranks(monkeypatch: pytest.MonkeyPatch):
    assert _outcomes_of_ranks(monkeypatch, [{"seed": 1, "corpus": "ä"}] * 3) == [None, None, None]


def test_one_rank_failed(monkeypatch: pytest.MonkeyPatch):
    fine: Outcome = {"seed": 1}
    results = _outcomes_of_ranks(monkeypatch, [fine, OSError("disk füll"), fine, ValueError("later")])
    assert [(type(error), str(error)) for error in results] == [(OSError, "rank 1: disk füll")] * 4


def test_all_ranks_failed_alike(monkeypatch: pytest.MonkeyPatch):
    results = _outcomes_of_ranks(monkeypatch, [ValueError("x" * 5000)] * 2)
    assert [type(error) for error in results] == [ValueError] * 2
    assert str(results[0]) == str(results[1]) == "x" * 5000


def test_ranks_with_other_data(monkeypatch: pytest.MonkeyPatch):
    ranks: list[Outcome] = [{"seed": 1, "corpus": "a"}, {"seed": 1, "corpus": "a"}, {"seed": 1, "corpus": "b"}]
    expected = "ranks do not have the same data: rank 0 has corpus=a, rank 2 has corpus=b; give every node the same"
    for error in _outcomes_of_ranks(monkeypatch, ranks):
        assert isinstance(error, ValueError) and str(error).startswith(expected)


def test_single_process():
    agree(None, {}, None)
    agree(SimpleNamespace(world_size=1), {}, None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="disk"):
        agree(None, {}, OSError("disk"))


def test_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [("b", 2, 3), ("c", None, 4)]
