import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler

from danon_lightning.data import GlobalBatchSampler, ResumableDataLoader


def _order(epoch: int, begin: int, end: int) -> list[int]:
    return [1000 * epoch + place for place in range(begin, end)]


def _sampler(**changes) -> GlobalBatchSampler:
    return GlobalBatchSampler(_order, **{"num_samples": 43, "global_batch_size": 8, **changes})


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
@pytest.mark.parametrize("first", [0, 13])
def test_ranks_together_get_the_same_global_batches(num_replicas: int, first: int):
    ranks = [_sampler(num_replicas=num_replicas, rank=rank, position=lambda: first) for rank in range(num_replicas)]
    shares = []
    for sampler in ranks:
        indices = list(sampler)
        size = sampler.local_batch_size
        shares.append([indices[at : at + size] for at in range(0, len(indices), size)])
        # The length is an epoch's, wherever iteration starts, and the incomplete sixth batch is dropped.
        assert len(sampler) == len(indices) == 5 * size
    batches = [sum(parts, []) for parts in zip(*shares, strict=True)]
    numbers = [divmod(number, 5) for number in range(first, first + 5)]
    assert batches == [_order(epoch, 8 * batch, 8 * batch + 8) for epoch, batch in numbers]


def test_position_is_asked_for_when_the_first_sample_is_drawn():
    position = 4
    sampler = _sampler(position=lambda: position)
    iterator = iter(sampler)
    position = 7
    assert next(iterator) == 1016
    # What follows must not move what is still being drawn.
    position = 30
    assert list(iterator)[-1] == 2015


def test_set_epoch_counts_without_a_position():
    sampler = _sampler()
    sampler.set_epoch(3)
    iterator = iter(sampler)
    assert next(iterator) == 3000
    sampler.set_epoch(4)
    assert list(iterator)[-1] == 3039


def test_lightning_keeps_the_sampler():
    assert isinstance(_sampler(), DistributedSampler)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_begins_when_its_first_batch_is_asked_for(num_workers: int):
    position = 0
    sampler = _sampler(position=lambda: position)
    data = TensorDataset(torch.arange(5000))
    loader = ResumableDataLoader(data, sampler=sampler, batch_size=8, drop_last=True, num_workers=num_workers)
    iterator = iter(loader)
    position = 8
    assert len(loader) == 5
    assert [batch[0][0].item() for batch in iterator] == [1024, 1032, 2000, 2008, 2016]
    position = 10
    assert [batch[0][0].item() for batch in loader] == [2000, 2008, 2016, 2024, 2032]


def test_loader_without_a_known_position_refuses_to_resume():
    loader = ResumableDataLoader(TensorDataset(torch.arange(100)), sampler=_sampler(), batch_size=8)
    assert isinstance(loader, _Stateful)
    with pytest.raises(RuntimeError, match=r"call Trainer.fit\(model, datamodule=...\) in place of"):
        loader.load_state_dict({})
    ResumableDataLoader(TensorDataset(torch.arange(100)), sampler=_sampler(position=lambda: 0)).load_state_dict({})


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [
        (10, 4, "global_batch_size=10 does not divide evenly among 4 data-parallel ranks; change global_batch_size to "
                "8 or 12, or the number of ranks"),
        (2, 4, "global_batch_size=2 does not divide evenly among 4 data-parallel ranks; change global_batch_size to 4"),
        (0, 2, "global_batch_size=0 does not divide evenly among 2"),
        (44, 1, "num_samples=43 is less than one batch of global_batch_size=44; lower global_batch_size or give more"),
    ],
)  # fmt: skip
def test_errors(size: int, ranks: int, message: str):
    with pytest.raises(ValueError, match=message):
        _sampler(global_batch_size=size, num_replicas=ranks)
    with pytest.raises(ValueError, match="Invalid rank 2"):
        _sampler(num_replicas=2, rank=2)
