"""Steps that go wrong in known ways, and steps that only look as if they did.

Each fault is an ordinary small LightningModule with a batch; known of it are the cause, the operation, the module and
the pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BATCH, WIDTH, TOKENS = 8, 16, 6


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Model(pl.LightningModule):
    """A layer, what is to be tried, and another layer."""

    def __init__(self, tried: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.tried = tried
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tried(torch.tanh(self.stem(x))))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return functional.mse_loss(self(batch["x"]).squeeze(-1), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Classifier(Model):
    """Its loss is that of labels, some of which count for nothing."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.head = nn.Linear(WIDTH, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch["x"]), batch["label"], ignore_index=-100)


class OwnLoss(Model):
    """Its training step computes a loss by hand, with a logarithm of what may be zero."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        probability = torch.relu(self(batch["x"]).squeeze(-1) - 100)
        return -torch.log(probability).mean()


class Attention(nn.Module):
    """One head by hand; what hides scores is given."""

    def __init__(self, hide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(1, 3 * 4)
        self.merge = nn.Linear(4, 1)
        self.hide = hide

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x[..., None]).chunk(3, -1)
        scores = self.hide(query @ key.transpose(-2, -1))
        return x + self.merge(scores.softmax(-1) @ value).squeeze(-1)


class Fused(Attention):
    """The same, by torch's fused attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda scores: scores)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x[..., None])[:, None].chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(query, key, value, **self.options)
        return x + self.merge(mixed[:, 0]).squeeze(-1)


class Ready(nn.Module):
    """Torch's own attention, some keys of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(1, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(len(x), WIDTH, dtype=torch.bool)
        padding[:, -3:] = True
        mixed, _ = self.attention(x[..., None], x[..., None], x[..., None], key_padding_mask=padding)
        return mixed.squeeze(-1)


class Biased(nn.Module):
    """Attention whose mask is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((WIDTH, WIDTH), -torch.inf).triu(1))
        self.attention = Attention(lambda scores: scores + self.mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Halved(nn.Module):
    """Computes in half precision, as a trainer with 16-bit weights would."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        half = x.half() * self.factor
        return x + (half @ half.t()).float().mean()


class Blocks(nn.Module):
    """Blocks of blocks; the third is what is tried."""

    def __init__(self, tried: nn.Module, through: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mixer": nn.Linear(WIDTH, WIDTH)}) for _ in range(4))
        self.blocks[2]["mixer"] = tried
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.through(block["mixer"], x)
        return x


class Unlucky(nn.Module):
    """Divides by how many of four numbers dropout has left: none, now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.drop(torch.ones(len(x), 4))
        return x * (kept.sum(1) / kept.square().sum(1))[:, None]


class Straight(torch.autograd.Function):
    """The identity; its derivative is wrong where the input is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (x - x)


class Normalized(nn.Module):
    """Layer normalization without its small number, of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * 0)


class Table(nn.Module):
    """An embedding of which rows may be bad."""

    def __init__(self, bad_row: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, WIDTH)
        with torch.no_grad():
            self.rows.weight[bad_row] = torch.nan

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(torch.arange(len(x)) % 4)


@dataclass(frozen=True)
class Fault:
    """A step that goes wrong, and what is known about it.

    Attributes:
        name: What goes wrong.
        make: Makes the module.
        cause: As in an origin.
        op: The readable name of the operation; empty for inputs and weights, of which only the name counts.
        module: Where.
        phase: In which pass.
        subject: The parameter or the leaf of the batch for weights and inputs.
        batches: The micro-batches of the step.
        micro_batch: Which of them is bad.
        context: Makes the context of precision.
        sample: Which sample is bad; None where it is not one alone.
    """

    name: str
    make: Callable[[], pl.LightningModule]
    cause: str
    op: str = ""
    module: str = "tried"
    phase: str = "forward"
    subject: str = ""
    batches: Callable[[], list[Any]] = lambda: [batch()]
    micro_batch: int = 0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    sample: int | None = None


@dataclass(frozen=True)
class Benign:
    """A step in which something is not finite, as it was meant, or as it does no harm."""

    name: str
    make: Callable[[], pl.LightningModule]
    batch: Callable[[], Any] = lambda: batch()
    loss_scale: float = 1.0


def batch(**changed: Tensor) -> dict[str, Tensor]:
    """An ordinary batch, but for what is given."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return {"x": x, "y": torch.randn(BATCH, generator=generator), "label": torch.arange(BATCH) % 4} | changed


def spoilt(value: float, sample: int) -> list[dict[str, Tensor]]:
    """A batch with one bad number."""
    made = batch()
    made["x"][sample, 3] = value
    return [made]


def function(of: Callable[[Tensor], Tensor]) -> Callable[[], Model]:
    """A model that tries a function."""
    return lambda: Model(Calls(of))


def zeros(x: Tensor) -> Tensor:
    """Zeros that depend on x."""
    return x - x.detach()


def hidden_row(scores: Tensor) -> Tensor:
    """Hide all of the second sample's scores in one row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[1, 2] = True
    return scores.masked_fill(mask, -torch.inf)


def unlucky() -> Model:
    return Model(Unlucky())


def poisoned() -> Model:
    model = Model(nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model.tried.weight[2, 5] = torch.nan
    return model


def poisoned_statistics() -> Model:
    model = Model(nn.BatchNorm1d(WIDTH))
    model.tried.running_var[3] = torch.nan
    return model.eval()


def bad_third() -> list[dict[str, Tensor]]:
    made = [batch() for _ in range(4)]
    made[2]["x"] = made[2]["x"] * 100
    return made


def shifted_log(x: Tensor) -> Tensor:
    """A logarithm that is defined for what an ordinary batch gives."""
    return torch.log(1.8 - x.abs().mean(-1, keepdim=True) * 2) + x


FAULTS = [
    Fault("log of negatives", function(lambda x: torch.log(x - 2)), "forward", "log"),
    Fault("sqrt of negatives", function(lambda x: torch.sqrt(x - 2)), "forward", "sqrt"),
    Fault("0 / 0", function(lambda x: zeros(x) / zeros(x)), "forward", "div"),
    Fault("exp overflows", function(lambda x: torch.exp(x * 0 + 100)), "forward", "exp"),
    Fault("exp overflows, inf - inf", function(lambda x: (h := torch.exp(x * 0 + 100)) - h), "forward", "exp"),
    Fault("a product overflows in fp16", lambda: Model(Halved(4e3)), "forward", "mm"),
    Fault(
        "autocast to fp16 overflows",
        function(lambda x: (x * 0 + 1e4) @ (x * 0 + 1e4).t() @ x),
        "forward",
        "mm",
        context=lambda: torch.autocast("cpu", torch.float16),
    ),
    Fault("log in place", function(lambda x: (x - 2).log_()), "forward", "log_"),
    Fault("a row hidden as a whole", lambda: Model(Attention(hidden_row)), "forward", "softmax", sample=1),
    Fault("constants in LayerNorm without eps", lambda: Model(Normalized()), "forward", "layer_norm", "tried.norm"),
    Fault(
        "constants in a norm by hand",
        function(lambda x: (y := x * 0 - (x * 0).mean()) / y.square().mean(-1, keepdim=True).sqrt()),
        "forward",
        "div",
    ),
    Fault("dropout leaves nothing", unlucky, "forward", "div"),
    Fault(
        "no label counts",
        Classifier,
        "forward",
        "nll_loss",
        "",
        batches=lambda: [batch(label=torch.full((BATCH,), -100))],
    ),
    Fault("log of zero in the training step", lambda: OwnLoss(nn.Identity()), "forward", "log", ""),
    Fault(
        "in a nested module",
        lambda: Model(Blocks(Calls(lambda x: torch.log(x - 9)), lambda block, x: block(x))),
        "forward",
        "log",
        "tried.blocks.2.mixer",
    ),
    Fault("in micro-batch 3 of 4", function(shifted_log), "forward", "log", batches=bad_third, micro_batch=2),
    Fault(
        "derivative of sqrt at 0", function(lambda x: x + torch.sqrt(zeros(x))), "backward", "sqrt", phase="backward"
    ),
    Fault("derivative of x ** 0.5 at 0", function(lambda x: x + zeros(x) ** 0.5), "backward", "pow", phase="backward"),
    Fault(
        "derivative of a norm at 0 by hand",
        function(lambda x: x + zeros(x).square().sum(-1, keepdim=True).sqrt()),
        "backward",
        "sqrt",
        phase="backward",
    ),
    Fault(
        "derivative of acos at 1",
        function(lambda x: x + torch.acos(zeros(x) + 1)),
        "backward",
        "acos",
        phase="backward",
    ),
    Fault(
        "where does not shield log in backward",
        function(lambda x: torch.where(x > 9, torch.log(zeros(x)), x)),
        "backward",
        "log",
        phase="backward",
    ),
    Fault(
        "where does not shield a bad sqrt",
        function(lambda x: torch.where(x > 9, torch.sqrt(x - 9), x)),
        "forward",
        "sqrt",
    ),
    Fault("derivative of a custom function", function(Straight.apply), "backward", "Straight", phase="backward"),
    Fault(
        "derivative of log(sum(exp)) of nothing",
        function(lambda x: x + (x + torch.full_like(x, -torch.inf)).exp().sum(-1, keepdim=True).log().clamp(min=-9)),
        "backward",
        "log",
        phase="backward",
    ),
    Fault(
        "in a checkpoint",
        lambda: Model(
            Blocks(Calls(lambda x: x + torch.sqrt(zeros(x))), lambda b, x: checkpoint(b, x, use_reentrant=False))
        ),
        "backward",
        "sqrt",
        "tried.blocks.2.mixer",
        "backward",
    ),
    Fault(
        "in a reentrant checkpoint",
        lambda: Model(Blocks(Calls(lambda x: torch.log(x - 9)), lambda b, x: checkpoint(b, x, use_reentrant=True))),
        "forward",
        "log",
        "tried.blocks.2.mixer",
    ),
    Fault(
        "NaN in the batch",
        lambda: Model(nn.Identity()),
        "input",
        module="stem",
        subject='batch["x"]',
        batches=lambda: spoilt(torch.nan, 5),
        sample=5,
    ),
    Fault(
        "infinity in the batch",
        lambda: Model(nn.LayerNorm(WIDTH)),
        "input",
        module="stem",
        subject='batch["x"]',
        batches=lambda: spoilt(torch.inf, 2),
        sample=2,
    ),
    Fault("NaN in a weight", poisoned, "weight", subject="tried.weight"),
    Fault(
        "NaN in an embedding's row", lambda: Model(Table(3)), "weight", module="tried.rows", subject="tried.rows.weight"
    ),
    Fault("NaN in a running variance", poisoned_statistics, "weight", subject="tried.running_var"),
]

BENIGN = [
    Benign(
        "a causal mask by hand",
        lambda: Model(Attention(lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf))),
    ),
    Benign(
        "a causal mask added",
        lambda: Model(Attention(lambda s: s + torch.full(s.shape[-2:], -torch.inf).triu(1))),
    ),
    Benign("a causal mask in a buffer", lambda: Model(Biased())),
    Benign("a mask by where", lambda: Model(Attention(lambda s: torch.where(s > 9, -torch.inf, s)))),
    Benign("fused attention, causal", lambda: Model(Fused(is_causal=True))),
    Benign(
        "fused attention with a float mask",
        lambda: Model(Fused(attn_mask=torch.full((WIDTH, WIDTH), -torch.inf).triu(1))),
    ),
    Benign("fused attention with a bool mask", lambda: Model(Fused(attn_mask=torch.ones(WIDTH, WIDTH).tril().bool()))),
    Benign("padding of keys", lambda: Model(Ready())),
    Benign("1 / inf", function(lambda x: x + 1 / torch.exp(x.detach() * 0 + 100))),
    Benign(
        "logsumexp with some hidden",
        function(lambda x: x + torch.logsumexp(x.masked_fill(x > x.mean(), -torch.inf), -1, keepdim=True)),
    ),
    Benign(
        "the maximum of hidden rows",
        function(lambda x: x + hidden_row(x[:, None] + x[..., None]).amax(-1).clamp(min=-1)),
    ),
    Benign("a minimum that starts at infinity", function(lambda x: torch.minimum(torch.full_like(x, torch.inf), x))),
    Benign("missing values that are replaced", lambda: Cleaning(nn.Identity()), lambda: spoilt(torch.nan, 1)[0]),
    Benign("a bad row of an embedding that is not used", lambda: Model(Table(7))),
    Benign("memory that is filled after it was made", function(lambda x: torch.empty_like(x).copy_(x))),
    Benign("the first scale of a scaler", lambda: Model(HalfGradient()), loss_scale=2.0**18),
]


class Cleaning(Model):
    """Its data have gaps, which it fills."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.nan_to_num(x))


class HalfGradient(nn.Module):
    """Computes in half precision what is small, so that only large gradients overflow."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.half() * 4).float()
