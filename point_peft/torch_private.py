"""Every name that torch calls private and point_peft uses all the same, each with its reason.

A release of torch may change them without notice; this file is then the only one to read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys

try:
    from torch._higher_order_ops.scan import scan
except ImportError:  # torch 2.4 and 2.5
    scan = None  # type: ignore[assignment]

__all__ = [
    "BatchNorm",
    "IncompatibleKeys",
    "NormBase",
    "graph_task",
    "is_compiled",
    "leaf_of",
    "made_when",
    "overwrite",
    "run_backward",
    "scan",
]
# BatchNorm and NormBase are what batch norms, and all norms with running statistics, are known by: users' own as well.
# IncompatibleKeys is the type that Module.load_state_dict returns.
# scan is a loop in an exported graph, where Python's would be unrolled.


def graph_task() -> int:
    """The number of the backward pass that this thread is in, -1 outside of any."""
    if torch.compiler.is_compiling():
        return -1
    number: int = torch._C._current_graph_task_id()
    return number


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile, or the module's own compile(), has been called on a module."""
    # What torch.compile returns is of a class that takes seconds to import, and holds the module by this name.
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node of an autograd graph adds up, None for any other node."""
    leaf: Tensor | None = node.variable if node.name() == "torch::autograd::AccumulateGrad" else None
    return leaf


def made_when(node: Any) -> int:
    """The place of a node of an autograd graph in the order in which its thread made them."""
    number: int = node._sequence_nr()
    return number


def overwrite(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target in one call, in which Ctrl-C is not heard: all of them or none."""
    torch._foreach_copy_(list(targets), list(sources))


def run_backward(loss: Tensor) -> None:
    """Run the backward pass of a loss () in whatever modes are on.

    `Tensor.backward` is itself a function that modes see, and switches them off while it runs.
    """
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
