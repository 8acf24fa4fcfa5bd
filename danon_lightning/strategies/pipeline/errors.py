"""What is raised when a step cannot be cut into stages, and how it names the user's line of code."""

import sys
import sysconfig
from pathlib import Path
from types import FrameType

import torch

# Code that carries the user's operations out, but did not ask for them.
_MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_INSTALLED = sysconfig.get_paths()["purelib"]


class UnsupportedStepError(RuntimeError):
    """The step does something that cannot be cut into stages. Names the reason and the user's line of code."""


class AbsentDataError(UnsupportedStepError):
    """An operation needs the value of a tensor that this process does not hold."""


def user_location() -> str:
    """The line of code outside of torch and of this package that is being executed, as ``file:line in function``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_machinery(filename: str) -> bool:
    if filename.startswith(_MACHINERY) or filename.startswith("<frozen"):
        return True
    return filename.startswith(_STANDARD_LIBRARY) and not filename.startswith(_INSTALLED)
