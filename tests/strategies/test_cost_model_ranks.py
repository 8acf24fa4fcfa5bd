"""The cost model against ranks that exchange: bytes to the last one, and links that are there or fail."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from danon_lightning.strategies import GradientCommunicator, available_compressors
from danon_lightning.strategies.communication.cost_model import (
    Link,
    Links,
    agree_on_link,
    predict_exchange,
    probe,
    probe_links,
)
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import SHAPES, Given, emulated_mesh  # noqa: E402

LAYOUTS = [(2, 2, "auto"), (2, 2, False), (4, 1, "auto"), (1, 4, "auto"), (1, 3, "auto")]
SOME = ["int4", "topk", "powersgd"]
FREE = Link(0.0, 1e30)


def compressions(nodes, local, hierarchical):
    """One of each way, and all of them where there are two levels."""
    return [None, *(available_compressors() if (nodes, local, hierarchical) == (2, 2, "auto") else SOME)]


def count_bytes(folder):
    """What ranks counted in one exchange, beside what is predicted."""
    found = {}
    # The large one takes several messages; the sizes are odd.
    for nodes, local, hierarchical in LAYOUTS:
        with emulated_mesh(nodes, local, folder) as mesh:
            for name in compressions(nodes, local, hierarchical) if mesh is not None else []:
                model = Given({**SHAPES, "large": (1531, 1777)})
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape)
                communicator = GradientCommunicator(model, mesh, compression=name, hierarchical=hierarchical)
                communicator.average(list(model.parameters()), 1 << 30)
                stats = communicator.stats()
                communicator.close()
                mine = torch.tensor([stats["inter_node_bytes"], stats["intra_node_bytes"]])
                rows = [torch.empty_like(mine) for _ in range(mesh.world_size)]
                dist.all_gather(rows, mine)
                by_node = [sum(rows[i : i + local]).tolist() for i in range(0, mesh.world_size, local)]
                links = Links(nodes, local, FREE, FREE)
                predicted = predict_exchange(
                    [list(model.named_parameters())], links, compression=name, hierarchical=hierarchical
                )
                busiest = max(by_node)
                found[nodes, local, hierarchical, name] = (
                    busiest, [predicted.inter_node_bytes, predicted.intra_node_bytes],
                )  # fmt: skip
    return found


def test_predicted_bytes_are_those_that_ranks_count(tmp_path):
    found = run_distributed(count_bytes, 4, str(tmp_path), timeout=200)[0]
    assert len(found) == sum(len(compressions(*layout)) for layout in LAYOUTS)
    for key, (counted, predicted) in found.items():
        assert counted == predicted, key
        assert (counted[0] > 0) == (key[0] > 1), key


def probe_everywhere(folder):
    found = {}
    for nodes, local in [(2, 2), (3, 1), (1, 4), (1, 1)]:
        with emulated_mesh(nodes, local, folder) as mesh:
            if mesh is not None:
                found[nodes, local] = probe_links(mesh, pairwise=True)
    with emulated_mesh(2, 2, folder) as mesh:
        # The same numbers everywhere, the slowest rank's.
        estimate = Link(1e-3 * (mesh.rank + 1), 1e9 / (mesh.rank + 1))
        found["agreed"] = agree_on_link(estimate)
        found["one in doubt"] = agree_on_link(None if mesh.rank == 2 else estimate)
        # A rank on which something goes wrong spoils it for all, in time, and everybody goes on.
        original = probe._Probe._measure_level

        def fails_on_one(self, level, message_bytes):
            if mesh.rank == 3 and not isinstance(level, probe.SharedMemoryLevel):
                raise OSError("the link has vanished\nand more of it")
            return original(self, level, message_bytes)

        probe._Probe._measure_level = fails_on_one
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["failed"] = probe_links(mesh, time_limit=3)
        found["warnings"] = [str(one.message) for one in caught if "could not be measured" in str(one.message)]
        dist.barrier()
    return found


def test_ranks_measure_the_same_links_and_survive_a_failure(tmp_path):
    results = run_distributed(probe_everywhere, 4, str(tmp_path), timeout=200)
    both, alone = results[0][2, 2], results[0][3, 1]
    for links in (both, alone):
        assert 1e6 < links.inter.bytes_per_second < 1e12 and 0 < links.inter.latency_seconds < 1
        assert links.pairwise is not None
        for i, row in enumerate(links.pairwise):
            assert [rate > 0 for rate in row] == [i != j for j in range(links.nodes)]
    assert both.intra.bytes_per_second > 1e6 and alone.intra is None
    assert results[0][1, 4].inter is None and results[0][1, 4].intra is not None
    assert results[0][1, 1] is None
    assert both.shared_memory == (sys.platform == "linux")
    for key in [(2, 2), (3, 1), (1, 4)]:
        assert len({result[key] for result in results if key in result}) == 1
    for result in results:
        assert result["agreed"] == Link(4e-3, 1 / 4e-9) and result["one in doubt"] is None
        assert result["failed"] is None
    (said,) = results[0]["warnings"]
    assert "rank 3: OSError: the link has vanished" in said and "dense, by ring" in said and "more" not in said
    assert not any(result["warnings"] for result in results[1:])
