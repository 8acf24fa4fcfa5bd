"""What steps have taken: when buckets were ready, what the exchange has added, and how long all else took."""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danon_lightning.strategies.communication.cost_model.traffic import Parameters

# After a change, which take longer than later ones.
_UNUSUAL_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """One step, agreed over all ranks.

    Attributes:
        compute_seconds: All but what the exchange has added, of the slowest rank.
        exposed_seconds: What the exchange has added, from the last bucket's being ready to the last mean: that of the
            rank which waited least, for the others have waited for ranks too, not only for bytes.
        ready: Seconds from the first bucket's being ready to each one's.
        buckets: What is in each, in the order in which they are exchanged.
    """

    compute_seconds: float
    exposed_seconds: float
    ready: tuple[float, ...]
    buckets: Sequence[Parameters]

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.compute_seconds + self.exposed_seconds


class Moment:
    """A point in time, of the processor or of the device's present stream."""

    def __init__(self, device: torch.device) -> None:
        """Now."""
        self._seconds, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def until(self, later: "Moment") -> float:
        """Seconds from this to a later one, which must have been reached."""
        if self._event is not None and later._event is not None:
            later._event.synchronize()
            return 1e-3 * float(self._event.elapsed_time(later._event))
        return later._seconds - self._seconds


class StepMeter:
    """Keeps what the last steps have taken on this rank.

    A step lasts from the end of an exchange to the end of the next one; the first one, for which there is no end
    before, does not count. What has changed makes earlier steps incomparable, and the next few unusual: :meth:`clear`.

    Args:
        device: Where gradients lie.
        kept: How many steps; what is usual among them is their median, so that a pause for validation does not matter.
    """

    def __init__(self, device: torch.device, kept: int) -> None:
        """See the class."""
        self._device = device
        self._steps: deque[tuple[float, float, tuple[float, ...]]] = deque(maxlen=kept)
        self._moments: list[Moment] = []
        self._end: Moment | None = None
        self._unusual = 0  # so many steps to come

    def bucket_is_ready(self) -> None:
        """Call it whenever a bucket is handed over."""
        self._moments.append(Moment(self._device))

    def end_exchange(self) -> None:
        """Call it when all buckets have been averaged."""
        end, moments, self._moments = Moment(self._device), self._moments, []
        if self._unusual:
            self._unusual -= 1
        elif self._end is not None and moments:
            exposed = moments[-1].until(end)
            ready = tuple(moments[0].until(moment) for moment in moments)
            if self._steps and len(self._steps[-1][2]) != len(ready):
                self._steps.clear()  # DDP has regrouped its buckets
            self._steps.append((max(self._end.until(end) - exposed, 0.0), exposed, ready))
        self._end = end

    def pause(self) -> None:
        """What has passed since the end of the exchange is no part of the next step."""
        self._end = Moment(self._device)

    def clear(self) -> None:
        """Forget all steps, and do not count the next ones: what is new touches its memory for the first time."""
        self._steps.clear()
        self._unusual = _UNUSUAL_STEPS

    def __len__(self) -> int:
        """How many steps are kept."""
        return len(self._steps)

    def to_numbers(self, num_buckets: int) -> Tensor:
        """The usual step, such that the largest of all ranks is what counts; float64 ``[num_buckets + 3]``.

        The last number says whether this rank has nothing to tell: it must be 0.
        """
        if not self._steps or len(self._steps[-1][2]) != num_buckets:
            return torch.tensor([0.0, -1e30] + [0.0] * num_buckets + [1.0], dtype=torch.float64)
        compute, exposed, ready = zip(*self._steps, strict=True)
        usual = [statistics.median(times) for times in zip(*ready, strict=True)]
        numbers = [statistics.median(compute), -statistics.median(exposed), *usual, 0.0]
        return torch.tensor(numbers, dtype=torch.float64)


def from_numbers(agreed: Sequence[float], buckets: Sequence[Parameters]) -> Measured | None:
    """What :meth:`StepMeter.to_numbers` says of these buckets, after the maximum over ranks; None if it is useless."""
    compute, minus_exposed, *ready, missing = agreed
    if missing or not all(map(_is_time, (compute, -minus_exposed, *ready))) or compute - minus_exposed <= 0:
        return None
    rising = [max(ready[: index + 1]) for index in range(len(ready))]
    return Measured(compute, -minus_exposed, tuple(rising), buckets)


def _is_time(value: float) -> bool:
    return 0 <= value < 1e9
