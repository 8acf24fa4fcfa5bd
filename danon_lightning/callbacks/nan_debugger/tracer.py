"""Watches every operation of a step and tells where something non-finite began.

To report the first operation with a bad result would not do: minus infinity is the ordinary way to mask scores, and an
overflow may be harmless (``1 / inf``). So every bad result is followed to where it goes, and what is reported is the
first one that has really reached the loss or a gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from danon_lightning.callbacks.nan_debugger.ledger import NOBODY, Blamed, Candidate, Ledger
from danon_lightning.callbacks.nan_debugger.modules import Place, RunningModules, node_name
from danon_lightning.callbacks.nan_debugger.operations import Operation
from danon_lightning.callbacks.nan_debugger.origin import Origin, TensorStatistics
from danon_lightning.callbacks.nan_debugger.sources import Sources
from danon_lightning.callbacks.nan_debugger.user_code import user_location
from danon_lightning.callbacks.nan_debugger.values import Badness, bad_sample, badness, batch_size_of, statistics_of


@dataclass(frozen=True)
class _Taken:
    """A tensor that an operation has taken; if it is changed in place, as it was before."""

    tensor: Tensor
    bad: Badness
    statistics: TensorStatistics | None = None


class OriginTracer(TorchDispatchMode):
    """Watches every operation inside ``with tracer:``, forward and backward, below autograd.

    ``with tracer: ...step...`` and then :meth:`resolve` with the loss and the gradients. Each operation costs a sum
    over its results and a host read more: this is for the replay of a step that has failed.

    Storages are followed, not tensors, so that views and detached tensors share what is known. What was bad before the
    step is recognised by the storages of parameters, buffers and the batch. Two rules: an infinity that an operation
    was given as a number, as by a fill, is meant as a mask; a NaN that is made of such infinities only (the softmax of
    a row that is masked as a whole) is an origin of its own, while for one made of an overflow that one is to blame.

    Attributes:
        before_writes: Called with the tensors that an operation is about to write, before it runs.
        unseen: Operations whose results could not be looked at, and why.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, batch: Any = None, *, stage: int = 0, micro_batch: int = 0) -> None:
        """Learn what is there before the step.

        Args:
            module: The whole module; its name is empty.
            batch: What the step will get, so that bad values in it are named.
            stage: The pipeline stage that runs, until :meth:`measuring` says otherwise.
            micro_batch: The micro-batch that runs, likewise.
        """
        super().__init__()
        self.before_writes: Callable[[Sequence[Tensor]], None] | None = None
        self.unseen: dict[str, str] = {}
        self._batch_size = batch_size_of(batch)
        self._sources = Sources(module, batch)
        self._ledger = Ledger(self._sources, self._batch_size)
        self._running = RunningModules(module)
        self._stage, self._kind, self._micro_batch = stage, "", micro_batch
        self._resolved: Origin | None = None
        self._watching = ExitStack()

    @contextmanager
    def measuring(self, stage: int, kind: str, micro_batch: int) -> Iterator[None]:
        """Say which pass is running in here; the signature is that of the pipeline's stopwatch.

        Args:
            stage: The pipeline stage.
            kind: ``"forward"``, ``"backward"``, or anything else, such as ``"communication"``.
            micro_batch: Which one.
        """
        before = self._stage, self._kind, self._micro_batch
        self._stage, self._kind, self._micro_batch = stage, kind, micro_batch
        try:
            with self._running.whole():
                yield
        finally:
            self._stage, self._kind, self._micro_batch = before

    def mark(self, stage: int, kind: str, micro_batch: int) -> None:
        """Do nothing: there are moments that only a stopwatch notes."""

    def resolve(
        self, loss: Tensor | None = None, gradients: Mapping[str, Tensor | None] | None = None
    ) -> Origin | None:
        """Tell from where what is bad in the loss, or else in the gradients, came.

        Args:
            loss: None if there is none on this rank.
            gradients: By parameter, in the order in which backward has made them: the first bad one is reported.

        Returns:
            None if all of it is finite, or has come from another rank.
        """
        self._resolved = None
        nothing_known = Origin("forward", exact=False, note="no operation was seen to make it")
        if loss is not None and badness(loss):
            self._resolved = self._ledger.first(self._ledger.blamed(loss, lambda: nothing_known))
            return self._resolved
        bad = {name: one for name, one in (gradients or {}).items() if one is not None and badness(one)}
        if bad:
            blamed = NOBODY.union(*(self._ledger.blamed(one, lambda: nothing_known) for one in bad.values()))
            found = self._ledger.first(blamed)
            if found is not None and found.cause == "forward" and loss is not None:
                note = "the loss is finite: the bad value has reached gradients only"
                found = replace(found, note="; ".join(filter(None, (found.note, note))))
            elif found is not None and found.cause == "backward":
                found = replace(found, parameter=next(iter(bad)))
            self._resolved = found
        return self._resolved

    @property
    def origin(self) -> Origin | None:
        """What :meth:`resolve` has told; before it the best guess, the first NaN or else the first overflow."""
        if self._resolved is not None:
            return self._resolved
        guess = self._ledger.guess()
        return None if guess is None else replace(guess, exact=False)

    @override
    def __enter__(self) -> "OriginTracer":
        """Begin to watch."""
        self._watching.enter_context(self._running.watching())
        super().__enter__()
        return self

    @override
    def __exit__(self, *exception: Any) -> None:
        """Watch no longer."""
        try:
            super().__exit__(*exception)
        finally:
            self._watching.close()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what has come of it."""
        kwargs = kwargs or {}
        operation = Operation.of(func, args, kwargs)
        self._running.note(operation.name, self._stage, self._micro_batch)
        if self.before_writes is not None and operation.written:
            self.before_writes(operation.written)
        changed = self._before(operation)
        output = func(*args, **kwargs)
        made = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        made += [one for one in operation.written if not any(one is other for other in made)]
        if operation.communicates:
            self._note_received([*operation.taken, *made])
        elif operation.allocates:
            for one in made:
                self._ledger.note_unwritten(one)
        elif not operation.views:
            try:
                self._look(operation, changed, made)
            except (RuntimeError, NotImplementedError, TypeError) as error:  # a kind of tensor that nobody thought of
                self.unseen.setdefault(operation.name, str(error).partition("\n")[0])
        return output

    def _before(self, operation: Operation) -> dict[int, _Taken]:
        """What is to be changed in place, as long as it is there."""
        try:
            return {id(one): _Taken(one, badness(one), self._statistics(one)) for one in operation.changed}
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self.unseen.setdefault(operation.name, str(error).partition("\n")[0])
            return {}

    def _look(self, operation: Operation, changed: Mapping[int, _Taken], made: Sequence[Tensor]) -> None:
        bad = [(one, how) for one in made if (how := badness(one))]
        taken: list[_Taken] = []
        if bad:
            taken = [changed.get(id(one)) or _Taken(one, badness(one)) for one in operation.taken]
        sick = [one for one in taken if one.bad]
        # Asked before anything that was written is forgotten.
        inherited = [
            self._inherited(one, how, sick, lambda made: self._describe(operation, taken, made)) for one, how in bad
        ]
        for one in operation.written:
            self._ledger.note_written(one)
        fresh = NOBODY
        for (tensor, how), blamed in zip(bad, inherited, strict=True):
            if (
                not blamed
                and not operation.written
                and any(self._ledger.is_same(tensor, one) for one in operation.taken)
            ):
                continue  # a view that its schema does not call one
            if not blamed:
                fresh = blamed = fresh or self._add(operation, taken, tensor, how)
            self._ledger.blame(tensor, blamed)

    def _inherited(
        self, made: Tensor, how: Badness, sick: Sequence[_Taken], describe: Callable[[Tensor], Origin]
    ) -> Blamed:
        """Who is to blame already for what comes out bad; nobody if this operation has made it of what was well."""

        def blamed(one: _Taken) -> Blamed:
            return self._ledger.blamed(one.tensor, lambda: describe(made))

        by_nan = NOBODY.union(*(blamed(one) for one in sick if one.bad.nan))
        if by_nan and how.nan:
            return by_nan
        by_inf = NOBODY.union(*(blamed(one) for one in sick if one.bad.inf))
        return self._ledger.unmeant(by_inf) if how.nan else by_inf or by_nan

    def _add(self, operation: Operation, taken: Sequence[_Taken], made: Tensor, how: Badness) -> Blamed:
        notes = []
        if how.nan and any(one.bad.inf for one in taken):
            notes.append("made of infinities that were meant, as in a mask")
        if any(self._ledger.unwritten(one.tensor) for one in taken if one.bad):
            notes.append("it has read memory that nobody had written")
        origin = replace(self._describe(operation, taken, made), note="; ".join(notes))
        return self._ledger.add(Candidate(origin, meant=operation.fills and not how.nan))

    def _describe(self, operation: Operation, taken: Sequence[_Taken], made: Tensor | None) -> Origin:
        place, backward = self._place(operation)
        inputs = tuple(one.statistics or self._statistics(one.tensor) for one in taken)
        names = (self._sources.find(one.tensor) for one in taken)
        return Origin(
            cause="backward" if backward else "forward",
            op=operation.name,
            module=place.module,
            module_type=place.module_type,
            parameter=None if backward else next((one.name for one in names if one.kind == "parameter"), None),
            stage=place.stage,
            micro_batch=place.micro_batch,
            phase="backward" if backward else "forward",
            node=node_name() if backward else "",
            forward_op=place.op if backward else "",
            location=place.location,
            inputs=inputs,
            output=None if made is None else statistics_of(made),
            sample=None if made is None else bad_sample(made, self._batch_size),
        )

    def _place(self, operation: Operation) -> tuple[Place, bool]:
        """Where the operation belongs, and whether it is part of backward."""
        here = Place(*self._running.current, user_location(), operation.name, self._stage, self._micro_batch)
        # In backward a module runs only where checkpointing computes its forward again.
        differentiated = None if self._running.inside else self._running.differentiated()
        if differentiated is None:
            backward = self._kind == "backward" and not self._running.inside
            return here._replace(op="") if backward else here, backward
        # The line of a backward that the user has written says more than the line that called its forward.
        return differentiated._replace(location=here.location or differentiated.location), True

    def _statistics(self, tensor: Tensor) -> TensorStatistics:
        return statistics_of(tensor, self._sources.find(tensor).name)

    def _note_received(self, tensors: Sequence[Tensor]) -> None:
        received = self._ledger.add(Candidate(Origin("forward"), received=True))
        for tensor in tensors:
            self._ledger.blame(tensor, received)
