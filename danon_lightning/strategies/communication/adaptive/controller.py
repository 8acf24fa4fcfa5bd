"""Looks at what steps take, now and then, and says what gradients are to be compressed with."""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from danon_lightning.strategies.communication.adaptive.choice import Chooser
from danon_lightning.strategies.communication.adaptive.experience import Experience
from danon_lightning.strategies.communication.adaptive.forecast import Forecaster
from danon_lightning.strategies.communication.adaptive.link_probe import PING_SECONDS
from danon_lightning.strategies.communication.adaptive.measurement import Measured
from danon_lightning.strategies.communication.adaptive.settings import OFF, AutoCompression, Candidate, label

# The first step is slower than all others, and DDP regroups its buckets after it.
FIRST_LOOK = 2
# So a choice is made there only if it makes steps shorter by this share; else after so many more looks, when steps have
# settled and show what they take uncompressed.
_CLEAR_GAIN, _HESITATIONS = 0.5, 2
# What was not tried must be predicted to be faster by this share than what was: to try it costs some slow steps.
_CAUTION = 0.02
# A bandwidth that has changed by this factor since the last look has changed; else it is noise.
_CHANGED = 1.5
# What is measured on fast links depends on how busy processors are: less than this contradicts nothing.
_CLEARLY_CHANGED = 3.0
# And it matters if steps are longer or shorter by this share.
_MATTERS = 0.05
# Of changes within so many looks, this many to and fro are a contradiction. Then nothing is believed for a while.
_RECENT_LOOKS, _TO_AND_FRO, _DISTRUST_LOOKS = 24, 4, 12
# A probe that has found nothing new makes more of a difference pass for noise, until looks have confirmed predictions.
_MOST_DOUBT, _LESS_DOUBT = 8.0, 0.9
# Unless the difference is so many times as large as what may be noise, a probe waits until it takes but this share of
# the time since the last one.
_LARGE, _PROBING_SHARE = 5.0, 0.01
# What a look may want: nothing, a look at whether the link has become much faster, or a measurement of it.
NOTHING, PING, PROBE = 0, 1, 2
# The share of the time that the second may take.
_PINGING_SHARE = 0.015

_UNCOMPRESSED = "Gradients travel uncompressed"


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        step: After so many exchanges.
        name: What gradients are compressed with from then on; "off" for dense.
        sentence: Why.
    """

    step: int
    name: str
    sentence: str


class Controller:
    """Decides on one rank for all. What it is told is agreed over ranks before.

    Args:
        settings: How readily it changes its mind.
        candidates: What may be chosen, dense first, by name.
        forecaster: Predicts steps; None if nothing is known about the links, which makes it stay with dense gradients.
        reason: Why nothing is known, for the log.

    Attributes:
        current: Name of the present choice. To be set once a decision is carried out.
        probe_seconds: What the last probe has taken; 0 before the first one.
        ping_seconds: What the last look at whether the link has become faster has taken, or should take.
        predictions: Seconds of a step with each candidate, as of the last look: of those that were tried what they have
            taken. Empty where nothing is known.
        warning: What is to be warned of once, if anything.
    """

    def __init__(
        self,
        settings: AutoCompression,
        candidates: Mapping[str, Candidate],
        forecaster: Forecaster | None,
        reason: str = "",
    ) -> None:
        """See the class."""
        self.settings, self.candidates, self.forecaster, self._reason = settings, dict(candidates), forecaster, reason
        self.current = OFF
        self.predictions: dict[str, float] = {}
        self.probe_seconds, self.ping_seconds = 0.0, PING_SECONDS
        self.warning = ""
        self._allowed: set[str] = set(candidates)
        self._chooser, self._experience = Chooser(settings), Experience()
        self._has_chosen = self._has_warned = False
        self._hesitations = 0
        self._looks, self._changes = 0, deque[tuple[int, float]]()  # at which look, by which factor
        self._last_look: int | None = None
        self._doubt, self._seconds_since_ping, self._seconds_since_probe = 1.0, 0.0, 0.0
        self._has_link_changed = False
        self._distrusted_looks = 0

    @property
    def distrusts(self) -> bool:
        """Whether measurements contradict one another at present."""
        return self._distrusted_looks > 0

    def is_due(self, step: int) -> bool:
        """Whether to look after exchange number ``step``, counted from 1; the same on all ranks."""
        return step == FIRST_LOOK or step % self.settings.every_n_steps == 0

    @property
    def _is_settled(self) -> bool:
        """Whether steps are what they will be: the first ones are slower than all others."""
        return self._has_chosen or self._hesitations == _HESITATIONS

    @property
    def is_calm(self) -> bool:
        """Whether nothing that looks have found waits for others to confirm it."""
        return self._has_chosen and not self.distrusts and not self._chooser.is_hesitating

    def allow(self, names: Collection[str]) -> None:
        """From now on, choose among these only. Dense gradients are always allowed."""
        self._allowed = {OFF, *names} & set(self.candidates)

    def allows(self, name: str) -> bool:
        """Whether it may be chosen."""
        return name in self._allowed

    def give_up(self, reason: str) -> None:
        """Nothing is known any more: the next decision is for dense gradients, for good."""
        self.forecaster, self._reason, self._has_chosen = None, reason, False
        self.predictions = {}

    def wants_probe(self, measured: Measured | None, step: int) -> int:
        """Compare what was measured with what was predicted; returns what must be known of the link to tell why.

        It may have changed; or the model is wrong about the present choice, or something else keeps processors busy.
        Where coding takes so long that steps do not show what the link can do, that is looked at now and then.

        Args:
            measured: Agreed over ranks; None if there is nothing new.
            step: Number of exchanges so far.

        Returns:
            :data:`NOTHING`, :data:`PING` or :data:`PROBE`.
        """
        forecaster = self.forecaster
        if forecaster is None or measured is None or self.distrusts or not self._is_settled:
            return NOTHING
        self._looks += 1
        passed = 0.0 if self._last_look is None else (step - self._last_look) * measured.step_seconds
        self._last_look = step
        self._seconds_since_ping += passed
        self._seconds_since_probe += passed
        name = self.current
        if not self._has_chosen:
            forecaster.learn(name, measured, step)
            return NOTHING
        predicted = forecaster.exposed_seconds(name, measured, step)
        if forecaster.confirms(measured, predicted, self._doubt):
            self._doubt = max(1.0, _LESS_DOUBT * self._doubt)
        elif (
            self.probe_seconds <= _PROBING_SHARE * self._seconds_since_probe
            or not forecaster.confirms(measured, predicted, max(self._doubt, _LARGE))
        ):  # fmt: skip
            return PROBE
        forecaster.learn(name, measured, step)
        if self.current == OFF or self._seconds_since_ping < self.ping_seconds / _PINGING_SHARE:
            return NOTHING
        if forecaster.shows_a_faster_link(name, measured, step, 2 * self._doubt):
            return NOTHING
        self._seconds_since_ping = 0.0
        return PING

    def take_probe(self, bytes_per_second: float | None, measured: Measured, step: int) -> None:
        """Go by a probe of the link; what is left of the difference is the model's error about the present choice.

        Args:
            bytes_per_second: Between nodes; None if the probe has failed, which makes this choose dense gradients.
            measured: As for :meth:`wants_probe`.
            step: The same.
        """
        forecaster = self.forecaster
        assert forecaster is not None and forecaster.links.inter is not None
        if bytes_per_second is None or not 0 < bytes_per_second < math.inf:
            self._distrust(f"a probe has found {bytes_per_second} bytes a second")
            return
        self._seconds_since_probe = 0.0
        scale = bytes_per_second / forecaster.links.inter.bytes_per_second
        change, matters = scale / forecaster.scale, self._would_matter(scale, measured, step)
        self._has_link_changed = matters and max(change, 1 / change) >= _CHANGED
        if self._has_link_changed:
            self._change_link(scale, change)
        elif matters:
            forecaster.scale = scale
        self._doubt = 1.0 if self._has_link_changed else min(2 * self._doubt, _MOST_DOUBT)
        if not self.distrusts:
            forecaster.learn(self.current, measured, step)

    def decide(self, measured: Measured | None, step: int) -> Decision | None:
        """What to do from now on; None to go on as before.

        Args:
            measured: As for :meth:`wants_probe`, which comes first.
            step: The same.
        """
        first, forecaster = not self._has_chosen, self.forecaster
        if forecaster is None:
            self._has_chosen = True
            return Decision(step, OFF, f"{_UNCOMPRESSED}: {self._reason}.") if first else None
        if self.current not in self._allowed:
            return Decision(step, OFF, f"{_UNCOMPRESSED}: {self.current} is not among the candidates.")
        if self.distrusts:
            self._distrusted_looks -= 1
            if self.current == OFF:
                return None
            return Decision(
                step,
                OFF,
                f"{_UNCOMPRESSED}, which is safe: measurements of the link contradict one another.",
            )
        if measured is None:
            return None
        if self._is_settled:
            self._experience.note(
                self.current, forecaster.bits_per_second, measured.step_seconds, self._looks,
                computing=measured.compute_seconds, codes=self.current != OFF,
            )  # fmt: skip
        seconds, cautious = self._step_seconds(measured, step)
        self.predictions = seconds
        is_clear = min(seconds.values()) <= (1 - _CLEAR_GAIN) * seconds[OFF]
        if first and not is_clear and self._hesitations < _HESITATIONS:
            self._hesitations += 1
            return None
        self._has_chosen = True
        # Against a change that has been seen speaks nothing but the numbers either.
        chosen = self._chooser.update(cautious, self.current, at_once=first or self._has_link_changed)
        self._has_link_changed = False
        if chosen == self.current and not first:
            return None
        return Decision(step, chosen, self._why(chosen, seconds, forecaster.bits_per_second))

    def _step_seconds(self, measured: Measured, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a step with each candidate, as it should be; and as it counts, more where it was not tried."""
        forecaster = self.forecaster
        assert forecaster is not None
        seconds, cautious = {}, {}
        for name in self._allowed_candidates():
            known = self._experience.recall(name, forecaster.bits_per_second, self._looks)
            if known is None:
                computing = self._experience.computing(codes=name != OFF) or measured.compute_seconds
                seconds[name] = computing + forecaster.exposed_seconds(name, measured, step)
                cautious[name] = (1 + _CAUTION) * seconds[name]
            else:
                seconds[name] = cautious[name] = known
        return seconds, cautious

    def _allowed_candidates(self) -> list[str]:
        """From the least lossy one on."""
        return [name for name in self.candidates if name in self._allowed]

    def _would_matter(self, scale: float, measured: Measured, step: int) -> bool:
        """Whether steps, as they are or uncompressed, would be others at another bandwidth; else it may be noise."""
        forecaster = self.forecaster
        assert forecaster is not None

        def exposed(name: str, scale: float) -> float:
            return forecaster.exposed_seconds(name, measured, step, scale=scale)

        changes = [abs(exposed(name, scale) - exposed(name, forecaster.scale)) for name in {self.current, OFF}]
        return max(changes) > _MATTERS * measured.step_seconds

    def _change_link(self, scale: float, change: float) -> None:
        """Go by another bandwidth, and forget what it makes obsolete."""
        assert self.forecaster is not None
        self.forecaster.change_link(scale)
        self._chooser.forget_mistakes()
        if max(change, 1 / change) < _CLEARLY_CHANGED:
            return
        self._changes.append((self._looks, change))
        while self._changes[0][0] < self._looks - _RECENT_LOOKS:
            self._changes.popleft()
        turns = [(one > 1) != (other > 1) for (_, one), (_, other) in pairwise(self._changes)]
        if sum(turns) >= _TO_AND_FRO:
            self._distrust("it seems to change to and fro")

    def _distrust(self, why: str) -> None:
        self._distrusted_looks = _DISTRUST_LOOKS
        self._changes.clear()
        if not self._has_warned:
            self.warning = (
                f"measurements of the link between nodes contradict one another ({why}): gradients travel "
                "uncompressed, which is safe, until they agree for a while"
            )
            self._has_warned = True

    def _why(self, chosen: str, seconds: Mapping[str, float], bits_per_second: float) -> str:
        link = f"at {_bits(bits_per_second)} between nodes"
        if chosen != OFF:
            return (
                f"Gradients are compressed with {chosen}: a step should take {_time(seconds[chosen])} instead of "
                f"{_time(seconds[OFF])} uncompressed, {link}."
            )
        fastest = min(seconds, key=seconds.__getitem__)
        if fastest == OFF:
            return f"{_UNCOMPRESSED}: a step should take {_time(seconds[OFF])}, {link}, and no less coded."
        return (
            f"{_UNCOMPRESSED}: a step should take {_time(seconds[OFF])}, {link}, and {fastest} would not "
            f"make it much shorter ({_time(seconds[fastest])})."
        )

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint: plain numbers and strings. Links are probed anew."""
        return {"current": self.current, "has_chosen": self._has_chosen, "chooser": self._chooser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, as far as there is a choice and the present one is still a candidate."""
        if self.forecaster is not None and state["current"] in self.candidates:
            self.current, self._has_chosen = state["current"], bool(state["has_chosen"])
            self._chooser.load_state_dict(state["chooser"])


def by_name(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Candidates by what they are called."""
    return {label(candidate): candidate for candidate in candidates}


def _bits(per_second: float) -> str:
    return f"{per_second / 1e9:.3g} Gbit/s" if per_second >= 1e9 else f"{per_second / 1e6:.3g} Mbit/s"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
