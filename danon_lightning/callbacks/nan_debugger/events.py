"""A log of events: one line of JSON each."""

import json
import math
import time
from pathlib import Path
from typing import Any

from danon_lightning.callbacks.logs import Guarded


class EventLog:
    """Appends events to a file, each on the disk as soon as it is written.

    Args:
        path: The file, made with its folder at the first event; None for no log.
        guard: What turns a failure to write into one warning.
    """

    def __init__(self, path: str | Path | None, guard: Guarded) -> None:
        """See the class."""
        self.path = None if path is None else Path(path)
        self._guard = guard

    def write(self, event: str, **facts: Any) -> None:
        """Append ``{"event": …, "time": …, **facts}``. NaN and Inf become strings, which JSON has no numbers for."""
        if self.path is None:
            return
        with self._guard:
            line = json.dumps(plain({"event": event, "time": round(time.time(), 3), **facts}), allow_nan=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def plain(value: Any) -> Any:
    """The same in types that JSON has."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
