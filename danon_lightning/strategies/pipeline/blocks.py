"""Finding the body of a module: the blocks that its code calls one after another."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

# How many times the parameters of all other candidates the body must have to be found by itself.
_CLEARLY_LARGER = 3


@dataclass(frozen=True)
class Blocks:
    """The body of a module.

    Attributes:
        name: Its dotted name.
        modules: The blocks in the order of their calls.
    """

    name: str
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.modules)


def find_blocks(module: nn.Module, name: str | None = None) -> Blocks:
    """Find the blocks of a module that can be shared out among pipeline stages.

    Args:
        module: Where to look.
        name: The dotted name of an ``nn.Sequential`` or ``nn.ModuleList`` of blocks. None to find it: of the lists of
            at least two modules of one type that are in no other such list, the one that has at least three times as
            many parameters as the others together.

    Raises:
        ValueError: If there is no such list under ``name``, or none or several that could be meant.
    """
    candidates = _candidates(module)
    if name is not None:
        return _named(module, name, candidates)
    sizes = [_size(blocks.modules) for blocks in candidates]
    for blocks, size in zip(candidates, sizes, strict=True):
        if size >= _CLEARLY_LARGER * (sum(sizes) - size):
            return blocks
    if not candidates:
        raise ValueError(
            f"pipeline_layers=None finds no nn.Sequential or nn.ModuleList of at least two blocks of one type in "
            f"{type(module).__name__}: put the layers into one, or name one of mixed types "
            "(pipeline_layers='model.layers')"
        )
    raise ValueError(
        f"pipeline_layers=None finds several lists of blocks in {type(module).__name__}, none of which is clearly the "
        f"largest: {_listed(candidates)}. Name the one to cut: pipeline_layers={candidates[0].name!r}"
    )


def _named(module: nn.Module, name: str, candidates: list[Blocks]) -> Blocks:
    try:
        body = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"pipeline_layers={name!r} is not a module of {type(module).__name__}; lists of blocks are: "
            f"{_listed(candidates)}"
        ) from error
    if not isinstance(body, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"pipeline_layers={name!r} is a {type(body).__name__}: it must be an nn.Sequential or nn.ModuleList. Lists "
            f"of blocks are: {_listed(candidates)}"
        )
    modules = tuple(body)
    if len(modules) < 2:
        raise ValueError(f"pipeline_layers={name!r} has {len(modules)} blocks: at least two are needed to cut it")
    if len(set(modules)) < len(modules):
        raise ValueError(
            f"pipeline_layers={name!r} contains the same block more than once: a block is on one stage only, so all "
            "must be different modules"
        )
    return Blocks(name, modules)


def _candidates(module: nn.Module) -> list[Blocks]:
    found: list[Blocks] = []
    inside: set[nn.Module] = set()
    for name, body in module.named_modules():  # a list comes before those in its blocks
        if body in inside or not isinstance(body, (nn.Sequential, nn.ModuleList)):
            continue
        modules = tuple(body)
        one_type = len({type(block) for block in modules}) == 1
        if one_type and 2 <= len(modules) == len(set(modules)) and _size(modules):
            found.append(Blocks(name, modules))
            inside.update(part for block in modules for part in block.modules())
    return found


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _listed(candidates: list[Blocks]) -> str:
    descriptions = []
    for blocks in candidates:
        kind, size = type(blocks.modules[0]).__name__, _size(blocks.modules)
        descriptions.append(f"{blocks.name!r} ({len(blocks)} × {kind}, {size:,} parameters)")
    return ", ".join(descriptions) or "none"
