"""A check that all ranks have the same data, and that a failure of one becomes the failure of all."""

import json
from typing import Any

import torch
from lightning.pytorch import Trainer

__all__ = ["agree", "differences"]

_PAYLOAD_BYTES = 2048
# A rank's payload starts with the index of its outcome here; None stands for success.
_OUTCOMES: tuple[type[Exception] | None, ...] = (None, ValueError, OSError)


def agree(trainer: Trainer | None, identity: dict[str, Any], error: ValueError | OSError | None) -> None:
    """Raise on every rank if one rank failed or has other data than the rest.

    Every rank has to call it, also one that failed: none is left waiting for another. With a single process it only
    raises ``error``. Only plain bytes travel between ranks.

    Args:
        trainer: The trainer, or ``None`` without one.
        identity: What has to be equal on all ranks; strings and numbers.
        error: What went wrong on this rank, or ``None``; ``identity`` is not used if there is one.

    Raises:
        ValueError: If a rank failed with a ``ValueError``, or identities differ.
        OSError: If a rank failed with an ``OSError``.
    """
    if trainer is None or trainer.world_size == 1 or not torch.distributed.is_initialized():
        if error is not None:
            raise error
        return
    if error is None:
        outcome, text = 0, json.dumps(identity)
    else:
        outcome, text = (1 if isinstance(error, ValueError) else 2), str(error)
    # Cut to the same length on every rank, and filled up with spaces, which JSON ignores.
    payload = (bytes([outcome]) + text.encode("utf-8", "backslashreplace"))[:_PAYLOAD_BYTES].ljust(_PAYLOAD_BYTES)
    local = torch.tensor(list(payload), dtype=torch.uint8, device=trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(local)
    results = [bytes(row) for row in gathered.cpu().tolist()]

    texts = [result[1:].decode("utf-8", "ignore").strip() for result in results]
    for rank, result in enumerate(results):
        kind = _OUTCOMES[result[0]]
        if kind is not None:
            if error is not None and len(set(results)) == 1:
                raise error  # a mistake that all ranks made needs no rank number
            raise kind(f"rank {rank}: {texts[rank]}") from error
    first = json.loads(texts[0])
    for rank, other in enumerate(texts):
        if different := differences(first, json.loads(other)):
            name, here, there = different[0]
            raise ValueError(
                f"ranks do not have the same data: rank 0 has {name}={here}, rank {rank} has {name}={there}; "
                "give every node the same files (a shared folder, or equal copies) and the same settings"
            )


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare two flat dictionaries.

    Args:
        first: One dictionary.
        second: The other.

    Returns:
        Name and both values for each entry that differs, ``None`` standing for one that is missing; in the order of
        ``first``, then of ``second``.
    """
    names = list(dict.fromkeys([*first, *second]))
    return [(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]
