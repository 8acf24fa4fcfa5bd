import pytest
import torch

from danon_lightning.strategies.communication.messages import SMALLEST_COMPRESSED, plan_messages

BLOCK, SHARDS, CAPACITY = 8, 4, 4096
SHAPES = [(100, 77), (13,), (3, 5), (65, 64), (10_000,), (1, 20_001)]
PARAMETERS = [torch.empty(shape) for shape in SHAPES]
NUMEL = sum(p.numel() for p in PARAMETERS)


def plan(parameters=PARAMETERS, block_size=BLOCK):
    return plan_messages(parameters, capacity=CAPACITY, shards=SHARDS, block_size=block_size)


@pytest.mark.parametrize("block_size", [None, BLOCK])
def test_every_element_travels_once_and_comes_back(block_size):
    bucket = torch.arange(1.0, NUMEL + 1)
    arrived = torch.zeros(NUMEL)
    for message in plan(block_size=block_size):
        values = message.load(bucket)
        assert len(values) == message.numel <= CAPACITY
        assert message.numel % (SHARDS * (block_size if message.compressed else 1)) == 0
        message.store(values.clone(), arrived)
    assert torch.equal(arrived, bucket)
    assert sum(piece.numel for message in plan(block_size=block_size) for piece in message.pieces) == NUMEL


def test_small_and_one_dimensional_tensors_go_dense():
    starts, offset = {}, 0
    for parameter in PARAMETERS:
        starts[offset] = parameter
        offset += parameter.numel()
    for message in plan():
        for piece in message.pieces:
            covered = [
                p
                for start, p in starts.items()
                if start < piece.bucket_offset + piece.numel and piece.bucket_offset < start + p.numel()
            ]
            for parameter in covered:
                assert message.compressed == (parameter.dim() > 1 and parameter.numel() >= SMALLEST_COMPRESSED)


def test_blocks_follow_the_parameter_wherever_it_lies_in_the_bucket():
    """DDP regroups its buckets after the first step; what is coded together must not change."""

    def blocks(parameters):
        found, offset = {}, 0
        for parameter in parameters:
            found[id(parameter)] = set()
            for message in plan(parameters):
                for piece in message.pieces:
                    start = piece.bucket_offset - offset
                    if message.compressed and 0 <= start < parameter.numel():
                        assert piece.message_offset % BLOCK == 0
                        found[id(parameter)] |= set(range(start, start + piece.numel, BLOCK))
            offset += parameter.numel()
        return found

    reference = blocks(PARAMETERS)
    assert all(start % BLOCK == 0 for starts in reference.values() for start in starts)
    assert blocks(PARAMETERS[::-1]) == reference
    assert all(blocks([p])[id(p)] == reference[id(p)] for p in PARAMETERS)


@pytest.mark.parametrize(("shards", "block_size"), [(3, 256), (4, 20), (6, 100)])
def test_any_block_size_and_number_of_ranks_leaves_blocks_whole(shards, block_size):
    big = torch.empty(300, 301)
    for message in plan_messages([big], capacity=CAPACITY, shards=shards, block_size=block_size):
        assert message.numel % (shards * block_size) == 0
        assert all(piece.bucket_offset % block_size == 0 for piece in message.pieces)


def test_a_message_in_one_piece_is_not_copied():
    bucket = torch.zeros(SHARDS * 100)
    (message,) = plan([torch.empty(SHARDS * 100)], block_size=None)
    assert message.load(bucket).data_ptr() == bucket.data_ptr()
