"""What torch.distributed.pipelining does not document and this package relies on: a stage of its schedules.

But for ``orders.py``, which reads off what schedules do, nothing else in the package may touch such names;
``tests/strategies/pipeline/test_torch_internals.py`` fails where torch has changed one of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import _StageMeta, extract_tensor_metas
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo
from typing_extensions import override

from danon_lightning.strategies.pipeline.timeline import PassObserver
from danon_lightning.strategies.process_groups import GroupReference


class ScheduledStage(_PipelineStageBase):
    """A stage of a schedule of torch.

    torch's own stages learn shapes from a first micro-batch, and keep buffers of these shapes. Here they are known, may
    differ from micro-batch to micro-batch, and buffers are there while something is on its way only.
    """

    def __init__(
        self, module: nn.Module, index: int, stages: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        """Start.

        Args:
            module: Runs the stage: gets what has arrived and ``index=`` the number of the micro-batch; returns a tuple
                of tensors to be sent on, in the last stage the loss.
            index: Which stage it is.
            stages: Number of stages.
            device: Where it runs.
            group: The ranks of the pipeline.
        """
        super().__init__(module, index, stages, device, group)
        self.observer: PassObserver | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of the pipeline."""
        return self._group()

    @group.setter
    def group(self, group: dist.ProcessGroup) -> None:
        self._group = GroupReference(group)

    def _measuring(self, kind: str, chunk: int) -> AbstractContextManager[None]:
        return nullcontext() if self.observer is None else self.observer.measuring(self.stage_index, kind, chunk)

    def _named(self, kind: str, chunk: int, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Have :func:`_transfers_observed` know them again."""
        for op in ops:
            op.transfer = (self.stage_index, kind, chunk)  # type: ignore[attr-defined]
        return ops

    def expect(self, arriving: Sequence[Sequence[Tensor]], leaving: Sequence[Sequence[Tensor]]) -> None:
        """Get ready for a batch.

        Args:
            arriving: For each micro-batch what comes from the stage before: tensors on the meta device.
            leaving: The same for what goes to the next one; nothing in the last stage.
        """
        self.clear_runtime_states()
        for left_over in (self.bwd_cache, self.backward_state, self.dw_runner):
            left_over.clear()
        self.has_backward = True
        self.chunks = len(arriving)
        self._metas = [(_metas(ins), _metas(outs)) for ins, outs in zip(arriving, leaving, strict=True)]
        before, after = self.stage_index - 1, self.stage_index + 1
        self.args_recv_info = {
            chunk: tuple(_RecvInfo("activation", before, None, meta) for meta in ins)
            for chunk, (ins, _) in enumerate(self._metas)
        }
        self.grad_recv_info = {
            chunk: tuple(_RecvInfo("gradient", after, None, meta) for meta in _with_gradient(outs))
            for chunk, (_, outs) in enumerate(self._metas)
        }
        self._turn_to(0)

    def _turn_to(self, chunk: int) -> None:
        """torch takes all micro-batches for alike, and looks at these for any of them."""
        ins, outs = self._metas[chunk]
        self._stage_meta = _StageMeta(ins, outs, _with_gradient(ins), _with_gradient(outs))
        self.act_send_info = {0: []} if self.is_last else {at: [self.stage_index + 1] for at in range(len(outs))}
        self.grad_send_info = [self.stage_index - 1] * len(ins)

    @override
    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._turn_to(fwd_chunk_id)
        with self._measuring("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    @override
    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._turn_to(bwd_chunk_id)
        with self._measuring("backward", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    @override
    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self._measuring("weights", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    @override
    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        ops = _as_in_memory(super().get_fwd_recv_ops(fwd_chunk_id))
        return self._named("receive activation", fwd_chunk_id, ops)

    @override
    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        ops = _as_in_memory(super().get_bwd_recv_ops(bwd_chunk_id))
        return self._named("receive gradient", bwd_chunk_id, ops)

    @override
    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._allocate(self.grad_recv_info[mb_index])
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    @override
    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        arrived = super()._retrieve_recv_activations(fwd_chunk_id)
        _forget(self.args_recv_info[fwd_chunk_id])
        return arrived

    @override
    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        arrived = super()._retrieve_recv_grads(bwd_chunk_id)
        _forget(self.grad_recv_info[bwd_chunk_id])
        return arrived

    @override
    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._turn_to(fwd_chunk_id)
        ops = _laid_out(super().get_fwd_send_ops(fwd_chunk_id), self._metas[fwd_chunk_id][1])
        return self._named("send activation", fwd_chunk_id, ops)

    @override
    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._turn_to(bwd_chunk_id)
        sent = [meta for meta in _with_gradient(self._metas[bwd_chunk_id][0]) if meta is not None]
        ops = _laid_out(super().get_bwd_send_ops(bwd_chunk_id), sent)
        return self._named("send gradient", bwd_chunk_id, ops)

    @override
    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # Neighbours may be on one rank, which cannot send to itself.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    @override
    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        """All is known already."""

    @override
    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        """All is known already."""

    @override
    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[_RecvInfo, ...]:
        """torch demands it, and calls it where it would learn the shapes: never here."""
        raise NotImplementedError

    def _allocate(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            meta = info.tensor_meta
            if meta is not None:
                info.buffer = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=self.device)


def build_schedule(name: str, stages: Sequence[ScheduledStage], micro_batches: int) -> schedules._PipelineSchedule:
    """A schedule of torch.

    Args:
        name: What torch calls it.
        stages: The stages of this rank, ascending.
        micro_batches: For how many.
    """
    cls = schedules.get_schedule_class(name)
    single = issubclass(cls, schedules.PipelineScheduleSingle)
    # The stage has weighted the loss already.
    return cls(stages[0] if single else list(stages), micro_batches, loss_fn=_first, scale_grads=False)


def run_schedule(
    schedule: schedules._PipelineSchedule, micro_batches: int, observer: PassObserver | None = None
) -> None:
    """Run all forward and backward passes.

    Args:
        schedule: From :func:`build_schedule`.
        micro_batches: For how many.
        observer: Is told of transfers; of passes it is told by the stages.
    """
    numbers = [{"index": index} for index in range(micro_batches)]
    with nullcontext() if observer is None else _transfers_observed(observer):
        schedule._step_microbatches([()] * micro_batches, numbers, list(range(micro_batches)), return_outputs=False)


class _Works(list[dist.Work]):
    """Transfers under way, and which of them is waited for."""

    transfer: tuple[int, str, int]


@contextmanager
def _transfers_observed(observer: PassObserver) -> Iterator[None]:
    """Replace the two functions by which all schedules of torch begin transfers and wait for them.

    Stages could only guess when a rank waits: most schedules ask for data long before they need it.
    """
    begin, wait = schedules._batch_p2p, schedules._wait_batch_p2p

    def measured_begin(p2p_ops: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
        transfers = [op.transfer for op in p2p_ops if hasattr(op, "transfer")]
        if not transfers:
            return begin(p2p_ops, desc)
        received = [transfer for transfer in transfers if transfer[1].startswith("receive")]
        # A pass cannot begin without what is received. What is sent along goes to the rank that this comes from.
        stage, kind, chunk = transfer = (received or transfers)[0]
        if received:
            observer.mark(stage, kind.replace("receive", "want"), chunk)
        with observer.measuring(stage, "communication", chunk):
            works = _Works(begin(p2p_ops, desc))
        works.transfer = transfer
        return works

    def measured_wait(work: list[dist.Work]) -> None:
        with observer.measuring(*work.transfer) if isinstance(work, _Works) else nullcontext():
            wait(work)

    schedules._batch_p2p, schedules._wait_batch_p2p = measured_begin, measured_wait
    try:
        yield
    finally:
        schedules._batch_p2p, schedules._wait_batch_p2p = begin, wait


def _first(output: Tensor, _: object) -> Tensor:
    return output


def _metas(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    # Strides are kept where there are neither gaps nor overlaps.
    dense = [torch.empty_like(tensor).requires_grad_(tensor.requires_grad) for tensor in tensors]
    return extract_tensor_metas(tuple(dense)) or ()


def _with_gradient(metas: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(meta if meta.requires_grad else None for meta in metas)


def _forget(infos: Sequence[_RecvInfo]) -> None:
    for info in infos:
        info.buffer = None


def _laid_out(ops: list[dist.P2POp], metas: Sequence[Any]) -> list[dist.P2POp]:
    """Sends, of tensors with the strides that the receiver has. Those of a gradient are anyone's guess."""
    for op, meta in zip(ops, metas, strict=True):
        op.tensor = laid_out(op.tensor, meta.stride)
    return _as_in_memory(ops)


def _as_in_memory(ops: list[dist.P2POp]) -> list[dist.P2POp]:
    for op in ops:
        op.tensor = as_in_memory(op.tensor)
    return ops


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor, copied if it has other strides.

    Args:
        tensor: Any.
        stride: Those that are wanted.
    """
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def no_view(tensor: Tensor) -> Tensor:
    """The tensor, as something that torch's stages can detach in place when they have done with it: no view."""
    return _Detachable.apply(tensor) if tensor.requires_grad and tensor._is_view() else tensor


class _Detachable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def as_in_memory(tensor: Tensor) -> Tensor:
    """A contiguous view, as gloo wants it: the dimensions in the order in which they lie in memory.

    Args:
        tensor: Without gaps or overlaps.
    """
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
