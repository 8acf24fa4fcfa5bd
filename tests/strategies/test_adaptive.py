"""What "auto" decides, as a function of numbers: no rank, no clock."""

import itertools
import warnings
from dataclasses import astuple, replace

import pytest
import torch
from torch import optim

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies import AutoCompression, DanonHybridStrategy, TopKCompressor
from danon_lightning.strategies.communication.adaptive import forecast
from danon_lightning.strategies.communication.adaptive.choice import Chooser
from danon_lightning.strategies.communication.adaptive.controller import PING, PROBE, Controller, by_name
from danon_lightning.strategies.communication.adaptive.experience import Experience
from danon_lightning.strategies.communication.adaptive.forecast import Forecaster
from danon_lightning.strategies.communication.adaptive.measurement import Measured, from_numbers
from danon_lightning.strategies.communication.adaptive.settings import FOR_ANY_OPTIMIZER, FOR_SGD, label
from danon_lightning.strategies.communication.cost_model import CodingCosts, Link, Links, predict_exchange
from danon_lightning.strategies.communication.cost_model.traffic import exchange_traffic
from danon_lightning.strategies.optimizer_checks import allowed_compressions

DEVICE = torch.device("cpu")
# 2 million numbers in two buckets.
BUCKETS = [[(f"{index}", torch.empty(1000, 1000, device="meta"))] for index in range(2)]
CODING = CodingCosts(copy=1e-10, add=1e-10, encode=1e-9, decode=1e-9, decode_add=1e-9)
CODING_FOR_LONG = CodingCosts(copy=1e-10, add=1e-10, encode=1e-7, decode=1e-7, decode_add=1e-7)
MBIT = 1e6 / 8


def links_at(mbit, ranks=1):
    return Links(2, ranks, Link(1e-5, 1e10) if ranks > 1 else None, Link(1e-4, mbit * MBIT))


class World:
    """Steps as they would be on links of a given speed, seen by a controller that has probed others."""

    def __init__(
        self, mbit, *, compute=0.2, settings=None, default=FOR_SGD, slower=None, known=CODING, coding=None, busy=1.0
    ):
        self.settings = settings or AutoCompression()
        self.mbit, self.compute, self.slower, self.busy = mbit, compute, slower or {}, busy
        candidates = by_name(self.settings.resolve(default))
        costs = dict.fromkeys(candidates, known)
        self.coding = coding or known
        self.controller = Controller(
            self.settings, candidates, Forecaster(links_at(mbit), candidates, costs, "auto", DEVICE), "no reason"
        )
        self.step = 0
        self.probes = self.pings = 0
        self.rests = self.probes_now = False

    def exposed(self, name, mbit=None):
        seconds = predict_exchange(
            BUCKETS,
            links_at(mbit or self.mbit),
            compression=self.controller.candidates[name],
            costs=self.coding,
            ready=(0.0, 0.05),
        ).exposed_seconds
        return seconds + self.slower.get(name, 0.0)

    def measured(self, noise=1.0):
        computing = self.compute * (self.busy if self.controller.current != "off" else 1.0)
        return Measured(computing, noise * self.exposed(self.controller.current), (0.0, 0.05), BUCKETS)

    def look(self, noise=1.0, probe=None):
        measured = self.measured(noise)
        wanted = self.controller.wants_probe(measured, self.step)
        self.pings += wanted == PING
        believed = self.controller.forecaster.bits_per_second if self.controller.forecaster else 0.0
        self.probes_now = wanted == PROBE or (wanted == PING and self.mbit * 1e6 > 2 * believed)
        if self.probes_now:
            self.probes += 1
            self.controller.take_probe(self.mbit * MBIT if probe is None else probe, measured, self.step)
        decision = self.controller.decide(measured, self.step)
        if decision is not None:
            self.controller.current = decision.name
        return decision

    def run(self, steps, noise=None):
        """Returns the decisions."""
        found = []
        for _ in range(steps):
            self.step += 1
            if not self.controller.is_due(self.step):
                continue
            if self.rests:
                self.rests = False
                continue
            decision = self.look(noise() if noise else 1.0)
            self.rests = decision is None and self.controller.is_calm and not self.probes_now
            found += [decision] if decision else []
        return found

    def fastest(self):
        return min(self.exposed(name) + self.compute for name in self.controller.candidates)

    def now(self):
        return self.exposed(self.controller.current) + self.compute


@pytest.mark.parametrize("mbit", [10, 100, 1000, 10_000, 100_000])
@pytest.mark.parametrize("compute", [0.01, 0.2, 5.0])
def test_the_choice_is_within_three_per_cent_of_the_best_and_the_least_lossy_such(mbit, compute):
    world = World(mbit, compute=compute)
    (decision,) = world.run(10)
    assert decision.name == world.controller.current
    seconds = {name: world.compute + world.exposed(name) for name in world.controller.candidates}
    best = min(seconds.values())
    alike = [name for name, value in seconds.items() if value <= 1.03 * best]
    assert decision.name == alike[0]
    # Where little is gained, it wants to see first what steps take uncompressed.
    assert decision.step == (2 if best <= 0.5 * seconds["off"] else 10)
    assert world.run(200) == []  # and there it stays


def test_where_links_are_fast_it_says_why_compression_is_off():
    (decision,) = World(100_000, compute=0.5).run(10)
    assert decision.name == "off"
    assert decision.sentence.startswith("Gradients travel uncompressed: a step should take 50")
    assert "at 100 Gbit/s between nodes" in decision.sentence and decision.sentence.endswith(".")


def test_where_they_are_slow_it_says_what_is_gained():
    (decision,) = World(100, default=FOR_ANY_OPTIMIZER).run(2)
    assert decision.name == "int4"
    assert "compressed with int4: a step should take" in decision.sentence
    assert "s uncompressed, at 100 Mbit/s between nodes." in decision.sentence


@pytest.mark.parametrize("before", [20, 100, 1000, 20_000])
@pytest.mark.parametrize("after", [20, 100, 1000, 20_000])
def test_a_change_of_bandwidth_is_answered_within_twenty_steps(before, after):
    world = World(before, default=FOR_ANY_OPTIMIZER)
    world.run(53)
    world.mbit = after
    world.run(19)
    assert world.now() <= 1.1 * world.fastest()
    assert world.run(300) == []


def test_what_was_tried_is_judged_by_its_steps_and_not_tried_again():
    # Coding slows down whatever else a rank computes, which no prediction knows.
    world = World(1000, busy=1.4)
    found = world.run(300)
    tried = [decision.name for decision in found if decision.name != "off"]
    # One of them says it for all.
    assert len(tried) == 1 and found[-1].step <= 35
    assert world.controller.current == "off" and world.controller.predictions["off"] == pytest.approx(world.now())
    assert world.controller.predictions[tried[0]] == pytest.approx(1.4 * world.compute + world.exposed(tried[0]))


def test_experience_belongs_to_a_candidate_and_a_bandwidth():
    def note(name, bandwidth, seconds, look):
        known.note(name, bandwidth, seconds, look, computing=seconds / 2, codes=name != "off")

    known = Experience()
    assert known.recall("int8", 100.0, 1) is None and known.computing(codes=True) is None
    note("int8", 100.0, 0.2, 1)
    note("int8", 120.0, 0.24, 2)
    assert known.recall("int8", 90.0, 3) == pytest.approx(0.22)
    # Of dense steps nothing was seen yet: they may compute for as long.
    assert known.computing(codes=True) == known.computing(codes=False) == pytest.approx(0.104)
    assert known.recall("int8", 200.0, 3) is None and known.recall("off", 100.0, 3) is None
    note("int8", 1000.0, 0.1, 3)
    note("off", 100.0, 1.0, 4)
    assert known.recall("int8", 100.0, 5) == pytest.approx(0.22) and known.recall("int8", 1000.0, 5) == 0.1
    assert known.recall("off", 100.0, 204) == 1.0 and known.recall("off", 100.0, 205) is None
    # Steps that are other steps now say nothing of what they were before.
    note("off", 100.0, 1.5, 6)
    assert known.recall("int8", 100.0, 7) is None and known.recall("off", 100.0, 7) == 1.5
    assert known.computing(codes=True) == known.computing(codes=False) == 0.75


def test_noise_does_not_make_it_swing():
    noise = torch.Generator().manual_seed(0)
    world = World(400, default=FOR_ANY_OPTIMIZER)
    world.run(2)
    decisions = world.run(2000, lambda: 1 + 0.15 * float(torch.randn((), generator=noise)))
    assert len(decisions) <= 2


def test_a_model_that_is_wrong_about_a_candidate_is_corrected_and_the_mistake_not_repeated():
    """Coding takes longer than was measured, so that what should be faster is not."""
    slower = {name: 2.0 for name in ("bf16", "int8", "int4")}
    world = World(100, default=FOR_ANY_OPTIMIZER, slower=slower)
    world.run(2)
    assert world.controller.current != "off"
    world.run(60)
    assert world.controller.current == "off" and world.now() <= 1.05 * world.fastest()
    assert world.run(1000) == []


def test_a_link_that_becomes_faster_is_noticed_though_steps_do_not_show_it():
    """Coding takes so long that it hides the transfer: without compression there would be none of it."""
    world = World(50, default=("int4",), coding=CODING_FOR_LONG, known=CODING_FOR_LONG)
    world.run(40)
    assert world.controller.current == "int4"
    before, world.mbit = world.now(), 20_000
    assert world.now() > 0.9 * before > 2 * world.fastest()
    world.run(20)
    assert world.controller.current == "off"


def test_looking_for_a_faster_link_takes_a_share_of_the_time_however_long_a_look_takes():
    def pings(seconds):
        world = World(50, default=("int4",), coding=CODING_FOR_LONG, known=CODING_FOR_LONG)
        world.run(40)
        world.pings, world.controller.ping_seconds = 0, seconds
        world.run(400)
        return world.pings, 0.015 * 400 * (world.now()) / seconds

    for seconds in (0.1, 0.4):
        found, allowed = pings(seconds)
        assert 0.7 * allowed <= found <= allowed


def test_where_steps_show_what_the_link_does_nothing_is_sent_to_look():
    world = World(100, default=FOR_ANY_OPTIMIZER)
    world.run(500)
    assert world.controller.current == "int4" and world.probes == world.pings == 0


def test_one_candidate_tells_how_busy_processors_are_for_all():
    busy = CodingCosts(*(6 * seconds for seconds in astuple(CODING)))
    world = World(3000, default=FOR_ANY_OPTIMIZER, compute=0.05, coding=busy)
    world.run(10)
    first = world.controller.current
    assert first != "off"
    world.run(45)
    for name, seconds in world.controller.predictions.items():
        assert seconds == pytest.approx(world.compute + world.exposed(name), rel=0.25), name
    assert world.now() <= 1.05 * world.fastest()


@pytest.mark.parametrize(("promised", "choice"), [(0.045, "off"), (0.06, "int4")])
def test_what_was_not_tried_must_promise_more_than_what_was_tried(promised, choice):
    exposed = World(1000).exposed
    compute = (exposed("off") - exposed("int4")) / promised - exposed("off")
    world = World(1000, default=("int4",), compute=compute)
    world.run(200)
    assert world.controller.current == choice


def test_what_dense_gradients_take_longer_others_that_were_not_tried_do_too():
    # Processors are busy: whatever is exchanged waits for one, so that there is nothing to be gained.
    world = World(10_000, compute=0.02, default=("int4",), slower={"off": 0.012, "int4": 0.012})
    assert [decision.name for decision in world.run(200)] == ["off"]


def test_what_was_lacking_on_one_link_only_is_forgotten_with_it():
    world = World(10_000)
    forecaster, measured = world.controller.forecaster, world.measured()

    def predicted(name):
        return forecaster.exposed_seconds(name, measured, 0)

    plain = {name: predicted(name) for name in ("off", "int8", "int4")}
    forecaster.learn("off", replace(measured, exposed_seconds=plain["off"] + 0.01), 0)
    forecaster.learn("int8", replace(measured, exposed_seconds=plain["int8"] + 0.02), 0)
    assert predicted("int4") == pytest.approx(plain["int4"] + 0.02)
    forecaster.change_link(0.01)
    slow = predicted("off")
    forecaster.learn("off", replace(measured, exposed_seconds=slow + 0.5), 0)
    assert predicted("off") == pytest.approx(slow + 0.5)
    forecaster.change_link(1.0)
    for name, lacking in (("off", 0.01), ("int8", 0.02), ("int4", 0.02)):
        assert predicted(name) == pytest.approx(plain[name] + lacking)


def test_a_bandwidth_that_would_not_change_steps_is_noise():
    world = World(100_000, compute=5.0)
    world.run(10)
    for found, scale in ((30_000, 1.0), (200_000, 1.0), (100, 0.001)):
        world.controller.take_probe(found * MBIT, world.measured(), world.step)
        assert world.controller.forecaster.scale == pytest.approx(scale)


def looks_in(world, steps):
    """At which steps it looks."""
    found = []
    usual = world.look
    world.look = lambda noise: found.append(world.step) or usual(noise)
    world.run(steps)
    world.look = usual
    return found


def test_while_all_is_as_expected_every_second_look_is_left_out():
    world = World(100, default=FOR_ANY_OPTIMIZER)
    world.run(40)
    looks = looks_in(world, 40)
    assert {after - before for before, after in itertools.pairwise(looks)} == {10}
    world.slower = {world.controller.current: 0.15}  # another choice is better now, which a second look must confirm
    looks, decided = looks_in(world, 40), world.controller.current
    assert 5 in {after - before for before, after in itertools.pairwise(looks)}
    assert decided != "int4"


def test_a_probe_that_finds_nothing_makes_it_less_ready_to_probe():
    world = World(100, default=FOR_ANY_OPTIMIZER)
    world.run(10)
    swings = itertools.cycle([1.0, 1.9])
    world.run(1000, lambda: next(swings))
    assert 1 <= world.probes < 30
    world.mbit = 2  # and is still answered
    probes = world.probes
    world.run(10)
    assert world.probes == probes + 1 and world.controller.forecaster.bits_per_second == pytest.approx(2e6)


def test_probes_that_take_long_wait_unless_the_difference_is_large():
    def probes(noise, probe_seconds):
        world = World(100, default=FOR_ANY_OPTIMIZER)
        world.run(10)
        world.controller.probe_seconds = probe_seconds
        world.run(5, lambda: noise)
        return world.probes

    assert probes(1.5, 0.0) == probes(20.0, 60.0) == 1
    assert probes(1.5, 60.0) == 0


def test_links_that_change_now_and_then_contradict_nothing():
    world = World(100, default=FOR_ANY_OPTIMIZER)
    for turn in range(10):
        world.run(100)
        assert not world.controller.distrusts and world.now() <= 1.1 * world.fastest()
        world.mbit = 100 if turn % 2 else 5000


def test_contradictory_measurements_make_it_safe_with_one_warning():
    world = World(100, default=FOR_ANY_OPTIMIZER)
    world.run(20)
    assert world.controller.current == "int4"
    warned = []
    for look in range(40):
        world.mbit = 100 if look % 2 else 5
        world.look()
        warned += [world.controller.warning] if world.controller.warning else []
        world.controller.warning = ""
        if world.controller.distrusts:
            assert world.controller.current == "off"
    assert len(warned) == 1 and "contradict one another" in warned[0]
    world.mbit = 100
    world.run(200)
    assert world.controller.current == "int4"  # trust comes back


@pytest.mark.parametrize("found", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_probe_that_finds_nonsense_makes_it_safe(found):
    world = World(100, default=FOR_ANY_OPTIMIZER)
    world.run(2)
    world.mbit = 50_000  # the link no longer decides, so it wants to probe
    world.look(probe=found)
    assert world.controller.current == "off" and "contradict" in world.controller.warning


def test_without_links_gradients_stay_dense():
    controller = Controller(AutoCompression(), by_name(AutoCompression().resolve(FOR_SGD)), None, "nobody knows")
    decision = controller.decide(None, 2)
    assert (decision.name, decision.sentence) == ("off", "Gradients travel uncompressed: nobody knows.")
    assert controller.decide(Measured(1.0, 1.0, (0.0, 0.0), BUCKETS), 5) is None
    assert not controller.wants_probe(Measured(1.0, 1.0, (0.0, 0.0), BUCKETS), 5)


def test_a_choice_that_is_no_longer_allowed_is_left_at_once():
    world = World(100)
    world.run(2)
    world.controller.allow(["int8"])
    decision = world.look()
    assert decision.name == "off" and "not among the candidates" in decision.sentence


def test_hysteresis():
    chooser = Chooser(AutoCompression(gain=0.1, confirmations=2, tie=0.03))
    assert [chooser.update({"off": 1.0, "int8": 0.975}, "off") for _ in range(50)] == ["off"] * 50  # alike
    assert chooser.update({"off": 1.0, "int8": 0.5}, "off") == "off"  # not confirmed
    assert chooser.update({"off": 1.0, "int8": 0.975}, "off") == "off"  # a pause begins anew
    assert chooser.update({"off": 1.0, "int8": 0.5}, "off") == "off"
    assert chooser.update({"off": 1.0, "int8": 0.5}, "off") == "int8"
    # Back for nothing but less loss.
    assert chooser.update({"off": 1.05, "int8": 1.0}, "int8") == "int8"
    assert chooser.update({"off": 1.02, "int8": 1.0}, "int8") == "int8"
    assert chooser.update({"off": 1.02, "int8": 1.0}, "int8") == "off"
    # Soon left again: the next time takes longer.
    better = [chooser.update({"off": 1.0, "int8": 0.5}, "off") for _ in range(4)]
    assert better == ["off", "off", "off", "int8"]


@pytest.mark.parametrize(("gain", "looks"), [(0.5, 2), (0.1, 2), (0.08, 3), (0.05, 4), (0.04, 5)])
def test_the_less_there_is_to_be_gained_the_more_looks_it_takes(gain, looks):
    chooser = Chooser(AutoCompression(gain=0.1, confirmations=2, tie=0.03))
    chosen = [chooser.update({"off": 1.0, "int8": 1.0 - gain}, "off") for _ in range(looks)]
    assert chosen == ["off"] * (looks - 1) + ["int8"]


def test_what_was_a_mistake_takes_more_confirmations():
    chooser = Chooser(AutoCompression())
    fast, slow = {"off": 1.0, "int8": 0.5}, {"off": 0.5, "int8": 1.0}
    looks = []
    for _ in range(3):
        for numbers, current, other in ((fast, "off", "int8"), (slow, "int8", "off")):
            count = 1
            while chooser.update(numbers, current) != other:
                count += 1
            looks.append(count)
    assert looks[0::2] == [2, 4, 8] and looks[1::2] == sorted(looks[1::2])
    again = Chooser(AutoCompression())
    again.load_state_dict(chooser.state_dict())
    assert again.state_dict() == chooser.state_dict()
    chooser.forget_mistakes()
    assert [chooser.update(fast, "off") for _ in range(2)] == ["off", "int8"]


def test_messages_are_planned_once_for_each_candidate_and_kind_of_bucket(monkeypatch):
    planned = []

    def plan(buckets, levels, compressor, **options):
        planned.append(label(compressor))
        return exchange_traffic(buckets, levels, compressor, **options)

    monkeypatch.setattr(forecast, "exchange_traffic", plan)
    warm = TopKCompressor(0.01, warmup_steps=20, warmup_density=0.05)
    world = World(100, settings=AutoCompression(candidates=["int8", warm]))
    forecaster, candidates = world.controller.forecaster, world.controller.candidates
    others = [[one] for bucket in BUCKETS for one in bucket[::-1]][::-1]
    for step, buckets in [(0, BUCKETS), (0, BUCKETS), (10, BUCKETS), (20, BUCKETS), (25, BUCKETS), (30, others)]:
        measured = Measured(0.2, 0.5, (0.0, 0.05), buckets)
        for name, compressor in candidates.items():
            found = forecaster.exposed_seconds(name, measured, step)
            assert found == predict_exchange(
                buckets, links_at(100), compression=compressor, costs=CODING, ready=measured.ready, step=step
            ).exposed_seconds  # fmt: skip
    # During the warm-up codes become shorter at each step.
    assert planned.count("off") == planned.count("int8") == 2 and planned.count(label(warm)) == 4


def test_predictions_are_there_for_whoever_asks():
    world = World(100)
    assert world.controller.predictions == {}
    world.run(10)
    predictions = world.controller.predictions
    assert list(predictions) == list(world.controller.candidates)
    assert predictions[world.controller.current] == pytest.approx(world.now(), rel=0.01)
    world.controller.give_up("nobody knows")
    assert world.controller.predictions == {}


def test_ties_go_to_the_least_lossy():
    chooser = Chooser(AutoCompression())
    assert chooser.best({"off": 1.02, "bf16": 1.0, "int8": 1.0}) == "off"
    assert chooser.best({"off": 1.2, "bf16": 1.01, "int8": 1.0}) == "bf16"


def test_numbers_of_ranks_that_cannot_be_are_no_measurement():
    assert from_numbers([1.0, -0.5, 0.0, 0.2, 0.1, 0.0], BUCKETS) == Measured(1.0, 0.5, (0.0, 0.2, 0.2), BUCKETS)
    for numbers in ([1.0, -0.5, 0.0, 1.0], [float("nan"), -0.5, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0], [0.0, -0.0, 0.0, 0.0]):
        assert from_numbers(numbers, BUCKETS) is None


# ---- the quality floor


def weights():
    return [torch.nn.Parameter(torch.zeros(3, 3))]


def names(settings, *optimizers, clips=False):
    return [label(one) for one in allowed_compressions(settings, optimizers, clips=clips)]


def test_the_floor_depends_on_the_optimizer():
    assert names(AutoCompression(), optim.AdamW(weights())) == ["off", "bf16", "int8", "int4"]
    assert names(AutoCompression(), optim.Rprop(weights())) == ["off", "bf16", "int8", "int4"]  # nobody has tried
    sgd = optim.SGD(weights(), lr=0.1, momentum=0.9)
    assert names(AutoCompression(), sgd) == ["off", "bf16", "int8", "int4", "powersgd", "topk", "sign"]
    assert names(AutoCompression(), sgd, optim.Adam(weights())) == ["off", "bf16", "int8", "int4"]


def test_what_was_asked_for_is_left_out_if_the_optimizer_does_not_tolerate_it():
    wanted = AutoCompression(candidates=["int8", "sign", "topk", TopKCompressor(0.02, warmup_steps=100), "powersgd"])
    with pytest.warns(UserWarning, match="leaves out sign, topk: AdamW does not train well with it. What is left: off"):
        found = names(wanted, optim.AdamW(weights()))
    assert found == ["off", "int8", "topk(density=0.02, warmup_steps=100)", "powersgd"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(names(wanted, optim.SGD(weights(), lr=0.1))) == 6


def test_one_bit_adam_is_refused():
    with pytest.raises(ValueError, match="compression='auto' cannot be used with OneBitAdam"):
        names(AutoCompression(), OneBitAdam(weights(), freeze_step=10))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"confirmations": 0}, "confirmations=0 must be at least 1"),
        ({"gain": 0.02}, "tie=0.03 must be above 0 and below gain=0.02"),
        ({"tie": -1.0}, "tie=-1.0 must be above 0"),
        ({"candidates": ["int9"]}, "compression='int9' is not known"),
        ({"candidates": ["int8", "int8"]}, "int8 is named twice"),
        ({"candidates": "int8"}, "candidates='int8' must be a list"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoCompression(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error_feedback": True}, "error_feedback=True cannot be used with compression='auto'"),
        ({"sync_mode": "async"}, "compression='auto' needs sync_mode='full'"),
        ({"pipeline_parallel_size": 2}, "compression='auto' cannot be used with pipeline stages"),
    ],
)
def test_what_does_not_go_with_auto_is_refused(arguments, message):
    for compression in ("auto", AutoCompression(candidates=["int8"])):
        with pytest.raises(ValueError, match=message):
            DanonHybridStrategy(compression=compression, **arguments)


def test_decisions_go_on_from_a_checkpoint():
    world = World(100)
    world.run(30)
    other = World(100)
    other.controller.load_state_dict(world.controller.state_dict())
    assert other.controller.current == world.controller.current != "off"
    assert other.run(50) == []
    fewer = World(100, settings=replace(AutoCompression(), candidates=["bf16"]))
    fewer.controller.load_state_dict(world.controller.state_dict())
    assert fewer.controller.current == "off"
