"""Sequences sorted into classes, with every variant."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from danon_lightning.attention import FullAttentionConfig, MSRAConfig, available_variants, observing
from danon_lightning.models import SequenceClassifier

sys.path.insert(0, str(Path(__file__).parent))
from small_models import config_of, scrambled  # noqa: E402

SMALL = {"vocab_size": 20, "hidden_size": 32, "num_layers": 1, "max_sequence_length": 64}
CLASSES = 3
pytestmark = pytest.mark.filterwarnings("ignore:isinstance.treespec", "ignore:You defined a .validation_step")


def build(variant, **settings):
    torch.manual_seed(0)
    return SequenceClassifier(
        variant, CLASSES, config_of(variant, **SMALL, **settings), {"learning_rate": 2e-2, "warmup_steps": 5}
    )


def examples(count, seed):
    """Noise with two tokens of its class in it, and padding of any length behind it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for label in torch.randint(0, CLASSES, (count,), generator=generator).tolist():
        length = int(torch.randint(5, 20, (), generator=generator))
        ids = torch.randint(CLASSES, 20, (30,), generator=generator)
        ids[torch.randint(0, length, (2,), generator=generator)] = label
        ids[length:] = torch.randint(0, CLASSES, (30 - length,), generator=generator)  # padding that would mislead
        mask = (torch.arange(30) < length).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)})
    return made


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize(
    ("variant", "settings"), [*((name, {}) for name in available_variants()), ("msra", {"causal": False})]
)
def test_it_learns_under_the_trainer(variant, settings):
    module, run = build(variant, **settings), trainer(max_steps=80)
    run.fit(module, DataLoader(examples(640, 0), batch_size=32), DataLoader(examples(100, 1), batch_size=30))
    measured = {name: value.item() for name, value in run.callback_metrics.items()}
    assert measured["val/accuracy"] > 0.85 and measured["val/f1"] > 0.85
    assert measured["val/loss"] < 0.5 and {"train/loss", "train/accuracy"} <= set(measured)
    [probabilities] = run.predict(module, DataLoader(examples(20, 2), batch_size=20))
    labels = torch.stack([example["labels"] for example in examples(20, 2)])
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(20))
    assert (probabilities.argmax(dim=-1) == labels).float().mean() > 0.8


def test_metrics_are_those_of_the_whole_set():
    module, data = build("full"), examples(50, 3)
    [measured] = trainer().test(module, DataLoader(data, batch_size=20), verbose=False)
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    with torch.no_grad():
        found = module.eval()(batch["input_ids"], batch["attention_mask"]).argmax(dim=-1)
    labels = batch["labels"]
    assert measured["test/accuracy"] == pytest.approx((found == labels).float().mean().item())
    scores = []
    for label in range(CLASSES):
        hits = ((found == label) & (labels == label)).sum().item()
        scores.append(2 * hits / max(1, (found == label).sum().item() + (labels == label).sum().item()))
    assert measured["test/f1"] == pytest.approx(sum(scores) / CLASSES)


@pytest.mark.parametrize("variant", available_variants())
def test_padding_changes_nothing(variant):
    module, ids = build(variant).double(), torch.randint(0, 20, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, 11:] = 0
    logits = module(ids, mask)
    torch.testing.assert_close(logits[1:], module(ids[1:, :11]), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[:1], module(ids[:1]), rtol=0, atol=1e-10)
    assert module(ids, torch.zeros_like(mask)).isfinite().all()
    torch.testing.assert_close(module(ids, 2 * mask), logits, rtol=0, atol=0)


def test_batches_have_two_forms():
    module = build("msra")
    ids, labels = torch.randint(0, 20, (2, 9)), torch.tensor([0, 2])
    mask = torch.ones_like(ids)
    forms = [{"input_ids": ids, "labels": labels}, (ids, mask, labels), [ids, None, labels]]
    losses = [module.training_step(form, 0).item() for form in forms]
    assert losses == [pytest.approx(losses[0], abs=1e-6)] * 3
    with pytest.raises(ValueError, match="the batch has 2 parts; it must have input_ids, attention_mask"):
        module.training_step((ids, labels), 0)
    with pytest.raises(ValueError, match=r"the batch has \['ids'\]; it must have input_ids"):
        module.training_step({"ids": ids}, 0)
    with pytest.raises(ValueError, match="the batch has no labels"):
        module.training_step({"input_ids": ids}, 0)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2], [-100, 0]])
def test_labels_out_of_range_are_named(labels):
    match = rf"labels lie in \[{min(labels)}, {max(labels)}\], but num_classes=3 takes 0 … 2"
    for step in (build("full").training_step, build("full").validation_step):
        with pytest.raises(ValueError, match=match):
            step((torch.randint(0, 20, (2, 9)), None, torch.tensor(labels)), 0)


def test_training_rewards_the_entropy_of_the_weights_without_padding():
    batch = torch.utils.data.default_collate(examples(4, 0))
    plain, diverse = (build("super_hybrid", diversity_weight=weight) for weight in (0.0, 0.5))
    logged = {}
    for module in (plain, diverse):
        scrambled(module)
        module.log = lambda name, value, **_: logged.update({name: value})
    diverse.load_state_dict(plain.state_dict())
    loss, rewarded = plain.training_step(batch, 0), diverse.training_step(batch, 0)
    core, real = plain.model.layers[0].core, batch["attention_mask"].bool()
    with observing([core], ["component_weights"]) as [observed]:
        plain(batch["input_ids"], real)
    entropy = torch.special.entr(observed["component_weights"]).sum(dim=1).movedim(1, -1)[real].mean()
    torch.testing.assert_close(logged["train/component_entropy"], entropy)
    torch.testing.assert_close(rewarded, loss - 0.5 * entropy)
    torch.testing.assert_close(logged["train/loss"], loss)
    [gained] = torch.autograd.grad(rewarded, diverse.model.layers[0].core.gate.weight)
    [of_loss] = torch.autograd.grad(loss, core.gate.weight, retain_graph=True)
    [of_entropy] = torch.autograd.grad(entropy, core.gate.weight)
    torch.testing.assert_close(gained, of_loss - 0.5 * of_entropy)
    with pytest.raises(ValueError, match="diversity_weight=0.5 needs the weights of the whole batch"):
        build("super_hybrid", diversity_weight=0.5, gradient_checkpointing=True)


def test_what_follows_the_course_of_training_moves_on():
    module = build("ucsa", error_compensation=1.0)
    trainer(max_steps=3).fit(module, DataLoader(examples(24, 0), batch_size=8))
    core = module.model.layers[0].core
    assert core.training_step == 3
    assert core.error_mean != 0.5 and core.error_variance > 0


@pytest.mark.parametrize("variant", available_variants())
def test_every_parameter_gets_a_gradient(variant):
    module = build(variant)
    module.training_step((torch.randint(0, 20, (2, 9)), None, torch.tensor([0, 2])), 0).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_the_checkpoint_restores_the_module_from_plain_values(tmp_path):
    module, run = build("msra"), trainer(max_steps=1)
    run.fit(module, DataLoader(examples(8, 0), batch_size=8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.config == module.config and isinstance(loaded.config, MSRAConfig)
    assert loaded.optimizer_config == module.optimizer_config
    ids = torch.randint(0, 20, (2, 20))
    torch.testing.assert_close(loaded(ids), module(ids), rtol=0, atol=0)


def test_settings():
    assert not build("full", causal=False).config.causal
    given = FullAttentionConfig(**SMALL, num_heads=2)
    assert SequenceClassifier("full", 2, given).config is given
    with pytest.raises(ValueError, match="name='dense' is not an attention variant"):
        SequenceClassifier("dense", 2)
    with pytest.raises(ValueError, match="num_classes=1 must be an integer of at least 2"):
        SequenceClassifier("full", 1)
    with pytest.raises(TypeError, match="config must be a MSRAConfig or a mapping"):
        SequenceClassifier("msra", 2, given)
    with pytest.raises(ValueError, match=r"config has unknown fields \['hiden_size'\]"):
        SequenceClassifier("msra", 2, {"hiden_size": 3})
