"""How much memory a process takes: on its device, and on its host."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_GIB = 2**30


@dataclass(frozen=True)
class MemoryUse:
    """In GiB; NaN where it is not known.

    Attributes:
        resident: What the process holds of its host's memory now.
        resident_peak: The most it has held since the last reading.
        allocated_peak: The most that tensors have taken on the CUDA device since the last reading.
        reserved_peak: The most that torch has kept of the CUDA device's memory since then.
    """

    resident: float
    resident_peak: float
    allocated_peak: float = float("nan")
    reserved_peak: float = float("nan")


class MemoryMeter:
    """Reads the memory in use, and its peak since the last reading.

    On the host it is the resident set of this process (not of the workers that load data): ``VmRSS`` and ``VmHWM`` of
    ``/proc/self/status``, whose peak is reset through ``/proc/self/clear_refs``. Where that is not possible, the peak
    is the one since the process has begun, and where there is no ``/proc``, it is all that is known
    (``getrusage``). On CUDA it is ``torch.cuda.max_memory_allocated`` and ``max_memory_reserved``, reset too.

    Args:
        device: Where the model computes.
        process: The folder with ``status`` and ``clear_refs``.
    """

    def __init__(self, device: torch.device, process: Path = Path("/proc/self")) -> None:
        """See the class."""
        self._device, self._process = device, process

    def read(self) -> MemoryUse:
        """What is in use; then peaks are counted anew. Does not wait for the device."""
        resident, peak = self._on_host()
        if self._device.type != "cuda":
            return MemoryUse(resident, peak)
        allocated = torch.cuda.max_memory_allocated(self._device) / _GIB
        reserved = torch.cuda.max_memory_reserved(self._device) / _GIB
        torch.cuda.reset_peak_memory_stats(self._device)
        return MemoryUse(resident, peak, allocated, reserved)

    def _on_host(self) -> tuple[float, float]:
        try:
            lines = (self._process / "status").read_text().splitlines()
            sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
            resident, peak = (int(sizes[name].split()[0]) * 1024 / _GIB for name in ("VmRSS", "VmHWM"))
        except (OSError, KeyError, ValueError, IndexError):
            return float("nan"), _peak_so_far()
        try:
            (self._process / "clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
        except OSError:
            pass  # the peak since the process has begun, then
        return resident, peak


def _peak_so_far() -> float:
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def limit_of(device: torch.device) -> float:
    """How much memory there is, in GiB: on a CUDA device; else on this host, or what this container may take of it.

    Args:
        device: Where the model computes.

    Returns:
        NaN if it is not known.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / _GIB
    limits = []
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
        limits.append(int(line.split()[1]) * 1024)
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # "max"
            pass
    return min(limits) / _GIB if limits else float("nan")
