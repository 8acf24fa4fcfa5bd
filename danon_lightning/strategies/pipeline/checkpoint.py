"""One ordinary checkpoint out of what the ranks of a pipeline hold, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.absent import Absent, find_absent
from danon_lightning.strategies.pipeline.agreement import receive_plain, send_plain


def gather_plain(
    own: Mapping[Any, Any], order: Iterable[Any], group: dist.ProcessGroup, device: torch.device
) -> dict[Any, Any]:
    """Collect dictionaries on the first rank of a pipeline. Collective.

    Args:
        own: Plain data (see ``agreement``) by keys that mean the same on all ranks. What is absent is left out.
        order: All keys, in the order in which they are wanted.
        group: The ranks of the pipeline.
        device: Where these move tensors.

    Returns:
        On the first rank everything that any rank has, on the CPU; where several have a key, what the first of them
        has. Nothing elsewhere.
    """
    present = {key: value for key, value in own.items() if find_absent(value) is None}
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank:
        known = set(receive_plain(0, group, device))
        mine = [key for key in present if key not in known]
        send_plain(mine, 0, group, device)
        for key in mine:  # one at a time, so that no rank needs room for more
            send_plain(present[key], 0, group, device)
        return {}
    found = {key: _on_cpu(value) for key, value in present.items()}
    for peer in range(1, size):
        send_plain(list(found), peer, group, device)
        for key in receive_plain(peer, group, device):
            found[key] = _on_cpu(receive_plain(peer, group, device))
    return {key: found[key] for key in order if key in found}


def _on_cpu(value: Any) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().cpu())


def load_own(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load what a rank holds.

    Args:
        module: Of which some parameters are absent.
        state: The whole state.
        strict: Whether names must agree with those of the module, absent ones included.

    Raises:
        RuntimeError: If they must and do not.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"the checkpoint does not fit {type(module).__name__}: missing keys {missing}, unexpected keys {unexpected}"
        )
    held = {n: value for n, value in state.items() if n in expected and not isinstance(expected[n], Absent)}
    module.load_state_dict(held, strict=False)
