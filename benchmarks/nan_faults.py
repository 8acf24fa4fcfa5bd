"""Who finds planted faults, and what looking for them costs while all is well.

    python benchmarks/nan_faults.py --json nan_faults.json
    python benchmarks/nan_faults.py --only faults   # or: costs

*Faults* are those of ``tests/callbacks/nan_debugger/fault_zoo.py``: small LightningModules in which something known
goes wrong. Three tools look for it: the replay of this package's NaN debugger; ``torch.autograd.detect_anomaly``, which
names a node of autograd; and hooks on every module that look at outputs, at gradients, and before the step at the
batch and the weights, which name a module. A fault counts as found where the tool names the right operation, or the
right module. For a bad batch or weight both mean that this is said, by name. Anomaly mode prints the line that has
called the operation, not the module: it is credited with the module where the line is the right one. Steps without a
fault in which there are infinities all the same tell of false alarms.

*Costs* are those of a healthy step of a transformer of 26 million parameters, in one process that runs the plain step
and each tool in turn, round by round; ratios are medians over the rounds. The check of the NaN debugger is also timed
alone, since it is less than what steps differ by.
"""

import argparse
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "callbacks" / "nan_debugger"))
import fault_zoo
from fault_zoo import BENIGN, FAULTS, Fault

from danon_lightning.callbacks.nan_debugger.check import read
from danon_lightning.callbacks.nan_debugger.random_state import random_state
from danon_lightning.callbacks.nan_debugger.replay import replay_step


@dataclass(frozen=True)
class Named:
    """What a tool says.

    Attributes:
        found: Whether it says anything.
        op: The operation, as one would say it.
        module: The module; with anomaly mode the line.
        subject: The parameter, or the leaf of the batch.
    """

    found: bool = False
    op: str = ""
    module: str | None = None
    subject: str = ""


@dataclass(frozen=True)
class Score:
    """What a tool has got right about a fault."""

    op: bool
    module: bool
    said: str


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["faults", "costs"])
    parser.add_argument("--rounds", type=int, default=15, help="how often each step is timed")
    parser.add_argument("--layers", type=int, default=6, help="of the transformer whose steps are timed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console, results = Console(), {}
    if options.only != "costs":
        results["faults"] = faults()
        show_faults(console, results["faults"])
    if options.only != "faults":
        results["costs"] = costs(options.rounds, options.layers)
        show_costs(console, results["costs"])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- faults


def faults() -> dict[str, Any]:
    """Try each tool on each fault, and on what is none."""
    found: dict[str, Any] = {"by_fault": {}, "false_alarms": {name: [] for name in TOOLS}}
    for fault in FAULTS:
        line = by_replay(fault)[1]
        found["by_fault"][fault.name] = {name: asdict(score(fault, tool(fault), line)) for name, tool in TOOLS.items()}
    for benign in BENIGN:
        # A loss scale belongs to a scaler, which neither of the other tools knows of: they see the overflow and alarm.
        like = Fault(benign.name, benign.make, "", batches=lambda benign=benign: [benign.batch()])
        for name, tool in TOOLS.items():
            if tool(like, benign.loss_scale).found:
                found["false_alarms"][name].append(benign.name)
    rows = found["by_fault"].values()
    found["totals"] = {
        name: {
            "op": sum(row[name]["op"] for row in rows),
            "module": sum(row[name]["module"] for row in rows),
            "both": sum(row[name]["op"] and row[name]["module"] for row in rows),
            "of": len(FAULTS),
            "false_alarms": len(found["false_alarms"][name]),
        }
        for name in TOOLS
    }
    return found


def score(fault: Fault, named: Named, line: str) -> Score:
    """Hold what a tool says against what is known.

    Args:
        fault: What is known.
        named: What the tool says.
        line: That of the user's code which is to blame.
    """
    if fault.subject:
        right = named.subject == fault.subject
        return Score(right, right, named.subject or named.op or named.module or "nothing")
    op = bool(named.op) and named.op.replace("_", "") in (fault.op.replace("_", ""), *ALSO.get(fault.op, ()))
    module = named.module in (fault.module, line)
    where = "the training step" if named.module == "" else named.module
    said = " in ".join(filter(None, [named.op, where])) if named.found else "nothing"
    return Score(op, module, said)


# The same operation has other names above autograd and below.
ALSO = {"layer_norm": ("nativelayernorm",), "nll_loss": ("nlllossforward",), "mm": ("addmm",)}


def steps_of(fault: Fault, scale: float) -> Iterator[tuple[Any, Any, int, Callable[[], Tensor]]]:
    """The micro-batches of a fault: module, batch, index, and what computes the loss."""
    torch.manual_seed(1)
    module = fault.make()
    for index, batch in enumerate(fault.batches()):

        def loss(batch: Any = batch, index: int = index) -> Tensor:
            with fault.context():
                return module.training_step(batch, index) * scale

        yield module, batch, index, loss


def by_replay(fault: Fault, scale: float = 1.0) -> tuple[Named, str]:
    """What the NaN debugger's replay says, and of which line: after the check of a step has raised an alarm."""
    for module, batch, index, loss in steps_of(fault, scale):
        state = random_state()
        value = loss()
        value.backward()
        gradients = [(name, one.grad) for name, one in module.named_parameters() if one.grad is not None]
        reading = read(gradients, [value.detach()])
        if reading.gradients_finite and reading.losses_finite:
            continue
        replay = replay_step(
            module, batch, index, rng=state, context=fault.context, loss_scale=scale, micro_batch=index
        )
        origin = replay.origin
        if origin is None or origin.micro_batch != fault.micro_batch:
            return Named(), ""
        subject = (origin.leaf if origin.cause == "input" else origin.parameter) or ""
        is_subject = origin.cause in ("input", "weight")
        return Named(True, origin.name, origin.module, subject if is_subject else ""), origin.location
    return Named(), ""


def by_anomaly(fault: Fault, scale: float = 1.0) -> Named:
    """What anomaly mode says."""
    for _, _, _, loss in steps_of(fault, scale):
        with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
            warnings.simplefilter("always")
            try:
                loss().backward()
            except RuntimeError as error:
                node = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
                text = "".join(str(one.message) for one in caught)
                frames = re.findall(r'File "([^"]+fault_zoo.py)", line (\d+), in (\S+)', text)
                where = f"{relative(frames[-1][0])}:{frames[-1][1]} in {frames[-1][2]}" if frames else None
                return Named(True, snake(node[1]) if node else "", where)
    return Named()


def relative(file: str) -> str:
    """As the NaN debugger shows it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def snake(name: str) -> str:
    """``NativeLayerNorm`` as ``native_layer_norm``; a custom function keeps its name."""
    return name if hasattr(fault_zoo, name) else re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def by_hooks(fault: Fault, scale: float = 1.0) -> Named:
    """What hooks on all modules say."""
    for module, batch, _, loss in steps_of(fault, scale):
        with hooked(module) as seen:
            for path, leaf in batch.items():
                if not is_finite(leaf):
                    return Named(True, subject=f'batch["{path}"]')
            for name, one in [*module.named_parameters(), *module.named_buffers()]:
                if not is_finite(one):
                    return Named(True, subject=name)
            value = loss()
            value.backward()
            if seen:
                return Named(True, module=seen[0])
            if not is_finite(value):
                return Named(True, module="")
    return Named()


@contextmanager
def hooked(module: nn.Module) -> Iterator[list[str]]:
    """Look at what every module gives in forward and in backward; gives the names of those that are not finite."""
    seen: list[str] = []

    def look(name: str, values: Any) -> None:
        if not all(is_finite(one) for one in tree_leaves(values) if isinstance(one, Tensor)):
            seen.append(name)

    handles = []
    for name, one in module.named_modules():
        if one is not module:
            handles.append(one.register_forward_hook(lambda _, args, output, name=name: look(name, output)))
            handles.append(one.register_full_backward_hook(lambda _, before, after, name=name: look(name, before)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


TOOLS: dict[str, Callable[..., Named]] = {
    "NaN debugger": lambda *args: by_replay(*args)[0],
    "detect_anomaly": by_anomaly,
    "module hooks": by_hooks,
}


def show_faults(console: Console, found: dict[str, Any]) -> None:
    """Print who has named what."""
    table = Table(title="Planted faults: what each tool says", title_justify="left")
    table.add_column("fault")
    for name in TOOLS:
        table.add_column(name, overflow="fold")
    for fault, row in found["by_fault"].items():
        table.add_row(fault, *(cell(row[name]) for name in TOOLS))
    table.add_section()
    totals = found["totals"]
    for title, key in (("operation named", "op"), ("module named", "module"), ("both", "both")):
        table.add_row(title, *(f"{totals[name][key]} of {totals[name]['of']}" for name in TOOLS))
    table.add_row("false alarms", *(f"{totals[name]['false_alarms']} of {len(BENIGN)}" for name in TOOLS))
    console.print(table)


def cell(score: dict[str, Any]) -> str:
    """A tool's words, in green where all of it is right."""
    color = "green" if score["op"] and score["module"] else "yellow" if score["op"] or score["module"] else "red"
    return f"[{color}]{score['said'].replace('tests/callbacks/nan_debugger/', '')}"


# --- costs


class Transformer(nn.Module):
    """A language model of 26 million parameters with six layers."""

    def __init__(self, layers: int, width: int = 512, vocabulary: int = 7000) -> None:
        """Take the number of layers."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting the tokens themselves."""
        logits = self.head(self.layers(self.embedding(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def costs(rounds: int, layers: int) -> dict[str, Any]:
    """Time steps with and without each tool.

    Args:
        rounds: How often.
        layers: Of the model.
    """
    torch.manual_seed(0)
    model = Transformer(layers)
    tokens = torch.randint(0, 7000, (8, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    check_seconds: list[float] = []

    def check(loss: Tensor) -> None:
        start = time.process_time()
        gradients = [(name, one.grad) for name, one in model.named_parameters() if one.grad is not None]
        reading = read(gradients, [loss.detach()])
        assert reading.gradients_finite and reading.losses_finite
        check_seconds.append(time.process_time() - start)

    tools: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[Tensor], None]]] = {
        "plain": (nullcontext, lambda loss: None),
        "NaN debugger": (nullcontext, check),
        "detect_anomaly": (torch.autograd.detect_anomaly, lambda loss: None),
        "module hooks": (lambda: hooked(model), lambda loss: None),
    }

    def step(context: AbstractContextManager[Any], after: Callable[[Tensor], None]) -> float:
        with context:
            start = time.process_time()
            optimizer.zero_grad()
            loss = model(tokens)
            loss.backward()
            after(loss)
            optimizer.step()
            return time.process_time() - start

    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for index in range(rounds + 1):
        for name, (context, after) in tools.items():
            took = step(context(), after)
            if index:  # the first round warms up
                seconds[name].append(took)
    plain = seconds["plain"]
    result = {
        name: {
            "seconds": statistics.median(took),
            "ratio": statistics.median(one / other for one, other in zip(took, plain, strict=True)),
        }
        for name, took in seconds.items()
    }
    alone = statistics.median(check_seconds[1:])
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "tools": result,
        "check": {"seconds": alone, "share_of_step": alone / statistics.median(plain)},
    }


def show_costs(console: Console, found: dict[str, Any]) -> None:
    """Print what a healthy step costs."""
    title = f"A healthy step, {found['parameters'] / 1e6:.1f} M parameters, {found['threads']} thread(s), CPU time"
    table = Table(title=title, title_justify="left")
    for column in ("tool", "a step", "of the plain step"):
        table.add_column(column, justify="left" if column == "tool" else "right")
    for name, one in found["tools"].items():
        table.add_row(name, f"{one['seconds']:.3f} s", f"{one['ratio'] - 1:+.1%}")
    console.print(table)
    check = found["check"]
    console.print(
        f"The NaN debugger's check alone: {check['seconds'] * 1e3:.2f} ms, {check['share_of_step']:.2%} of a step"
    )


if __name__ == "__main__":
    main()
