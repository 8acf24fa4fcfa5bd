"""Watches what the attention of a model attends to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.attention_monitor.capture import Call, Recorder, replaying
from danon_lightning.callbacks.attention_monitor.figures import byte_tokens, draw_map, find_ids
from danon_lightning.callbacks.attention_monitor.protocol import summarise
from danon_lightning.callbacks.health.finding import Finding

__all__ = ["AttentionMonitor"]

# Below this share of the largest possible entropy all heads of a layer look at next to nothing but single tokens.
_COLLAPSED = 0.02
# Above this load nearly all queries take most by the same way.
_ONE_SIDED = 0.98


class AttentionMonitor(pl.Callback):
    """Logs sparsity, entropy, routing, compression and cache hits of attention, and draws who reads whom.

    It watches every module with a method ``attention_statistics``, as
    :class:`~danon_lightning.callbacks.MeasuresAttention` describes it; the attention variants of this package have it.
    Of modules in one another it takes the outermost. On every n-th step the arguments of these modules are kept, of the
    first sequences only; after the backward pass each is measured with them, in evaluation mode and without gradients.
    Training draws the same random numbers with and without it; other steps cost nothing. Rank 0 measures what it holds,
    without communication: under a pipeline the layers of the first stage; it says which are missing.

    Keys logged, for each layer by the name of its module, and of numbers the mean over the layers as
    ``attention/<what>``; ``<what>`` as :func:`~danon_lightning.callbacks.attention_monitor.protocol.summarise` defines
    it:
        ``attention/<layer>/sparsity``, ``…/compression_ratio``, ``…/entropy``, ``…/entropy_normalised``,
        ``…/share/<route>``, ``…/load/<route>``, ``…/imbalance``, ``…/cache_hit_rate`` and what else a module tells;
        ``attention/<layer>/head_<index>`` (figure): the weights among the first tokens of the first sequence, with the
        shares of routes beside them.

    Args:
        every_n_steps: How often numbers are logged.
        figures_every_n_steps: How often maps are drawn, a multiple of ``every_n_steps``; ``None``: never. Needs
            matplotlib.
        layers: Of which layers maps are drawn: ``"last"``, ``"all"``, or indices in the order of the modules.
        heads: Of which heads; ``"mean"`` draws their mean instead.
        max_tokens: Tokens on each axis of a map.
        tokens: Gives what to write for token ids; by default they are taken for bytes.
        sequences: How many sequences of a batch are measured, the first ones. The weights of n tokens take n² numbers a
            head for each. ``None``: all, for modules whose first dimension is not the batch.

    Raises:
        ValueError: If a value is out of range.
        TypeError: At the start of ``fit``, if no module can be watched.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        figures_every_n_steps: int | None = 1000,
        layers: Literal["last", "all"] | Sequence[int] = "last",
        heads: Literal["mean"] | Sequence[int] = (0, 1),
        max_tokens: int = 64,
        tokens: Callable[[Sequence[int]], Sequence[str]] = byte_tokens,
        sequences: int | None = 2,
    ) -> None:
        """See the class."""
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if figures_every_n_steps is not None and (figures_every_n_steps < 1 or figures_every_n_steps % every_n_steps):
            raise ValueError(
                f"figures_every_n_steps={figures_every_n_steps} must be a multiple of every_n_steps={every_n_steps}: "
                "maps are drawn of what is measured; or None for no maps"
            )
        if isinstance(layers, str) and layers not in ("last", "all"):
            raise ValueError(f"layers={layers!r} must be 'last', 'all', or a list of indices such as [0, 5]")
        if isinstance(heads, str) and heads != "mean":
            raise ValueError(f"heads={heads!r} must be 'mean', or a list of indices such as [0, 1]")
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens} must be at least 2")
        if sequences is not None and sequences < 1:
            raise ValueError(f"sequences={sequences} must be at least 1, or None for all")
        self.every_n_steps, self.figures_every_n_steps = every_n_steps, figures_every_n_steps
        self.layers, self.heads, self.max_tokens = layers, heads, max_tokens
        self.tokens, self.sequences = tokens, sequences
        self.statistics: dict[str, dict[str, float]] = {}
        """The newest numbers, by the name of the module."""
        self._modules: dict[str, nn.Module] = {}
        self._recorder: Recorder | None = None
        self._listening = False
        self._seen_step = -1
        self._ids: Tensor | None = None
        self._errors: dict[str, str] = {}
        self._missing: list[str] = []
        self._writing = logs.Guarded("AttentionMonitor")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what can be watched."""
        if self.figures_every_n_steps is not None:
            import matplotlib  # noqa: F401  # rather now than in the middle of training
        self._modules = _outermost(pl_module)
        self._recorder, self._seen_step, self._missing = None, -1, []
        if not self._modules:
            raise TypeError(
                f"AttentionMonitor found no module in {type(pl_module).__name__} with a method attention_statistics: "
                "leave the callback out, or add the method to the attention (see MeasuresAttention)"
            )
        if not isinstance(self.layers, str):
            outside = [i for i in self.layers if not -len(self._modules) <= i < len(self._modules)]
            if outside:
                raise ValueError(
                    f"layers={list(self.layers)} names {outside}, but there are {len(self._modules)} layers"
                )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            self._give_up(f"parameters are spread over ranks by {type(trainer.strategy).__name__}")
        elif getattr(pl_module, "_compiler_ctx", None) is not None:
            self._give_up("the whole LightningModule is compiled: compile the model inside of it instead")
        elif trainer.is_global_zero:
            self._recorder = Recorder(pl_module, _entries(pl_module, self._modules), self.sequences)

    def _give_up(self, why: str) -> None:
        self._missing = list(self._modules)
        self._errors[""] = why
        rank_zero_warn(f"AttentionMonitor cannot measure here: {why}")

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Never looks at weights or gradients between the backward pass and the next forward pass."""
        return False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen, if this step is to be measured."""
        step = logs.current_step(trainer)
        if self._recorder is None or step == self._seen_step or not logs.is_due(trainer, self.every_n_steps):
            return
        # Of several batches whose gradients are added up the first is enough.
        self._seen_step, self._listening, self._ids = step, True, find_ids(batch)
        self._recorder.start()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure: activations of the backward pass are gone, and the weights are still those of the forward pass."""
        self._measure(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, where gradients are only added up in this batch."""
        self._measure(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        self._listening = False
        if self._recorder is not None:
            self._recorder.stop()

    def findings(self) -> list[Finding]:
        """What of the newest numbers is odd, and what could not be measured."""
        found = []
        for layer, numbers in self.statistics.items():
            entropy = numbers.get("entropy_normalised")
            if entropy is not None and entropy < _COLLAPSED:
                found.append(
                    Finding(
                        "warning",
                        f"attention of {layer}",
                        f"nearly every query reads one token only: entropy {entropy:.1%} of the largest possible",
                        "normalise queries and keys (stability_factor), or lower the learning rate",
                    )
                )
            loads = {name.removeprefix("load/"): load for name, load in numbers.items() if name.startswith("load/")}
            route = max(loads, key=loads.__getitem__, default="")
            if route and loads[route] > _ONE_SIDED:
                found.append(
                    Finding(
                        "note",
                        f"attention of {layer}",
                        f"{loads[route]:.0%} of the queries take most from one of {len(loads)} ways: {route}",
                        "if that lasts, the other ways may be left out, or need sequences that are long enough",
                    )
                )
        for layer, why in self._errors.items():
            found.append(Finding("note", f"attention of {layer}" if layer else "attention", f"not measured: {why}"))
        if self._missing and not self._errors:
            found.append(Finding("note", "attention", _not_shown(self._missing)))
        return found

    def _measure(self, trainer: pl.Trainer) -> None:
        if not self._listening or self._recorder is None:
            return
        self._listening = False
        self._recorder.stop()
        calls = self._calls(self._recorder.calls)
        self._recorder.calls = {}
        self._note_missing(calls)
        step = self._seen_step
        draws = self.figures_every_n_steps is not None and (step + 1) % self.figures_every_n_steps == 0
        drawn = _chosen(list(self._modules), self.layers) if draws else set()
        numbers: dict[str, dict[str, Tensor]] = {}
        for layer, call in calls.items():
            found = self._told(layer, call)
            if found is None:
                continue
            try:
                numbers[layer] = summarise(found)
                if layer in drawn:
                    self._draw(trainer, layer, found, step, call[0].batch)
            except Exception as error:  # what a module tells may be anything
                self._failed(layer, error)
        self.statistics = _read(numbers)
        with self._writing:
            logs.scalars(trainer, _tags(self.statistics), step)

    def _calls(self, recorded: dict[str, list[Call]]) -> dict[str, list[Call]]:
        """Return the calls of the watched modules; those inside of compiled ones are called once more to find them."""
        assert self._recorder is not None
        calls = {name: kept for name, kept in recorded.items() if name in self._modules}
        for name in recorded.keys() - self._modules.keys():
            entry = self._recorder.modules[name]
            parts = {layer: part for layer, part in self._modules.items() if any(part is m for m in entry.modules())}
            inner = Recorder(entry, parts, None)
            call = recorded[name][-1]
            inner.start()
            try:
                with replaying([entry], call.autocast):
                    _uncompiled(entry)(*call.args, **call.kwargs)
            except Exception as error:  # somebody else's module
                for layer in parts:
                    self._failed(layer, error)
            finally:
                inner.stop()
            calls |= inner.calls
        return {name: calls[name] for name in self._modules if name in calls and name not in self._errors}

    def _told(self, layer: str, calls: list[Call]) -> Mapping[str, Any] | None:
        """Ask a module. Of a streaming form the last chunk tells of the cache, and all else is told of the first."""
        module: nn.Module = self._modules[layer]
        found: dict[str, Any] = {}
        try:
            for call in reversed(calls):
                with replaying([module], call.autocast):
                    found = {**found, **module.attention_statistics(*call.args, **call.kwargs)}  # type: ignore[operator]
        except Exception as error:  # somebody else's method, or too little memory for the weights
            self._failed(layer, error)
            return None
        return found

    def _failed(self, layer: str, error: Exception) -> None:
        """Warn once of a module, and leave it alone from then on."""
        if layer not in self._errors:
            self._errors[layer] = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"AttentionMonitor leaves {layer} out from now on: {self._errors[layer]}")

    def _note_missing(self, calls: Mapping[str, Any]) -> None:
        missing = [name for name in self._modules if name not in calls and name not in self._errors]
        if missing and not self._missing:
            rank_zero_warn(f"AttentionMonitor: {_not_shown(missing)}")
        self._missing = missing

    def _draw(self, trainer: pl.Trainer, layer: str, found: Mapping[str, Any], step: int, batch: int) -> None:
        weights, count = found.get("weights"), self.max_tokens
        routes = {name.removeprefix("route/"): x for name, x in found.items() if name.startswith("route/")}
        shown = weights if weights is not None else next(iter(routes.values()), None)
        if shown is None:
            return
        heads = shown.shape[1]
        length = min(count, shown.shape[2])
        tokens = None
        if self._ids is not None and self._ids.shape[1] >= length:
            # The last call has the last sequences: all of them, or those of a micro-batch.
            tokens = self.tokens(self._ids[max(0, len(self._ids) - batch), :length].tolist())
        chosen = ["mean"] if self.heads == "mean" else [head for head in self.heads if int(head) < heads]
        for head in chosen:

            def of(x: Tensor, head: Any = head) -> Tensor:
                return x[0].mean(dim=0) if head == "mean" else x[0].expand(heads, *x.shape[2:])[head]

            figure = draw_map(
                None if weights is None else of(weights)[:count, :count],
                {name: of(share)[:length] for name, share in routes.items()},
                tokens,
                f"{layer}, head {head}, step {step}" if head != "mean" else f"{layer}, mean of the heads, step {step}",
            )
            with self._writing:
                logs.figure(trainer, f"attention/{layer}/head_{head}", figure, step)


def _outermost(root: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that can be watched, without those inside of one another, by name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in root.named_modules():
        if module is not root and module not in inside and hasattr(module, "attention_statistics"):
            found[name.replace("_orig_mod.", "")] = module
            inside |= set(module.modules())
    return found


def _entries(root: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules to listen at: those watched, or the outermost compiled ones around them."""
    entries: dict[str, nn.Module] = {}
    compiled: set[nn.Module] = set()
    for name, module in root.named_modules():
        is_compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if module not in compiled and is_compiled and any(part in set(modules.values()) for part in module.modules()):
            entries[f"compiled {name}"] = module
            compiled |= set(module.modules())
    return entries | {name: module for name, module in modules.items() if module not in compiled}


def _uncompiled(module: nn.Module) -> Callable[..., Any]:
    original = getattr(module, "_orig_mod", module)
    return original._call_impl if getattr(original, "_compiled_call_impl", None) is not None else original


def _chosen(layers: list[str], which: Literal["last", "all"] | Sequence[int]) -> set[str]:
    if which == "all":
        return set(layers)
    return {layers[int(i)] for i in ([-1] if which == "last" else which)}


def _read(numbers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Bring all numbers to the host at once."""
    flat = [number for layer in numbers.values() for number in layer.values()]
    if not flat:
        return {}
    device = flat[0].device
    values = iter(torch.stack([number.to(device) for number in flat]).tolist())
    return {layer: {name: next(values) for name in names} for layer, names in numbers.items()}


def _tags(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    tags = {f"attention/{layer}/{name}": value for layer, names in statistics.items() for name, value in names.items()}
    everywhere: dict[str, list[float]] = {}
    for names in statistics.values():
        for name, value in names.items():
            everywhere.setdefault(name, []).append(value)
    return tags | {f"attention/{name}": sum(values) / len(values) for name, values in everywhere.items()}


def _not_shown(missing: Sequence[str]) -> str:
    named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    return f"rank 0 does not run {named} ({len(missing)} in all), which another stage of the pipeline holds: not shown"
