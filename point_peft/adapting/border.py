"""The border between a backbone in half precision and the parts of an adapter, which are trained in float32.

A part is given what its module gets and gives in the part's own type, and what it returns has the backbone's again.
Under autocast the operations see to that themselves.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Steps
from point_peft.parts.base import Call, Part
from point_peft.running.nested import Args, Kwargs, all_arguments, leaves, put, put_argument

HALF = frozenset((torch.float16, torch.bfloat16))
TRAINED = HALF | {torch.float32, torch.float64}
"""The types that tensors of adapters may have; a quantised backbone has others."""


def before(part: Part, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """`part.before`, in the types of the part."""
    wide = _wide(part, call, args[0] if args else kwargs, all_arguments(args, kwargs))
    if wide is None:
        return part.before(call, args, kwargs)
    given = dict(all_arguments(args, kwargs))
    widened = _widened(given, wide)
    own_args, own_kwargs = args, kwargs
    for steps, value in widened.items():
        own_args, own_kwargs = put_argument(own_args, own_kwargs, steps, value)
    new_args, new_kwargs = part.before(call, own_args, own_kwargs)
    if new_args is own_args and new_kwargs is own_kwargs:
        return args, kwargs
    for steps, value in _narrowed(given, widened, dict(all_arguments(new_args, new_kwargs)), wide).items():
        new_args, new_kwargs = put_argument(new_args, new_kwargs, steps, value)
    return new_args, new_kwargs


def after(part: Part, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """`part.after`, in the types of the part."""
    wide = _wide(part, call, output, leaves(output))
    if wide is None:
        return part.after(call, args, kwargs, output)
    for steps, value in _widened(dict(all_arguments(args, kwargs)), wide).items():
        args, kwargs = put_argument(args, kwargs, steps, value)
    given = dict(leaves(output))
    widened = _widened(given, wide)
    for steps, value in widened.items():
        output = put(output, steps, value)
    output = part.after(call, args, kwargs, output)
    for steps, value in _narrowed(given, widened, dict(leaves(output)), wide).items():
        output = put(output, steps, value)
    return output


def _wide(part: Part, call: Call, first: Any, every: Iterable[tuple[Any, Tensor]]) -> torch.dtype | None:
    """The type of a part's tensors where it is given tensors in half precision; None where nothing is to be done."""
    if type(first) is Tensor:  # told quickly: this runs at every call of an adapted module
        if first.dtype not in HALF:
            return None
        device = first.device.type
    else:
        half = [value for _, value in every if value.dtype in HALF]
        if not half:
            return None
        device = half[0].device.type
    if torch.is_autocast_enabled(device):
        return None
    floats = (tensor.dtype for held in (part, call.shared) for tensor in _tensors(held) if tensor.is_floating_point())
    own = next(floats, None)
    return None if own in HALF else own


def _tensors(held: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module and those in it; DataParallel's replicas do not have them as parameters."""
    for module in held.modules():
        for value in (*module._parameters.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                yield value


def _widened(given: dict[Steps, Tensor], wide: torch.dtype) -> dict[Steps, Tensor]:
    return {steps: value.to(wide) for steps, value in given.items() if value.dtype in HALF}


def _narrowed(
    given: dict[Steps, Tensor], widened: dict[Steps, Tensor], made: dict[Steps, Tensor], wide: torch.dtype
) -> dict[Steps, Tensor]:
    """Tensors that a part has made in its own type, in the backbone's; those that it passes on are those given."""
    passed = {id(value): given[steps] for steps, value in widened.items()}
    kept = {id(value) for value in given.values()}
    half = next(iter(passed.values())).dtype
    return {
        steps: passed[id(value)] if id(value) in passed else value.to(half)
        for steps, value in made.items()
        if value.dtype == wide and id(value) not in kept and (steps in widened or steps not in given)
    }
