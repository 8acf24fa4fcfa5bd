import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from danon_lightning.attention import MSRAConfig
from danon_lightning.models import FullAttentionLightning, MSRALightning

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_sequence_length": 64}
MODELS = [(MSRALightning, {**SMALL, "block_size": 8}), (FullAttentionLightning, SMALL)]


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


@pytest.mark.parametrize(("cls", "config"), MODELS)
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


@pytest.mark.parametrize(("cls", "config"), MODELS)
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
