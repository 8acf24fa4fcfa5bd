"""Changes of the compression on ranks that exchange: at one step, and without losing anything."""

import itertools
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danon_lightning.callbacks import CommunicationMonitor
from danon_lightning.strategies import AutoCompression, DanonHybridStrategy, TopKCompressor
from danon_lightning.strategies.communication.adaptive import adaptation
from danon_lightning.strategies.communication.adaptive.controller import NOTHING, PING, PROBE, Decision
from danon_lightning.strategies.communication.cost_model import Link, Links, probe
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import (  # noqa: E402
    SHAPES,
    Given,
    PlainModule,
    emulated_mesh,
    exchange,
    give,
    given_gradients,
    loader,
    same_on_all_ranks,
)

_TAG = "communication/compression/text_summary"

CANDIDATES = ["bf16", "int8", "int4", "powersgd", TopKCompressor(0.05), "sign"]
SLOW_NAMES = ["sign", "topk(density=0.05)", "powersgd", "off", "sign", "int4", "topk(density=0.05)"]


def known_links(mesh, **options):
    """In place of a probe."""
    return Links(mesh.num_nodes, mesh.ranks_per_node, Link(1e-5, 1e10), Link(1e-4, 1e7))


def follow(communicator, names):
    """Have rank 0 decide for these names, one at each look, and for nothing once they are through."""
    left = list(names)

    def decide(measured, step):
        return Decision(step, left.pop(0), "because") if left else None

    communicator._auto.controller.decide = decide
    communicator._auto.controller.wants_probe = lambda *args: False


def total(tensors):
    return {name: tensors[name].double() for name in SHAPES}


def add(sums, tensors):
    return {name: sums.get(name, 0) + tensors[name].double() for name in SHAPES}


def mean_of(step, world_size):
    ranks = [given_gradients(step, rank) for rank in range(world_size)]
    return {name: torch.stack([rank[name].double() for rank in ranks]).mean(dim=0) for name in SHAPES}


def settings(every_n_steps=1):
    return AutoCompression(candidates=CANDIDATES, every_n_steps=every_n_steps)


def check_conservation(sent, due, residual, note):
    for name in SHAPES:
        missing = due[name].flatten() - sent[name].flatten() - residual.get(name, torch.zeros(())).double()
        assert missing.abs().max() < 2e-4, f"{note}, {name}: {missing.abs().max()}"


def check_switching(folder):
    adaptation.probe_links = known_links
    found = {}
    for nodes, ranks in [(2, 1), (2, 2)]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            with exchange(mesh, settings()) as (ddp, communicator):
                follow(communicator, SLOW_NAMES)
                sent, due, names = {}, {}, []
                for step in range(2 * len(SLOW_NAMES) + 4):
                    delivered = give(ddp, given_gradients(step, mesh.rank))
                    assert same_on_all_ranks(delivered), f"{mesh}, step {step}: ranks differ"
                    sent, due = add(sent, delivered), add(due, mean_of(step, mesh.world_size))
                    names.append(communicator.compression)
                    state = communicator.state_dict()
                    if mesh.rank == 0 and communicator.compression not in ("int4", "bf16", "int8"):  # feed nothing back
                        residual = state["mean"]["residual"]
                        if "int4" not in names:
                            check_conservation(sent, due, residual, f"{mesh}, step {step}, {names}")
                everybody = [None] * mesh.world_size
                dist.all_gather_object(everybody, (names, communicator.decisions()))
                assert all(one == everybody[0] for one in everybody)
                found[f"{nodes}x{ranks}"] = names
    return found


def test_nothing_is_lost_when_the_compression_changes_and_all_ranks_change_together(tmp_path):
    found = run_distributed(check_switching, 4, str(tmp_path), timeout=200)[0]
    for names in found.values():
        changes = [name for name, before in zip(names, ["off", *names], strict=False) if name != before]
        assert changes == SLOW_NAMES


def check_not_finite(folder):
    """A step that does not count while everything is to be flushed: it is flushed with the next one that does."""
    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is None:
            return
        with exchange(mesh, settings()) as (ddp, communicator):
            follow(communicator, ["sign", "off"])
            sent, due = {}, {}
            for step in range(8):
                gradients = given_gradients(step, mesh.rank)
                if step in (0, 3, 4, 6) and mesh.rank == 1:
                    gradients["table"][0, 0] = torch.nan
                delivered = give(ddp, gradients)
                if step in (0, 3, 4, 6):
                    assert communicator.finite is False
                    continue
                assert communicator.finite is True
                sent, due = add(sent, delivered), add(due, mean_of(step, 2))
                assert communicator.compression == {1: "off", 2: "sign", 5: "off", 7: "off"}[step]
            state = communicator.state_dict()
            assert communicator.stats()["skipped_steps"] == 4
            if mesh.rank == 0:
                check_conservation(sent, due, state["mean"]["residual"], "after NaN")
                assert state["mean"]["residual"] == {}


def check_dense_not_finite(folder):
    """While gradients travel dense no rank asks the others, and yet all of them know, wherever a bad element is."""
    adaptation.probe_links = known_links
    layouts = [(1, 2, "auto"), (2, 1, "auto"), (2, 2, "auto"), (2, 2, False)]
    types = [torch.float32, torch.float64, torch.float16]
    for (nodes, ranks, hierarchical), dtype in itertools.product(layouts, types):
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            options = {"model": Given(dtype=dtype), "hierarchical": hierarchical, "loss_scale": lambda: 4.0}
            with exchange(mesh, AutoCompression(candidates=[]), **options) as (ddp, communicator):
                communicator._agree = None
                for step, name in enumerate(SHAPES):
                    gradients = given_gradients(step, mesh.rank, dtype=dtype)
                    if mesh.rank == step % mesh.world_size:
                        bad = (torch.inf, torch.nan, -torch.inf)[step % 3]
                        gradients[name].view(-1)[-1 if step % 2 else 0] = bad
                    delivered = give(ddp, gradients, loss_scale=4.0)
                    note = f"{mesh}, {hierarchical}, {dtype}, {name}"
                    assert communicator.finite is False, f"{note}: unnoticed"
                    assert not all(torch.isfinite(tensor).all() for tensor in delivered.values()), f"{note}: hidden"
                    give(ddp, given_gradients(100 + step, mesh.rank, dtype=dtype), loss_scale=4.0)
                    assert communicator.finite is True, f"{note}: in the next step"
                assert communicator.stats()["skipped_steps"] == len(SHAPES)


def test_what_is_not_finite_on_one_rank_is_known_on_all_without_asking(tmp_path):
    run_distributed(check_dense_not_finite, 4, str(tmp_path), timeout=200)


def check_bandwidth(folder):
    """What is measured says that the link has become slower, then faster again."""
    found = []
    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is None:
            return None
        model = None
        candidates = AutoCompression(candidates=["bf16", "int8", "int4"])
        with exchange(mesh, candidates, model=model) as (ddp, communicator):
            auto = communicator._auto
            bandwidth = 1e9

            def numbers(num_buckets):
                forecaster = auto.controller.forecaster
                links = Links(2, 1, None, Link(1e-4, bandwidth))
                seconds = adaptation_model(forecaster, links, auto, communicator)
                # Ranks have measured differently; the slower one computes, the faster one waits for it.
                late = 0.01 * mesh.rank
                return torch.tensor(
                    [0.02 + late, -(seconds + 0.01 - late), *[0.0] * num_buckets, 0.0], dtype=torch.float64
                )

            auto._meter.to_numbers = numbers
            auto._probe.measure = lambda: bandwidth
            for step in range(90):
                bandwidth = 1e9 if step < 33 or step >= 62 else 1e5
                give(ddp, given_gradients(step, mesh.rank))
                found.append(communicator.compression)
            decisions = communicator.decisions()
    return found, decisions


def adaptation_model(forecaster, links, auto, communicator):
    from danon_lightning.strategies.communication.cost_model import predict_exchange

    return predict_exchange(
        communicator._exchanged,
        links,
        compression=communicator._exchange.compressor,
        costs=forecaster.costs[communicator.compression],
    ).exposed_seconds


def check_ping(folder):
    """A link that seems faster is measured, and what is found decides at once, on all ranks."""
    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is None:
            return
        with exchange(mesh, AutoCompression(every_n_steps=4)) as (ddp, communicator):
            auto, seen, measured = communicator._auto, [], []
            auto.controller.wants_probe = lambda *args: PING
            auto._probe.seems_faster = lambda: seen.append(auto.exchanges) or auto.exchanges == 9
            auto._probe.measure = lambda: measured.append(auto.exchanges) or 5e8
            auto.controller.take_probe = lambda found, *args: setattr(auto.controller, "found", found)
            auto.controller.decide = lambda *args: (
                Decision(0, "int8", "it is faster") if getattr(auto.controller, "found", None) == 5e8 else None
            )
            names = []
            for step in range(12):
                give(ddp, given_gradients(step, mesh.rank))
                names.append(communicator.compression)
            assert seen == [3, 5, 9] and measured == [9]
            assert names == ["off"] * 8 + ["int8"] * 4
            assert communicator.decisions() == [(9, "int8", "it is faster")]


def check_rest(folder):
    """Every second look is left out, by all ranks or none, unless the link was measured."""
    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is None:
            return
        with exchange(mesh, AutoCompression(every_n_steps=2)) as (ddp, communicator):
            auto, looks = communicator._auto, []
            usual = auto._meter.to_numbers
            auto._meter.to_numbers = lambda *args: looks.append(auto.exchanges) or usual(*args)
            auto.controller.wants_probe = lambda *args: PROBE if auto.exchanges == 10 else NOTHING
            auto.controller.take_probe = lambda *args: None
            auto.controller.decide = lambda *args: None
            auto._probe.measure = lambda: 5e8
            auto.controller._has_chosen = True
            for step in range(21):
                give(ddp, given_gradients(step, mesh.rank))
            assert looks == [2, 6, 10, 12, 16, 20]


def check_failed_probe(folder):
    """Gradients stay dense, and nobody waits for anybody."""

    def vanished(*args):
        raise OSError("the link has vanished")

    adaptation.probe_links, probe._Probe.run = probe.probe_links, vanished
    with emulated_mesh(2, 1, folder) as mesh, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if mesh is None:
            return
        with exchange(mesh, "auto") as (ddp, communicator):
            texts = [str(one.message) for one in caught if "exchange dense, by ring" in str(one.message)]
            assert len(texts) == (mesh.rank == 0) and all("the link has vanished" in text for text in texts)
            for step in range(12):
                delivered = give(ddp, given_gradients(step, mesh.rank))
                for name, mean in mean_of(step, 2).items():
                    torch.testing.assert_close(delivered[name].double(), mean, rtol=1e-5, atol=1e-5)
            (decision,) = communicator.decisions()
            assert decision == (3, "off", "Gradients travel uncompressed: the links could not be measured.")

    def fails(*args, **options):
        raise ZeroDivisionError("nothing to divide")

    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is None:
            return
        with exchange(mesh, AutoCompression(every_n_steps=1)) as (ddp, communicator):
            follow(communicator, ["int8"])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for step in range(8):
                    if step == 4:
                        assert communicator.compression == "int8"
                        communicator._auto.controller.forecaster.exposed_seconds = fails
                        del communicator._auto.controller.decide
                    give(ddp, given_gradients(step, mesh.rank))
            assert communicator.compression == "off"
            assert communicator.decisions()[-1][1:] == (
                "off",
                "Gradients travel uncompressed: steps cannot be predicted.",
            )
            texts = [str(one.message) for one in caught if "cannot be predicted" in str(one.message)]
            assert len(texts) == (mesh.rank == 0)


def several(folder):
    check_not_finite(folder)
    found = check_bandwidth(folder)
    check_ping(folder)
    check_rest(folder)
    check_failed_probe(folder)
    return found


def test_a_change_of_bandwidth_is_answered_by_all_ranks_at_one_step(tmp_path):
    (names, decisions), (others, other_decisions) = run_distributed(several, 2, str(tmp_path), timeout=200)
    assert names == others and decisions == other_decisions
    assert names[32] == "off"
    assert names[33 + 19] == names[61] == "int4"
    assert names[62 + 19] == names[-1] == "off"
    assert [name for _, name, _ in decisions][-3:] == ["off", "int4", "off"]


def run_and_save(folder):
    adaptation.probe_links = known_links
    with emulated_mesh(2, 1, folder) as mesh:
        if mesh is not None:
            sent, due = {}, {}
            with exchange(mesh, settings(every_n_steps=2)) as (ddp, communicator):
                follow(communicator, ["powersgd", "sign", "topk(density=0.05)"])
                states = []
                for step in range(8):
                    sent, due = add(sent, give(ddp, given_gradients(step, mesh.rank))), add(due, mean_of(step, 2))
                    states.append((communicator.state_dict(), communicator.state_dict(per_rank=True), sent, due))
                names = communicator.compression
            assert names == "topk(density=0.05)"
            if mesh.rank == 0:
                torch.save(states, f"{folder}/states")
    for nodes, ranks in [(2, 1), (3, 1), (1, 3)]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            states = torch.load(f"{folder}/states", weights_only=True)
            for number, (mean, per_rank, sent, due) in enumerate(states):
                if number >= 2:
                    check_resume(mesh, per_rank if number % 2 else mean, sent, due, number)


def check_resume(mesh, state, sent, due, number):
    active, following = state["auto"]["active"], state["auto"]["next"]
    assert (active == following) == (number not in (4, 6))
    with exchange(mesh, settings(every_n_steps=1000)) as (ddp, communicator):
        communicator.load_state_dict(state)
        follow(communicator, [])
        assert [name for _, name, _ in communicator.decisions()][-1:] in ([], [following])
        for step in range(8, 11):
            sent = add(sent, give(ddp, given_gradients(step, mesh.rank)))
            due = add(due, mean_of(step, mesh.world_size))
            if step == 8 and active == following and mesh.num_nodes > 1:
                assert communicator.compression == active
        # Between ranks of one node there is nothing to be compressed: what is owed is flushed.
        assert communicator.compression == (following if mesh.num_nodes > 1 else "off")
        kept = communicator.state_dict()
        if mesh.rank == 0:
            assert kept["auto"]["exchanges"] == state["auto"]["exchanges"] + 3
            check_conservation(sent, due, kept["mean"]["residual"], f"{mesh}, state {number}, {active}, {following}")


def test_a_run_goes_on_with_what_was_chosen_and_owed_also_on_other_ranks(tmp_path):
    run_distributed(run_and_save, 3, str(tmp_path), timeout=200)


def train(folder):
    """In a Trainer on two nodes, by name; then on from the checkpoint. The links are what they are."""
    adaptation.probe_links = known_links
    rank = int(os.environ["RANK"])
    logger = TensorBoardLogger(folder)
    told = []
    for steps, ckpt_path in ((14, None), (20, f"{folder}/auto.ckpt")):
        strategy = DanonHybridStrategy(compression=AutoCompression(candidates=["int8", "powersgd"], every_n_steps=3))
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            num_nodes=2,
            logger=logger,
            callbacks=[CommunicationMonitor(every_n_steps=5)],
            max_steps=steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        module = PlainModule(optimizer="sgd")
        forced = {3: "powersgd", 9: "int8", 12: "powersgd"}

        def decide(measured, step, forced=forced):
            return Decision(step, forced[step], "Because it is so.") if step in forced else None

        class Force(pl.Callback):
            def on_train_start(self, trainer, module, decide=decide):
                trainer.strategy._communicator._auto.controller.decide = decide
                trainer.strategy._communicator._auto.controller.wants_probe = lambda *args: False

        trainer.callbacks.append(Force())
        trainer.fit(module, loader(4, rank=rank, ranks=2), ckpt_path=ckpt_path)
        if ckpt_path is None:
            trainer.save_checkpoint(f"{folder}/auto.ckpt")
        assert strategy.gradients_finite is True
        told.append((strategy.compression_decisions(), strategy._communicator.compression))
        weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    logger.finalize("success")
    return told, weights, strategy.describe()["gradients"]


def test_a_trainer_goes_on_with_what_was_chosen_and_tensorboard_is_told_why(tmp_path):
    (first, weights, described), (second, others, _) = run_distributed(
        train, 2, str(tmp_path), ranks_per_node=1, timeout=200
    )
    assert first == second and torch.equal(weights, others)
    because = [
        (4, "powersgd", "Because it is so."),
        (10, "int8", "Because it is so."),
        (13, "powersgd", "Because it is so."),
    ]
    assert first[0] == first[1] == (because, "powersgd")
    assert "if it pays" in described
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(_TAG)]
    assert texts[:3] == [f"step {step}, **{name}**: {why}" for step, name, why in because]
    assert len(texts) == 3
