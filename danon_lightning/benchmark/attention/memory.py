"""The most memory that a process holds, beyond what it held before."""

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Counts from its construction on.

    On CPU it is the resident memory of the process, by the kernel's own record of the most there was; on CUDA what
    torch has allocated.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        """Take the baseline."""
        self._cuda = device == "cuda"
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._baseline = torch.cuda.memory_allocated()
        else:
            _return_free_memory()
            self._baseline = _reset_peak()

    def grown(self) -> int:
        """Bytes by which the peak so far exceeds the baseline."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _peak()
        return max(0, peak - self._baseline)


def limit_memory(limit: int) -> None:
    """Let allocations fail beyond so many bytes from here on, before the system kills something (Linux only)."""
    if not _STATUS.exists():
        return
    import resource

    most = _status("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def available_memory() -> int | None:
    """Bytes that processes can still have on this machine; None where that is not told."""
    try:
        [kilobytes] = re.findall(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    free = int(kilobytes) * 1024
    try:
        # Of the control group that a container is.
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(most) - int(used))
    except (OSError, ValueError):
        return free


def _return_free_memory() -> None:
    """Give back to the system what the allocator keeps for later, so that later is seen to grow."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Forget the peak so far where that is possible, and return the resident memory."""
    try:
        _RESET.write_text("5")
        return _status("VmRSS")
    except OSError:
        # A fresh process has only grown, so its peak is about what it holds.
        return _peak()


def _peak() -> int:
    if _STATUS.exists():
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    [kilobytes] = re.findall(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(kilobytes) * 1024
