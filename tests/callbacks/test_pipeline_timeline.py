"""What the ranks of a pipeline do, as it was measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies" / "pipeline"))
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Tied, loader, make_trainer

from danon_lightning.callbacks import PipelineTimeline, draw_timeline
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")


def draw(folder, schedule):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4, schedule=schedule)
    logger = TensorBoardLogger(folder, name="", version=schedule)
    trainer = make_trainer(strategy, 2, max_steps=5, max_epochs=-1, logger=logger)
    trainer.callbacks.append(PipelineTimeline(every_n_steps=2, path=f"{folder}/{schedule}.png"))
    trainer.fit(Tied(), loader())
    return strategy.pipeline_timeline()


@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", [[0], [1]]), ("zbv", [[0, 3], [1, 2]])])
def test_every_pass_is_measured_and_drawn(tmp_path, schedule, stages):
    one, two = run_distributed(draw, 2, str(tmp_path), schedule, timeout=60)
    assert one == two
    for passes, own in zip(one, stages, strict=True):
        assert {p.stage for p in passes} == set(own)
        for stage in own:
            for kind in ("forward", "backward"):
                assert sorted(p.micro_batch for p in passes if (p.stage, p.kind) == (stage, kind)) == [0, 1, 2, 3]
        assert any(p.kind == "weights" for p in passes) == (schedule == "zbv")
        assert all(0 <= p.start <= p.end for p in passes)
        assert all(first.end <= second.start for first, second in zip(passes, passes[1:], strict=False))
    assert (tmp_path / f"{schedule}.png").read_bytes().startswith(b"\x89PNG")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / schedule), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("pipeline/timeline")] == [2, 4]


def test_nothing_measured_is_an_empty_picture():
    assert draw_timeline([[], []]).axes


def test_other_strategies_are_refused():
    trainer = make_trainer(max_steps=1, max_epochs=-1)
    trainer.callbacks.append(PipelineTimeline())
    with pytest.raises(TypeError, match="PipelineTimeline needs pipeline stages, SingleDeviceStrategy has none"):
        trainer.fit(Tied(), loader())
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        PipelineTimeline(every_n_steps=0)
