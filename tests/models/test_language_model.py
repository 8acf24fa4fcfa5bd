import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from danon_lightning.attention import MSRAConfig
from danon_lightning.models import (
    DALALightning,
    FullAttentionLightning,
    InfiniteLightning,
    MSRALightning,
    SuperHybridLightning,
    UCSALightning,
)

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_sequence_length": 64}
PARTS = {
    "msra": {"block_size": 8},
    "dala": {"block_size": 8, "memory_size": 8},
    "ucsa": {"block_size": 4, "local_window_size": 8, "global_tokens": 4, "max_selected_blocks": 2},
}
MODELS = [
    (MSRALightning, {**SMALL, **PARTS["msra"]}),
    (DALALightning, {**SMALL, **PARTS["dala"]}),
    (UCSALightning, {**SMALL, **PARTS["ucsa"]}),
    (InfiniteLightning, {**SMALL, "local_window": 16, "sliding_window": 32, "compression_ratio": 0.5}),
    (SuperHybridLightning, {**SMALL, "settings": PARTS}),
    (FullAttentionLightning, SMALL),
]
# The hybrid is made of all others.
TRAINED = [MODELS[0], MODELS[-2], MODELS[-1], *(pytest.param(*model, marks=pytest.mark.slow) for model in MODELS[1:-2])]


def build(cls, config, **optimizer):
    torch.manual_seed(0)
    return cls(config, {"learning_rate": 1e-2, "warmup_steps": 2, **optimizer})


def quiet_trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def text_loader(length=33):
    data = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))
    return DataLoader([data[i : i + length] for i in range(0, 1024, 16)], batch_size=16)


@pytest.mark.parametrize(("cls", "config"), TRAINED)
def test_it_learns_a_sentence(cls, config):
    module = build(cls, config)
    trainer = quiet_trainer(max_steps=60)
    trainer.fit(module, text_loader(), text_loader())
    assert trainer.callback_metrics["val/bits_per_byte"] < 1.5
    assert trainer.callback_metrics["val/bits_per_byte"] == pytest.approx(
        trainer.callback_metrics["val/loss"].item() / 0.6931472, rel=1e-4
    )


@pytest.mark.parametrize(("cls", "config"), MODELS)
def test_every_parameter_gets_a_gradient(cls, config):
    module = build(cls, config)
    module.loss(torch.randint(0, 256, (2, 10))).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("cls", "config"), MODELS)
def test_the_checkpoint_restores_the_module_from_plain_values(cls, config, tmp_path):
    module = build(cls, config)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, text_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = cls.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.config == module.config
    assert loaded.optimizer_config == module.optimizer_config
    tokens = torch.randint(0, 256, (2, 20))
    assert torch.equal(loaded(tokens), module(tokens))


@pytest.mark.parametrize(("cls", "config"), TRAINED)
def test_text_is_generated_as_the_parallel_form_predicts_it(cls, config):
    module = build(cls, config)
    quiet_trainer(max_steps=60).fit(module, text_loader())
    text = module.generate_text("the quick ", max_new_bytes=40, temperature=0)
    tokens = torch.tensor([list(text.encode())])
    predicted = module.eval()(tokens[:, :-1]).argmax(-1)
    assert predicted[0, 9:].tolist() == tokens[0, 10:].tolist()
    assert text.startswith("the quick brown fox")


def test_generation_changes_neither_mode_nor_random_state():
    module = build(*MODELS[0]).train()
    state = torch.get_rng_state()
    first, again, other = (module.generate_text("a", max_new_bytes=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_named():
    module = build(*MODELS[0])
    with pytest.raises(ValueError, match="prompt='' is empty"):
        module.generate_text("")
    with pytest.raises(ValueError, match=r"prompt of 1 bytes and max_new_bytes=64 exceed max_sequence_length=64"):
        module.generate_text("a", max_new_bytes=64)
    with pytest.raises(ValueError, match=r"unknown fields \['hiden_size'\]; MSRAConfig has: .*hidden_size"):
        MSRALightning({"hiden_size": 3})
    with pytest.raises(TypeError, match="config must be a MSRAConfig or a mapping"):
        MSRALightning(7)
    with pytest.raises(ValueError, match="causal=False"):
        MSRALightning(MSRAConfig(**MODELS[0][1], causal=False))


def test_weights_of_components_are_kept_diverse():
    entropies = {}
    for weight in (0.0, 1.0):
        config = {**SMALL, "settings": PARTS, "diversity_weight": weight}
        module = build(SuperHybridLightning, config)
        with torch.no_grad():
            for block in module.model.layers:
                block.core.gate.bias[:2] = 3.0
        loader = text_loader()
        trainer = quiet_trainer(max_steps=20)
        trainer.fit(module, loader)
        weights = module.model(next(iter(loader))).component_weights
        entropies[weight] = sum(torch.special.entr(layer).sum(dim=1).mean().item() for layer in weights) / 2
    assert entropies[1.0] > entropies[0.0] + 0.1
    assert trainer.callback_metrics["train/component_entropy"] == pytest.approx(entropies[1.0], abs=0.2)


@pytest.mark.parametrize(
    ("settings", "chunk_length"),
    [({}, 8), ({"gradient_checkpointing": True}, None), ({"memory_efficient": True}, None)],
)
def test_diversity_needs_the_weights_in_the_graph(settings, chunk_length):
    with pytest.raises(ValueError, match="diversity_weight=1.0 needs the weights of the whole batch"):
        SuperHybridLightning({**SMALL, "diversity_weight": 1.0, **settings}, chunk_length=chunk_length)


def test_the_test_measures_as_the_validation_does():
    module, data, trainer = build(*MODELS[-1]), text_loader(), quiet_trainer()
    [validated] = trainer.validate(module, data, verbose=False)
    [tested] = trainer.test(module, data, verbose=False)
    assert set(tested) == {"test/loss", "test/bits_per_byte"}
    assert {name.replace("val/", "test/"): value for name, value in validated.items()} == tested


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_schedule_of_sparsity_follows_the_steps(hybrid):
    settings = {**PARTS["ucsa"], "sparsity_factor": 0.5, "sparsity_decay": 0.5, "max_selected_blocks": 8}
    settings["error_compensation"] = 1.0
    if hybrid:
        parts = {"components": "msra+ucsa", "settings": {"msra": PARTS["msra"], "ucsa": settings}}
        module = build(SuperHybridLightning, {**SMALL, **parts})
        core = module.model.layers[0].core.by_name()["ucsa"]
    else:
        module = build(UCSALightning, {**SMALL, **settings})
        core = module.model.layers[0].core
    assert core.config.num_selected(0) == 8 and core.config.num_selected(3) == 2
    quiet_trainer(max_steps=3).fit(module, text_loader(length=65))
    assert core.training_step == 3
    assert core.error_mean != 0.5 and core.error_variance > 0
