"""Families of operations: what to write in place of one that has given a NaN or an infinity."""

import math
from collections.abc import Callable, Mapping

import torch

from danon_lightning.callbacks.nan_debugger.origin import Origin, TensorStatistics

# What overflows where numbers are large.
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "mul", "dot", "matmul", "einsum", "square", "sum")
_LINEAR_ALGEBRA = ("linalg", "svd", "cholesky", "inverse", "eigh", "solve", "logdet", "det")


def family_of(name: str) -> "Family | None":
    """What knows what to write in place of an operation: of the origin, and whether it was in backward, makes lines.

    Args:
        name: Of the operation, without the underscore of those that work in place.
    """
    return _BY_NAME.get(name) or next((family for part, family in _BY_PART if part in name), None)


def at(origin: Origin, write: str = "Write") -> str:
    """Where to write it, as the beginning of a sentence, or of a part of one."""
    at = "At" if write == "Write" else "at"
    return f"{at} {origin.location}, write" if origin.location else write


def look(origin: Origin) -> str:
    """What is said of an operation that nothing is known about."""
    where = origin.location or f"the calls of {origin.name} in {origin.module or 'the LightningModule'}"
    given = "; ".join(one.describe() for one in origin.inputs[:2])
    return f"Look at {where}: {origin.name} gives what is not finite" + (f", of {given}." if given else ".")


def lowest(origin: Origin) -> float | None:
    """The smallest element of the first tensor that went in."""
    return origin.inputs[0].minimum if origin.inputs else None


def size(one: TensorStatistics) -> float:
    """The largest absolute value."""
    return max(abs(one.minimum or 0.0), abs(one.maximum or 0.0))


def infinite(origin: Origin) -> int:
    """How many infinities went in."""
    return sum(one.inf_count for one in origin.inputs)


def float_type(origin: Origin) -> str:
    """In which type it was computed."""
    known = [one.dtype for one in (*origin.inputs, origin.output) if one is not None]
    return next((dtype for dtype in known if "float" in dtype), "float32")


def eps(origin: Origin) -> str:
    """A number that is small, and still a normal one in the type at hand."""
    return "1e-4" if float_type(origin) == "float16" else "1e-6"


# ---- families


def _log(origin: Origin, backward: bool) -> list[str]:
    small = eps(origin)
    if backward:
        return [
            f"The derivative of log at 0 is infinite. {at(origin)} torch.log(x.clamp_min({small})) in place of "
            "torch.log(x).",
            "A torch.where after it does not help in backward (0 * inf is NaN), it has to be inside, too: "
            "torch.where(ok, torch.log(torch.where(ok, x, 1)), 0).",
            "If it is the log of a softmax or of a sum of exponentials: F.log_softmax or torch.logsumexp.",
        ]
    least = lowest(origin)
    why = "" if least is None else f": the smallest argument was {least:.4g}"
    other = (
        "An argument that can be negative is a fault before this line: look how it is computed."
        if least is not None and least < 0
        else "If the argument is a softmax or a sum of exponentials: F.log_softmax or torch.logsumexp."
    )
    return [f"{at(origin)} torch.log(x.clamp_min({small})) in place of torch.log(x){why}.", other]


def _sqrt(origin: Origin, backward: bool) -> list[str]:
    small = eps(origin)
    by_hand = "For the length of a vector: torch.linalg.vector_norm(x, dim=-1), whose derivative at 0 is 0; for its "
    by_hand += f"direction F.normalize(x, dim=-1, eps={small})."
    shielded = "A torch.where after it shields nothing in backward: torch.where inside as well, sqrt(where(ok, x, 1))."
    if backward:
        return [
            f"The derivative of {origin.name} at 0 is infinite. {at(origin)} torch.sqrt(x + {small}) in place of "
            "torch.sqrt(x).",
            by_hand,
            shielded,
        ]
    least = lowest(origin)
    why = "" if least is None else f": the smallest argument was {least:.4g}"
    return [
        f"{at(origin)} torch.sqrt(x.clamp_min(0) + {small}) in place of torch.sqrt(x){why}.",
        f"Look how it becomes negative. {shielded}",
    ]


def _rsqrt(origin: Origin, backward: bool) -> list[str]:
    least = lowest(origin)
    why = "" if least is None or backward else f": the smallest argument was {least:.4g}"
    return [f"{at(origin)} torch.rsqrt(x.clamp_min(0) + {eps(origin)}) in place of torch.rsqrt(x){why}."]


def _pow(origin: Origin, backward: bool) -> list[str]:
    clamped = f"x.clamp_min({eps(origin)}) ** p in place of x ** p"
    if backward:
        return [
            f"The derivative of x ** p at 0 is infinite for p < 1. {at(origin)} {clamped}.",
            "A torch.where after it shields nothing in backward: it has to be inside, too.",
        ]
    least, output = lowest(origin), origin.output
    if least is not None and least > 0 and output is not None and output.inf_count:
        return [f"A power has overflowed: {at(origin, 'write')} x.clamp_max(...) ** p, or normalise x first."]
    why = "" if least is None else f": the smallest base was {least:.4g}"
    return [f"{at(origin)} {clamped}{why}; a negative base has no fractional power, and 0 no negative one."]


def _div(origin: Origin, backward: bool) -> list[str]:
    small = eps(origin)
    divisor = origin.inputs[1] if len(origin.inputs) > 1 and not backward else None
    if divisor is not None and divisor.minimum is not None and divisor.minimum < 0:
        write = f"a / torch.where(b.abs() < {small}, {small}, b)"
    else:
        write = f"a / b.clamp_min({small})"
    if divisor is not None and divisor.minimum is not None:
        why = f"the divisors lie in [{divisor.minimum:.4g}, {divisor.maximum:.4g}]"
    elif origin.inputs and not backward and divisor is None:
        write = f"a / max(b, {small})"
        why = "the divisor is a plain number, which is 0 or not finite"
    else:
        why = "the divisor was 0, or nearly"
    return [
        f"{at(origin)} {write} in place of a / b: {why}.",
        f"For a count as divisor: .clamp_min(1). To normalise: F.normalize(x, eps={small}), or "
        "(x - mean) / (std + eps).",
    ]


def _softmax(origin: Origin, backward: bool) -> list[str]:
    if not infinite(origin) and "attention" not in origin.name and not backward:
        return [f"{look(origin)} The rows of a softmax must not be empty or infinite."]
    return [
        "A row is masked out as a whole, and its softmax is 0 / 0: have each row of the mask leave one key, for "
        f"instance the token itself{f', at {origin.location}' if origin.location else ''}.",
        "Or hide by torch.finfo(x.dtype).min in place of -inf, and set such rows to 0 afterwards "
        "(out.masked_fill(hidden.all(-1, keepdim=True), 0)).",
    ]


def _logsumexp(origin: Origin, backward: bool) -> list[str]:
    return [
        "A row is -inf as a whole: leave one element of each, or hide by torch.finfo(x.dtype).min in place of -inf."
    ]


def _cross_entropy(origin: Origin, backward: bool) -> list[str]:
    labels = next((one.name for one in origin.inputs if one.name and "int" in one.dtype), "the labels")
    return [
        f"Probably all labels in {labels} are ignore_index, and the mean over none of them is 0 / 0. "
        f'{at(origin)} F.cross_entropy(..., reduction="sum") / (label != ignore_index).sum().clamp_min(1).',
        "Or leave out such batches where they are made: (label != ignore_index).any().",
    ]


def _bce(origin: Origin, backward: bool) -> list[str]:
    return [
        f"{at(origin)} F.binary_cross_entropy_with_logits(x, target) in place of a sigmoid and "
        "F.binary_cross_entropy: a sigmoid rounds to exactly 0 or 1."
    ]


def _exp(origin: Origin, backward: bool) -> list[str]:
    dtype = float_type(origin)
    limit = math.log(torch.finfo(getattr(torch, dtype)).max)
    largest = origin.inputs[0].maximum if origin.inputs and not backward else None
    why = "" if largest is None else f": the largest argument was {largest:.4g}"
    return [
        f"{at(origin)} torch.exp(x - x.amax(-1, keepdim=True)), subtracting the maximum{why}, and exp overflows above "
        f"{limit:.4g} in {dtype}.",
        f"For ratios or logarithms of sums: softmax, log_softmax, torch.logsumexp; or bound x: x.clamp_max("
        f"{math.floor(limit * 0.9)}).",
    ]


def _bounded(origin: Origin, backward: bool) -> list[str]:
    name, small = origin.name.rstrip("_"), eps(origin)
    first = origin.inputs[0] if origin.inputs and not backward else None
    why = "it is not defined outside of its limits, and has no finite derivative at its ends"
    if first is not None and first.minimum is not None:
        why = f"its arguments lie in [{first.minimum:.4g}, {first.maximum:.4g}]"
    low, call = ("", f"torch.{name}") if name != "logit" else (f"{small}, ", "torch.logit")
    return [f"{at(origin)} {call}(x.clamp({low or f'-1 + {small}, '}1 - {small})) in place of {name}(x): {why}."]


def _vector_norm(origin: Origin, backward: bool) -> list[str]:
    if not backward:
        return [f"The squares in {origin.name} overflow: divide x by its largest absolute value first.", look(origin)]
    small = eps(origin)
    return [
        f"A norm has no derivative at 0. {at(origin)} torch.linalg.vector_norm(x + {small}, dim=-1), or "
        f"F.normalize(x, dim=-1, eps={small}) for a direction."
    ]


def _normalization(origin: Origin, backward: bool) -> list[str]:
    first = origin.inputs[0] if origin.inputs and not backward else None
    constant = first is not None and first.minimum is not None and first.minimum == first.maximum
    why = "what goes in is constant, so its variance is 0" if constant else "the variance of what goes in is 0, or huge"
    module = origin.module or "this module"
    return [f"Give {module} ({origin.module_type or origin.name}) a larger eps, 1e-5 or more: {why}."]


def _deviation(origin: Origin, backward: bool) -> list[str]:
    return [
        f"{origin.name} of a single number is 0 / 0: {at(origin, 'write')} x.{origin.name}(correction=0), or leave "
        "out groups of one.",
        f"Where derivatives at constants are needed: torch.sqrt(x.var(-1, correction=0) + {eps(origin)}).",
    ]


def _mean(origin: Origin, backward: bool) -> list[str]:
    if any(one.numel == 0 for one in origin.inputs):
        return [f"The mean of nothing is 0 / 0: {at(origin, 'write')} x.sum() / max(x.numel(), 1)."]
    return _product(origin, backward)


def _linear_algebra(origin: Origin, backward: bool) -> list[str]:
    what = "has no finite derivative" if backward else "fails"
    return [
        f"{origin.name} {what} where a matrix is singular or has equal singular values: {at(origin, 'write')} "
        f"x + {eps(origin)} * torch.diag(torch.linspace(0.5, 1, n)) in place of x, or compute it in float64.",
    ]


def _product(origin: Origin, backward: bool) -> list[str]:
    sizes = [f"{size(one):.4g}" for one in origin.inputs]
    if infinite(origin):
        return [f"Infinities have come in (0 * inf, inf - inf): look where they are made, before {origin.location}."]
    return [
        f"{origin.name} has overflowed, what went in was as large as {' and '.join(sizes) or 'its type allows'}: "
        f"normalise it before{f' {origin.location}' if origin.location else ''}, or lower the learning rate."
    ]


Family = Callable[[Origin, bool], list[str]]
_BY_NAME: Mapping[str, Family] = (
    dict.fromkeys(("log", "log2", "log10", "log1p", "xlogy"), _log)
    | dict.fromkeys(("div", "true_divide", "reciprocal", "floor_divide", "remainder", "fmod"), _div)
    | dict.fromkeys(("exp", "exp2", "expm1", "cosh", "sinh"), _exp)
    | dict.fromkeys(("acos", "asin", "atanh", "erfinv", "logit", "arccos", "arcsin"), _bounded)
    | dict.fromkeys(("std", "var", "std_mean", "var_mean"), _deviation)
    | dict.fromkeys(("norm", "linalg_vector_norm", "cdist", "dist", "euclidean_dist"), _vector_norm)
    | dict.fromkeys(PRODUCTS, _product)
    | {"sqrt": _sqrt, "rsqrt": _rsqrt, "pow": _pow, "mean": _mean, "logsumexp": _logsumexp}
)
# Where names have many forms, such as "_scaled_dot_product_flash_attention_for_cpu".
_BY_PART: tuple[tuple[str, Family], ...] = (
    ("softmax", _softmax),
    ("attention", _softmax),
    ("binary_cross_entropy", _bce),
    ("nll_loss", _cross_entropy),
    ("cross_entropy", _cross_entropy),
    ("norm", _normalization),
    *((part, _linear_algebra) for part in _LINEAR_ALGEBRA),
)
