"""One run of the user's step without parameters, to find out what each stage needs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.batches import tensors_in
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError, user_location
from danon_lightning.strategies.pipeline.loss_weights import CountedLosses
from danon_lightning.strategies.pipeline.made_up import call_with_made_up_values
from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.observer import observed_by
from danon_lightning.strategies.pipeline.random_numbers import generators_restored
from danon_lightning.strategies.pipeline.recorder import BufferUses, Recorder
from danon_lightning.strategies.pipeline.recording import (
    ArgumentAt,
    BlockRecord,
    Constant,
    Recording,
    TensorMeta,
    position_of,
)
from danon_lightning.strategies.pipeline.slots import blocks_of_slots, find_slots
from danon_lightning.strategies.pipeline.torch_internals import (
    TreeSpec,
    call_with_forward,
    calls_replaced,
    enclosing_checkpoint,
    flatten,
    flatten_with_paths,
    in_reentrant_checkpoint,
    unflatten,
)

# What a block may return besides tensors: it says the same in every process and cannot hide a tensor.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)


def dry_run(root: nn.Module, blocks: Blocks, step: Callable[[], object]) -> Recording:
    """Run a step once with all parameters absent, and record what stages must know about it.

    Nothing stays changed: parameters, buffers and attributes of the module and its submodules, and the generators of
    random numbers, are as before.

    Args:
        root: The module that owns everything the step uses.
        blocks: Its body.
        step: Runs the user's step on a micro-batch, whose data are real. Its result does not matter.

    Raises:
        UnsupportedStepError: If the step cannot be cut anywhere: the reason, and the user's line of code.
    """
    return _DryRun(root, blocks).run(step)


def batch_signature(root: nn.Module, batch: object) -> tuple[Any, ...]:
    """What the recording of a dry run depends on: a batch of the same signature needs no new one.

    Args:
        root: The module.
        batch: Its input: nested containers of tensors and other things.

    Returns:
        Something hashable.
    """
    leaves, structure = flatten(batch)
    return (
        str(structure),
        tuple(_leaf_signature(leaf) for leaf in leaves),
        tuple(_leaf_signature(tensor) for tensor in tensors_in(batch)),
        torch.is_grad_enabled(),
        tuple(module.training for module in root.modules()),
        tuple(parameter.requires_grad for parameter in root.parameters()),
    )


def _leaf_signature(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (type(None), bool, int, float)) else type(leaf)


@dataclass(frozen=True)
class _Call:
    """How a block was called."""

    arguments: dict[str, Any]
    checkpoint: FrameType | None


class _DryRun:
    """The state of a dry run."""

    def __init__(self, root: nn.Module, blocks: Blocks) -> None:
        self._root, self._blocks = root, blocks
        self._recorder = Recorder(len(blocks))
        self._calls: list[_Call] = []
        self._results: list[tuple[tuple[TensorMeta | ArgumentAt | Constant, ...], TreeSpec]] = []
        self._has_gradients = torch.is_grad_enabled()

    def run(self, step: Callable[[], object]) -> Recording:
        tail_problem = None
        with self._everything_absent() as losses:
            try:
                step()
            except UnsupportedStepError as error:
                if not self._recorder.in_tail or self._recorder.fatal is not None:
                    raise
                tail_problem = str(error)
            except Exception as error:
                if not self._recorder.in_tail:
                    raise
                # Whatever it is that the tail does with values which it does not have, it will on the last stage.
                tail_problem = f"{type(error).__name__}: {error}"
        recorder = self._recorder
        if recorder.fatal is not None:  # user code has caught it
            raise recorder.fatal
        if not recorder.in_tail:
            recorder.refuse(
                f"the step calls {len(self._calls)} of the {len(self._blocks)} blocks of {self._blocks.name!r}: "
                "with pipeline stages all must be called, one after another"
            )
        return Recording(
            blocks=tuple(self._block_record(index) for index in range(len(self._blocks))),
            uses={name: frozenset(positions) for name, positions in recorder.uses.items()},
            losses=len(losses.divisors),
            tail_problem=tail_problem,
            tail_reads=recorder.tail_reads,
        )

    @contextmanager
    def _everything_absent(self) -> Iterator[CountedLosses]:
        """Replace parameters and the buffers of blocks, and record what is done with them and with blocks."""
        slots = find_slots(self._root)
        of_blocks = blocks_of_slots(slots, self._blocks.modules)
        device = next(iter(slots.values())).get().device
        losses = CountedLosses()
        with ExitStack() as stack:
            stack.enter_context(generators_restored(device))
            # It puts parameters back as well.
            stack.enter_context(restored(self._root))
            for name, slot in slots.items():
                if slot.is_parameter or name in of_blocks:
                    slot.put(Absent.like(slot.get(), name=name))
            buffers = {id(slot.get()): name for name, slot in slots.items() if not isinstance(slot.get(), Absent)}
            stack.enter_context(observed_by(self._recorder))
            self._recorder.buffers = buffers
            stack.enter_context(BufferUses(self._recorder, buffers))
            stack.enter_context(losses)
            stack.enter_context(calls_replaced(self._blocks.modules, self._replacement))
            yield losses

    def _replacement(self, index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        block = self._blocks.modules[index]

        def call(*args: Any, **kwargs: Any) -> Any:
            self._note_call(index, args, kwargs)
            forward = block.forward

            def recorded(*args: Any, **kwargs: Any) -> Any:
                return self._forward(index, forward, args, kwargs)

            result = call_with_forward(block, recorded, *args, **kwargs)
            self._recorder.position = position_of(index) + 1
            return result

        return call

    def _note_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a block; refuse it in a place where it could not be run by another stage."""
        expected = len(self._calls)
        if index < expected:
            self._recorder.refuse(
                f"block {index} of {self._blocks.name!r} is called more than once in a step, the last time at "
                f"{user_location()}: with pipeline stages each is called once, since nothing goes back to earlier ones"
            )
        if index > expected:
            self._recorder.refuse(
                f"block {index} of {self._blocks.name!r} is called where block {expected} was expected, at "
                f"{user_location()}: with pipeline stages all are called in their order, none is left out"
            )
        if self._has_gradients and in_reentrant_checkpoint():
            self._recorder.refuse(
                f"block {index} of {self._blocks.name!r} is called inside torch.utils.checkpoint with "
                f"use_reentrant=True, at {user_location()}, which hides what the block needs from other stages: set "
                "use_reentrant=False"
            )
        arguments = flatten_with_paths((args, kwargs))
        self._calls.append(_Call(arguments, enclosing_checkpoint()))
        self._recorder.position = position_of(index)
        for argument in arguments.values():
            if isinstance(argument, Absent):
                self._recorder.used(argument)

    def _forward(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block, and record what it returns."""
        given = args, kwargs
        try:
            returned = forward(*args, **kwargs)
        except AbsentDataError as reason:
            try:
                returned, given = call_with_made_up_values(self._blocks.modules[index], forward, args, kwargs)
            except AbsentDataError:
                raise
            except Exception as error:
                raise AbsentDataError(
                    f"block {index} of {self._blocks.name!r} can be run neither on shapes alone ({reason}) nor on "
                    f"random values ({type(error).__name__}: {error})"
                ) from error
        arguments = flatten_with_paths((args, kwargs))
        paths = {id(leaf): path for path, leaf in flatten_with_paths(given).items() if not isinstance(leaf, _PLAIN)}
        leaves, structure = flatten(returned)
        results = tuple(self._result(index, leaf, paths) for leaf in leaves)
        self._results.append((results, structure))
        # What is made in a block is made by it, even if from the batch alone: other stages do not run it.
        for_user: list[Any] = []
        for leaf, result in zip(leaves, results, strict=True):
            if isinstance(result, ArgumentAt):
                leaf = arguments[result.path]
            elif isinstance(result, TensorMeta):
                leaf = result.absent()
                self._recorder.made(leaf)
            for_user.append(leaf)
        return unflatten(for_user, structure)

    def _result(self, index: int, leaf: Any, paths: dict[int, str]) -> TensorMeta | ArgumentAt | Constant:
        if id(leaf) in paths:
            return ArgumentAt(paths[id(leaf)])
        if isinstance(leaf, Tensor):
            return TensorMeta.of(leaf)
        if not isinstance(leaf, _PLAIN):
            self._recorder.refuse(
                f"block {index} of {self._blocks.name!r} returns a {type(leaf).__name__}, in which tensors cannot be "
                "found: return tensors, or tuples, lists or dictionaries of them"
            )
        return Constant(leaf)

    def _block_record(self, index: int) -> BlockRecord:
        call = self._calls[index]
        obstacle = self._recorder.obstacle(index, call.arguments.values(), call.checkpoint) if index else None
        arrives: dict[str, TensorMeta] = {}
        seen: set[int] = set()
        for path, argument in call.arguments.items():
            # A parameter among the arguments is held where it is used.
            if isinstance(argument, Absent) and argument.full_name is None and id(argument) not in seen:
                seen.add(id(argument))
                arrives[path] = TensorMeta.of(argument)
        results, structure = self._results[index]
        return BlockRecord(results, structure, arrives, obstacle)
