"""What the frozen stem of the embedded backbone makes of a cloud, computed once for everything that leaves it alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.backbones.layers import Encoder, Group

STEM = (Group, Encoder)
"""Modules of the embedded backbone that see clouds one by one, and that no method has to change."""
Rows = dict[bytes, tuple[Tensor, ...]]


@dataclass
class Store:
    """Outputs of the modules of the stem by class and by the bytes of a sample, kept in a file."""

    path: Path
    rows: dict[str, Rows] = field(default_factory=lambda: {kind.__name__: {} for kind in STEM})
    grown: bool = False

    @staticmethod
    def read(path: Path) -> Store:
        """The store of a file, or an empty one."""
        if not path.exists():
            return Store(path)
        held = torch.load(path)
        return Store(
            path,
            {name: dict(zip(keys, zip(*values, strict=True), strict=True)) for name, (keys, values) in held.items()},
        )

    def write(self) -> None:
        """Write the file anew, at once, if there is more than it holds."""
        if self.grown:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own = self.path.with_suffix(f".{os.getpid()}")
            # A few large tensors are read much faster than thousands of rows.
            stacked = {
                name: (list(rows), [torch.stack(column) for column in zip(*rows.values(), strict=True)])
                for name, rows in self.rows.items()
            }
            torch.save(stacked, own)
            own.replace(self.path)

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """Let the stem of a plain or an adapted model answer from this store, unless something changes it."""
        served = [module for module in model.modules() if isinstance(module, STEM) and not changed(module)]
        for module in served:
            # The module stays in its place, so that whoever listens to it still hears it.
            forward = self._remembering(module.forward, self.rows[type(module).__name__])
            module.forward = forward  # type: ignore[method-assign, assignment]
        yield
        for module in served:
            del module.forward  # that of its class is under it

    def _remembering(self, compute: Callable[[Tensor], Any], rows: Rows) -> Callable[[Tensor], Any]:
        def forward(samples: Tensor) -> Any:
            keys = [sha256(sample.numpy().tobytes()).digest() for sample in samples.detach()]
            missing = [place for place, key in enumerate(keys) if key not in rows]
            if missing:
                with torch.no_grad():
                    found = compute(samples[missing])
                several = found if isinstance(found, tuple) else (found,)
                for place, row in zip(missing, zip(*several, strict=True), strict=True):
                    rows[keys[place]] = tuple(value.clone() for value in row)
                self.grown = True
            whole = tuple(torch.stack(values) for values in zip(*(rows[key] for key in keys), strict=True))
            return whole if len(whole) > 1 else whole[0]

        return forward


def changed(module: nn.Module) -> bool:
    """Tell whether a stem is trained, or whether an adapter hangs inside of it."""
    inner: Sequence[nn.Module] = [
        part for part in module.modules() if part is not module and not isinstance(part, nn.BatchNorm1d)
    ]
    # What keeps the statistics of a frozen norm listens to the norm; nothing else does.
    heard = any(part._forward_hooks or part._forward_pre_hooks for part in inner)
    return heard or any(parameter.requires_grad for parameter in module.parameters())
