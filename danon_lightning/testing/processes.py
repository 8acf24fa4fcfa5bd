"""Child processes that cannot outlive the parent, with their output in files."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from danon_lightning.testing.forking import ForkedProcess, ForkServer, give_up

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_POLL_SECONDS = 0.02
# What a supervisor may take to kill a tree of processes before it is killed itself.
_STOP_SECONDS = 10.0
# So much of each output is shown in a report.
_SHOWN_CHARACTERS = 6000


@dataclass(frozen=True)
class ProcessResult:
    """How one process, and all that it started, ended.

    Attributes:
        node: Index of the (emulated) host that it ran on.
        returncode: Its exit code, minus the signal that ended it, or None if the launcher stopped it.
        timed_out: Whether it was stopped because the time was up, not because another process had failed.
        stdout: All that it wrote there.
        stderr: All that it wrote there.
        seconds: From its start to its end.
    """

    node: int
    returncode: int | None
    timed_out: bool
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.returncode == 0

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"node {self.node}"

    def __str__(self) -> str:
        """Returns a report of a few lines: the end, then the last part of both outputs."""
        if self.returncode is None:
            end = "still running when the time was up" if self.timed_out else "stopped because another one had failed"
        else:
            end = f"exit code {self.returncode}" if self.returncode >= 0 else f"ended by signal {-self.returncode}"
        lines = [f"{self.name}: {end} (after {self.seconds:.1f} s)"]
        for title, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            if text.strip():
                lines += [f"--- {title} of {self.name}", text[-_SHOWN_CHARACTERS:].rstrip()]
        return "\n".join(lines)


class SupervisedProcess:
    """A command that ends, with everything it started, no later than this process does."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_directory: Path,
        log_name: str,
        server: ForkServer | None = None,
    ) -> None:
        """Starts the command.

        Args:
            command: Program and arguments.
            env: Its whole environment.
            log_directory: An existing folder for its two outputs.
            log_name: Their name there, without ``.out`` and ``.err``.
            server: Where to fork it, if the command is this Python and a script.
        """
        self._stdout = log_directory / f"{log_name}.out"
        self._stderr = log_directory / f"{log_name}.err"
        self._started = time.monotonic()
        self._seconds: float | None = None
        self._stopped = False
        with open(self._stdout, "wb") as stdout, open(self._stderr, "wb") as stderr:
            self._process: subprocess.Popen[bytes] | ForkedProcess
            if server is not None:
                try:
                    self._process = server.start(command[1:], env=env, stdout=stdout, stderr=stderr)
                    return
                except OSError as error:
                    give_up(error)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid()), *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                # Ctrl+C in the terminal is for this process, which then stops its children in order.
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Returns the exit code (minus the signal, if one ended it), or None while it runs."""
        code = self._process.poll()
        if code is not None and self._seconds is None:
            self._seconds = time.monotonic() - self._started
        return code

    def ask_to_stop(self) -> None:
        """Tells it to end, and returns at once."""
        if self.poll() is None:
            self._stopped = True
            self._process.terminate()

    def wait_until_stopped(self) -> None:
        """Returns once it has ended; to be called after :meth:`ask_to_stop`."""
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The command dies with its supervisor.
            self._process.kill()
            self._process.wait()
        self.poll()

    @property
    def returncode(self) -> int | None:
        """How it ended by itself: exit code or minus the signal; None while it runs and if it was stopped."""
        return None if self._stopped else self.poll()

    @property
    def seconds(self) -> float:
        """How long it ran, or has been running."""
        return time.monotonic() - self._started if self._seconds is None else self._seconds

    @property
    def stdout(self) -> str:
        """What it has written to its standard output so far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to its standard error so far."""
        return self._stderr.read_text(errors="replace")


class ProcessSet:
    """Processes that belong together: if one fails, or the time is up, all are stopped.

    A context manager; leaving it, also by an exception, stops what still runs.
    """

    def __init__(self, log_directory: Path | str | None = None) -> None:
        """Prepares the folder.

        Args:
            log_directory: A folder for their outputs, created if needed and kept; None for a temporary one.
        """
        self._temporary = tempfile.TemporaryDirectory(prefix="danon-ranks-") if log_directory is None else None
        self.directory = Path(self._temporary.name if self._temporary else log_directory or "")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.processes: list[SupervisedProcess] = []

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], name: str, server: ForkServer | None = None
    ) -> None:
        """Starts one more process, whose outputs become ``name.out`` and ``name.err``."""
        self.processes.append(
            SupervisedProcess(command, env=env, log_directory=self.directory, log_name=name, server=server)
        )

    def wait(self, timeout: float, *, failure_grace: float | None) -> bool:
        """Waits for all to end, then stops those that have not.

        Args:
            timeout: Seconds from now.
            failure_grace: Seconds that the others may go on after the first failure, say to report what they noticed
                of it; None for as long as ``timeout`` permits.

        Returns:
            Whether processes were stopped because the time was up.
        """
        deadline = time.monotonic() + timeout
        grace_end: float | None = None
        while True:
            codes = [process.poll() for process in self.processes]
            now = time.monotonic()
            if None not in codes:
                return False
            if now >= deadline:
                self.stop()
                return True
            if failure_grace is not None and any(codes):
                grace_end = now + failure_grace if grace_end is None else grace_end
                if now >= grace_end:
                    self.stop()
                    return False
            time.sleep(_POLL_SECONDS)

    def result(self, index: int, *, node: int, timed_out: bool) -> ProcessResult:
        """Returns how a process ended.

        Args:
            index: Its place in the order of their starts.
            node: Where it ran.
            timed_out: What :meth:`wait` has returned.
        """
        process = self.processes[index]
        code = process.returncode
        return ProcessResult(
            node=node,
            returncode=code,
            timed_out=timed_out and code is None,
            stdout=process.stdout,
            stderr=process.stderr,
            seconds=process.seconds,
        )

    def stop(self) -> None:
        """Kills all that still run."""
        for process in self.processes:
            process.ask_to_stop()
        for process in self.processes:
            process.wait_until_stopped()

    def __enter__(self) -> "ProcessSet":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kills all that still run and removes the temporary folder."""
        try:
            self.stop()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()
