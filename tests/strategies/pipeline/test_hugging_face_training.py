"""Models of the transformers library, as they are, in a Trainer with pipeline stages."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

VOCABULARY, LENGTH = 61, 12
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 4, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True))


def mixtral():
    config = transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def t5():
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_decoder_layers=4, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(**sizes, **no_dropout, image_size=8, patch_size=4, num_channels=3, num_labels=5)
    return transformers.ViTForImageClassification(config)


MODELS = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral, "t5": t5, "vit": vit}
LAYERS = {"t5": "model.decoder.block"}


class OfTransformers(pl.LightningModule):
    """What users write around such a model."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.model = MODELS[name]()

    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.log("loss", output.loss)
        return output.loss

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def loader(name):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(24):
        if name == "vit":
            pixels = torch.randn(3, 8, 8, generator=generator)
            samples.append({"pixel_values": pixels, "labels": torch.tensor(index % 5)})
            continue
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.long)
        mask[LENGTH - index % 4 :] = 0
        labels = torch.where(mask.bool(), (tokens * 3 + 1) % VOCABULARY, -100)
        samples.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return DataLoader(samples, batch_size=8)


def train(names):
    losses = {}
    for name in names:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        options = {"num_microbatches": 3, "schedule": "1f1b", "pipeline_layers": LAYERS.get(name)}
        strategy = DanonHybridStrategy(pipeline_parallel_size=ranks, **options) if ranks > 1 else "auto"
        trainer = make_trainer(strategy, ranks, precision=32, max_epochs=2)
        trainer.fit(OfTransformers(name), loader(name), loader(name))
        losses[name] = [*losses_of(trainer), float(trainer.callback_metrics["validation_loss"])]
    return losses


def test_models_of_transformers_train_as_in_one_process():
    plain = train(MODELS)
    for found in run_distributed(train, 2, list(MODELS), timeout=250):
        for name, losses in plain.items():
            assert found[name] == pytest.approx(losses, rel=2e-4), name
            assert losses[-1] < losses[0], name
