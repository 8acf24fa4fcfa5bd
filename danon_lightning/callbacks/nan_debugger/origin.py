"""Where something non-finite came from, as plain data that can be written, sent to other ranks and compared."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isclose
from typing import Any, Literal, get_args

Cause = Literal["input", "weight", "forward", "backward", "optimizer", "reduction", "transient"]
Phase = Literal["forward", "backward", "optimizer", "reduction", ""]
# Sums of the same numbers differ by the order of summation, which follows the number of threads.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class TensorStatistics:
    """What a tensor held, in numbers.

    Attributes:
        shape: Its shape; of a sharded tensor, that of the part on this rank.
        dtype: Its dtype without "torch.", such as ``"float32"``.
        minimum: The smallest of the finite elements (of their absolute values, if complex); None if there are none.
        maximum: The largest of them; None if there are none.
        mean_abs: The mean of their absolute values; None if there are none.
        nan_count: How many elements are NaN.
        inf_count: How many are infinite, of either sign.
        numel: How many there are in all; of a sparse tensor, how many are stored.
        name: What the tensor is where that is known: a parameter, a leaf of the batch; otherwise empty.
    """

    shape: tuple[int, ...]
    dtype: str
    minimum: float | None
    maximum: float | None
    mean_abs: float | None
    nan_count: int
    inf_count: int
    numel: int
    name: str = ""

    @property
    def finite(self) -> bool:
        """Whether all elements are finite."""
        return not (self.nan_count or self.inf_count)

    def describe(self) -> str:
        """One line: ``float32 [8, 16] in [-1.2, 3.4], 2 NaN of 128``."""
        bad = [f"{count} {what}" for count, what in ((self.nan_count, "NaN"), (self.inf_count, "infinite")) if count]
        span = "" if self.minimum is None else f" in [{self.minimum:.4g}, {self.maximum:.4g}]"
        text = f"{self.dtype} {list(self.shape)}{span}" + (f", {' and '.join(bad)} of {self.numel}" if bad else "")
        return f"{self.name}: {text}" if self.name else text

    def agrees_with(self, other: "TensorStatistics") -> bool:
        """Whether these are the statistics of the same values, up to the order of summation."""
        exact = ("shape", "dtype", "nan_count", "inf_count", "numel")
        if any(getattr(self, name) != getattr(other, name) for name in exact):
            return False
        return all(_close(getattr(self, name), getattr(other, name)) for name in ("minimum", "maximum", "mean_abs"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TensorStatistics":
        """The inverse of ``dataclasses.asdict``, also after JSON has made lists of tuples."""
        known = _known(cls, data)
        return cls(**{**known, "shape": tuple(known["shape"])})


@dataclass(frozen=True)
class Origin:
    """Where something non-finite came from.

    Attributes:
        cause: ``"input"``: it was in the batch. ``"weight"``: it was in a parameter or buffer before the step.
            ``"forward"`` or ``"backward"``: an operation of that pass made it. ``"optimizer"``, ``"reduction"``,
            ``"transient"``: see whoever says so; a replay never does.
        op: The operation in full, such as ``"aten.log.default"``; for inputs and weights the first one that took the
            bad value and gave a bad result. Empty where only the module is known.
        module: Name of the module that was running (in backward: whose operation was differentiated), as in
            ``named_modules``; empty for the LightningModule itself.
        module_type: Its class.
        parameter: The bad parameter or buffer; in forward a parameter that the operation took; in backward the one
            whose gradient was the first to be bad. None if there is none.
        leaf: Where in the batch a bad input is, such as ``batch["x"]``; None for other causes.
        stage: The pipeline stage; 0 without stages.
        micro_batch: Which micro-batch of the step.
        phase: The pass in which it happened; a value that is bad in forward and reaches gradients only counts as
            forward.
        node: In backward, the autograd node that ran, such as ``"SqrtBackward0"``; otherwise empty.
        forward_op: In backward, the operation that was differentiated, such as ``"aten.sqrt.default"``; otherwise
            empty.
        location: Where in the user's code, ``"model.py:31 in forward"``; in backward the line that had called what is
            differentiated. Empty if there is no such frame.
        inputs: What went into the operation.
        output: What came out; None if that is not known.
        sample: Which sample of the batch, where the first dimension is that of the batch and not all are bad.
        exact: Whether a replay has found the operation from which it provably reached the loss or a gradient.
            Otherwise it is the best guess, and the note says why.
        note: What else there is to say, in plain words.
    """

    cause: Cause
    op: str = ""
    module: str = ""
    module_type: str = ""
    parameter: str | None = None
    leaf: str | None = None
    stage: int = 0
    micro_batch: int = 0
    phase: Phase = ""
    node: str = ""
    forward_op: str = ""
    location: str = ""
    inputs: tuple[TensorStatistics, ...] = ()
    output: TensorStatistics | None = None
    sample: int | None = None
    exact: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        """The operation as one would say it: ``"log"``, and for the derivative of a square root ``"sqrt"``."""
        return readable(self.forward_op or self.op)

    def describe(self) -> str:
        """One sentence, such as ``log (aten.log.default) in layers.2 (Scorer), forward, model.py:31 in forward``."""
        what = {
            "input": f"{self.leaf} was not finite",
            "weight": f"{self.parameter or 'a tensor made before the step'} was not finite",
            "optimizer": f"the optimizer's update of {self.parameter or 'a parameter'}",
            "reduction": "the sum of finite gradients over the ranks overflowed",
            "transient": "it does not happen again with the same batch, weights and random numbers",
        }.get(self.cause)
        if what is None:
            of = "derivative of " if self.phase == "backward" and self.forward_op else ""
            what = f"{of}{self.name} ({self.op})" if self.op else "some operation"
        module = f" in {self.module or 'the LightningModule'}" if self.module_type else ""
        kind = f" ({self.module_type})" if self.module_type else ""
        rest = [self.phase if self.cause in ("forward", "backward") else "", self.location]
        rest += [f"sample {self.sample}" if self.sample is not None else ""]
        return ", ".join([what + module + kind, *filter(None, rest)])

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Origin":
        """The inverse of :meth:`to_dict`, also after a round trip through JSON; unknown keys are ignored.

        Raises:
            ValueError: If it is not the description of an origin.
        """
        known = _known(cls, data)
        if known.get("cause") not in get_args(Cause):
            raise ValueError(f"cause must be one of {', '.join(get_args(Cause))}, not {known.get('cause')!r}")
        output = known.get("output")
        known["inputs"] = tuple(TensorStatistics.from_dict(one) for one in known.get("inputs", ()))
        known["output"] = None if output is None else TensorStatistics.from_dict(output)
        return cls(**known)

    def differences(self, other: "Origin") -> list[str]:
        """How another finding of the same fault differs in what should be the same; empty if in nothing."""
        same = ("cause", "op", "module", "parameter", "leaf", "phase", "node", "sample")
        found = [
            f"{name}: {getattr(self, name)!r}, now {getattr(other, name)!r}"
            for name in same
            if getattr(self, name) != getattr(other, name)
        ]
        before, after = [*self.inputs, self.output], [*other.inputs, other.output]
        if len(before) != len(after):
            return [*found, f"inputs: {len(self.inputs)}, now {len(other.inputs)}"]
        for index, (one, two) in enumerate(zip(before, after, strict=True)):
            if (one is None) != (two is None) or (one is not None and two is not None and not one.agrees_with(two)):
                which = "output" if index == len(self.inputs) else f"input {index}"
                found.append(f"{which}: {one.describe() if one else None}, now {two.describe() if two else None}")
        return found


def readable(op: str) -> str:
    """The name of an operation as one would say it: ``"log"`` for ``"aten.log.default"``, ``"log_"`` in place."""
    parts = op.split(".")
    return parts[1].lstrip("_") if len(parts) > 2 else op


def _close(one: float | None, two: float | None) -> bool:
    if one is None or two is None:
        return one is two
    return isclose(one, two, rel_tol=_TOLERANCE, abs_tol=1e-12)


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {key: value for key, value in data.items() if key in names}
