"""What the parts of a training step cost, by the number of samples: time, memory, and what would travel."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn, optim

from danon_lightning.strategies.pipeline.balance import Costs
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.ownership import find_owners
from danon_lightning.strategies.pipeline.recording import HEAD, Cuts, Recording


@dataclass(frozen=True)
class Affine:
    """A constant and so much for each sample; never less than 0."""

    constant: float = 0.0
    per_sample: float = 0.0

    def __call__(self, samples: float) -> float:
        """The value for a number of samples."""
        return max(0.0, self.constant + self.per_sample * samples)

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Affine":
        """The line through two points (samples, value). A falling one, which only noise can make, becomes level."""
        (few, small), (many, large) = first, second
        slope = max(0.0, (large - small) / (many - few))
        return cls(large - slope * many, slope)


@dataclass(frozen=True)
class Part:
    """The head, a block, or the tail of a step.

    Attributes:
        forward: Seconds.
        backward: Seconds.
        kept: Bytes that live from its forward pass to its backward pass.
        forward_peak: Bytes that live at most during its forward pass, of its own.
        backward_peak: Bytes that live at most during its backward pass, without what earlier parts keep.
        entering: Bytes of activations that it gets if the step is cut in front of it.
        returned: Bytes of gradients that it gives back for them.
        obstacle: Why the step cannot be cut there; None if it can.
        is_block: Whether it is a block: one that checkpointing runs twice.
    """

    forward: Affine
    backward: Affine
    kept: Affine
    forward_peak: Affine
    backward_peak: Affine
    entering: Affine = Affine()
    returned: Affine = Affine()
    obstacle: str | None = None
    is_block: bool = False


@dataclass(frozen=True)
class OptimizerCost:
    """What the optimizer takes.

    Attributes:
        name: Its class.
        seconds_per_element: For each number that it trains.
        state_bytes_per_element: What it remembers of each.
        temporary_bytes_per_element: What a step needs in between.
        instances: The optimizers themselves, to ask which compression they go with.
    """

    name: str
    seconds_per_element: float
    state_bytes_per_element: float
    temporary_bytes_per_element: float = 0.0
    instances: Sequence[optim.Optimizer] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Profile:
    """What is known of a module.

    Attributes:
        module: A copy of it, as large as it is.
        blocks: Its body; None if it has none that could be cut.
        no_pipeline: Why it cannot be cut at all; None if it can.
        recording: What a dry run has found; None without blocks.
        parts: The head, each block, and the tail; the whole step alone without blocks.
        optimizer: What it takes.
        stage_seconds: What a stage adds to each forward pass: it runs the whole step, for others with absent data.
        count_seconds: What it adds for each micro-batch before the first pass, to see what losses divide by.
        measured_samples: The sizes of the micro-batches that were measured.
        batch_samples: Number of samples of the batch that was given.
    """

    module: pl.LightningModule = field(repr=False)
    blocks: Blocks | None
    no_pipeline: str | None
    recording: Recording | None = field(repr=False)
    parts: tuple[Part, ...]
    optimizer: OptimizerCost
    stage_seconds: float
    count_seconds: float
    measured_samples: tuple[int, int]
    batch_samples: int

    def costs(self, samples: int) -> Costs:
        """What the parts take in a micro-batch, forward and backward, in seconds."""
        head, *blocks, tail = [part.forward(samples) + part.backward(samples) for part in self.parts]
        return Costs(head, tuple(blocks), tail)

    def parts_of(self, cuts: Cuts | None, stage: int) -> range:
        """Which parts a stage runs."""
        if cuts is None:
            return range(len(self.parts))
        own = cuts.blocks_of(stage)
        start = 0 if stage == 0 else own.start + 1
        return range(start, len(self.parts) if stage == cuts.stages - 1 else own.stop + 1)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters by name."""
        return list(self.module.named_parameters())

    def parameters_of(self, cuts: Cuts) -> list[list[tuple[str, Tensor]]]:
        """The parameters that each stage holds, in the order of the module."""
        assert self.blocks is not None and self.recording is not None
        owners = find_owners(self.module, self.blocks, cuts, [self.recording])
        return [
            [(name, parameter) for name, parameter in self.parameters() if stage in owners.get(name, ())]
            for stage in range(cuts.stages)
        ]

    def part_of(self, name: str) -> int:
        """The part whose backward pass completes the gradient of a parameter: the first that uses it."""
        if self.recording is None or self.blocks is None:
            return 0
        positions = self.recording.uses.get(name) or frozenset()
        if not positions:
            return 0
        first, last = min(positions), len(self.parts) - 1
        if first == HEAD:
            return 0
        block, after = divmod(first - 1, 2)
        return min(last, block + 1 + (after and block + 2 == last))

    def describe(self) -> dict[str, Any]:
        """For JSON: the parts at one sample more, in words that a reader can check."""
        few, many = self.measured_samples
        return {
            "measured_samples": [few, many],
            "parameters": sum(parameter.numel() for _, parameter in self.parameters()),
            "blocks": None if self.blocks is None else {"name": self.blocks.name, "number": len(self.blocks)},
            "optimizer": {
                "name": self.optimizer.name,
                "seconds_per_element": self.optimizer.seconds_per_element,
                "state_bytes_per_element": self.optimizer.state_bytes_per_element,
            },
            "stage_seconds": self.stage_seconds,
            "parts": [
                {
                    "forward_seconds": part.forward(many),
                    "backward_seconds": part.backward(many),
                    "kept_bytes": part.kept(many),
                    "entering_bytes": part.entering(many),
                }
                for part in self.parts
            ],
        }
