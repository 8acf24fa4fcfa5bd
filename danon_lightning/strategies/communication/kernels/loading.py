"""Loads the compiled kernels on first use, or finds that eager torch has to do."""

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_CODED = (_POINTER, _POINTER, _FLOAT, _POINTER)  # values, residual, decay, new_residual
_SIGNATURES: dict[str, tuple[tuple[type, ...], type | None]] = {
    "danon_copy": ((_POINTER, _POINTER, _LONG), None),
    "danon_add_scaled": ((_POINTER, _POINTER, _INT, _LONG, _FLOAT), _INT),
    "danon_quantize": ((_INT, *_CODED, _POINTER, _LONG, _LONG, _POINTER, _POINTER), None),
    "danon_quantize_sum": (
        (_INT, _POINTER, _INT, _FLOAT, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
        _INT,
    ),
    "danon_dequantize": ((_INT, _POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER), None),
    "danon_encode_signs": ((*_CODED, _LONG, _LONG, _POINTER, _POINTER), None),
    "danon_decode_signs": ((_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER), None),
    "danon_select": ((*_CODED, _LONG, _FLOAT, _LONG, _LONG, _POINTER, _POINTER, _POINTER), _LONG),
    "danon_scatter_add": ((_POINTER, _POINTER, _LONG, _LONG, _POINTER), _INT),
}


class _Loader:
    """Loads once for the process, whichever thread asks first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False
        self._library: ctypes.CDLL | None = None

    def __call__(self) -> ctypes.CDLL | None:
        if not self._done:
            with self._lock:
                if not self._done:
                    self._library = _load()
                    self._done = True
        return self._library


def _load() -> ctypes.CDLL | None:
    if os.environ.get("DANON_KERNELS") == "0":
        _log.info("compression runs in eager torch: DANON_KERNELS=0")
        return None
    if sys.platform != "linux":
        _log.info("compression runs in eager torch: compiled kernels are for Linux only")
        return None
    # Not everywhere importable: it needs file locks.
    from danon_lightning.strategies.communication.kernels.build import BuildError, built_library

    try:
        with built_library() as path:
            library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (BuildError, OSError, AttributeError) as error:
        _log.warning(
            "compression runs in eager torch, several times slower with equal results: %s. Install a C++ compiler or "
            "name it in CXX; DANON_KERNELS=0 silences this",
            error,
        )
        return None
    return library


library = _Loader()


def library_for(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels, if they can work on all of ``tensors`` (None stands for one left out): contiguous, on the CPU."""
    for tensor in tensors:
        if tensor is not None and not (
            tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.uint8)
        ):
            return None
    return library()


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of the addresses of their first elements."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def address(tensor: Tensor | None, offset: int = 0) -> int | None:
    """Address of a tensor's first element, plus ``offset`` bytes; None (a null pointer) for None."""
    return None if tensor is None else tensor.data_ptr() + offset
