"""Small modules to plan for."""

import lightning.pytorch as pl
import torch
from torch import nn

WIDTH, LAYERS, CLASSES = 32, 4, 5


class Stack(pl.LightningModule):
    """Layers of one size, with something before and after them."""

    def __init__(self):
        super().__init__()
        self.entrance = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        x = self.entrance(x)
        for layer in self.layers:
            x = layer(x)
        loss = nn.functional.cross_entropy(self.head(x), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Single(Stack):
    """Nothing that can be cut."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH))


def batch(samples=16):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(samples, WIDTH, generator=generator),
        torch.randint(CLASSES, (samples,), generator=generator),
    )
