"""The one object that a bucket of gradients meets."""

import atexit
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.constants import default_pg_timeout
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies.communication.adaptive.adaptation import Adaptation
from danon_lightning.strategies.communication.adaptive.settings import (
    AutoCompression,
    Candidate,
    check_auto,
    label,
    resolve_auto,
)
from danon_lightning.strategies.communication.averaging import Averaging, group_into_buckets, take_gradients
from danon_lightning.strategies.communication.checkpoint import dense_state, gather_state, has_residual, restore_state
from danon_lightning.strategies.communication.collectives import Exchange, Steps, average
from danon_lightning.strategies.communication.collectives.exchange import view
from danon_lightning.strategies.communication.compressors import (
    Compressor,
    Int8Compressor,
    LinearCompressor,
    get_compressor,
)
from danon_lightning.strategies.communication.compressors.base import Region
from danon_lightning.strategies.communication.error_feedback import ErrorFeedback, resolve_error_feedback
from danon_lightning.strategies.communication.layout import build_levels, group_of_all
from danon_lightning.strategies.communication.memory import Memory
from danon_lightning.strategies.communication.messages import Layout, Plan, plan_messages, sizes_for
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.strategies.mesh import Mesh

# Room for codes that are longer than what they stand for (several nodes' sparse ones).
_ROW_MARGIN = 3


class GradientCommunicator:
    """Averages the gradient buckets of DistributedDataParallel over all ranks.

    Register it on any torch DDP module: ``ddp.register_comm_hook(communicator, communicator.hook)``. Buckets are handed
    to one thread in the order in which DDP completes them, cut into messages, and sent while the backward pass goes on.
    All ranks end with the same bits.

    If the exchange fails (a peer has died, the time-out has passed) ``backward()`` raises on every rank, and so does
    every later one. DDP garbles the message on its way; ``error`` keeps the original.

    With a compression, what is kept for later steps changes only if the gradients of all ranks are finite. Otherwise
    ``finite`` is False after ``backward()``, and the step should be skipped: it is, with a gradient scaler; else test
    ``finite`` before ``optimizer.step()``.

    Args:
        module: The model, best wrapped in DistributedDataParallel already: its parameters' names are what residuals go
            by, and the wrapper says whether there may be unused ones.
        mesh: Layout of the ranks. The default process group must be initialised.
        compression: None for dense gradients, a name of :func:`available_compressors`, or a compressor; "auto", or an
            :class:`AutoCompression`, to choose by measurement, again and again. Choices are those that any optimizer
            tolerates, unless candidates are given or :meth:`allow` says more.
        error_feedback: Whether what compression leaves out is added to the next step: "auto" for where the compressor
            needs it; or an :class:`ErrorFeedback` with settings of its own.
        hierarchical: True to sum inside each node first and send only the sums between nodes, False to treat all ranks
            alike, "auto" for True wherever there are several nodes with several ranks each.
        device: Device of the gradients.
        timeout: How long one operation may take; None for torch's default.
        loss_scale: What the loss is multiplied with at present: ``scaler.get_scale``, where a ``GradScaler`` is used.

    Attributes:
        error: What has made the exchange fail; None as long as it works.
        finite: Whether all gradients of the last exchange were finite, on all ranks. Without compression (and without
            "auto") it is always True: nothing depends on it, so it is not asked.

    Raises:
        ValueError: For an unknown compression; ``hierarchical=True`` on a mesh of one level; ranks that are not
            numbered node by node.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        *,
        compression: "str | Compressor | LinearCompressor | AutoCompression | None" = None,
        error_feedback: "bool | Literal['auto'] | ErrorFeedback" = "auto",
        hierarchical: bool | Literal["auto"] = "auto",
        device: torch.device | str = "cpu",
        timeout: timedelta | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """See the class. Collective: it creates process groups, so every rank must do it at the same point."""
        self._mesh = mesh
        self._device = torch.device(device)
        self._loss_scale = loss_scale
        self._module = module.module if isinstance(module, DistributedDataParallel) else module
        self._names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        self._stats = CommunicationStats()
        timeout = timeout if timeout is not None else default_pg_timeout
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        auto = resolve_auto(compression)
        if auto is not None:
            check_auto(error_feedback, mesh.pipeline_parallel_size)
        compressor = None if isinstance(compression, AutoCompression) or auto else get_compressor(compression)
        feedback = resolve_error_feedback(error_feedback, compressor)
        self._row_bytes, self._region_numel = sizes_for(self._device)
        self._everybody = group_of_all(mesh, self._device, timeout)
        inner, outer = build_levels(
            mesh,
            hierarchical,
            compressed=compressor is not None,  # "auto" compresses between nodes only, where it makes no difference
            row_bytes=_ROW_MARGIN * self._row_bytes,
            device=self._device,
            timeout=timeout,
            stats=self._stats,
        )
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._has_unused = isinstance(module, DistributedDataParallel) and (
            module.find_unused_parameters or module.static_graph
        )
        self._exchange = Exchange(inner, outer, None, None)
        self._compress_with(compressor, feedback)
        self._auto: Adaptation | None = None
        self._next: Candidate = None  # what comes once everything is flushed
        self._exchanged: list[list[tuple[str, Tensor]]] = []
        if auto is not None:
            self._exchange.looks_at_averages = True
            self._auto = Adaptation(auto, mesh, outer, hierarchical=hierarchical, device=self._device, timeout=timeout)
            controller = self._auto.controller
            self.allow([compressor for name, compressor in controller.candidates.items() if controller.allows(name)])
        self._in_flight: deque[_Transfer] = deque()
        self._open: list[_Bucket] = []
        self._scale = 1.0
        self._busy_seconds = 0.0
        self._busy_since = 0.0
        self._last_bucket_came = 0.0
        self.error: RuntimeError | None = None
        self.finite = True
        self._closed = False
        self._queue: queue.SimpleQueue[_Bucket | None] = queue.SimpleQueue()
        self._start()
        # A thread that is caught inside torch while the interpreter shuts down aborts the process.
        atexit.register(self.close)

    # DDP checks the name and the annotation of `bucket`, and that of the result.
    @staticmethod
    def hook(state: "GradientCommunicator", bucket: GradBucket) -> Future[Tensor]:
        """The function to register with ``register_comm_hook``; its state is the communicator."""
        return state._submit(bucket)

    @property
    def steps(self) -> int:
        """Number of exchanges so far."""
        return self._stats.steps

    @property
    def checks_finite(self) -> bool:
        """Whether ``finite`` is asked."""
        return self._auto is not None or self._exchange.memory is not None

    @property
    def compression(self) -> str:
        """What gradients are compressed with at present; "off" for dense ones."""
        return label(self._exchange.compressor)

    def decisions(self) -> list[tuple[int, str, str]]:
        """What "auto" has decided, the last ones: after how many exchanges, what, and why. Alike on all ranks."""
        return [(one.step, one.name, one.sentence) for one in self._auto.decisions] if self._auto is not None else []

    def predictions(self) -> dict[str, float]:
        """Seconds that a step should take with each choice of "auto", as of its last look; on rank 0, which decides."""
        return dict(self._auto.controller.predictions) if self._auto is not None else {}

    def allow(self, compressions: Sequence[Candidate]) -> None:
        """Have "auto" choose among these only, which must be candidates, on all ranks before the first exchange."""
        assert self._auto is not None
        self._auto.allow({label(compressor) for compressor in compressions if self._tolerates(compressor)})

    def exchange_momentum_of(self, optimizer: OneBitAdam) -> None:
        """Exchange the optimizer's momentum in place of gradients, once its variance is frozen.

        Without compression it does nothing: the optimizer then forms its momentum by itself, to the same effect.
        """
        if self._exchange.memory is not None:
            optimizer.receives_momentum = True
            self._exchange.memory.exchange_momentum_of(optimizer)

    def state_dict(self, *, per_rank: bool = False) -> dict[str, Any] | None:
        """What compression has left out so far, for a checkpoint. Collective; not during ``backward()``.

        It goes over the default process group, also after :meth:`close`.

        Args:
            per_rank: True for the memory of each rank, with which a run on the same number of nodes and ranks goes on
                to the bit as if it had not been interrupted; its size is that of (M + 1) models in float32 with M nodes
                (plus momentum, if that is corrected). False for one model copy, valid for any number of ranks.

        Returns:
            Tensors, numbers and strings on rank 0 (``torch.load`` with ``weights_only=True`` reads them); None on the
            others, and without compression.
        """
        memory = self._exchange.memory
        if memory is None and self._auto is None:
            return None
        # Not over a group of its own: a checkpoint may be written after close().
        group = dist.group.WORLD if self._mesh.world_size > 1 else None
        if memory is not None:
            state = gather_state(memory, self._layout, group, per_rank=per_rank)
        else:
            state = dense_state(self._layout, self._mesh.rank)
        if state is not None and self._auto is not None:
            state["auto"] = {**self._auto.state_dict(), "active": self.compression, "next": label(self._next)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a checkpoint, on every rank, before the first ``backward()``.

        Args:
            state: What :meth:`state_dict` returned on rank 0.

        Returns:
            Whether the run goes on to the bit. If not, the sum of all residuals is preserved, and shared out anew.

        Raises:
            ValueError: If it does not fit the model.
        """
        if self._auto is not None:
            self._go_on_choosing(self._auto, state)
            if self._exchange.memory is None:
                return state.get("compressor") is None
        memory = self._exchange.memory
        if memory is None:
            if self._mesh.rank == 0 and has_residual(state):
                warnings.warn("gradients are no longer compressed: what they still owe is lost", stacklevel=2)
            return False
        # Which regions there are follows from each parameter alone, whatever the buckets will be.
        regions: set[Region] = set()
        for parameter in self._module.parameters():
            regions |= self._plan_messages([parameter], parameter.element_size()).regions
        return restore_state(memory, state, regions, self._layout, self._mesh.rank, self._device)

    def _go_on_choosing(self, auto: Adaptation, state: dict[str, Any]) -> None:
        """Compress as before, or be about to flush what is owed to whatever there was before."""
        candidates = {label(candidate): candidate for candidate in auto.controller.candidates.values()}
        saved = state.get("auto")
        if saved is not None:
            auto.load_state_dict(saved)
        else:
            auto.exchanges = int(state.get("step", 0))
        active = saved["active"] if saved is not None else state.get("compressor")
        follows = saved is not None and active == saved["next"] == auto.controller.current
        if follows or not has_residual(state):
            self._change_to(candidates.get(auto.controller.current))
            return
        compressor = candidates.get(active or "") or Int8Compressor()
        self._compress_with(compressor, ErrorFeedback())
        self._next = candidates.get(auto.controller.current)
        assert self._exchange.memory is not None
        self._exchange.memory.flush_next = True

    @property
    def _levels(self) -> tuple[int, int]:
        return self._exchange.inner.size, self._exchange.outer.size

    @property
    def _layout(self) -> tuple[int, ...]:
        return (*self._levels, self._mesh.pipeline_parallel_size, int(self._mesh.pipelines_across_nodes))

    def average(self, parameters: Sequence[Tensor], bucket_bytes: int) -> None:
        """Average gradients without DistributedDataParallel, after the backward pass. Collective.

        Args:
            parameters: With gradients, the same on all ranks that exchange them; there may be none. Their ``.grad``
                become parts of buckets.
            bucket_bytes: Size of these at most, unless one gradient is larger.

        Raises:
            RuntimeError: If the exchange has failed.
        """
        for parameter, gradient in self._begin(parameters, bucket_bytes, overlaps=False).wait():
            parameter.grad = gradient

    def start_average(self, parameters: Sequence[Tensor], bucket_bytes: int) -> Averaging:
        """Begin to average gradients as :meth:`average` does, and go on meanwhile. One at a time.

        Args:
            parameters: With gradients, the same on all ranks. Their ``.grad`` become None.
            bucket_bytes: Size of buckets at most, unless one gradient is larger.

        Returns:
            What is under way. ``finite`` tells of it once it has been waited for.
        """
        return self._begin(parameters, bucket_bytes, overlaps=True)

    def _begin(self, parameters: Sequence[Tensor], bucket_bytes: int, *, overlaps: bool) -> Averaging:
        buckets, waiting = group_into_buckets(parameters, bucket_bytes), []
        for index, bucket in enumerate(buckets):
            buffer, is_last = take_gradients(bucket, self._device), index == len(buckets) - 1
            waiting.append((bucket, buffer, self._enqueue(buffer, bucket, index == 0, is_last, overlaps=overlaps)))
        return Averaging(waiting, self._stats if overlaps else None)

    def send(self, buffer: Tensor, parameters: list[Tensor], *, first: bool, last: bool) -> Future[Tensor]:
        """Begin to average a bucket in its place, which nobody else may touch until that is done.

        Args:
            buffer: The gradients, one after another.
            parameters: Whose they are.
            first: Whether it is the first bucket of a step, on all ranks.
            last: Whether it is the last one.

        Returns:
            Done when the averages are there. How long it is waited for is to be told to :meth:`add_exposed`.
        """
        return self._enqueue(buffer, parameters, first, last, overlaps=True)

    @property
    def waiting(self) -> int:
        """How many buckets have been submitted, but not begun."""
        return self._queue.qsize()

    def add_exposed(self, seconds: float) -> None:
        """Count time for which a bucket of :meth:`send` was waited for."""
        self._stats.exposed_seconds += seconds

    def agree_on_maximum(self, value: int) -> int:
        """The largest of the values of all ranks. Collective; with no bucket under way."""
        if self._everybody is None:
            return value
        agreed = torch.tensor(value, device=self._device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._everybody)
        return int(agreed)

    def stats(self) -> dict[str, Any]:
        """The fields of :class:`CommunicationStats`: what this rank has done since the start."""
        exchange = self._exchange
        return asdict(
            replace(
                self._stats,
                compression_ratio=exchange.dense_bytes / exchange.sent_bytes if exchange.sent_bytes else 1.0,
                hidden_seconds=max(0.0, self._busy_seconds - self._stats.exposed_seconds),
                residual_norm=exchange.memory.residual_norm() if exchange.memory else 0.0,
            )
        )

    def close(self, *, failed: bool = False) -> None:
        """End the thread and give up the process groups; a second call does nothing.

        Args:
            failed: Set it if other ranks may not come to this point. The groups are then left as they are: giving them
                up would wait for operations that nobody completes.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._queue.put(None)
        # A thread that waits for a dead peer cannot be woken; it is a daemon and must not hold up the exit.
        self._thread.join(timeout=1.0)
        if not (failed or self.error or self._thread.is_alive()):
            self._exchange.close()
            if self._auto is not None:
                self._auto.close()
            if self._everybody is not None and dist.is_initialized():
                dist.destroy_process_group(self._everybody)
                self._everybody = None

    def _start(self) -> None:
        """Start the thread, which shall compute with one core and leave the others to the backward pass."""
        threads, ready = torch.get_num_threads(), threading.Event()

        def run() -> None:
            # Both calls are needed: the first one sets up this thread, with as many threads as the process has.
            torch.get_num_threads()
            torch.set_num_threads(1)
            ready.set()
            self._run()

        self._thread = threading.Thread(target=run, name="gradient-communicator", daemon=True)
        self._thread.start()
        ready.wait()
        torch.set_num_threads(threads)  # the thread has set it for the process too

    def _submit(self, bucket: GradBucket) -> Future[Tensor]:
        if bucket.buffer().is_sparse:
            raise ValueError("sparse gradients cannot be exchanged: set sparse=False on the embedding")
        return self._enqueue(bucket.buffer(), bucket.parameters(), bucket.index() == 0, bucket.is_last())

    def _enqueue(
        self, buffer: Tensor, parameters: list[Tensor], first: bool, last: bool, *, overlaps: bool = False
    ) -> Future[Tensor]:
        if self._closed:
            raise RuntimeError(
                "the gradient communicator is closed: make another one, on a new DistributedDataParallel"
            )
        future: Future[Tensor] = Future(devices=[self._device]) if self._stream else Future()
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        if first and self._loss_scale is not None:
            self._scale = self._loss_scale()
        if self._auto is not None:
            if first:
                self._auto.start_exchange()
            self._auto.bucket_is_ready()
        if last:
            self._last_bucket_came = time.perf_counter()
        self._queue.put(_Bucket(buffer, parameters, first, last, overlaps, future, ready, self._scale))
        return future

    def _run(self) -> None:
        with self._on_stream(), torch.no_grad():
            while (bucket := self._queue.get()) is not None:
                self._busy_since = time.perf_counter()
                try:
                    if self.error is not None:
                        raise self.error
                    self._average(bucket)
                except BaseException as error:
                    self._fail(error, bucket)
                self._busy_seconds += time.perf_counter() - self._busy_since

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _average(self, bucket: "_Bucket") -> None:
        if bucket.ready is not None:
            assert self._stream is not None
            self._stream.wait_event(bucket.ready)
        if bucket.is_first:
            self._exchange.begin_step(bucket.loss_scale)
            self._exchanged = []
        self._open.append(bucket)
        if self._auto is not None:
            self._exchanged.append([(self._names[id(parameter)], parameter) for parameter in bucket.parameters])
        self._stats.dense_bytes += bucket.buffer.nbytes
        bucket.plan = self._plan(bucket)
        bucket.unfinished = len(bucket.plan.messages)
        for message in bucket.plan.messages:
            self._in_flight.append(_Transfer(bucket, average(self._exchange, message, bucket.buffer)))
            self._advance()
        # Which operations follow one another must be a function of the messages' numbers alone, the same on every rank.
        # So the pipeline is emptied after the last bucket, never because the queue happens to be empty here.
        if bucket.is_last:
            while self._in_flight:
                self._advance()
            self._end_step()
        elif not bucket.plan.messages:  # empty parameters
            self._finish(bucket)

    def _plan(self, bucket: "_Bucket") -> Plan:
        key = tuple(id(parameter) for parameter in bucket.parameters)
        if key not in self._plans:
            self._plans[key] = self._plan_messages(bucket.parameters, bucket.buffer.element_size())
        return self._plans[key]

    def _plan_messages(self, parameters: list[Tensor], element_size: int) -> Plan:
        return plan_messages(
            [(self._names[id(parameter)], parameter) for parameter in parameters],
            layout=Layout(*self._levels),
            compressor=self._exchange.compressor,
            row_numel=self._row_bytes // element_size,
            region_numel=self._region_numel,
        )

    def _advance(self) -> None:
        """Take every message under way one step further, oldest first."""
        for transfer in tuple(self._in_flight):
            try:
                next(transfer.steps)
            except StopIteration:
                self._in_flight.remove(transfer)
                bucket = transfer.bucket
                bucket.unfinished -= 1
                # The last one waits until it is known whether the step was finite.
                if not bucket.unfinished and not bucket.is_last:
                    self._finish(bucket)

    def _finish(self, bucket: "_Bucket") -> None:
        self._correct_dense(bucket)
        self._deliver(bucket)

    def _correct_dense(self, bucket: "_Bucket") -> None:
        memory = self._exchange.memory
        if memory is not None:
            assert bucket.plan is not None
            for piece in bucket.plan.dense:
                assert piece.region is not None
                memory.correct_dense(piece.region, view(piece, bucket.buffer), bucket.loss_scale)

    def _deliver(self, bucket: "_Bucket") -> None:
        self._open.remove(bucket)
        bucket.future.set_result(bucket.buffer)

    def _end_step(self) -> None:
        """Know on all ranks whether the step counts, and deliver its last bucket."""
        (last,) = self._open
        memory = self._exchange.memory
        self._stats.steps += 1
        is_flushed = False
        if memory is not None:
            self._correct_dense(last)
            owes = memory.flush_next and memory.owes_more()
            self.finite, owes_nothing = self._agree(self._exchange.finite, not owes)
            is_flushed = memory.flush_next and owes_nothing
            if self.finite:
                memory.commit()
            else:
                memory.roll_back()
        elif self._auto is not None:
            self.finite = self._exchange.finite  # of the averages, which are the same on all ranks
        if not self.finite:
            self._stats.skipped_steps += 1
            # A gradient scaler must see it too, also where the bad element was not sent.
            last.buffer.fill_(torch.nan)
        if self._auto is not None:
            self._adapt(self._auto, is_flushed=is_flushed)
        now = time.perf_counter()
        if not last.overlaps:
            self._stats.exposed_seconds += now - self._last_bucket_came
        self._busy_seconds += now - self._busy_since
        # Only now: backward() may return at once, and what it finds must be complete.
        self._deliver(last)
        if self._auto is not None and self.finite and not self._flushes_next:
            self._auto.look(self._exchanged)
        self._busy_since = time.perf_counter()

    def _agree(self, *flags: bool) -> list[bool]:
        """Whether each is True on all ranks."""
        if self._everybody is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.int32, device=self._device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self._everybody)
        return [bool(flag) for flag in agreed.tolist()]

    def _adapt(self, auto: Adaptation, *, is_flushed: bool) -> None:
        """Change the compression, if that has been decided and nothing is owed any more."""
        decision = auto.end_exchange(finite=self.finite)
        if self.finite and is_flushed:
            self._change_to(self._next)
        if decision is None:
            return
        self._next = auto.controller.candidates[decision.name]
        memory = self._exchange.memory
        if memory is None or memory.feedback is None:
            self._change_to(self._next)
        elif self._next is not self._exchange.compressor:
            memory.flush_next = True

    @property
    def _flushes_next(self) -> bool:
        """Whether a change is under way already."""
        return self._exchange.memory is not None and self._exchange.memory.flush_next

    def _change_to(self, compressor: Candidate) -> None:
        """Compress otherwise from now on, with nothing owed from before."""
        self._next = compressor
        if compressor is self._exchange.compressor:
            return
        self._compress_with(compressor, resolve_error_feedback("auto", compressor))
        assert self._auto is not None
        if self._exchange.memory is not None:
            self._exchange.memory.step = self._auto.exchanges
        self._auto.forget_steps()

    def _compress_with(self, compressor: Candidate, feedback: ErrorFeedback | None) -> None:
        outer, memory = self._exchange.outer, None
        if compressor is not None:
            memory = Memory(compressor, feedback, outer.index, outer.size, dict(self._module.named_parameters()))
            memory.unused_parameters = self._has_unused
        self._exchange.compressor, self._exchange.memory = compressor, memory
        self._plans.clear()

    def _tolerates(self, compressor: Candidate) -> bool:
        """Whether it can be left again: what is owed to parameters that are not used cannot be flushed."""
        return compressor is None or not (self._has_unused and compressor.needs_error_feedback)

    def _fail(self, error: BaseException, bucket: "_Bucket") -> None:
        if self.error is None:
            self.error = RuntimeError(
                f"rank {self._mesh.rank}: the gradient exchange has failed ({type(error).__name__}: {error}). If the "
                "connection was closed, another rank has stopped: the cause is the first error in that rank's output"
            )
            self.error.__cause__ = error
        for waiting in [bucket, *self._open]:
            if not waiting.future.done():
                waiting.future.set_exception(self.error)  # type: ignore[arg-type]  # torch's own annotation is wrong
        self._in_flight.clear()
        self._open.clear()


@dataclass(eq=False)
class _Bucket:
    buffer: Tensor
    parameters: list[Tensor]
    is_first: bool
    is_last: bool
    overlaps: bool  # with what comes after the backward pass: what it adds to a step is known to whoever waits
    future: Future[Tensor]
    ready: "torch.cuda.Event | None"
    loss_scale: float
    plan: Plan | None = None
    unfinished: int = 0


@dataclass(eq=False)
class _Transfer:
    bucket: _Bucket
    steps: Steps[None]
