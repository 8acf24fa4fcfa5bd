"""Where a module keeps its parameters and buffers, so that they can be taken away and put back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from danon_lightning.strategies.pipeline.torch_internals import buffer_places, parameter_places


@dataclass(frozen=True)
class Slot:
    """All places of one tensor; a tied parameter has several.

    Attributes:
        name: Its first full name.
        names: All of them.
        places: Dictionaries of modules and the keys in them.
        is_parameter: Whether it is a parameter; else it is a buffer.
    """

    name: str
    names: tuple[str, ...]
    places: tuple[tuple[dict[str, Tensor | None], str], ...]
    is_parameter: bool

    def get(self) -> Tensor:
        """What is in it now."""
        dictionary, key = self.places[0]
        tensor = dictionary[key]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Put something else into all its places."""
        for dictionary, key in self.places:
            dictionary[key] = tensor


def find_slots(root: nn.Module) -> dict[str, Slot]:
    """The slots of all parameters and buffers of a module, by their first full name; parameters come first."""
    slots: dict[str, Slot] = {}
    for places, is_parameter in ((parameter_places(root), True), (buffer_places(root), False)):
        found: dict[int, list[tuple[str, dict[str, Tensor | None], str]]] = {}
        for name, dictionary, key in places:
            tensor = dictionary[key]
            if tensor is not None:
                found.setdefault(id(tensor), []).append((name, dictionary, key))
        for occurrences in found.values():
            names = tuple(name for name, _, _ in occurrences)
            slots[names[0]] = Slot(names[0], names, tuple((d, key) for _, d, key in occurrences), is_parameter)
    return slots


def blocks_of_slots(slots: Mapping[str, Slot], blocks: Iterable[nn.Module]) -> dict[str, tuple[int, ...]]:
    """The blocks that have each tensor among their own, by name; left out if there is none."""
    members: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for tensor in (*block.parameters(), *block.buffers()):
            members.setdefault(id(tensor), set()).add(index)
    found = {name: members.get(id(slot.get()), set()) for name, slot in slots.items()}
    return {name: tuple(sorted(indices)) for name, indices in found.items() if indices}
