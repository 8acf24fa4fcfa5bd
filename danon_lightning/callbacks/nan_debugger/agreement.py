"""How ranks come to one decision, and tell each other what they have found."""

import json
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.events import plain
from danon_lightning.callbacks.ranks import gather_texts

# What one rank has to say fits into a fraction of this.
_MOST_BYTES = 1 << 18


@runtime_checkable
class _Mesh(Protocol):
    pipeline_parallel_size: int
    pipeline_rank: int


@runtime_checkable
class HasMesh(Protocol):
    """A strategy that lays out its ranks."""

    @property
    def mesh(self) -> _Mesh:
        """The layout."""
        ...


@runtime_checkable
class KnowsFinite(Protocol):
    """A strategy that looks at the gradients which it exchanges."""

    @property
    def gradients_finite(self) -> bool | None:
        """False if all ranks skip this step since a gradient was not finite, None if that is not known."""
        ...


@runtime_checkable
class ReplaysPipeline(Protocol):
    """A strategy with stages that can run a training step of the optimizer step under way again."""

    def keep_batches(self) -> None:
        """Get ready for it."""
        ...

    def replay_training_step(self, observer: Any, batch: int = -1) -> dict[str, Tensor]:
        """Run it inside of ``observer.measuring(stage, kind, micro_batch)``; the gradients of this rank. Collective."""
        ...


def pipeline_stages(strategy: object) -> int:
    """How many ranks share a model; 1 without stages."""
    return strategy.mesh.pipeline_parallel_size if isinstance(strategy, HasMesh) else 1


def pipeline_rank(strategy: object) -> int:
    """Which of them this one is."""
    return strategy.mesh.pipeline_rank if isinstance(strategy, HasMesh) else 0


def dropped_by_strategy(strategy: object) -> bool:
    """Whether the strategy itself has found gradients that are not finite, and has dropped them on all ranks."""
    # Where gradients travel late or in periods, the last exchange was not that of this step.
    return _agree(strategy) and isinstance(strategy, KnowsFinite) and strategy.gradients_finite is False


def has_equal_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether gradients are surely the same on all ranks after backward, so that all see the same without a word."""
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return True
    return (
        isinstance(strategy, DDPStrategy)
        and _agree(strategy)
        and module.automatic_optimization  # else gradients may be summed at other times, or not at all
        and pipeline_stages(strategy) == 1
        and not getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        and getattr(strategy, "_model_averaging_period", None) is None  # local steps
    )


def _agree(strategy: object) -> bool:
    return getattr(strategy, "gradients_agree", True)


def any_rank(trainer: pl.Trainer, decision: bool) -> bool:
    """Whether it is so on any rank. Collective."""
    return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))


def exchange_overflows_at(trainer: pl.Trainer, gradient_dtype: torch.dtype) -> tuple[float, str]:
    """Above which sum gradients overflow on their way from rank to rank, and why.

    Gradients travel in their own type, unless a hook of DDP or a compression makes them smaller.
    """
    limit, reason = torch.finfo(gradient_dtype).max, str(gradient_dtype).removeprefix("torch.")
    hooks = [
        getattr(hook, "__qualname__", "")
        for hook, _ in getattr(trainer.strategy.model, "_comm_hooks", ())  # what register_comm_hook was given
    ]
    describe = getattr(trainer.strategy, "describe", None)
    sent = describe().get("gradients", "") if callable(describe) else ""
    other = [hook for hook in hooks if "bf16" not in hook and not hook.startswith("GradientCommunicator")]
    if "fp16" in sent or other:
        half = torch.finfo(torch.float16).max
        if half < limit:
            return half, "float16" if "fp16" in sent else f"float16, if that is what the hook {other[0]} sends"
    return limit, reason


def gather(value: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What all ranks have to say, by rank. Collective; without a process group only one's own.

    Travels as bytes of JSON, so that nothing has to be unpickled.
    """
    text = json.dumps(plain(value)).encode()
    several = dist.is_available() and dist.is_initialized()
    if several and len(text) > _MOST_BYTES:  # every rank must go on, so that none waits
        text = json.dumps({"rank": dist.get_rank(), "note": "what this rank has found was too long to send"}).encode()
    return [json.loads(one) for one in gather_texts(text, device)]
