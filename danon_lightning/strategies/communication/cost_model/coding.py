"""What a rank computes for an exchange, in seconds an element: measured once a process, for a fraction of a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor, get_compressor
from danon_lightning.strategies.communication.compressors.base import Context
from danon_lightning.strategies.communication.cost_model.traffic import STEADY_STEP
from danon_lightning.strategies.communication.messages import sizes_for

# Regions that take turns, so that none is in the cache when its turn comes.
_REGIONS = 8
_WARM_UP, _REPEATS = 2, 5
# Sides of the matrix that codes of whole parameters are measured on.
_SIDE = 1024


@dataclass(frozen=True)
class CodingCosts:
    """Seconds an element, of one rank.

    Attributes:
        copy: To copy a float32 number.
        add: To add one to a sum.
        encode: To code one value of one source, error feedback included where the compressor needs it.
        decode: To decode it.
        decode_add: To add a decoded value to a sum.
    """

    copy: float = 0.0
    add: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    decode_add: float = 0.0


NO_COSTS = CodingCosts()

_measured: dict[tuple[object, ...], CodingCosts] = {}


def coding_costs(
    compression: "str | Compressor | LinearCompressor | None", device: torch.device | str = "cpu"
) -> CodingCosts:
    """Measure what a compressor takes on this rank at present, with one thread, as the communicator has it.

    A second call with an equal compressor gives the same figures without measuring. Ranks that share processors slow
    one another down: have all of them measure at the same time.

    Args:
        compression: As for the communicator; None for the costs of a dense exchange.
        device: Where gradients lie.
    """
    compressor, device = get_compressor(compression), torch.device(device)
    settings = tuple(sorted((name, repr(value)) for name, value in vars(compressor).items())) if compressor else ()
    key = type(compressor), settings, device.type, kernels.available()
    if key not in _measured:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                _measured[key] = _measure(compressor, device)
        finally:
            torch.set_num_threads(threads)
    return _measured[key]


def agree_on_costs(
    costs: CodingCosts, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> CodingCosts:
    """The slowest rank's costs, the same on all ranks. Collective.

    Args:
        costs: This rank's.
        group: Of the ranks; None for all.
        device: Where numbers can be reduced: that of the group's backend.
    """
    agreed = torch.tensor(astuple(costs), dtype=torch.float64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    return CodingCosts(*agreed.tolist())


def forget_costs() -> None:
    """Have all costs measured anew."""
    _measured.clear()


def _measure(compressor: Compressor | LinearCompressor | None, device: torch.device) -> CodingCosts:
    numel = min(sizes_for(device)[1], 1 << 19 if device.type == "cpu" else 1 << 22)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(numel, generator=generator).to(device) for _ in range(_REGIONS)]
    out = [torch.empty(numel, device=device) for _ in range(_REGIONS)]

    def timed(operation: Callable[[int], object]) -> float:
        return _seconds(operation, device) / (_REGIONS * numel)

    copy = timed(lambda i: kernels.copy(out[i], values[i]))
    add = timed(lambda i: kernels.add_scaled(out[i], [values[i], values[i - 1]], 0.5)) / 2
    if compressor is None:
        return CodingCosts(copy, add)
    if isinstance(compressor, LinearCompressor):
        encode, decode = _measure_linear(compressor, values, out, device)
        return CodingCosts(copy, add, encode, decode)
    return CodingCosts(copy, add, *_measure_codes(compressor, values, out, device))


def _measure_codes(
    compressor: Compressor, values: list[Tensor], out: list[Tensor], device: torch.device
) -> tuple[float, float, float]:
    """Seconds an element to encode, to decode, and to decode and add."""
    numel = values[0].numel()
    contexts = [Context(step=STEADY_STEP) for _ in values]
    payloads = [
        torch.zeros(compressor.payload_bytes(numel, STEADY_STEP), dtype=torch.uint8, device=device) for _ in values
    ]
    residuals = [torch.zeros(numel, device=device) for _ in values]

    def encode(i: int) -> None:
        context = Context(step=contexts[i].step + 1, state={**contexts[i].state, **contexts[i].new_state})
        contexts[i] = context
        if compressor.needs_error_feedback:
            summed = torch.empty_like(values[i])
            kernels.add_scaled(summed, [values[i]], 0.5)
            compressor.encode_with_feedback(summed, residuals[i], 1.0, out[i], payloads[i], context)
            residuals[i], out[i] = out[i], residuals[i]
        else:
            compressor.encode_sum([values[i]], 0.5, payloads[i], context)

    scale = 1 / (len(values) * numel)
    seconds = [
        _seconds(encode, device),
        _seconds(lambda i: compressor.decode(payloads[i], out[i]), device),
        _seconds(lambda i: compressor.decode(payloads[i], out[i], add=True), device),
    ]
    return seconds[0] * scale, seconds[1] * scale, seconds[2] * scale


def _measure_linear(
    compressor: LinearCompressor, values: list[Tensor], out: list[Tensor], device: torch.device
) -> tuple[float, float]:
    """Seconds an element for all rounds, and to decode."""
    rows = min(_SIDE, int(values[0].numel() ** 0.5))
    shape = torch.Size([rows, values[0].numel() // rows])
    if compressor.code_numel(shape) is None:  # it would travel dense
        return 0.0, 0.0
    matrices = [value[: shape.numel()].view(shape) for value in values]
    contexts = [Context(step=STEADY_STEP) for _ in values]
    codes: list[Tensor] = [torch.empty(0) for _ in values]

    def encode(i: int) -> None:
        context = Context(step=contexts[i].step + 1, state={**contexts[i].state, **contexts[i].new_state})
        contexts[i] = context
        work = out[i][: shape.numel()].view(shape)
        work.copy_(matrices[i])
        rounds = compressor.rounds(work, context, feedback=compressor.needs_error_feedback)
        term = next(rounds)
        while True:
            try:
                term = rounds.send(term.clone())
            except StopIteration as stop:
                codes[i] = stop.value
                return

    encoding = _seconds(encode, device)
    decoding = _seconds(lambda i: compressor.decode(codes[i], out[i][: shape.numel()].view(shape), contexts[i]), device)
    scale = 1 / (len(values) * shape.numel())
    return encoding * scale, decoding * scale


def _seconds(operation: Callable[[int], object], device: torch.device) -> float:
    """Median time to do it once for each region."""
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):  # memory is touched for the first time, and thresholds settle
        start = time.perf_counter()
        for index in range(_REGIONS):
            operation(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])
