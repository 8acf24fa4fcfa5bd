"""Bytes of real text for a byte-level language model."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from danon_lightning.data.agreement import agree, differences
from danon_lightning.data.corpus import Corpus, default_cache_dir, prepare_corpus
from danon_lightning.data.sampler import GlobalBatchSampler, Order, Position, ResumableDataLoader, check_divisible
from danon_lightning.data.sources import Source, list_source
from danon_lightning.data.windows import (
    ORDER_VERSION,
    ByteWindows,
    check_lengths,
    num_train_windows,
    num_val_windows,
    train_window_starts,
    val_window_starts,
)

__all__ = ["ByteTextDataModule"]


class ByteTextDataModule(LightningDataModule):
    """Batches of text as bytes, cut into windows: vocabulary 256, no tokenizer, and by default no download.

    A batch is an int64 tensor ``[local batch, context_length + 1]`` of byte values; a model's inputs are
    ``batch[:, :-1]`` and its targets ``batch[:, 1:]``. A zero byte stands between two files. Files that are empty,
    hidden (their name starts with a dot) or not text (a zero byte among the first 8192) are left out.

    What is trained in which step depends on ``global_batch_size``, ``context_length``, ``seed`` and the text, and not
    on the number of ranks or workers. A run that ``Trainer.fit(ckpt_path=...)`` resumes, also from the middle of an
    epoch and also on another number of ranks, goes on with the batch after the last one trained. An epoch that
    ``limit_train_batches`` cuts short is followed by the rest of the text, not by its beginning. With
    ``accumulate_grad_batches``, a global batch is one of the batches that are accumulated.

    Args:
        path: A folder, a file, or ``None`` for the Python files of the standard library without its tests. A folder is
            split into training and validation by file, depending on each file's relative path alone; of a single file,
            the end is for validation.
        pattern: Which files of the folder to take, as a glob over their relative paths (``"**/*.txt"``). ``None``:
            ``"**/*.py"`` for the standard library, else all.
        context_length: Length of a model's input, in bytes.
        global_batch_size: Windows of one batch over all data-parallel ranks, in training and in validation.
        val_fraction: Share of the files, or of the single file, for validation; between 0 and 1, both excluded.
        val_windows: Number of windows to validate on at most, evenly spread over the validation part; ``None``: all.
        seed: Seed of the order of training windows.
        num_workers: Number of loading processes of each rank; 0 loads in the training process.
        cache_dir: Where the joined bytes are kept, about as large as the text; one folder for each state of the text.
            ``None``: ``danon_lightning/byte_text`` in the user's cache folder.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        pattern: str | None = None,
        context_length: int = 512,
        global_batch_size: int = 16,
        val_fraction: float = 0.1,
        val_windows: int | None = 256,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Check and keep the arguments; no file is looked at yet."""
        super().__init__()
        _check_integer("context_length", context_length, at_least=1)
        _check_integer("global_batch_size", global_batch_size, at_least=1)
        _check_integer("num_workers", num_workers, at_least=0)
        _check_integer("seed", seed)
        if val_windows is not None:
            _check_integer("val_windows", val_windows, at_least=1)
            if val_windows < global_batch_size:
                raise ValueError(
                    f"val_windows={val_windows} is less than one batch of global_batch_size={global_batch_size}; "
                    f"set val_windows to at least {global_batch_size}, or to None for all"
                )
        if isinstance(val_fraction, bool) or not isinstance(val_fraction, (int, float)) or not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction!r} is not between 0 and 1; give the share held out for validation, "
                "for example 0.1"
            )
        self.path = path
        self.pattern = pattern if pattern is not None else ("**/*.py" if path is None else "**")
        self.context_length = context_length
        self.global_batch_size = global_batch_size
        self.val_fraction = float(val_fraction)
        self.val_windows = val_windows
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._source: Source | None = None
        self._corpus: Corpus | None = None

    @override
    def prepare_data(self) -> None:
        """Build the corpus in the cache unless it is there; Lightning calls this on one process of each node."""
        try:
            self._build()
        except (ValueError, OSError):
            # Raised here, it would stop this process alone and leave the others waiting. `setup` runs on all of them,
            # meets the same error, and raises it on all.
            pass

    @override
    def setup(self, stage: str) -> None:
        """Open the corpus, building it if it is missing, and check that it fits the settings.

        Args:
            stage: Lightning's name of what is about to run; all are treated alike.

        Raises:
            ValueError: If ``path`` does not exist, no file matches, the text is too short for ``context_length`` and
                ``global_batch_size``, ``global_batch_size`` does not divide among the data-parallel ranks, or ranks
                have different text or settings. Every rank raises it.
            OSError: If the text cannot be read or the cache cannot be written. Every rank raises it.
        """
        error: ValueError | OSError | None = None
        identity: dict[str, Any] = {}
        self._corpus = None
        try:
            check_divisible(self.global_batch_size, self._replicas()[0])
            source, corpus = self._build()
            check_lengths(
                corpus,
                context_length=self.context_length,
                global_batch_size=self.global_batch_size,
                val_fraction=self.val_fraction,
            )
            self._source, self._corpus = source, corpus
            identity = self.state_dict()
        except (ValueError, OSError) as problem:
            error = problem
        agree(self.trainer, identity, error)

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return this rank's training batches: int64 ``[global_batch_size / ranks, context_length + 1]``."""
        corpus = self._require_corpus()
        order = partial(_train_order, num_bytes=corpus.train_bytes, context_length=self.context_length, seed=self.seed)
        dataset = ByteWindows(corpus.train_path, corpus.train_bytes, self.context_length)
        num_windows = num_train_windows(corpus.train_bytes, self.context_length)
        position = None if self.trainer is None else self._batches_trained
        sampler = self._sampler(order, num_windows, position)
        return ResumableDataLoader(dataset, sampler=sampler, **self._loader_arguments(sampler))

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return this rank's validation batches, always the same: int64 ``[global_batch_size / ranks, ...]``."""
        corpus = self._require_corpus()
        num_windows = self._num_val_windows(corpus)
        order = partial(
            _val_order, num_bytes=corpus.val_bytes, context_length=self.context_length, num_windows=num_windows
        )
        dataset = ByteWindows(corpus.val_path, corpus.val_bytes, self.context_length)
        sampler = self._sampler(order, num_windows, None)
        return DataLoader(dataset, sampler=sampler, **self._loader_arguments(sampler))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what the order of samples depends on; the position in it is Lightning's own batch counter."""
        corpus = self._require_corpus()
        return {
            "global_batch_size": self.global_batch_size,
            "context_length": self.context_length,
            "seed": self.seed,
            "corpus": f"{corpus.digest} ({corpus.train_bytes} bytes to train on, {corpus.val_bytes} to validate on)",
            "order_version": ORDER_VERSION,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run that is about to resume sees the samples that the interrupted one would have seen.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.

        Raises:
            ValueError: If a setting or the text is not what it was.
        """
        # Validating or testing a checkpoint on other data is no mistake.
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        different = differences(state_dict, self.state_dict())
        if different:
            then = ", ".join(f"{name}={value}" for name, value, _ in different)
            now = ", ".join(f"{name}={value}" for name, _, value in different)
            raise ValueError(
                f"cannot resume: the checkpoint was written with {then}, and this run has {now}, so that samples would "
                f"be repeated or left out; use the checkpoint's values, or, to train its weights on other data, load "
                f"the weights alone and do not pass ckpt_path"
            )

    def describe(self) -> dict[str, str]:
        """Return short facts about the data for a table at the start of a run; :meth:`setup` has to come first."""
        corpus = self._require_corpus()
        assert self._source is not None
        windows = num_train_windows(corpus.train_bytes, self.context_length)
        val_windows = self._num_val_windows(corpus)
        files = f"{corpus.train_files:,} + {corpus.val_files:,} files"
        if self._source.is_single_file:
            files = "1 file, split by position"
        skipped = f", {corpus.skipped_files:,} left out as not text" if corpus.skipped_files else ""
        return {
            "source": f"{self._source.label} ({files}{skipped})",
            "training": f"{_human_bytes(corpus.train_bytes)}, {windows:,} windows",
            "validation": f"{_human_bytes(corpus.val_bytes)}, {val_windows:,} windows used",
            "context": f"{self.context_length:,} bytes",
            "global batch": f"{self.global_batch_size:,} windows",
            "batches per epoch": f"{windows // self.global_batch_size:,}",
        }

    def _build(self) -> tuple[Source, Corpus]:
        source = list_source(self.path, self.pattern)
        return source, prepare_corpus(source, self.val_fraction, self.cache_dir)

    def _num_val_windows(self, corpus: Corpus) -> int:
        available = num_val_windows(corpus.val_bytes, self.context_length)
        wanted = available if self.val_windows is None else min(available, self.val_windows)
        # Rounded down before the windows are spread out, so that the dropped last batch is not always the same text.
        return wanted // self.global_batch_size * self.global_batch_size

    def _replicas(self) -> tuple[int, int]:
        """Return the number of data-parallel ranks and this process's rank among them."""
        arguments = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if arguments is None else (arguments["num_replicas"], arguments["rank"])

    def _sampler(self, order: Order, num_samples: int, position: Position | None) -> GlobalBatchSampler:
        num_replicas, rank = self._replicas()
        return GlobalBatchSampler(
            order,
            num_samples=num_samples,
            global_batch_size=self.global_batch_size,
            num_replicas=num_replicas,
            rank=rank,
            position=position,
        )

    def _loader_arguments(self, sampler: GlobalBatchSampler) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": sampler.local_batch_size,
            "drop_last": True,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": on_cuda,
        }

    def _batches_trained(self) -> int:
        """Return how many batches the run has trained, over all epochs; batches that were only fetched do not count."""
        if self.trainer is None or not self.trainer.training:
            return 0
        # Lightning saves and restores this counter. Its counters of epochs and of batches within one are not used: they
        # are off by one after some resumes (max_steps with a checkpoint of an epoch's end; a checkpoint of a run that
        # had itself resumed after an exception), and samples would be repeated or left out.
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        assert isinstance(total, _ProcessedTracker)
        return total.processed

    def _require_corpus(self) -> Corpus:
        if self._corpus is None:
            raise RuntimeError("the data is not set up; call setup('fit') first, or let a Trainer call it")
        return self._corpus


def _train_order(epoch: int, begin: int, end: int, **settings: int) -> list[int]:
    return train_window_starts(begin, end, epoch=epoch, **settings)


def _val_order(epoch: int, begin: int, end: int, **settings: int) -> list[int]:
    return val_window_starts(begin, end, **settings)


def _check_integer(name: str, value: int, *, at_least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not an integer; give a whole number")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}={value} is too small; give at least {at_least}")


def _human_bytes(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    power = min(4, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
