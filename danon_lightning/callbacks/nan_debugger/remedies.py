"""What to write in place of an operation that has given a NaN or an infinity: in plain words."""

import math

import torch

from danon_lightning.callbacks.nan_debugger.families import PRODUCTS, family_of, float_type, infinite, look, size
from danon_lightning.callbacks.nan_debugger.origin import Origin, readable

# What brings numbers from elsewhere; and what gives what it is given, where numbers are of ordinary size.
_WRITES = ("fill", "full", "copy", "lift_fresh", "index_put", "masked_fill", "scatter", "scalar_tensor", "empty")
_KEEPS = ("add", "sub", "rsub", "mul", "neg", "where", "lerp", "addcmul", "clamp", "sign", "tanh", "sigmoid")
# What makes much of a small difference to zero, and what half precision makes of that.
_SENSITIVE = ("log", "div", "reciprocal", "sqrt", "rsqrt", "pow", "exp", "acos", "asin", "atanh")
_ROUNDS = {"float16": "makes 0 of less than 3e-8", "bfloat16": "has only 8 bits of precision (1 - 0.001 is 1)"}
_IN_FLOAT32 = "on x.float() and with torch.autocast(x.device.type, enabled=False)"


def remedies(origin: Origin) -> list[str]:
    """What to write in place of the operation, most promising first; empty if the operation is not known.

    Args:
        origin: Of cause "forward" or "backward".
    """
    name = origin.name.rstrip("_").removeprefix("native_").removesuffix("_forward").removesuffix("_backward")
    if not name:
        return []
    backward = origin.phase == "backward"
    if backward and origin.forward_op and "." not in origin.forward_op:
        return _custom(origin)
    found = ([] if backward else _written(name, origin)) or _overflow(name, origin)
    if found:
        return found
    family = family_of(name)
    found = [look(origin)] if family is None else family(origin, backward)
    return [*found[:1], *_too_coarse(name, origin), *found[1:]]


def _custom(origin: Origin) -> list[str]:
    """Of an autograd function of the user, whose derivative is the user's code."""
    raw = readable(origin.op)
    zero = next((one for one in origin.inputs[1:] if one.minimum == one.maximum == 0), None)
    why = "divides by what is 0" if raw.startswith("div") and zero is not None else f"writes non-finite values ({raw})"
    return [
        f"Look at {origin.location or f'the backward of {origin.name}'}, which {why} itself: guard it, for instance "
        "with clamp_min on the divisor, or torch.where before the division and after it.",
        f"Compare the derivative with finite differences: torch.autograd.gradcheck({origin.name}.apply, inputs) in "
        "float64.",
    ]


def _written(name: str, origin: Origin) -> list[str]:
    """Of what is not finite though nothing was that went in, and was not large: so it was written there."""
    line = origin.location or f"the calls of {origin.name} in {origin.module or 'the LightningModule'}"
    given = ", ".join(one.describe() for one in origin.inputs)
    if any(name == one or name.startswith(f"{one}_") for one in _WRITES):
        return [
            f"Look at {line}, which writes non-finite values itself: a constant, an uninitialised torch.empty, or a "
            "number computed in Python."
        ]
    if name not in _KEEPS:
        return []
    if infinite(origin):
        return [
            "Infinities that were meant meet here (inf - inf, or 0 * inf): hide by torch.finfo(x.dtype).min in place "
            f"of -inf, or write torch.where(mask, x, 0) in place of x * mask, at {line}."
        ]
    largest = torch.finfo(getattr(torch, float_type(origin))).max
    if any(size(one) > math.sqrt(largest) for one in origin.inputs):
        return []
    return [
        f"Look at {line}, which writes non-finite values itself: the tensors in it are finite ({given}), so the number "
        f"given to {origin.name} is not."
    ]


def _overflow(name: str, origin: Origin) -> list[str]:
    """Of a product that is larger than float16 holds."""
    out = origin.output
    if float_type(origin) != "float16" or infinite(origin) or out is None or not out.inf_count:
        return []
    if name not in PRODUCTS and not name.startswith(("pow", "norm", "linalg_vector_norm")):
        return []
    largest = max((size(one) for one in origin.inputs), default=0.0)
    return [
        f"float16 ends at {torch.finfo(torch.float16).max:.0f}, and what went in here was as large as {largest:.4g}: "
        'train with precision="bf16-mixed", whose range is that of float32.',
        f'Or compute in float32 {_IN_FLOAT32} (policy="fallback" does it for a while)'
        f"{f', at {origin.location}' if origin.location else ''}; or scale down what goes in.",
    ]


def _too_coarse(name: str, origin: Origin) -> list[str]:
    """Of what may only be zero because half precision rounds."""
    dtype = float_type(origin)
    if dtype not in _ROUNDS or infinite(origin) or not name.startswith(_SENSITIVE):
        return []
    return [f"{dtype} {_ROUNDS[dtype]}: compute this in float32, {_IN_FLOAT32}."]
