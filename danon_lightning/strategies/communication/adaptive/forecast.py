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
# Steps tell how fast the link is if twice the bandwidth would shorten what the exchange adds at least to this share.
_SENSITIVE = 0.8
_SLOWEST, _FASTEST = 2.0**-14, 2.0**14
_PRECISION = 1.1
# A region by whose code it is known whether a compressor sends as much as at another step.
_SAMPLE_NUMEL = 1 << 20


@dataclass
class Forecaster:
    """Predicts steps from the links, and corrects the links by steps.

    Args:
        links: As they were probed.
        costs: Of coding with each candidate.
        hierarchical: As for the communicator.
        device: Where gradients lie.

    Attributes:
        scale: Bandwidth between nodes at present, as a multiple of the one probed.
        corrections: By candidate, what has been found out of the model's error: a factor of at most 1, and seconds to
            be added.
    """

    links: Links
    costs: Mapping[str, CodingCosts]
    hierarchical: bool | Literal["auto"]
    device: torch.device
    scale: float = 1.0
    corrections: dict[str, tuple[float, float]] = field(default_factory=dict)
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
        scale: float | None = None,
    ) -> float:
        """What the exchange would add to a step."""
        factor, more = self.corrections.get(name, (1.0, 0.0))
        return factor * self._model(name, compressor, measured, buckets, step, scale) + more

    def confirms(self, measured: Measured, exposed_seconds: float) -> bool:
        """Whether the prediction has turned out right."""
        difference, step = exposed_seconds - measured.exposed_seconds, measured.step_seconds
        # Half of what was expected: on a faster link something less lossy may do, though there is little to be gained.
        if difference > max(measured.exposed_seconds, _NOTICEABLE * step):
            return False
        return abs(difference) <= _TOLERANCE * step

    def fit(
        self, name: str, compressor: Candidate, measured: Measured, buckets: Sequence[Parameters], step: int
    ) -> float | None:
        """The scale at which the exchange would have added what it has added.

        Returns:
            None if the link is not what decides about it: most of the time goes into coding, or all is hidden.
        """

        def at(scale: float) -> float:
            return self.exposed_seconds(name, compressor, measured, buckets, step, scale)

        low, high = _SLOWEST, _FASTEST
        while high > low * _PRECISION:
            middle = math.sqrt(low * high)
            if at(middle) > measured.exposed_seconds:
                low = middle
            else:
                high = middle
        return high if at(2 * high) <= _SENSITIVE * at(high) else None

    def correct(
        self, name: str, compressor: Candidate, measured: Measured, buckets: Sequence[Parameters], step: int
    ) -> None:
        """Take what was measured at the present scale for the truth about a candidate."""
        predicted = self._model(name, compressor, measured, buckets, step, None)
        exposed = measured.exposed_seconds
        # What too short a prediction lacks are seconds of something else; too long a one is so by a share.
        self.corrections[name] = (exposed / predicted, 0.0) if exposed < predicted else (1.0, exposed - predicted)

    def _model(
        self,
        name: str,
        compressor: Candidate,
        measured: Measured,
        buckets: Sequence[Parameters],
        step: int,
        scale: float | None,
    ) -> float:
        inter = self.links.inter
        assert inter is not None
        bandwidth = inter.bytes_per_second * (self.scale if scale is None else scale)
        return predict_exchange(
            buckets,
            replace(self.links, inter=replace(inter, bytes_per_second=bandwidth)),
            compression=compressor,
            hierarchical=self.hierarchical,
            costs=self.costs[name],
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
