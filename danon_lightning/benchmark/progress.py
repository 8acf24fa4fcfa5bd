"""Shows what is being measured."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """A context manager: a bar in a terminal, and a line for each thing elsewhere (in a log, say).

    Args:
        console: Where to show it.
        total: Number of things that will be measured.
    """

    def __init__(self, console: Console, total: int) -> None:
        """See the class."""
        self._console = console
        self._subject = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)

    def show(self, subject: str, detail: str, done: int) -> None:
        """Say what is being measured.

        Args:
            subject: What; a new one gets a line of its own where there is no terminal.
            detail: How far that has come.
            done: Number of things measured so far.
        """
        if self._progress.disable and subject != self._subject:
            self._console.print(f"measuring {subject}", highlight=False)
        self._subject = subject
        self._progress.update(self._task, description=f"{subject}, {detail}", completed=done)

    def __enter__(self) -> "ProgressDisplay":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._progress.stop()
