"""On torch's `meta` device, which has shapes and no values: what a GPU would be made to wait for fails here.

A tensor that a forward or a backward makes on the CPU costs a copy to the GPU at every step, and asking for a value
(`.item()`, `.tolist()`, a tensor as a condition) stops the host until everything that was queued before has run. Every
registered method is tried on a dense backbone; a new one enters by being registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from point_peft import PointPeftModel
from tests.adapting import METHOD_NAMES, ONE_BLOCK, adapt, each, without_search
from tests.zoo import POINTS, TinyBackbone

META = torch.device("meta")


class OnlyMeta(TorchDispatchMode):
    """Refuses every operation that gives a tensor of another device, or, unless they are `answered`, a value."""

    def __init__(self, *, answered: bool) -> None:
        super().__init__()
        self.answered = answered

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.answered:
            return False  # the tensors are equal
        output = func(*args, **(kwargs or {}))
        leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
        # Bytes are the state of the CPU's generator, which nothing waits for.
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype != torch.uint8]
        elsewhere = [tensor.device for tensor in tensors if tensor.device != META]
        assert not elsewhere, f"{func} makes a tensor on {elsewhere[0]}"
        return output


@pytest.fixture
def autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has no autocast on this device, and refuses even to ask for it or to switch it off."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def switched(device_type: str, **options: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == META.type else autocast(device_type, **options)

    monkeypatch.setattr(torch, "autocast", switched)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind != META.type and is_enabled(kind))


@pytest.mark.usefixtures("autocast_on_meta")
@each([("LINEAR_PROBE", ONE_BLOCK), *((method, without_search(ONE_BLOCK)) for method in METHOD_NAMES)])
def test_training_makes_no_tensor_on_the_cpu_and_waits_for_no_value(method: str, backbone: TinyBackbone) -> None:
    """Of the first step, values may be asked for: Point-PEFT compares the positions that it keeps with the backbone's.

    It does so once after tensors have moved or were written to, and remembers the answer: on a GPU that is one wait
    when training begins, not one a step.
    """
    model = adapt(backbone, method).to(META).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for answered in (True, False):
        optimizer.zero_grad()
        with OnlyMeta(answered=answered):
            _training_step(model)
        assert trained and all(parameter.grad is not None and parameter.grad.device == META for parameter in trained)
        optimizer.step()


def _training_step(model: PointPeftModel) -> None:
    logits = model(torch.empty(3, POINTS, 3, device=META))
    loss = nn.functional.cross_entropy(logits, torch.empty(3, dtype=torch.int64, device=META))
    torch.autograd.backward(loss + model.auxiliary_loss())
