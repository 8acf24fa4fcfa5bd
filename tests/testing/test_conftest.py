"""What one test leaves behind, the next one does not find. The tests of this file rely on their order."""

import os
import signal

import torch
import torch.distributed as dist

_PATH = os.environ["PATH"]


def test_leaves_things_behind(tmp_path):
    os.environ["DANON_LEFT_BEHIND"] = "1"
    del os.environ["PATH"]
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    torch.set_num_threads(2)


def test_finds_nothing():
    assert "DANON_LEFT_BEHIND" not in os.environ
    assert os.environ["PATH"] == _PATH
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not dist.is_initialized()
    assert torch.get_num_threads() == 1
