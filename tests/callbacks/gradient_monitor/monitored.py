"""Small models to be watched, and a logger that remembers."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH, WIDTH = 32, 4, 6


class Remember(Logger):
    name, version = "remember", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        values = {tag: value for tag, value in metrics.items() if tag.startswith("grad/")}
        if values:
            self.steps.setdefault(step, {}).update(values)


class Network(pl.LightningModule):
    """Regression; the second layer has zeros in its gradients, from its ReLU."""

    def __init__(self, learning_rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 8)
        self.second = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.last = nn.Linear(8, 1, bias=False)
        self.learning_rate = learning_rate

    def forward(self, x):
        return self.last(self.second(self.first(x)))

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x, x.square().sum(1, keepdim=True)


def loader(batch=BATCH, rank=0, ranks=1):
    return DataLoader(TensorDataset(*samples()), batch, sampler=range(rank, SAMPLES, ranks))


class Vector(pl.LightningModule):
    """Its gradient is the mean of the batch."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer_with(*callbacks, logger=None, **options):
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return pl.Trainer(logger=logger or Remember(), callbacks=list(callbacks), **{**defaults, **options})


def fit(monitor, module=None, data=None, **options):
    """What it has logged, by step."""
    trainer = trainer_with(monitor, **options)
    trainer.fit(module if module is not None else Network(), data if data is not None else loader())
    return trainer.logger.steps


def gradients_of(module, loss):
    """By name of the layer, all that it has in one vector."""
    module.zero_grad()
    loss.backward()
    return by_layer({name: parameter.grad for name, parameter in module.named_parameters()})


def by_layer(tensors):
    layers = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition(".")[0], []).append(tensor.detach().clone().flatten())
    return {layer: torch.cat(parts) for layer, parts in layers.items()}


def whole(layers):
    return torch.cat(list(layers.values()))


def hooks_of(trainer, module):
    """All hooks that a monitor might have left behind."""
    found = [hook for p in module.parameters() for hook in (p._backward_hooks or {}).values()]
    return found + [hook for o in trainer.optimizers for hook in o._optimizer_step_post_hooks.values()]
