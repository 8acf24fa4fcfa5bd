"""How long a step would take with each candidate, and what steps tell of the link between nodes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from danon_lightning.strategies.communication.adaptive.measurement import Measured
from danon_lightning.strategies.communication.adaptive.settings import OFF, Candidate
from danon_lightning.strategies.communication.compressors import Compressor
from danon_lightning.strategies.communication.cost_model import CodingCosts, Levels, Links, predict_exchange
from danon_lightning.strategies.communication.cost_model.traffic import MessageTraffic, Parameters, exchange_traffic

# What is measured confirms a prediction if the step is as long by this share.
_TOLERANCE, _NOTICEABLE = 0.1, 0.03
# Of what is learned of a candidate each look counts alike at first, and later ones at least so much.
_LEAST_WEIGHT = 0.2
# What a change of bandwidth that matters is like.
_MUCH_FASTER = 4.0
# A region by whose code it is known whether a compressor sends as much as at another step.
_SAMPLE_NUMEL = 1 << 20


@dataclass
class Forecaster:
    """Predicts steps from the links, and learns from steps how far off that is.

    Args:
        links: As they were probed.
        candidates: What may be chosen, by name.
        costs: Of coding with each of them.
        hierarchical: As for the communicator.
        device: Where gradients lie.

    Attributes:
        scale: Bandwidth between nodes at present, as a multiple of the one probed.
        corrections: By candidate that was tried on the present link, what has been found out of the model's error: a
            factor of at most 1, and seconds to be added.
    """

    links: Links
    candidates: Mapping[str, Candidate]
    costs: Mapping[str, CodingCosts]
    hierarchical: bool | Literal["auto"]
    device: torch.device
    scale: float = 1.0
    corrections: dict[str, tuple[float, float]] = field(default_factory=dict)
    _looks: dict[str, int] = field(default_factory=dict, init=False)
    _lacking: dict[str, float] = field(default_factory=dict, init=False)  # on other links, the least of them
    _planned: dict[str, tuple[object, list[list[MessageTraffic]]]] = field(default_factory=dict, init=False)

    @property
    def bits_per_second(self) -> float:
        """Between nodes, at present."""
        assert self.links.inter is not None
        return 8 * self.scale * self.links.inter.bytes_per_second

    def change_link(self, scale: float) -> None:
        """Go by another bandwidth.

        Of what the model lacked on the last link only seconds remain that it lacked on all: what it was wrong about the
        bandwidth itself need not be so any more.
        """
        for name, (_, more) in self.corrections.items():
            self._lacking[name] = min(more, self._lacking.get(name, more))
        self.corrections.clear()
        self._looks.clear()
        self.scale = scale

    def exposed_seconds(self, name: str, measured: Measured, step: int, *, scale: float | None = None) -> float:
        """What the exchange would add to a step with a candidate, at the present ``scale`` unless one is given.

        Args:
            name: Of the candidate.
            measured: When buckets are ready, and what is in them.
            step: Number of exchanges so far.
            scale: Bandwidth, as a multiple of the one probed.
        """
        factor, more = self._correction(name)
        return factor * self._model(name, measured, step, scale or self.scale) + more

    def confirms(self, measured: Measured, exposed_seconds: float, doubt: float = 1.0) -> bool:
        """Whether the prediction has turned out right.

        Args:
            measured: What steps have taken.
            exposed_seconds: What was predicted.
            doubt: So many times as much as usual may be noise.
        """
        difference, step = exposed_seconds - measured.exposed_seconds, measured.step_seconds
        # Half of what was expected: on a faster link something less lossy may do, though there is little to be gained.
        if difference > max(measured.exposed_seconds, doubt * _NOTICEABLE * step):
            return False
        return abs(difference) <= doubt * _TOLERANCE * step

    def shows_a_faster_link(self, name: str, measured: Measured, step: int, doubt: float = 1.0) -> bool:
        """Whether steps with this candidate would tell if the link became much faster."""
        now = self.exposed_seconds(name, measured, step)
        then = self.exposed_seconds(name, measured, step, scale=_MUCH_FASTER * self.scale)
        return not self.confirms(replace(measured, exposed_seconds=then), now, doubt)

    def learn(self, name: str, measured: Measured, step: int) -> None:
        """Take what was measured at the present scale for the truth about a candidate, on the average of its looks."""
        self._looks[name] = self._looks.get(name, 0) + 1
        weight = max(1 / self._looks[name], _LEAST_WEIGHT)
        exposed = measured.exposed_seconds
        predicted = self._model(name, measured, step, self.scale)
        # What too short a prediction lacks are seconds of something else; too long a one is so by a share.
        found = (exposed / predicted, 0.0) if exposed < predicted else (1.0, exposed - predicted)
        (factor, more), (new_factor, new_more) = self.corrections.get(name, found), found
        self.corrections[name] = factor + weight * (new_factor - factor), more + weight * (new_more - more)

    def _correction(self, name: str) -> tuple[float, float]:
        """The factor, and the seconds to be added.

        How busy processors are no probe knows. So a compressor that was not tried is taken to lack what others do, or,
        if none was tried, what dense gradients do. What compressors lack, dense gradients need not: it may be coding.
        """
        if name in self.corrections:
            return self.corrections[name]
        lacking = self._lacking | {other: more for other, (_, more) in self.corrections.items()}
        if name in lacking or name == OFF:
            return 1.0, lacking.get(name, 0.0)
        of_dense = lacking.pop(OFF, 0.0)
        return 1.0, statistics.fmean(lacking.values() or [of_dense])

    def _model(self, name: str, measured: Measured, step: int, scale: float) -> float:
        inter = self.links.inter
        assert inter is not None
        return predict_exchange(
            measured.buckets,
            replace(self.links, inter=replace(inter, bytes_per_second=scale * inter.bytes_per_second)),
            compression=self.candidates[name],
            hierarchical=self.hierarchical,
            costs=self.costs[name],
            ready=measured.ready,
            step=step,
            device=self.device,
            traffic=self._traffic(name, measured.buckets, step),
        ).exposed_seconds

    def _traffic(self, name: str, buckets: Sequence[Parameters], step: int) -> list[list[MessageTraffic]]:
        """What the exchange moves. As long as buckets and sizes of codes are the same, it is planned once."""
        links, compressor = self.links, self.candidates[name]
        levels = Levels.of(
            links.nodes, links.ranks_per_node, hierarchical=self.hierarchical, compressed=compressor is not None
        )
        key: object = [[parameter for parameter, _ in bucket] for bucket in buckets]
        if isinstance(compressor, Compressor):  # during its warm-up it sends other amounts at each step
            sent = compressor.payload_bytes(_SAMPLE_NUMEL, step), compressor.prefers_dense(step, levels.outer)
            key = key, sent
        if name not in self._planned or self._planned[name][0] != key:
            self._planned[name] = key, exchange_traffic(buckets, levels, compressor, step=step, device=self.device)
        return self._planned[name][1]
