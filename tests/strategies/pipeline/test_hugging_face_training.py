"""Models of the transformers library, as they are, in a Trainer with pipeline stages."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
import transformers_models
from lightning_modules import losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

VOCABULARY, LENGTH = 61, 12
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2": lambda: transformers_models.gpt2(VOCABULARY, LENGTH, **NO_DROPOUT),
    "llama": lambda: transformers_models.llama(VOCABULARY, tie_word_embeddings=True),
    "mixtral": lambda: transformers_models.mixtral(VOCABULARY),
    "t5": lambda: transformers_models.t5(VOCABULARY),
    "vit": transformers_models.vit,
}
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
