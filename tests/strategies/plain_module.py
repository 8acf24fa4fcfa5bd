"""An ordinary LightningModule, as a user writes it: it knows nothing of this project."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class PlainModule(pl.LightningModule):
    """Regression on fixed random data, large enough that its gradients are compressed."""

    def __init__(self, dtype: str = "float32", optimizer: str = "adamw"):
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 96), nn.Linear(96, 1))
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.to(getattr(torch, dtype))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.layers(x) - y).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.layers(x) - y).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batch_size: int, dtype: str = "float32", *, rank: int = 0, ranks: int = 1) -> DataLoader:
    """This rank's share of samples that are the same, and in the same order, however many ranks there are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 20, generator=generator, dtype=torch.float64)
    y = x.square().mean(dim=1, keepdim=True)
    data = TensorDataset(x.to(getattr(torch, dtype)), y.to(getattr(torch, dtype)))
    return DataLoader(data, batch_size=batch_size, sampler=range(rank, len(data), ranks))
