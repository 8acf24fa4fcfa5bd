"""Which line of the user's code is running."""

import os
import sys
from functools import lru_cache
from pathlib import Path
from types import FrameType

import lightning
import torch

_PACKAGE = Path(__file__).parents[2]
_ENGINE = str(Path(torch.__file__).parent / "autograd" / "graph.py")
_REPLAY = str(Path(__file__).with_name("replay.py"))
# The attention models and LightningModules of this package are a user's model; the rest of it only calls that.
_OTHERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(torch.__file__).parent,
        Path(lightning.__file__).parent,
        Path(lightning.__file__).parent.with_name("pytorch_lightning"),
        Path(lightning.__file__).parent.with_name("lightning_fabric"),
        _PACKAGE / "callbacks",
        _PACKAGE / "strategies",
        Path(os.__file__).parent / "concurrent",
    )
)
_OTHER_FILES = (str(Path(os.__file__).with_name("contextlib.py")), str(Path(os.__file__).with_name("functools.py")))


def user_location() -> str:
    """Where the user's code is: the innermost frame that lies neither in torch, nor in Lightning, nor in this package.

    Beyond the start of a replay, and in backward beyond the engine of autograd, the stack is not that of a step.

    Returns:
        ``"models/gpt.py:31 in forward"``, relative to the working directory if below it; empty without such a frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file in (_ENGINE, _REPLAY):
            return ""
        if _is_users(file):
            return f"{_shown(file)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@lru_cache(maxsize=4096)
def _is_users(file: str) -> bool:
    return not (file.startswith((*_OTHERS, "<frozen ")) or file in _OTHER_FILES)


@lru_cache(maxsize=4096)
def _shown(file: str) -> str:
    inside = os.path.relpath(file) if os.path.isabs(file) else file
    return file if inside.startswith("..") else inside
