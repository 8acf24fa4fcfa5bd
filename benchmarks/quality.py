"""What compression costs in quality: the validation loss of a small language model after the same number of steps.

    python benchmarks/quality.py                          # all, five seeds: three quarters of an hour on two cores
    python benchmarks/quality.py --only dense int8 --seeds 2

Two ranks train a byte-level language model on the text of Python's own standard library, exchanging gradients as if a
slow link lay between them. A compressed run sees the same batches from the same initial weights as the dense run with
the same optimizer, to which it is compared seed by seed. Learning rates are those that suit the dense runs.

The model sees the last twelve bytes: embeddings, two hidden layers, a softmax (Bengio et al., "A Neural Probabilistic
Language Model", JMLR 2003). It is small enough to be trained, a hundred times over, until the learning rate has come
down; in shorter runs sparse gradients look worse than they are, for they arrive late.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.data.corpus import default_cache_dir, prepare_corpus
from danon_lightning.data.sources import list_source
from danon_lightning.models import OptimizerConfig
from danon_lightning.models.optimization import build_optimizer, warmup_cosine
from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies import (
    ErrorFeedback,
    GradientCommunicator,
    Int4Compressor,
    Int8Compressor,
    Mesh,
    PowerSGDCompressor,
    RandomKCompressor,
    TopKCompressor,
)
from danon_lightning.testing import run_distributed

# Of a window of CONTEXT + 1 bytes all but the first ORDER are predicted.
CONTEXT, ORDER, BATCH, RANKS, VALIDATION_BATCHES = 75, 12, 8, 2, 64


@dataclass(frozen=True)
class Variant:
    """One way to train: an optimizer, its settings, and how gradients are exchanged."""

    optimizer: str
    compression: Callable[[], Any] = lambda: None
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


ADAM = {"learning_rate": 4e-3}
SGD = {"learning_rate": 0.3, "weight_decay": 0.0}


def variants(steps: int) -> dict[str, Variant]:
    """All of them by name. What warms up does so in the first fifth of the steps."""
    fifth = max(1, steps // 5)
    frozen = {"freeze_step": fifth}

    def topk() -> TopKCompressor:
        return TopKCompressor(0.01, warmup_steps=fifth)

    return {
        "dense": Variant("adamw"),
        "fp16": Variant("adamw", lambda: "fp16"),
        "bf16": Variant("adamw", lambda: "bf16"),
        "int8": Variant("adamw", Int8Compressor),
        "int8, stochastic": Variant("adamw", lambda: Int8Compressor(stochastic=True)),
        "int4": Variant("adamw", Int4Compressor),
        "int4, stochastic": Variant("adamw", lambda: Int4Compressor(stochastic=True)),
        "int4, error feedback": Variant("adamw", Int4Compressor, {"error_feedback": True}),
        "topk 1 %, warm-up": Variant("adamw", topk),
        "randomk 1 %": Variant("adamw", lambda: RandomKCompressor(0.01)),
        "powersgd rank 4": Variant("adamw", lambda: PowerSGDCompressor(4)),
        "1-bit adam": Variant("onebit_adam", lambda: "sign", settings=frozen),
        "frozen variance, topk 1 %": Variant("onebit_adam", lambda: TopKCompressor(0.01), settings=frozen),
        "frozen variance, powersgd rank 4": Variant("onebit_adam", lambda: PowerSGDCompressor(4), settings=frozen),
        "sgd dense": Variant("sgd"),
        "sgd int8": Variant("sgd", Int8Compressor),
        "sgd int4": Variant("sgd", Int4Compressor),
        "sgd sign": Variant("sgd", lambda: "sign"),
        "sgd topk 1 %": Variant("sgd", lambda: TopKCompressor(0.01)),
        "sgd topk 1 %, warm-up": Variant("sgd", topk),
        "sgd topk 1 %, warm-up, momentum correction": Variant(
            "sgd", topk, {"error_feedback": ErrorFeedback(momentum=0.9)}, {"momentum": 0.0}
        ),
        "sgd randomk 1 %": Variant("sgd", lambda: RandomKCompressor(0.01)),
        "sgd powersgd rank 4": Variant("sgd", lambda: PowerSGDCompressor(4)),
    }


class ByteModel(nn.Module):
    """Predicts a byte from the ``ORDER`` bytes before it."""

    def __init__(self, embedding: int = 16, hidden: int = 64) -> None:
        """Take the widths of the embedding and of the hidden layers."""
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.first = nn.Linear(ORDER * embedding, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of windows (int64 ``[batch, length]``) in nats a byte."""
        seen = self.embedding(tokens[:, :-1].unfold(1, ORDER, 1)).flatten(2)
        hidden = torch.relu(self.first(seen))
        hidden = hidden + torch.relu(self.second(hidden))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, ORDER:].flatten())


def batches(data: Tensor, count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Random windows of the text: int64 ``[size, CONTEXT + 1]`` each."""
    starts = torch.randint(len(data) - CONTEXT - 1, (count, size), generator=generator)
    return [torch.stack([data[s : s + CONTEXT + 1] for s in row.tolist()]).long() for row in starts]


def train(train_path: str, val_path: str, name: str, seeds: int, steps: int) -> list[float]:
    """Runs on each rank: the validation losses of a variant, by seed, in nats a byte."""
    rank = dist.get_rank()
    text, held_out = (torch.from_numpy(np.fromfile(path, dtype=np.uint8)) for path in (train_path, val_path))
    validation = batches(held_out, VALIDATION_BATCHES, 16, torch.Generator().manual_seed(0))
    return [_train_once(variants(steps)[name], seed, steps, text, validation, rank) for seed in range(seeds)]


def _train_once(variant: Variant, seed: int, steps: int, text: Tensor, validation: list[Tensor], rank: int) -> float:
    torch.manual_seed(seed)
    settings = {
        "warmup_steps": max(1, steps // 50),
        **(SGD if variant.optimizer == "sgd" else ADAM),
        **variant.settings,
    }
    config = OptimizerConfig(name=variant.optimizer, **settings)
    model = ByteModel()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = Mesh(RANKS, 1, rank)
    communicator = GradientCommunicator(ddp, mesh, compression=variant.compression(), **variant.options)
    ddp.register_comm_hook(communicator, communicator.hook)
    optimizer = build_optimizer(model, config)
    if isinstance(optimizer, OneBitAdam):
        communicator.exchange_momentum_of(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, steps))
    for batch in batches(text, steps, BATCH, torch.Generator().manual_seed(1000 * seed + rank + 1)):
        optimizer.zero_grad()
        ddp(batch).backward()
        optimizer.step()
        schedule.step()
    communicator.close()
    with torch.no_grad():
        return statistics.fmean(float(model(batch)) for batch in validation)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of a run")
    parser.add_argument("--only", nargs="*", choices=list(variants(1)), help="these variants; the dense ones are added")
    parser.add_argument("--json", help="write the losses to this file")
    args = parser.parse_args()
    every = variants(args.steps)
    chosen = args.only or list(every)
    reference = {name: "sgd dense" if variant.optimizer == "sgd" else "dense" for name, variant in every.items()}
    names = [name for name in every if name in chosen or name in {reference[other] for other in chosen}]

    corpus = prepare_corpus(list_source(None, "**/*.py"), 0.05, default_cache_dir())
    losses = {}
    for number, name in enumerate(names, 1):
        print(f"{number} of {len(names)}: {name}", flush=True)
        arguments = str(corpus.train_path), str(corpus.val_path), name, args.seeds, args.steps
        losses[name] = run_distributed(train, RANKS, *arguments, ranks_per_node=1, timeout=3600)[0]
    title = f"validation loss after {args.steps} steps, {args.seeds} seeds, {RANKS} ranks"
    table = Table("gradients", "nats a byte", "dense = 100 %", "best and worst seed", title=title)
    rows = {}
    for name in names:
        dense = losses[reference[name]]
        ratios = [loss / other for loss, other in zip(losses[name], dense, strict=True)]
        mean = statistics.fmean(losses[name]) / statistics.fmean(dense)
        rows[name] = {"losses": losses[name], "ratio": mean, "ratios": ratios}
        table.add_row(
            name,
            f"{statistics.fmean(losses[name]):.4f}",
            f"{100 * mean:.2f} %",
            f"{100 * min(ratios):.2f} to {100 * max(ratios):.2f} %",
        )
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
