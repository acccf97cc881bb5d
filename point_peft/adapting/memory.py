"""Tensors of a model that lie in the same memory: one parameter in two modules, or views of one."""

from torch import Tensor, nn


class Memory:
    """The memory of a model's tensors. A module under two names is one, and shares nothing with itself."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, list[tuple[nn.Module, str, str, Tensor]]] = {}
        """Storage -> (module, its name for the tensor, the full name, the tensor)."""
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    full = f"{path}.{name}" if path else name
                    self._held.setdefault(_storage(tensor), []).append((module, name, full, tensor))

    def others(self, module: nn.Module, name: str) -> list[str]:
        """The full names of the other tensors that would change with a module's tensor of this name."""
        tensor = module._parameters[name]
        if tensor is None:
            return []
        return [
            full
            for holder, own, full, held in self._held[_storage(tensor)]
            if not (holder is module and own == name) and _overlap(held, tensor)
        ]


def _storage(tensor: Tensor) -> int:
    """The number of a tensor's storage; of a tensor without memory, its own."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Tell whether the spans of two tensors in one storage overlap."""
    (first, last), (begin, end) = _span(one), _span(other)
    return first < end and begin < last


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and that after its last."""
    begin = int(tensor.storage_offset())
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin + steps + 1 if tensor.numel() else begin
    return begin * tensor.element_size(), end * tensor.element_size()
