"""What a measurement ran on, to be stored beside its figures."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from danon_lightning.strategies.communication import kernels


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Facts of this machine and its software, ready for JSON.

    Args:
        device: What is computed on: "cpu" or "cuda".
    """
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def describe_environment() -> dict[str, Any]:
    """The same, and whether the kernels of the exchanges work; builds them if that has not been done yet."""
    return {**describe_machine(), "kernels": bool(kernels.available())}


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
