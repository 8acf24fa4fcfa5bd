"""In which order the stages of a pipeline run, and which rank has which stage."""

from dataclasses import dataclass
from typing import Literal

# What torch calls them, and whether a rank has several stages.
_KNOWN = {
    "gpipe": ("GPipe", False),
    "1f1b": ("1F1B", False),
    "interleaved_1f1b": ("Interleaved1F1B", True),
    "looped_bfs": ("LoopedBFS", True),
    "interleaved_zero_bubble": ("InterleavedZeroBubble", True),
    "zbv": ("ZBVZeroBubble", True),
}


@dataclass(frozen=True)
class Schedule:
    """An order of forward and backward passes, on a number of ranks.

    - ``"gpipe"``: all forward passes, then all backward passes (Huang et al., NeurIPS 2019, arXiv:1811.06965).
    - ``"1f1b"``: in turns, so that no stage has more micro-batches under way than there are stages from it to the last
      (Narayanan et al., SC 2021, arXiv:2104.04473).
    - ``"interleaved_1f1b"``: the same with several stages a rank, which shortens the idle time (ibid.).
    - ``"looped_bfs"``: several stages a rank, each of which runs all micro-batches before the next (Lamy-Poirier, MLSys
      2023, arXiv:2211.05953).
    - ``"interleaved_zero_bubble"`` and ``"zbv"``: backward passes in two parts, of which the second (the gradients of
      weights) fills the idle time; the latter with two stages a rank, the first and the last on the same one (Qi et
      al., ICLR 2024, arXiv:2401.10241).

    Attributes:
        name: One of these.
        ranks: Number of ranks of the pipeline.
        stages_per_rank: How many stages each has.
    """

    name: str
    ranks: int
    stages_per_rank: int

    @property
    def style(self) -> Literal["loop", "v"]:
        """Whether stages are dealt out from the first to the last rank each time, or there and back."""
        return "v" if self.name == "zbv" else "loop"

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of activations and of weights are computed at different times."""
        return self.name in ("interleaved_zero_bubble", "zbv")

    @property
    def stages(self) -> int:
        """Number of stages in all."""
        return self.ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """The rank (in the pipeline) that has a stage."""
        turn, rank = divmod(stage, self.ranks)
        return self.ranks - 1 - rank if self.style == "v" and turn % 2 else rank

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)

    def order(self, micro_batches: int) -> str:
        """What torch calls the schedule that this many micro-batches are run with.

        A last batch may be too small for what was asked for. Gradients do not depend on the order.
        """
        name = self.name
        if name == "1f1b" and micro_batches < self.ranks:
            name = "gpipe"
        if name in ("interleaved_1f1b", "interleaved_zero_bubble"):
            rounds = max(1, micro_batches // self.ranks)
            if micro_batches % rounds:
                name = "looped_bfs"
        return _KNOWN[name][0]


def resolve_schedule(name: str, ranks: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule of a name.

    Args:
        name: One of those of :class:`Schedule`.
        ranks: Number of ranks of the pipeline.
        stages_per_rank: How many stages each is to have; None for the fewest that make sense: one, or two where the
            schedule is for several.

    Raises:
        ValueError: If there is no such schedule, or it cannot have so many stages a rank.
    """
    if name not in _KNOWN:
        raise ValueError(f"schedule={name!r} must be one of {', '.join(_KNOWN)}")
    _, several = _KNOWN[name]
    stages = stages_per_rank if stages_per_rank is not None else 2 if several else 1
    if name == "zbv" and stages != 2:
        raise ValueError(f"schedule='zbv' has two stages a rank, but stages_per_rank={stages}")
    if several and stages < 2:
        raise ValueError(
            f"schedule={name!r} is for several stages a rank, but stages_per_rank={stages}: take more, or '1f1b'"
        )
    if not several and stages != 1:
        raise ValueError(
            f"schedule={name!r} has one stage a rank, but stages_per_rank={stages}: 'interleaved_1f1b' takes several"
        )
    return Schedule(name, ranks, stages)
