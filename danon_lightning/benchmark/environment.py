"""What a measurement ran on, to be stored beside its figures."""

import os
import platform
from typing import Any

import torch

from danon_lightning.strategies.communication import kernels


def describe_environment() -> dict[str, Any]:
    """Facts of this machine and its software, ready for JSON. Builds the kernels if that has not been done yet."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": bool(kernels.available()),
    }
