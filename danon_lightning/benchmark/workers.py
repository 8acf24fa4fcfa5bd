"""Runs the parts of a measurement in processes of their own: one that crashes or is killed loses only its own part."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Generic, Literal, TypeVar

_Argument = TypeVar("_Argument")
_Value = TypeVar("_Value")

# What a process that has done its work may take to leave.
_LAST_SECONDS = 10.0

# What the functions of the benchmarks are in: imported once, not in each process.
_IMPORTED = ("danon_lightning.benchmark.attention.streaming", "danon_lightning.benchmark.recall.training")

# Called in the process with how far it has come: anything that can be pickled.
Tell = Callable[[Any], None]
Status = Literal["finished", "crashed", "killed", "too slow"]


@dataclass(frozen=True)
class Outcome(Generic[_Value]):
    """What became of one call.

    Attributes:
        status: Whether it returned, raised, was killed (by the system, for lack of memory, most likely), or was ended
            because it took too long.
        value: What it returned.
        message: Why it did not, in one line.
        detail: Where that was, if it raised.
    """

    status: Status
    value: _Value | None = None
    message: str = ""
    detail: str = ""


def run_isolated(
    function: Callable[[_Argument, Tell], _Value],
    arguments: Sequence[_Argument],
    *,
    jobs: int = 1,
    time_limit: float | None = None,
    told: Callable[[int, Any], None] | None = None,
    done: Callable[[int, Outcome[_Value]], None] | None = None,
) -> list[Outcome[_Value]]:
    """Call a function once for each argument, each time in a fresh process; none of them is left at the end.

    Args:
        function: A function at module level, for it travels to the processes, as do its arguments and results.
        arguments: One for each call.
        jobs: Number of processes at the same time.
        time_limit: Seconds after which a process is ended; None for no limit.
        told: Is given the index of a call and what its function passed to its second argument.
        done: Is given the index of a call and its outcome as soon as it is there.

    Returns:
        The outcomes, in the order of the arguments.
    """
    outcomes: dict[int, Outcome[_Value]] = {}
    pending = list(enumerate(arguments))[::-1]
    running: dict[Connection, _Call] = {}
    context = _context()
    try:
        while pending or running:
            while pending and len(running) < jobs:
                index, argument = pending.pop()
                call = _Call(context, index, function, argument, time_limit)
                running[call.connection] = call
            for connection in _ready(running):
                call = running[connection]
                outcome = call.receive(told)
                if outcome is not None:
                    del running[connection]
                    call.end()
                    outcomes[call.index] = outcome
                    if done is not None:
                        done(call.index, outcome)
    finally:
        for call in running.values():
            call.end()
    return [outcomes[index] for index in range(len(arguments))]


class _Call:
    """A process that calls the function once."""

    def __init__(
        self,
        context: ForkServerContext | SpawnContext,
        index: int,
        function: Callable[..., Any],
        argument: object,
        time_limit: float | None,
    ) -> None:
        self.index = index
        self.time_limit = time_limit
        self.finished = False
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.connection, theirs = context.Pipe(duplex=False)
        # A daemon: a parent that ends in any orderly way takes it along.
        self.process = context.Process(target=_work, args=(theirs, function, argument), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, told: Callable[[int, Any], None] | None) -> Outcome[Any] | None:
        """Take what has come from the process, and return the outcome if there is one."""
        if not self.connection.poll():
            if self.deadline is not None and time.monotonic() > self.deadline:
                return Outcome("too slow", message=f"ended after {self.time_limit:.0f} s")
            return None
        try:
            kind, content = self.connection.recv()
        except EOFError:
            self.process.join()
            return _died(self.process.exitcode)
        if kind == "outcome":
            assert isinstance(content, Outcome)
            self.finished = True
            return content
        if told is not None:
            told(self.index, content)
        return None

    def end(self) -> None:
        """Leave nothing behind."""
        if self.finished:
            self.process.join(_LAST_SECONDS)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _context() -> ForkServerContext | SpawnContext:
    """Processes forked from one that has imported all and computed nothing: fresh ones, without the cost of imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_IMPORTED])
    return context


def _ready(running: dict[Connection, _Call]) -> list[Connection]:
    """Wait until a process has something to say or its time is up."""
    deadlines = [call.deadline for call in running.values() if call.deadline is not None]
    timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
    # Of those that are ready; or all, to see whose time is up.
    return [c for c in wait(list(running), timeout) if isinstance(c, Connection)] or list(running)


def _died(code: int | None) -> Outcome[Any]:
    if code is not None and code < 0:
        lack = " (out of memory, most likely)" if -code == signal.SIGKILL else ""
        return Outcome("killed", message=f"killed by signal {-code}{lack}")
    return Outcome("crashed", message=f"ended with exit code {code} and no result")


def _work(connection: Connection, function: Callable[[Any, Tell], Any], argument: object) -> None:
    # Ctrl-C reaches all processes of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    outcome: Outcome[Any]
    try:
        outcome = Outcome("finished", function(argument, lambda content: connection.send(("told", content))))
    except Exception as error:
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        outcome = Outcome("crashed", message=text, detail=traceback.format_exc())
    connection.send(("outcome", outcome))
    connection.close()


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
