"""Takes the screenshots of docs/monitoring.md: ``python docs/monitoring/screenshots.py [--steps 200] [--out FOLDER]``.

A small model is trained on the text of the standard library with all monitors on, one step of it with a planted NaN, so
that there is something to find. TensorBoard shows the logs on this machine only, and Chromium photographs its pages.
Needs matplotlib, tensorboard, Pillow and Chromium or Chrome; nothing is fetched.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from danon_lightning.callbacks import (
    AttentionMonitor,
    CommunicationMonitor,
    GradientMonitor,
    HealthReport,
    NaNDebugger,
    PerformanceMonitor,
)
from danon_lightning.data import ByteTextDataModule
from danon_lightning.models import DALALightning

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# Pages that paint in workers (#timeseries) are not ready when Chromium, in virtual time, takes them to be.
# Name of the picture → what follows the address of TensorBoard, and width and height of the window.
VIEWS = {
    "gradients": ("#scalars&tagFilter=grad%2Ftotal", 1500, 1000),
    "performance": ("#scalars&tagFilter=performance%2F%28seconds%7Cstep%7Csamples%7Ctokens%29", 1500, 1000),
    "attention": ("#scalars&tagFilter=attention%2F%5B%5E%2F%5D*%24", 1500, 1000),
    "custom_scalars": ("#custom_scalars", 1500, 1000),
    "maps": ("#images&tagFilter=attention", 1500, 1300),
    "heat_map": ("#images&tagFilter=grad", 1500, 1000),
    "health": ("#text&tagFilter=health", 1500, 900),
    "nan": ("#text&tagFilter=nan_debugger", 1500, 1100),
}
# Name of the picture → tag of a figure that is shown at its full size.
FIGURES = {"attention_map": "attention/model.layers.3.core/head_0"}
MOST_BYTES = 200_000


class Faulty(DALALightning):
    """A language model one step of which is spoilt, in the second block."""

    spoilt_step = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch."""
        if self.global_step != self.spoilt_step or batch_idx != self.spoilt_step:
            return super().training_step(batch, batch_idx)
        norm = self.model.layers[1].mlp_norm
        with torch.no_grad():
            kept, norm.eps = norm.eps, float("nan")
        try:
            return super().training_step(batch, batch_idx)
        finally:
            norm.eps = kept


def train(folder: Path, steps: int) -> None:
    """Train with all monitors on, and write logs to ``folder``."""
    pl.seed_everything(1, verbose=False)
    config = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "block_size": 32, "memory_size": 32}
    module = Faulty(config, {"learning_rate": 3e-3, "warmup_steps": 20})
    module.spoilt_step = steps // 2
    every = max(1, steps // 40)
    monitors = [
        NaNDebugger("skip"),
        GradientMonitor(every_n_steps=every, draw_every_n_steps=steps),
        PerformanceMonitor(every_n_steps=every, warm_up_steps=1),
        CommunicationMonitor(every_n_steps=every, warm_up_steps=1),
        AttentionMonitor(every_n_steps=every, figures_every_n_steps=every * 10),
        HealthReport(),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // 4),
        limit_val_batches=2,
        log_every_n_steps=every,
        logger=TensorBoardLogger(folder, name="", version="run"),
        callbacks=monitors,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ByteTextDataModule(context_length=128, global_batch_size=8))


def browser() -> str:
    """Return the path of a browser that can photograph pages.

    Raises:
        SystemExit: If there is none.
    """
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise SystemExit(f"none of {', '.join(BROWSERS)} is on PATH: install Chromium, and run this again")


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve logs on a free port of the loopback interface, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A relative path, for pages show it.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast", "false", "--reload_interval", "0"]
    server = subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}data/runs", timeout=5) as answer:
                    if b"run" in answer.read():
                        break
            except OSError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("TensorBoard did not start: try `python -m tensorboard.main --logdir .`")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def photograph(path: Path, address: str, width: int, height: int) -> None:
    """Save a page as a PNG file."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=30000"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        subprocess.run(
            [*command, f"--screenshot={path}", address],
            check=True,
            timeout=300,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def fetch_figure(path: Path, address: str, tag: str) -> None:
    """Save the newest figure of a tag as a PNG file."""
    query = urllib.parse.urlencode({"run": "run", "tag": tag, "sample": 0})
    with urllib.request.urlopen(f"{address}data/plugin/images/images?{query}") as answer:
        newest = json.load(answer)[-1]["query"]
    with urllib.request.urlopen(f"{address}data/plugin/images/individualImage?{newest}") as answer:
        path.write_bytes(answer.read())


def shrink(path: Path) -> None:
    """Save a picture with few colours, and smaller if need be, below ``MOST_BYTES``."""
    picture = Image.open(path).convert("RGB")
    for scale in (1.0, 0.85, 0.7, 0.6, 0.5, 0.4):
        size = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(size, Image.Resampling.LANCZOS).quantize(128).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return


def main() -> None:
    """Train, serve, photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--logs", type=Path, help="a folder with logs of an earlier run: nothing is trained")
    parser.add_argument("--only", choices=[*VIEWS, *FIGURES], nargs="*", default=[*VIEWS, *FIGURES])
    arguments = parser.parse_args()
    browser()  # rather now than after training
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        logs = (arguments.logs or Path(temporary) / "logs").resolve()
        if not (arguments.logs and (logs / "run").exists()):
            train(logs, arguments.steps)
        with tensorboard(logs) as address:
            for name in arguments.only:
                path = arguments.out / f"{name}.png"
                if name in FIGURES:
                    fetch_figure(path, address, FIGURES[name])
                else:
                    where, width, height = VIEWS[name]
                    photograph(path, address + where, width, height)
                shrink(path)
                print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
