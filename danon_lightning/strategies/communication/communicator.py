"""The one object that a DDP bucket meets: a comm hook with a thread of its own."""

import atexit
import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from danon_lightning.strategies.communication.collectives import build_collective
from danon_lightning.strategies.communication.compressors import BlockCompressor, get_compressor
from danon_lightning.strategies.communication.messages import Message, plan_messages
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.strategies.mesh import Mesh


class GradientCommunicator:
    """Averages the gradient buckets of DistributedDataParallel over all ranks.

    Register it on any torch DDP module: ``ddp.register_comm_hook(communicator, communicator.hook)``. Buckets are handed
    to one thread in the order in which DDP completes them, cut into messages, and sent while the backward pass goes on.
    All ranks end with the same bits.

    If the exchange fails (a peer has died, the time-out has passed) ``backward()`` raises on every rank, and so does
    every later one. DDP garbles the message on its way; ``error`` keeps the original.

    Args:
        mesh: Layout of the ranks. The default process group must be initialised.
        compression: None for dense gradients, a name of :func:`available_compressors`, or a compressor.
        hierarchical: True to sum inside each node first and send only the sums between nodes, False to treat all ranks
            alike, "auto" for True wherever there are several nodes with several ranks each.
        device: Device of the gradients.
        timeout: How long one operation may take; None for torch's default.

    Raises:
        ValueError: For an unknown compression, or ``hierarchical=True`` on a mesh of one level.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        compression: str | BlockCompressor | None = None,
        hierarchical: bool | Literal["auto"] = "auto",
        device: torch.device | str = "cpu",
        timeout: timedelta | None = None,
    ) -> None:
        """See the class. Collective: it creates process groups, so every rank must do it at the same point."""
        self._mesh = mesh
        self._device = torch.device(device)
        self._compressor = get_compressor(compression)
        self._stats = CommunicationStats()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        backend = "nccl" if self._stream else "gloo"
        self._collective = build_collective(mesh, hierarchical, backend=backend, timeout=timeout)
        self._plans: dict[tuple[tuple[torch.Size, torch.dtype], ...], list[Message]] = {}
        self._in_flight: deque[_Transfer] = deque()
        self.error: RuntimeError | None = None
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

    def stats(self) -> dict[str, int]:
        """The fields of :class:`CommunicationStats`: what this rank has sent since the start."""
        return asdict(self._stats)

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
            self._collective.close()
        del self._collective

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
        if self._closed:
            raise RuntimeError(
                "the gradient communicator is closed: make another one, on a new DistributedDataParallel"
            )
        if bucket.buffer().is_sparse:
            raise ValueError("sparse gradients cannot be exchanged: set sparse=False on the embedding")
        future: Future[Tensor] = Future(devices=[self._device]) if self._stream else Future()
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._queue.put(_Bucket(bucket.buffer(), bucket.parameters(), bucket.is_last(), future, ready))
        return future

    def _run(self) -> None:
        with self._on_stream():
            while (bucket := self._queue.get()) is not None:
                try:
                    if self.error is not None:
                        raise self.error
                    self._exchange(bucket)
                except BaseException as error:
                    self._fail(error, bucket)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _exchange(self, bucket: "_Bucket") -> None:
        if bucket.ready is not None:
            assert self._stream is not None
            self._stream.wait_event(bucket.ready)
        self._stats.dense_bytes += bucket.buffer.nbytes
        messages = self._plan(bucket)
        bucket.unfinished = len(messages)
        if not messages:  # empty parameters
            bucket.future.set_result(bucket.buffer)
        for message in messages:
            steps = self._collective.mean(
                message.load(bucket.buffer), self._compressor if message.compressed else None, self._stats
            )
            self._in_flight.append(_Transfer(message, bucket, steps))
            self._advance()
        # Which operations follow one another must be a function of the messages' numbers alone, the same on every rank.
        # So the pipeline is emptied after the last bucket, never because the queue happens to be empty here.
        if bucket.is_last:
            self._stats.steps += 1
            while self._in_flight:
                self._advance()

    def _plan(self, bucket: "_Bucket") -> list[Message]:
        key = tuple((parameter.shape, parameter.dtype) for parameter in bucket.parameters)
        if key not in self._plans:
            self._plans[key] = plan_messages(
                bucket.parameters,
                capacity=self._collective.capacity(bucket.buffer.element_size()),
                shards=self._collective.shards,
                block_size=self._compressor.block_size if self._compressor else None,
            )
        return self._plans[key]

    def _advance(self) -> None:
        """Take every message under way one step further, oldest first; all take the same number of steps."""
        for transfer in tuple(self._in_flight):
            values = next(transfer.steps)
            if values is None:
                continue
            self._in_flight.popleft()
            bucket = transfer.bucket
            transfer.message.store(values, bucket.buffer)
            bucket.unfinished -= 1
            if not bucket.unfinished:
                bucket.future.set_result(bucket.buffer)

    def _fail(self, error: BaseException, bucket: "_Bucket") -> None:
        if self.error is None:
            self.error = RuntimeError(
                f"rank {self._mesh.rank}: the gradient exchange has failed ({type(error).__name__}: {error}). If the "
                "connection was closed, another rank has stopped: the cause is the first error in that rank's output"
            )
            self.error.__cause__ = error
        for waiting in {id(b): b for b in [bucket, *(transfer.bucket for transfer in self._in_flight)]}.values():
            if not waiting.future.done():
                waiting.future.set_exception(self.error)  # type: ignore[arg-type]  # torch's own annotation is wrong
        self._in_flight.clear()


@dataclass
class _Bucket:
    buffer: Tensor
    parameters: list[Tensor]
    is_last: bool
    future: Future[Tensor]
    ready: "torch.cuda.Event | None"
    unfinished: int = 0


@dataclass
class _Transfer:
    message: Message
    bucket: _Bucket
    steps: Iterator[Tensor | None]
