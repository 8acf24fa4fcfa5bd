"""Fixtures for all tests. Heavy packages are imported only by the tests that need them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from danon_lightning.testing import EmulatedHosts

# For the processes that tests start: many ranks share few cores. The fixture below does the same for this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests whose hardware or permission is missing, with the reason."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
    if item.get_closest_marker("hosts"):
        _skip_without_hosts()


def _skip_without_hosts() -> None:
    from danon_lightning.testing import EmulatedHosts

    reason = EmulatedHosts.unavailable_reason()
    if reason is not None:
        pytest.skip(f"hosts cannot be emulated: {reason}")


@pytest.fixture
def emulated_hosts() -> Iterator[Callable[..., EmulatedHosts]]:
    """A function like the class EmulatedHosts whose hosts last until the end of the test."""
    from danon_lightning.testing import EmulatedHosts

    _skip_without_hosts()
    with ExitStack() as stack:
        yield lambda count, rate_mbit=None: stack.enter_context(EmulatedHosts(count, rate_mbit))


@pytest.fixture(autouse=True)
def restore_process_state() -> Iterator[None]:
    """Undoes what a test, or a Trainer in it, leaves in the process: environment, signal handlers, process group."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)

    yield

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for number, handler in handlers.items():
        # None: it was installed by something other than Python and cannot be restored from here.
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    # pytest itself changes this one between the phases of a test.
    environment.pop("PYTEST_CURRENT_TEST", None)
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
