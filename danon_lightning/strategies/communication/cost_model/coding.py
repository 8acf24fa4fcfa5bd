"""What a rank computes for an exchange, in seconds an element: measured once a process, for a fraction of a second."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor, get_compressor
from danon_lightning.strategies.communication.compressors.base import Region
from danon_lightning.strategies.communication.cost_model.traffic import STEADY_STEP
from danon_lightning.strategies.communication.error_feedback import resolve_error_feedback
from danon_lightning.strategies.communication.memory import Memory
from danon_lightning.strategies.communication.messages import SMALLEST_COMPRESSED, sizes_for

# Regions that take turns, so that none is in the cache when its turn comes.
_REGIONS = 8
_WARM_UP, _REPEATS = 2, 5
# Elements of a large region, and sides of the matrix that codes of whole parameters are measured on.
_CPU_NUMEL, _CUDA_NUMEL = 1 << 19, 1 << 22
_SIDE = 1 << 9
# Of the smallest region that is coded; it says what a region costs beside its elements.
_SMALL_SIDE = math.isqrt(SMALLEST_COMPRESSED)


@dataclass(frozen=True)
class CodingCosts:
    """Seconds an element, of one rank.

    Attributes:
        copy: To copy a float32 number.
        add: To add one to a sum.
        encode: To code one value of one source, error feedback included where the compressor needs it.
        decode: To decode it.
        decode_add: To add a decoded value to a sum.
        encode_region: Seconds for a region, however small, beside those for its elements.
        decode_region: The same.
        decode_add_region: The same.
    """

    copy: float = 0.0
    add: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    decode_add: float = 0.0
    encode_region: float = 0.0
    decode_region: float = 0.0
    decode_add_region: float = 0.0

    def times(self, factor: float) -> "CodingCosts":
        """On a processor that takes so many times as long."""
        return CodingCosts(*(factor * seconds for seconds in astuple(self)))


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
    numel = min(sizes_for(device)[1], _CPU_NUMEL if device.type == "cpu" else _CUDA_NUMEL)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(numel, generator=generator).to(device) for _ in range(_REGIONS)]
    out = [torch.empty(numel, device=device) for _ in range(_REGIONS)]
    copy = _seconds(lambda i: kernels.copy(out[i], values[i]), device) / numel
    add = _seconds(lambda i: kernels.add_scaled(out[i], [values[i], values[i - 1]], 0.5), device) / numel / 2
    if compressor is None:
        return CodingCosts(copy, add)
    if isinstance(compressor, LinearCompressor):
        small, large = torch.Size([_SMALL_SIDE] * 2), torch.Size([_SIDE, numel // _SIDE])
        if compressor.code_numel(large) is None:  # it would travel dense
            return CodingCosts(copy, add)
        shapes = [large] if compressor.code_numel(small) is None else [small, large]
        found = [(shape.numel(), _time_rounds(compressor, values, out, shape)) for shape in shapes]
    else:
        found = [(n, _time_codes(compressor, values, out, n)) for n in (_SMALL_SIDE**2, numel)]
    lines = [_line([(n, seconds[kind]) for n, seconds in found]) for kind in range(3)]
    return CodingCosts(copy, add, *(per_element for _, per_element in lines), *(each for each, _ in lines))


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds for a region, and for each of its elements, through times of a small and of a large region."""
    (few, short), (many, long) = points[0], points[-1]
    per_element = max(0.0, long - short) / (many - few) if many > few else long / many
    return max(0.0, short - per_element * few), per_element


def _time_codes(
    compressor: Compressor, values: list[Tensor], out: list[Tensor], numel: int
) -> tuple[float, float, float]:
    """Seconds to encode a region, to decode it, and to decode and add it, as the exchange does it."""
    device = values[0].device
    memory = _memory_of(compressor)
    regions = [Region(str(index), 0, numel) for index in range(_REGIONS)]
    size = compressor.payload_bytes(numel, STEADY_STEP)
    payloads = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in regions]
    sums = [one[:numel] for one in out]
    rounds = itertools.count()

    def encode(index: int) -> None:
        # Gradients of one region differ from step to step.
        source = values[(index + next(rounds) // _REGIONS) % _REGIONS][:numel]
        memory.encode_sum(regions[index], [source], 0.5, payloads[index])

    return (
        _seconds(encode, device, end=memory.commit),
        _seconds(lambda i: compressor.decode(payloads[i], sums[i]), device),
        _seconds(lambda i: compressor.decode(payloads[i], sums[i], add=True), device),
    )


def _time_rounds(
    compressor: LinearCompressor, values: list[Tensor], out: list[Tensor], shape: torch.Size
) -> tuple[float, float, float]:
    """Seconds for all rounds of a region, and to decode it."""
    device = values[0].device
    memory = _memory_of(compressor)
    regions = [Region(str(index), 0, shape.numel()) for index in range(_REGIONS)]
    codes = [torch.empty(0)] * _REGIONS
    spaces: list[Tensor] = []

    def begin() -> None:
        # The sum over the node is written there, whose costs are known.
        nonlocal spaces
        spaces = [memory.workspace(region, shape, device) for region in regions]
        for space, source in zip(spaces, values, strict=True):
            space.view(-1).copy_(source[: shape.numel()])

    def encode(index: int) -> None:
        rounds = memory.rounds(regions[index], spaces[index])
        term: Tensor | None = rounds.start()
        while term is not None:
            term = rounds.resume(term.clone())
        assert rounds.code is not None
        codes[index] = rounds.code

    encoding = _seconds(encode, device, begin=begin, end=memory.commit)
    contexts = [memory.decoding_context(region) for region in regions]
    sums = [one[: shape.numel()].view(shape) for one in out]
    return encoding, _seconds(lambda i: compressor.decode(codes[i], sums[i], contexts[i]), device), 0.0


def _memory_of(compressor: Compressor | LinearCompressor) -> Memory:
    memory = Memory(compressor, resolve_error_feedback("auto", compressor), 0, 1, {})
    memory.step = STEADY_STEP
    return memory


def _seconds(
    operation: Callable[[int], object],
    device: torch.device,
    *,
    begin: Callable[[], object] = lambda: None,
    end: Callable[[], object] = lambda: None,
) -> float:
    """Median time to do it for one region, where all have their turns; what is done before and after is not timed."""
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):  # memory is touched for the first time, and thresholds settle
        begin()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for index in range(_REGIONS):
            operation(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        end()
    return statistics.median(seconds[_WARM_UP:]) / _REGIONS
