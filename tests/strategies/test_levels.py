"""Boxes of a process group: rows of uneven size, several under way, bytes counted."""

import pytest
import torch
import torch.distributed as dist

from danon_lightning.strategies.communication.levels import ROW_ALIGNMENT, GroupLevel, row_offsets, split_rows
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.testing import run_distributed


def test_rows_begin_at_multiples_of_the_alignment_and_do_not_overlap():
    sizes = [0, 1, 64, 65, 1000, 0, 3]
    assert row_offsets(sizes) == [0, 0, 64, 128, 256, 1280, 1280, 1344]
    rows = split_rows(torch.zeros(row_offsets(sizes)[-1], dtype=torch.uint8), sizes)
    assert [row.numel() for row in rows] == sizes
    for number, row in enumerate(rows, 1):
        row.fill_(number)
        assert row.storage_offset() % ROW_ALIGNMENT == 0 or not row.numel()
    assert all((row == number).all() for number, row in enumerate(rows, 1))
    assert row_offsets([]) == [0]


def say(sender, receiver, number, size):
    return torch.full((size,), (37 * sender + 11 * receiver + number) % 251, dtype=torch.uint8)


def check_boxes():
    rank, size = dist.get_rank(), dist.get_world_size()
    stats = CommunicationStats()
    remote = [peer != rank and peer == 2 for peer in range(size)]
    level = GroupLevel(list(range(size)), rank, remote, dist.new_group(backend="gloo"), torch.device("cpu"), stats)
    assert level.size == size
    boxes, expected = [], {True: 0, False: 0}
    for number in range(40):
        gathers, given = number % 2 == 0, number % 3 == 0
        sizes = [(number * 997 + 61 * peer) % 3000 if (number + peer) % 5 else 0 for peer in range(size)]
        rows = [torch.zeros(n, dtype=torch.uint8) for n in sizes] if given else None
        box = level.all_gather(sizes, rows) if gathers else level.all_to_all(sizes, rows)
        assert rows is None or all(a is b for a, b in zip(box.outgoing, rows, strict=True))
        for peer in range(size):
            if peer != rank:
                expected[remote[peer]] += sizes[rank] if gathers else sizes[peer]
            if peer == rank or not gathers:
                box.outgoing[peer].copy_(say(rank, 0 if gathers else peer, number, sizes[peer]))
        boxes.append((number, gathers, sizes, box))
    for *_, box in boxes[::-1]:  # in another order than they were opened in, which tags keep apart
        box.post()
    for number, gathers, sizes, box in boxes:
        box.wait()
        for peer, row in enumerate(box.incoming):
            wanted = say(peer, 0 if gathers else rank, number, sizes[peer] if gathers else sizes[rank])
            assert torch.equal(row, wanted), (number, peer)
        box.release()
    assert (stats.inter_node_bytes, stats.intra_node_bytes) == (expected[True], expected[False])
    level.close()

    alone = GroupLevel([rank], 0, [False], None, torch.device("cpu"), stats)
    box = alone.all_to_all([5])
    box.outgoing[0].fill_(9)
    box.post()
    box.wait()
    assert box.incoming[0].tolist() == [9] * 5
    alone.close()


@pytest.mark.slow
def test_every_rank_receives_what_the_others_have_sent_it():
    run_distributed(check_boxes, 3)


@pytest.mark.cuda
def test_one_gpu_hands_bytes_to_itself():
    run_distributed(check_cuda_box, 1)


def check_cuda_box():
    device = torch.device("cuda:0")
    for group in (None, dist.new_group(backend="nccl")):
        level = GroupLevel([0], 0, [False], group, device, CommunicationStats())
        for box in (level.all_to_all([100]), level.all_gather([100])):
            box.outgoing[0].fill_(9)
            box.post()
            box.wait()
            assert box.incoming[0].tolist() == [9] * 100
            box.release()
