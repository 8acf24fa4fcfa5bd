"""What runs on the ranks of ``auto_compression.py``: models, and how their steps are timed."""

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.strategies import AutoCompression, GradientCommunicator, Mesh
from danon_lightning.strategies.communication.adaptive.settings import Candidate, label
from danon_lightning.strategies.communication.cost_model import forget_costs
from danon_lightning.strategies.optimizer_checks import allowed_compressions

DDP, AUTO = "ddp", "auto"
# Memory is touched for the first time, DDP regroups its buckets, and thresholds settle.
WARMUP_STEPS = 5
# In which a change of bandwidth is to be answered.
ANSWER_STEPS = 20
# What takes so many times as long as the best after so many rounds is measured no further; the first of them are those
# of the plan.
CLEARLY_SLOWER = {0: 1.5, 8: 1.25, 16: 1.12}
# As many as lie between two looks of "auto": so many steps have one. A turn lasts for as many such blocks as fit into
# so many seconds, and for one at least: caches that others have filled meanwhile are forgotten by then.
BLOCK_STEPS, TURN_SECONDS = AutoCompression().every_n_steps, 0.5
# Small models in as many buckets as larger ones have.
BUCKET_MB = 2
_POLL_SECONDS = 0.01


class Transformer(nn.Module):
    """Much computation for each parameter: all of them serve every byte."""

    def __init__(self, width: int = 192, layers: int = 4, context: int = 64) -> None:
        """Take the sizes."""
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Predict each byte from those before it; the mean loss."""
        x = self.layers(self.bytes(text[:, :-1]) + self.places, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


class Embeddings(nn.Module):
    """Next to no computation for each parameter: a table of which a batch uses few rows, and wide layers."""

    def __init__(self, words: int = 6000, width: int = 256, hidden: int = 2048) -> None:
        """Take the sizes."""
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())
        self.head = nn.Linear(width, 16)

    def forward(self, text: Tensor) -> Tensor:
        """Tell which of the classes the first word is in; the mean loss."""
        return nn.functional.cross_entropy(self.head(self.layers(self.words(text).mean(dim=1))), text[:, 0] % 16)


class Convolutions(nn.Module):
    """Many small tensors: a deep and narrow residual net with batch norm."""

    def __init__(self, width: int = 48, depth: int = 40) -> None:
        """Take the sizes."""
        super().__init__()
        self.entrance = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 16)

    def forward(self, image: Tensor) -> Tensor:
        """Tell where the image is brightest; the mean loss."""
        target = image.mean(dim=1).flatten(1).argmax(dim=1) % 16
        x = self.entrance(image)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x.mean(dim=(2, 3))), target)


@dataclass(frozen=True)
class Kind:
    """A model, its optimizer, and a batch."""

    model: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch: Callable[[torch.Generator], Tensor]


def _bytes(generator: torch.Generator) -> Tensor:
    return torch.randint(256, (4, 65), generator=generator)


def _words(generator: torch.Generator) -> Tensor:
    return torch.randint(6000, (16, 8), generator=generator)


def _images(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=generator)


# With SGD there are more candidates than with AdamW.
KINDS = {
    "transformer": Kind(Transformer, partial(torch.optim.AdamW, lr=1e-4), _bytes),
    "embeddings": Kind(Embeddings, partial(torch.optim.SGD, lr=1e-3), _words),
    "convolutions": Kind(Convolutions, partial(torch.optim.SGD, lr=1e-3, momentum=0.9), _images),
}
_BATCHES = 8


@dataclass(frozen=True)
class Plan:
    """What a job shall do.

    Attributes:
        nodes: Number of hosts.
        models: Names of :data:`KINDS`.
        rates: Of the links in Mbit/s, None for unshaped; None in place of all where links are not shaped.
        least_rounds: So often each way to exchange has its turn, at least.
        seconds: And for so long, at least.
        settle_steps: Steps that "auto" has to settle, and to answer a change of bandwidth.
        changes: Whether to change the bandwidth in mid-run.
        folder: Where rank 0 asks for rates, and says how far it has come.
    """

    nodes: int
    models: tuple[str, ...]
    rates: tuple[float | None, ...] | None
    least_rounds: int
    seconds: float
    settle_steps: int
    changes: bool
    folder: str


@dataclass
class Trained:
    """A model that is trained on this rank, with one way to exchange its gradients."""

    kind: Kind
    nodes: int
    name: str
    compression: "Candidate | str" = None
    setup_seconds: float = field(init=False)
    communicator: GradientCommunicator | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Set it up. Collective."""
        torch.manual_seed(0)
        rank = dist.get_rank()
        self.ddp = DistributedDataParallel(self.kind.model(), bucket_cap_mb=BUCKET_MB)
        self.optimizer = self.kind.optimizer(self.ddp.parameters())
        generator = torch.Generator().manual_seed(rank)
        self.batches = [self.kind.batch(generator) for _ in range(_BATCHES)]
        dist.barrier()
        start = time.perf_counter()
        if self.name != DDP:
            mesh = Mesh.from_world(dist.get_world_size(), self.nodes, rank)
            self.communicator = GradientCommunicator(self.ddp, mesh, compression=self.compression)
            if self.name == AUTO:
                self.communicator.allow(allowed_compressions(AutoCompression(), [self.optimizer], clips=False))
            self.ddp.register_comm_hook(self.communicator, self.communicator.hook)
        self.setup_seconds = slowest(time.perf_counter() - start)

    def step(self) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        self.ddp(self.batches[self.steps % _BATCHES]).backward()
        self.optimizer.step()
        self.steps += 1

    def seconds(self, steps: int) -> float:
        """Mean step of so many, on the slowest rank. Collective."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return slowest(time.perf_counter() - start) / steps

    def choice(self) -> str:
        """What its gradients are compressed with at present."""
        assert self.communicator is not None
        return self.communicator.compression

    def close(self) -> None:
        """Give it up."""
        if self.communicator is not None:
            self.communicator.close()
        del self.ddp, self.optimizer
        gc.collect()  # a model and its hook refer to each other


def slowest(seconds: float) -> float:
    """The largest of all ranks. Collective."""
    number = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


class Folder:
    """How rank 0 speaks to whoever has started the ranks, through files."""

    def __init__(self, folder: str) -> None:
        """Take the folder."""
        self._folder, self._count = Path(folder), 0

    def tell(self, **content: Any) -> None:
        """Say something, and wait until it has been taken note of. Collective."""
        self._count += 1
        if dist.get_rank() == 0:
            path = self._folder / f"{self._count}.json"
            partial_path = path.with_suffix(".partial")
            partial_path.write_text(json.dumps(content))
            partial_path.replace(path)
            while path.exists():
                time.sleep(_POLL_SECONDS)
        dist.barrier()


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Run a job; called on every rank with the process group initialised. What rank 0 returns counts."""
    torch.set_num_threads(1)
    folder = Folder(plan.folder)
    return [_measure_model(plan, name, folder) for name in plan.models]


def _measure_model(plan: Plan, name: str, folder: Folder) -> dict[str, Any]:
    kind = KINDS[name]
    if plan.rates:
        folder.tell(mbit=None)
    fixed = [Trained(kind, plan.nodes, DDP)]
    candidates = allowed_compressions(AutoCompression(), [fixed[0].optimizer], clips=False)
    fixed += [Trained(kind, plan.nodes, label(candidate), candidate) for candidate in candidates]
    for one in fixed:
        one.seconds(WARMUP_STEPS)
    found = []
    for mbit in plan.rates or (None,):
        if plan.rates:
            folder.tell(mbit=mbit)
        folder.tell(say=f"{name} at {mbit or 'no'} Mbit/s")
        auto, transient = _settle(plan, kind, fixed[1].setup_seconds)
        turns = _rounds([*fixed, auto], plan)
        assert auto.communicator is not None
        found.append({
            "mbit": mbit, "turns": turns, "choice": auto.choice(), "predicted": auto.communicator.predictions(),
            "decisions": auto.communicator.decisions(), **transient,
        })  # fmt: skip
        auto.close()
    changes = _changes(plan, kind, folder) if plan.changes and plan.rates and len(plan.rates) > 1 else []
    parameters = sum(parameter.numel() for parameter in fixed[0].ddp.parameters())
    for one in fixed:
        one.close()
    return {"model": name, "parameters": parameters, "rates": found, "changes": changes}


def _settle(plan: Plan, kind: Kind, dense_setup: float) -> tuple[Trained, dict[str, Any]]:
    """A new "auto", and its first steps."""
    forget_costs()  # each job measures them
    auto = Trained(kind, plan.nodes, AUTO, AUTO)
    seconds, choices = _watch(auto, plan.settle_steps)
    usual = statistics.median(seconds[len(seconds) // 2 :])
    return auto, {
        "setup_seconds": auto.setup_seconds - dense_setup,
        "lost_seconds": sum(seconds) - usual * len(seconds),
        "settled_after": last_change("off", choices),
        "first_seconds": seconds,
        "first_choices": choices,
    }


def _watch(auto: Trained, steps: int) -> tuple[list[float], list[str]]:
    """What each of so many steps takes on the slowest rank, and what is chosen after it."""
    dist.barrier()
    ends, choices = [time.perf_counter()], []
    for _ in range(steps):  # without a pause: "auto" goes by what it measures here
        auto.step()
        ends.append(time.perf_counter())
        choices.append(auto.choice())
    seconds = torch.tensor(ends, dtype=torch.float64).diff()
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.tolist(), choices


def last_change(before: str, choices: Sequence[str]) -> int:
    """After how many steps the choice was the last one; 0 if it was so before."""
    return max((i + 1 for i, (a, b) in enumerate(zip([before, *choices], choices, strict=False)) if a != b), default=0)


def _rounds(variants: list[Trained], plan: Plan) -> dict[str, list[float]]:
    """Mean steps of turns, by name: all take turns, so that whatever else the machine does disturbs them alike.

    After the least number of rounds those that are clearly not the best have no more turns.
    """
    turns: dict[str, list[float]] = {one.name: [] for one in variants}
    start, rounds = time.perf_counter(), 0
    while rounds < plan.least_rounds or slowest(time.perf_counter() - start) < plan.seconds:
        if rounds >= plan.least_rounds:
            usual = {name: statistics.median(seconds) for name, seconds in turns.items()}
            limit = min(usual.values()) * min(limit for least, limit in CLEARLY_SLOWER.items() if rounds >= least)
            variants = [one for one in variants if one.name == AUTO or usual[one.name] <= limit]
        # Not always after the same one: connections that were idle begin slowly.
        for one in variants[rounds % len(variants) :] + variants[: rounds % len(variants)]:
            one.seconds(1)
            steps = TURN_SECONDS / statistics.median(turns[one.name]) if turns[one.name] else 0.0
            turns[one.name].append(one.seconds(BLOCK_STEPS * max(1, round(steps / BLOCK_STEPS))))
        rounds += 1
    return turns


def _changes(plan: Plan, kind: Kind, folder: Folder) -> list[dict[str, Any]]:
    """From the slowest link to each other one and back, in the middle of one run."""
    assert plan.rates is not None
    slowest_first = sorted(plan.rates, key=lambda mbit: mbit or float("inf"))
    sequence = [mbit for other in slowest_first[1:] for mbit in (other, slowest_first[0])]
    folder.tell(mbit=slowest_first[0])
    folder.tell(say=f"bandwidth changes {slowest_first[0]:g} -> {' -> '.join(f'{mbit or 0:g}' for mbit in sequence)}")
    auto, _ = _settle(plan, kind, 0.0)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for before, mbit in zip([slowest_first[0], *sequence], sequence, strict=False):
            choice = auto.choice()
            folder.tell(mbit=mbit)
            seconds, choices = _watch(auto, plan.settle_steps)
            found.append({
                "from": before, "to": mbit, "choice_before": choice,
                "answered_after": last_change(choice, choices[:ANSWER_STEPS]), "answer": choices[ANSWER_STEPS - 1],
                "choice": choices[-1], "seconds": seconds, "choices": choices,
            })  # fmt: skip
    assert auto.communicator is not None
    decisions = auto.communicator.decisions()
    auto.close()
    texts = [str(one.message) for one in caught if "contradict" in str(one.message)]
    return [{**one, "warnings": texts, "decisions": decisions} for one in found]
