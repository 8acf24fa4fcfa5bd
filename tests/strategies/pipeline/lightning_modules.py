"""LightningModules that know nothing of stages, and their data."""

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

VOCABULARY, WIDTH, LENGTH, SAMPLES, BATCH = 31, 16, 6, 48, 8


class Tied(pl.LightningModule):
    """Embedding and head share their weight; metrics, and what a step logs in every way."""

    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([self.layer() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(VOCABULARY, average="micro")
        self.validation_accuracy = torchmetrics.classification.MulticlassAccuracy(VOCABULARY)
        self.computed = []

    @staticmethod
    def layer():
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        logits = self(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        self.accuracy(logits.detach(), labels.flatten().clamp(0))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log_dict({"largest": logits.max()}, reduce_fx="max", sync_dist=True)
        self.log("seen", float(len(tokens)), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch, batch_idx):
        tokens, labels = batch
        logits = self(tokens).flatten(0, 1)
        self.validation_accuracy.update(logits, labels.flatten().clamp(0))
        self.log("validation_loss", F.cross_entropy(logits, labels.flatten(), ignore_index=-100), sync_dist=True)

    def on_validation_epoch_end(self):
        self.log("validation_accuracy", self.validation_accuracy.compute())
        self.validation_accuracy.reset()

    test_step = validation_step

    def on_test_epoch_end(self):
        self.log("test_accuracy", self.validation_accuracy.compute())
        self.validation_accuracy.reset()

    def predict_step(self, batch, batch_idx):
        return {"tokens": self(batch[0]).argmax(-1)}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class InTurns(Sampler):
    """Every n-th sample: all replicas together see what one process sees."""

    def __init__(self, num_replicas, rank):
        self.replicas, self.rank = num_replicas, rank

    def __iter__(self):
        return iter(range(self.rank, SAMPLES, self.replicas))

    def __len__(self):
        return SAMPLES // self.replicas


def loader(replicas=1, rank=0, seed=0, ignored=False):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    labels = (tokens * 7 + 3) % VOCABULARY
    if ignored:
        for sample in range(SAMPLES):
            labels[sample, sample % LENGTH + 1 :] = -100
    return DataLoader(TensorDataset(tokens, labels), BATCH // replicas, sampler=InTurns(replicas, rank))


class Record(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


def make_trainer(strategy="auto", devices=1, **options):
    defaults = {
        "max_epochs": 2,
        "precision": "64-true",
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, devices=devices, callbacks=[Record()], **{**defaults, **options})


def losses_of(trainer):
    return next(callback.losses for callback in trainer.callbacks if isinstance(callback, Record))


class Wide(Tied):
    """With matrices that are large enough to be compressed."""

    @staticmethod
    def layer():
        return nn.Sequential(nn.Linear(WIDTH, 300), nn.GELU(), nn.Linear(300, WIDTH))


class Deferred(Tied):
    """Makes its layers when it is told to, with dropout in them and a buffer beside them."""

    def __init__(self, layers=4, width=WIDTH):
        super().__init__(layers)
        self.size, self.width = layers, width
        self.layers = None

    def configure_model(self):
        if self.layers is not None:
            return
        self.layers = nn.ModuleList([self.layer() for _ in range(self.size)])
        for layer in self.layers:
            nn.init.orthogonal_(layer[2].weight)
            layer.register_buffer("scale", torch.ones(1) * 0.5)
        self.register_buffer("positions", torch.arange(LENGTH))
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.shift + self.positions[:, None]
        for layer in self.layers:
            x = x + layer(x) * layer.scale
        return self.head(x)
