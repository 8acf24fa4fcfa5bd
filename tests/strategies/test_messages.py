import pytest
import torch

from danon_lightning.strategies import Int8Compressor, PowerSGDCompressor, RandomKCompressor, TopKCompressor
from danon_lightning.strategies.communication.messages import (
    SMALLEST_COMPRESSED,
    Layout,
    LinearMessage,
    plan_messages,
    split_pieces,
)

BLOCK, ROW = 8, 2048
SHAPES = [(100, 77), (13,), (3, 5), (65, 64), (10_000,), (1, 20_001)]
PARAMETERS = [(f"p{index}", torch.empty(shape)) for index, shape in enumerate(SHAPES)]
NUMEL = sum(p.numel() for _, p in PARAMETERS)
LAYOUTS = [Layout(1, 1), Layout(1, 3), Layout(3, 1), Layout(2, 2), Layout(4, 3)]
COMPRESSORS = {
    "dense": None,
    "reduced": Int8Compressor(BLOCK),
    "gathered": TopKCompressor(0.1),
    "linear": RandomKCompressor(0.1),
    "linear, whole": PowerSGDCompressor(2),
}


def plan(compressor, layout, parameters=PARAMETERS, row_numel=ROW, region_numel=ROW):
    return plan_messages(
        parameters, layout=layout, compressor=compressor, row_numel=row_numel, region_numel=region_numel
    )


def rows_of(message):
    """What each inner rank sums, at a time."""
    return message.fragments if isinstance(message, LinearMessage) else [message.rows]


def pieces_of(messages):
    return [piece for message in messages for rows in rows_of(message) for row in rows for piece in row]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_every_element_travels_once(kind, layout):
    covered = torch.zeros(NUMEL, dtype=torch.int64)
    for piece in pieces_of(plan(COMPRESSORS[kind], layout).messages):
        covered[piece.bucket_offset : piece.bucket_offset + piece.numel] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_no_rank_sums_more_than_a_row_of_a_message(kind, layout):
    for message in plan(COMPRESSORS[kind], layout).messages:
        for rows in rows_of(message):
            assert len(rows) == layout.inner
            assert all(sum(piece.numel for piece in row) <= ROW for row in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_that_are_coded_at_a_time_stay_small(layout):
    for kind in ("reduced", "gathered"):
        for message in plan(COMPRESSORS[kind], layout, region_numel=300).messages:
            if message.kind != "dense":
                assert all(piece.region.numel == piece.numel <= 300 for piece in pieces_of([message]))


@pytest.mark.parametrize("kind", list(COMPRESSORS)[1:])
def test_small_and_one_dimensional_tensors_go_dense(kind):
    result = plan(COMPRESSORS[kind], Layout(2, 2))
    large = {name for name, p in PARAMETERS if p.dim() > 1 and p.numel() >= SMALLEST_COMPRESSED}
    if kind == "linear, whole":
        large.remove("p5")  # of a single row: two factors would be no saving
    assert {piece.region.parameter for piece in result.dense} == {name for name, _ in PARAMETERS} - large
    compressed = [m for m in result.messages if isinstance(m, LinearMessage) or m.kind != "dense"]
    assert {piece.region.parameter for piece in pieces_of(compressed)} == large


def regions(compressor, layout, parameters):
    """What is coded together, by whom, and whose part it is."""
    found = {}
    for message in plan(compressor, layout, parameters).messages:
        if isinstance(message, LinearMessage):
            found.update({region: (rank, shape) for rank, row in enumerate(message.regions) for region, shape in row})
        elif message.kind != "dense":
            found.update(
                (piece.region, (inner, outer))
                for inner, row in enumerate(message.parts)
                for outer, part in enumerate(row)
                for piece in part
            )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", list(COMPRESSORS)[1:])
def test_what_is_coded_together_does_not_depend_on_the_bucket(kind, layout):
    """DDP regroups its buckets after the first step; residuals and blocks must stay where they are."""
    reference = regions(COMPRESSORS[kind], layout, PARAMETERS)
    assert regions(COMPRESSORS[kind], layout, PARAMETERS[::-1]) == reference
    one_by_one = [regions(COMPRESSORS[kind], layout, [parameter]) for parameter in PARAMETERS]
    assert {key: value for found in one_by_one for key, value in found.items()} == reference
    for region in reference:
        if kind == "reduced":
            assert region.start % BLOCK == 0
        if kind == "linear, whole":
            assert (region.start, region.stop) == (0, dict(PARAMETERS)[region.parameter].numel())


@pytest.mark.parametrize(("layout", "block"), [(Layout(1, 3), 256), (Layout(2, 2), 20), (Layout(3, 2), 100)])
def test_blocks_of_any_size_stay_whole(layout, block):
    for piece in pieces_of(plan(Int8Compressor(block), layout, [("p", torch.empty(300, 301))]).messages):
        assert piece.region.start % block == 0
        assert piece.region.stop == 300 * 301 or piece.numel % block == 0


def test_pieces_of_a_region_know_where_they_belong():
    """A low-rank code is of a whole matrix, which comes in several rows."""
    for message in plan(PowerSGDCompressor(2), Layout(2, 1), [("p", torch.empty(200, 30))]).messages:
        pieces = sorted(pieces_of([message]), key=lambda piece: piece.bucket_offset)
        assert len(pieces) > 1
        assert [piece.region_offset for piece in pieces] == [piece.bucket_offset for piece in pieces]
        assert {piece.region.numel for piece in pieces} == {6000}


def test_work_is_shared_out_evenly_over_many_parameters():
    layout = Layout(2, 2)
    many = [(f"layer.{index}.weight", torch.empty(64, 64 + index)) for index in range(40)]
    total = sum(parameter.numel() for _, parameter in many)
    for kind in ("reduced", "gathered", "linear", "linear, whole"):
        load = [0] * layout.inner
        for message in plan(COMPRESSORS[kind], layout, many).messages:
            for rows in rows_of(message):
                for rank, row in enumerate(rows):
                    load[rank] += sum(piece.numel for piece in row)
        assert max(load) < 0.7 * total, kind


def test_empty_parameters_send_nothing():
    result = plan(Int8Compressor(), Layout(2, 2), [("empty", torch.empty(0, 5)), ("none", torch.empty(0))])
    assert result.messages == result.dense == ()


def test_a_complex_parameter_is_as_long_as_its_real_and_imaginary_parts():
    weight = torch.empty(80, 80, dtype=torch.complex64)
    result = plan(Int8Compressor(), Layout(1, 2), [("weight", weight), ("next", torch.empty(5))], row_numel=10**6)
    assert [(piece.bucket_offset, piece.numel) for piece in result.dense] == [(0, 12800), (12800, 5)]


def test_shares_are_even_and_the_last_ones_get_the_rest():
    pieces = plan(None, Layout(1, 1), row_numel=10**6).messages[0].rows[0]
    shares = split_pieces(pieces, 4, -(-NUMEL // 4))
    sizes = [sum(piece.numel for piece in share) for share in shares]
    assert sizes[:3] == [-(-NUMEL // 4)] * 3
    assert sum(sizes) == NUMEL
