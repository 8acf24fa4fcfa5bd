from pathlib import Path

import pytest

import danon_lightning


@pytest.fixture
def quick_start() -> str:
    """First lines of a program that needs only danon_lightning.testing: the package itself would import Lightning."""
    folder = str(Path(danon_lightning.__file__).parent)
    return f"""
import sys, types
package = sys.modules["danon_lightning"] = types.ModuleType("danon_lightning")
package.__path__ = [{folder!r}]
"""


@pytest.fixture(params=["forked", "fresh"])
def way(request, monkeypatch) -> str:
    """How run_distributed starts ranks."""
    if request.param == "fresh":
        monkeypatch.setattr("danon_lightning.testing.distributed.fork_server", lambda env: None)
    return request.param
