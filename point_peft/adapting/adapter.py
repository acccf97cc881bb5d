"""An adapter: everything that belongs to one task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.config import PeftConfig
from point_peft.errors import AdapterError
from point_peft.parts.base import Call, Part, SharedState
from point_peft.running.forward import Forward, Root
from point_peft.running.proof import Unproven


class Adapter(nn.Module):
    """Everything that belongs to one task: parts by site, state that they share, heads of its own."""

    def __init__(self, config: PeftConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict()
        """Site path with "/" for "." -> its parts."""
        self.shared = nn.ModuleList()
        """One ModuleDict of shared state for each of the configuration's tuners."""
        self.saved: tuple[str, ...] = ()
        """Paths of the modules that the adapter has to itself."""
        self.in_stem: frozenset[str] = frozenset()
        """Modules of the stem in which it has parts, so that what they compute is not what the backbone would."""
        self.readers: dict[str, list[str]] = {}
        """Modules that read weights of modules which are not called -> these, as far as the adapter changes them."""
        self.unproven: Unproven | None = None
        """The facts that forwards have yet to show of it; None once they have shown all."""
        self.choices: list[str] = []
        """The choices of its methods for this backbone, in words."""
        self.ran_eagerly = False
        """True once a forward that was not compiled has run it."""

    def sites(self) -> Iterator[tuple[str, nn.ModuleList]]:
        """Pairs (module path, parts)."""
        for key, parts in self.parts.items():
            assert isinstance(parts, nn.ModuleList)
            yield key.replace("/", "."), parts

    def called(self) -> Iterator[str]:
        """The sites with parts that act when their module is called."""
        for path, part in self.all_parts():
            if not part.by_weight:
                yield path

    def all_parts(self) -> Iterator[tuple[str, Part]]:
        """Pairs (module path, part)."""
        for path, parts in self.sites():
            for part in parts:
                assert isinstance(part, Part)
                yield path, part

    def shared_states(self) -> Iterator[SharedState]:
        """The state that parts share, of all tuners."""
        for group in self.shared:
            for state in group.children():
                assert isinstance(state, SharedState)
                yield state

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Pairs (module path, module) of the modules that the adapter has to itself."""
        for path, part in self.all_parts():
            if path in self.saved and part.own_module is not None:
                yield path, part.own_module

    def weight_changes(self) -> dict[str, Part]:
        """The parts that are changes of their modules' tensors, by site."""
        return {path: part for path, part in self.all_parts() if part.mergeable}

    @property
    def silent(self) -> set[str]:
        """The sites whose parts have not run in any forward, compiled ones apart."""
        return set() if self.unproven is None else self.unproven.silent

    @property
    def asks_backbone(self) -> bool:
        """True if its forwards ask for the tokens of the last block, which take a second pass."""
        banks = [state.bank for state in self.shared_states() if state.in_forward and state.bank is not None]
        return any(bank.source == "backbone" for bank in banks)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, trained or not, by `<module path>.<name>`."""
        tensors: dict[str, Tensor] = {}
        owners: list[tuple[str, Part | SharedState]] = [*self.all_parts(), *(("", s) for s in self.shared_states())]
        for path, module in owners:
            for name, tensor in module.state_dict(keep_vars=True).items():
                key = ".".join(filter(None, [path, module.file_name(name)]))
                if key in tensors:
                    raise AdapterError(f"two parts of one adapter have a tensor '{key}'")
                tensors[key] = tensor
        return tensors

    def holds_only(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether it holds no tensors but these."""
        known = {id(tensor) for tensor in tensors.values()}
        return all(id(tensor) in known for tensor in (*self.parameters(), *self.buffers()))

    def free_rows(self) -> frozenset[str]:
        """Names, as in `tensors`, of those whose number of rows the configuration does not tell."""
        return frozenset(state.file_name(name) for state in self.shared_states() for name in state.free_rows)


def calls_at(forward: Forward, names: Sequence[str], path: str, module: nn.Module) -> list[tuple[Part, Call]]:
    """The parts of some adapters at a site, in order, each with what it is told."""
    key = path.replace(".", "/")
    calls: list[tuple[Part, Call]] = []
    for name in names:
        adapter: Any = adapters_by_name(forward.root)[name]
        for part in adapter.parts._modules.get(key, ()):
            # Not by index, which a ModuleList takes long to look up: this runs at every call of an adapted module.
            shared = adapter.shared._modules[str(part.tuner)]
            calls.append((part, Call(path=path, module=module, forward=forward, adapter=name, shared=shared)))
    return calls


def get_adapter(root: Root, name: str) -> Adapter:
    """The adapter of that name, which exists."""
    adapter = adapters_by_name(root)[name]
    assert isinstance(adapter, Adapter)
    return adapter


def adapters_by_name(root: Root) -> Mapping[str, nn.Module | None]:
    """Adapters by name; while `torch.compile` or `torch.export` traces, the active ones by their place."""
    return root.slots if torch.compiler.is_compiling() else root.adapters._modules
