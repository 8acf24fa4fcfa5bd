"""What the ranks of a pipeline do, as it was measured."""

import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies" / "pipeline"))
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Tied, loader, make_trainer

from danon_lightning.callbacks import PipelineTimeline, draw_timeline
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline import clocks
from danon_lightning.strategies.pipeline.timeline import Pass
from danon_lightning.testing import run_distributed

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")


def draw(folder, schedule):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4, schedule=schedule)
    logger = TensorBoardLogger(folder, name="", version=schedule)
    trainer = make_trainer(strategy, 2, max_steps=5, max_epochs=-1, logger=logger)
    trainer.callbacks.append(PipelineTimeline(every_n_steps=2, path=f"{folder}/{schedule}.png"))
    trainer.fit(Tied(), loader())
    return strategy.pipeline_timeline()


@pytest.mark.parametrize(
    ("schedule", "stages"), [("1f1b", [[0], [1]]), pytest.param("zbv", [[0, 3], [1, 2]], marks=pytest.mark.slow)]
)
def test_every_pass_is_measured_and_drawn(tmp_path, schedule, stages):
    one, two = run_distributed(draw, 2, str(tmp_path), schedule, timeout=60)
    assert one == two
    for passes, own in zip(one, stages, strict=True):
        assert {p.stage for p in passes} == set(own)
        for stage in own:
            for kind in ("forward", "backward"):
                assert sorted(p.micro_batch for p in passes if (p.stage, p.kind) == (stage, kind)) == [0, 1, 2, 3]
        assert any(p.kind == "weights" for p in passes) == (schedule == "zbv")
        assert "communication" in {p.kind for p in passes}
        assert all(0 <= p.start <= p.end for p in passes)
        assert all(first.end <= second.start for first, second in zip(passes, passes[1:], strict=False))
    assert (tmp_path / f"{schedule}.png").read_bytes().startswith(b"\x89PNG")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / schedule), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("pipeline/timeline")] == [2, 4]


class Sleep(nn.Module):
    def forward(self, x):
        time.sleep(0.5)
        return x


class SlowAtFirst(Tied):
    """The first layer takes longer than all else together, and long enough for a busy machine."""

    def __init__(self):
        super().__init__()
        self.layers[0].append(Sleep())


def measure_slow_stage():
    # Clocks of several machines have nothing in common.
    clocks.now = lambda: time.perf_counter() + 3600.0 * dist.get_rank()
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4)
    trainer = make_trainer(strategy, 2, max_steps=2, max_epochs=-1)
    trainer.callbacks.append(PipelineTimeline(every_n_steps=2, path="/dev/null"))
    trainer.fit(SlowAtFirst(), loader())
    return strategy.pipeline_timeline()


@pytest.mark.slow
def test_the_rank_behind_a_slow_stage_waits():
    first, second = run_distributed(measure_slow_stage, 2, timeout=100)[0]
    assert seconds(second, "waiting") > 1
    assert seconds(second, "waiting") > 2 * seconds(second, "communication")
    assert seconds(first, "waiting") < seconds(second, "waiting") / 2


def seconds(passes, kind):
    return sum(p.end - p.start for p in passes if p.kind == kind)


def test_the_picture_tells_apart_what_ranks_do():
    kinds = ["forward", "backward", "weights", "communication", "waiting"]
    passes = [Pass(0, kind, 0, float(at), at + 1.0) for at, kind in enumerate(kinds)]
    axes = draw_timeline([passes]).axes[0]
    colours = {tuple(bars.get_facecolor()[0]) for bars in axes.collections}
    assert len(colours) == len(axes.collections) == 5
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "forward", "backward", "gradients of weights", "communication", "waiting for another rank",
    ]  # fmt: skip
    # What is not explained is left blank.
    (bars,) = draw_timeline([[Pass(0, "forward", 0, 1.0, 2.0)]]).axes[0].collections
    assert len(bars.get_paths()) == 1


def test_nothing_measured_is_an_empty_picture():
    assert draw_timeline([[], []]).axes


def test_other_strategies_are_refused():
    trainer = make_trainer(max_steps=1, max_epochs=-1)
    trainer.callbacks.append(PipelineTimeline())
    with pytest.raises(TypeError, match="PipelineTimeline needs pipeline stages, SingleDeviceStrategy has none"):
        trainer.fit(Tied(), loader())
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        PipelineTimeline(every_n_steps=0)
