"""How long the gradient exchange takes that no computation hides, beside that of plain DistributedDataParallel.

    python benchmarks/exchange.py                                            # two processes of this machine
    python benchmarks/exchange.py --nodes 2 --ranks 2 --mbit 1000            # two emulated hosts, 1 Gbit/s (needs root)

All variants run in one job, one after the other, on the same gradients. What counts is the ratio; seconds depend on the
machine. Next to no computation takes place: with a real model, part of the exchange hides behind the backward pass.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.strategies import GradientCommunicator, Mesh, available_compressors
from danon_lightning.testing import EmulatedHosts, run_distributed

WARMUP_STEPS = 3  # DDP regroups its buckets after the first, and memory is touched for the first time


def measure(nodes: int, layers: int, steps: int, variants: list[str]) -> dict[str, dict[str, float]]:
    """Runs on each rank: the median seconds of a backward pass and the bytes it sent, by variant."""
    torch.set_num_threads(1)
    results = {}
    for variant in variants:
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        communicator = None
        if variant != "ddp":
            mesh = Mesh.from_world(dist.get_world_size(), nodes, dist.get_rank())
            communicator = GradientCommunicator(mesh, compression=None if variant == "dense" else variant)
            ddp.register_comm_hook(communicator, communicator.hook)
        seconds = []
        for _ in range(WARMUP_STEPS + steps):
            ddp.zero_grad()
            loss = ddp(torch.ones(1, 1024)).sum()
            dist.barrier()
            start = time.perf_counter()
            loss.backward()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        results[variant] = {"seconds": statistics.median(seconds[WARMUP_STEPS:])}
        if communicator is not None:
            results[variant]["inter_node_bytes"] = communicator.stats()["inter_node_bytes"] / len(seconds)
            communicator.close()
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1, help="emulated hosts; 1 uses the loopback of this machine")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each node")
    parser.add_argument("--mbit", type=float, help="rate of each host's link in Mbit/s; unshaped by default")
    parser.add_argument("--layers", type=int, default=12, help="layers of 1,048,576 parameters each")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each variant")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    variants = ["ddp", "dense", *available_compressors()]
    with EmulatedHosts(args.nodes, args.mbit) if args.nodes > 1 else nullcontext() as hosts:
        by_rank = run_distributed(
            measure, args.nodes * args.ranks, args.nodes, args.layers, args.steps, variants,
            ranks_per_node=args.ranks, hosts=hosts, timeout=3600,
        )  # fmt: skip
    # The slowest rank decides.
    rows: dict[str, dict[str, Any]] = {
        variant: {key: max(rank[variant][key] for rank in by_rank) for key in by_rank[0][variant]}
        for variant in variants
    }
    link = "unshaped" if args.mbit is None else f"{args.mbit:g} Mbit/s"
    title = f"{args.nodes} node(s) × {args.ranks} rank(s), {link}, {args.layers} M float32 gradients"
    table = Table("exchange", "ms a step", "ddp ÷ this", "MB sent to other nodes by a rank", title=title)
    for variant, row in rows.items():
        row["speedup"] = rows["ddp"]["seconds"] / row["seconds"]
        sent = f"{row['inter_node_bytes'] / 1e6:.1f}" if "inter_node_bytes" in row else "-"
        table.add_row(variant, f"{1000 * row['seconds']:.0f}", f"{row['speedup']:.2f}", sent)
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
