"""The exchanges that predictions are checked with."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Exchange:
    """One of them.

    Attributes:
        name: What it goes by on the command line and in results.
        description: A few words of help.
        compression: As for the gradient communicator.
        hierarchical: As for the gradient communicator.
        ours: Whether it is of this package.
    """

    name: str
    description: str
    compression: str | None = None
    hierarchical: bool | Literal["auto"] = "auto"
    ours: bool = True


EXCHANGES: dict[str, Exchange] = {
    exchange.name: exchange
    for exchange in [
        Exchange("torch", "torch's own all-reduce, predicted as a ring", ours=False),
        Exchange("dense-flat", "this package, float32, all ranks alike", hierarchical=False),
        Exchange("dense", "float32, nodes summed first like in all that follow"),
        Exchange("int8", "eight bits and a scale a block", "int8"),
        Exchange("topk", "the largest 1 %, with indices", "topk"),
        Exchange("powersgd", "low-rank factors of rank 4", "powersgd"),
    ]
}
