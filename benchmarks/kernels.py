"""What coding a gradient costs: nanoseconds an element on one core, compiled kernels beside eager torch.

    python benchmarks/kernels.py
    DANON_KERNELS=0 python benchmarks/kernels.py          # eager only

Ten million elements in regions of 512 Ki, as the exchange codes them. "Encode" includes adding the residual and keeping
the new one (error feedback). Both columns are measured in turns, in processes of their own; what counts is the ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from danon_lightning.strategies import (
    Compressor,
    Int4Compressor,
    Int8Compressor,
    SignCompressor,
    TopKCompressor,
)
from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors.base import Context

REGION, REGIONS, REPEATS = 1 << 19, 20, 7
COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "int8": Int8Compressor,
    "int4": Int4Compressor,
    "sign": SignCompressor,
    "topk 1 %": lambda: TopKCompressor(0.01),
}


def measure() -> dict[str, float]:
    """Median nanoseconds an element, by operation."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(REGION, generator=generator) for _ in range(REGIONS)]
    out = torch.empty(REGION)
    results = {"sum of two ranks": _time(lambda i: kernels.add_scaled(out, [gradients[i], gradients[i - 1]], 0.5))}
    for name, build in COMPRESSORS.items():
        compressor = build()
        payload = torch.zeros(compressor.payload_bytes(REGION, 0), dtype=torch.uint8)
        residuals = [torch.zeros(REGION) for _ in range(REGIONS)]
        spare = [torch.empty(REGION) for _ in range(REGIONS)]
        contexts = [Context() for _ in range(REGIONS)]

        def encode(
            i: int,
            compressor: Compressor = compressor,
            payload: torch.Tensor = payload,
            residuals: list[torch.Tensor] = residuals,
            spare: list[torch.Tensor] = spare,
            contexts: list[Context] = contexts,
        ) -> None:
            context = contexts[i]
            compressor.encode_with_feedback(gradients[i], residuals[i], 1.0, spare[i], payload, context)
            residuals[i], spare[i] = spare[i], residuals[i]
            contexts[i] = Context(step=context.step + 1, state={**context.state, **context.new_state})

        results[f"{name}: encode"] = _time(encode)
        results[f"{name}: decode"] = _time(lambda _, c=compressor, p=payload: c.decode(p, out))
    return results


def _time(operation: Callable[[int], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 2):  # memory is touched for the first time, and a threshold settles
        start = time.perf_counter()
        for index in range(REGIONS):
            operation(index)
        seconds.append(time.perf_counter() - start)
    return 1e9 * statistics.median(seconds[2:]) / (REGION * REGIONS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"compiled": kernels.available(), "results": measure()}))
        return
    runs = {}
    for kind, setting in (("kernel", os.environ.get("DANON_KERNELS", "1")), ("eager", "0")):
        output = subprocess.run(
            [sys.executable, __file__, "--worker"],
            env={**os.environ, "DANON_KERNELS": setting}, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        runs[kind] = json.loads(output.splitlines()[-1])
    if not runs["kernel"]["compiled"]:
        print("compiled kernels are not available here: both columns are eager", file=sys.stderr)
    table = Table("operation", "kernel, ns an element", "eager, ns an element", "eager ÷ kernel")
    for name, kernel in runs["kernel"]["results"].items():
        eager = runs["eager"]["results"][name]
        table.add_row(name, f"{kernel:.2f}", f"{eager:.2f}", f"{eager / kernel:.1f}")
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(runs, file, indent=2)


if __name__ == "__main__":
    main()
