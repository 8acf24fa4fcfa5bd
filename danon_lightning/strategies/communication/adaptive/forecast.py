"""How long a step would take with each candidate, and what steps tell of the link between nodes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from danon_lightning.strategies.communication.adaptive.measurement import Measured
from danon_lightning.strategies.communication.adaptive.settings import Candidate
from danon_lightning.strategies.communication.compressors import Compressor
from danon_lightning.strategies.communication.cost_model import CodingCosts, Levels, Links, predict_exchange
from danon_lightning.strategies.communication.cost_model.traffic import MessageTraffic, Parameters, exchange_traffic

# What is measured confirms a prediction if the step is as long by this share.
_TOLERANCE, _NOTICEABLE = 0.1, 0.03
# Of what is learned of a candidate each look counts alike at first, and later ones at least so much.
_LEAST_WEIGHT = 0.2
# So many first looks at a candidate also tell how busy the processors are, if twice the time for coding would lengthen
# what the exchange adds at least to this share.
_LOAD_LOOKS, _SENSITIVE = 3, 1.2
_LEAST_LOAD, _MOST_LOAD, _PRECISION = 0.5, 16.0, 1.05
# What a change of bandwidth that matters is like.
_MUCH_FASTER = 4.0
# A region by whose code it is known whether a compressor sends as much as at another step.
_SAMPLE_NUMEL = 1 << 20


@dataclass
class Forecaster:
    """Predicts steps from the links, and learns from steps how far off that is.

    Args:
        links: As they were probed.
        costs: Of coding with each candidate.
        hierarchical: As for the communicator.
        device: Where gradients lie.

    Attributes:
        scale: Bandwidth between nodes at present, as a multiple of the one probed.
        load: How much longer coding takes during training than when it was measured, for whoever else computes.
        corrections: By candidate, what has been found out of the model's error beyond that: a factor of at most 1, and
            seconds to be added.
    """

    links: Links
    costs: Mapping[str, CodingCosts]
    hierarchical: bool | Literal["auto"]
    device: torch.device
    scale: float = 1.0
    load: float = 1.0
    corrections: dict[str, tuple[float, float]] = field(default_factory=dict)
    _looks: dict[str, int] = field(default_factory=dict, init=False)
    _planned: dict[str, tuple[object, list[list[MessageTraffic]]]] = field(default_factory=dict, init=False)

    @property
    def bits_per_second(self) -> float:
        """Between nodes, at present."""
        assert self.links.inter is not None
        return 8 * self.scale * self.links.inter.bytes_per_second

    def exposed_seconds(
        self,
        name: str,
        compressor: Candidate,
        measured: Measured,
        buckets: Sequence[Parameters],
        step: int,
    ) -> float:
        """What the exchange would add to a step."""
        factor, more = self.corrections.get(name, (1.0, 0.0))
        return factor * self._model(name, compressor, measured, buckets, step, self.load) + more

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

    def shows_a_faster_link(
        self,
        name: str,
        compressor: Candidate,
        measured: Measured,
        buckets: Sequence[Parameters],
        step: int,
        doubt: float = 1.0,
    ) -> bool:
        """Whether steps would tell if the link became much faster."""
        now = self.exposed_seconds(name, compressor, measured, buckets, step)
        factor, more = self.corrections.get(name, (1.0, 0.0))
        then = factor * self._model(name, compressor, measured, buckets, step, self.load, _MUCH_FASTER) + more
        return not self.confirms(replace(measured, exposed_seconds=then), now, doubt)

    def learn(
        self, name: str, compressor: Candidate, measured: Measured, buckets: Sequence[Parameters], step: int
    ) -> None:
        """Take what was measured at the present scale for the truth about a candidate, on the average of its looks."""
        self._looks[name] = self._looks.get(name, 0) + 1
        weight = max(1 / self._looks[name], _LEAST_WEIGHT)

        def model(load: float) -> float:
            return self._model(name, compressor, measured, buckets, step, load)

        exposed, predicted = measured.exposed_seconds, model(self.load)
        if self._looks[name] <= _LOAD_LOOKS and model(2 * self.load) > _SENSITIVE * predicted:
            low, high = _LEAST_LOAD, _MOST_LOAD
            while high > low * _PRECISION:
                middle = math.sqrt(low * high)
                low, high = (low, middle) if model(middle) > exposed else (middle, high)
            self.load *= (low / self.load) ** (weight / 2)
            predicted = model(self.load)
        # What too short a prediction lacks are seconds of something else; too long a one is so by a share.
        found = (exposed / predicted, 0.0) if exposed < predicted else (1.0, exposed - predicted)
        (factor, more), (new_factor, new_more) = self.corrections.get(name, found), found
        self.corrections[name] = factor + weight * (new_factor - factor), more + weight * (new_more - more)

    def _model(
        self,
        name: str,
        compressor: Candidate,
        measured: Measured,
        buckets: Sequence[Parameters],
        step: int,
        load: float,
        times: float = 1.0,
    ) -> float:
        inter, costs = self.links.inter, self.costs[name]
        assert inter is not None
        bandwidth = inter.bytes_per_second * self.scale * times
        return predict_exchange(
            buckets,
            replace(self.links, inter=replace(inter, bytes_per_second=bandwidth)),
            compression=compressor,
            hierarchical=self.hierarchical,
            costs=costs.times(load),
            ready=measured.ready,
            step=step,
            device=self.device,
            traffic=self._traffic(name, compressor, buckets, step),
        ).exposed_seconds

    def _traffic(
        self, name: str, compressor: Candidate, buckets: Sequence[Parameters], step: int
    ) -> list[list[MessageTraffic]]:
        """What the exchange moves. As long as buckets and sizes of codes are the same, it is planned once."""
        links = self.links
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
