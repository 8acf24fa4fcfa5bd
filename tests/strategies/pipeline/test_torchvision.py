"""The vision transformer of torchvision, as it is, in a Trainer with pipeline stages."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

try:
    from torchvision.models import VisionTransformer
except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch, say one with CUDA
    pytest.skip(f"torchvision cannot be imported ({error}): pip install torchvision", allow_module_level=True)


class Classifier(pl.LightningModule):
    """What users write around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 16, "mlp_dim": 32}
        self.model = VisionTransformer(**sizes, num_layers=4, num_heads=2, num_classes=5)
        torch.nn.init.normal_(self.model.heads.head.weight)  # zero, else: no gradient would reach the layers at first

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        # Not Adam, which makes much of gradients that are zero but for rounding, such as those of the biases of keys.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(file):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 16, 16, generator=generator, dtype=torch.float64)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    strategy = DanonHybridStrategy(pipeline_parallel_size=ranks, num_microbatches=3) if ranks > 1 else "auto"
    trainer = make_trainer(strategy, ranks, max_epochs=3)
    samples = [(image, index % 5) for index, image in enumerate(images)]
    trainer.fit(Classifier(), DataLoader(samples, batch_size=8))
    trainer.save_checkpoint(file)
    return losses_of(trainer)


def test_it_trains_as_in_one_process(tmp_path):
    plain = train(tmp_path / "plain.ckpt")
    ranks = run_distributed(train, 2, str(tmp_path / "pipeline.ckpt"))

    assert plain[-1] < plain[0]
    for losses in ranks:
        assert losses == pytest.approx(plain, abs=1e-10)
    one, other = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("plain", "pipeline")
    )
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-10) for name in one)
