"""Watching a model while it runs: every call of its modules, and how what they made depends on what.

Tensors are kept as they were at the time, and as they are in the autograd graph, which tells dependencies exactly.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from point_peft.anatomy.description import Steps
from point_peft.running.nested import all_arguments, leaves
from point_peft.running.reading import arguments, looks

MOST_MOVED = 64
"""Of so many tensors of moved clouds, the first are kept: models move clouds before they choose points, for which they
may make one more with each."""


@dataclass
class ModuleCall:
    """One call of a module: tensors by the steps that lead to them, as they were and as they are in the graph."""

    when: int
    inputs: dict[Steps, Tensor]
    outputs: dict[Steps, Tensor] = field(default_factory=dict)
    live_inputs: dict[Steps, Tensor] = field(default_factory=dict)
    live_outputs: dict[Steps, Tensor] = field(default_factory=dict)


@dataclass
class Trace:
    """Calls, reads and clouds that were seen while a model ran."""

    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    """Module path -> its calls, in the order in which modules were first called."""
    clouds: list[Tensor] = field(default_factory=list)
    """Coordinates (n, 3) of all points that the model was given, by input."""
    given: list[tuple[int, Tensor]] = field(default_factory=list)
    """Further points (b n, 3) that modules were given, and when."""
    moved: list[Tensor] = field(default_factory=list)
    """Clouds (b n, 3) as the model has moved, scaled and turned them by itself, each as a whole."""
    grid: list[Tensor] = field(default_factory=list)
    """The same for inputs of whole numbers."""
    reads: dict[str, str] = field(default_factory=dict)
    """Module whose weights were read without a call -> the module that read them."""
    uses: Mapping[int, int] = field(default_factory=dict)
    """Parameter, by its identity -> how many functions were given it."""
    samples: int = 0
    """The number of clouds in the example, as far as packed inputs tell."""
    output: Any = None

    def first(self, path: str) -> ModuleCall:
        return self.calls[path][0]

    def before(self, when: int) -> Iterator[tuple[str, ModuleCall]]:
        """The first calls of the modules that began before, in order."""
        for path, calls in self.calls.items():
            if calls[0].when < when:
                yield path, calls[0]


@contextmanager
def with_gradients(model: nn.Module) -> Iterator[None]:
    """In here every parameter takes part in the graph; afterwards those that did before."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


class _Functions(TorchFunctionMode):
    """Notes which parameters are used while another module than their own runs, and clouds that functions return."""

    def __init__(self, model: nn.Module, running: list[str], seen: Trace) -> None:
        super().__init__()
        self.seen = seen
        self.owners = {id(own): path for path, module in model.named_modules() for own in module._parameters.values()}
        self.running = running
        self.readers: dict[str, str] = {}
        """Module -> the first other module that used its parameters."""
        self.uses: Counter[int] = Counter()
        """Parameter, by its identity -> how many functions were given it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in () if looks(func) else arguments(args, kwargs):
            if not isinstance(value, nn.Parameter):
                continue
            self.uses[id(value)] += 1
            owner = self.owners.get(id(value))
            if owner and self.running and owner not in self.running:
                self.readers.setdefault(owner, self.running[-1])
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.ndim == 3 and made.shape[2] == 3 and len(self.seen.moved) < MOST_MOVED:
            points = rearrange(made.detach(), "b n xyz -> (b n) xyz")
            if any(_is_moved(points, cloud, len(made)) for cloud in self.seen.clouds):
                self.seen.moved.append(points.clone())
        return made


def _is_moved(points: Tensor, cloud: Tensor, samples: int) -> bool:
    """Tell whether points (b n, 3) are those of clouds (b n, 3), each moved, scaled and turned as a whole."""
    if points.shape != cloud.shape or points.dtype != cloud.dtype or not len(points):
        return False
    made, given = (rearrange(rows.float(), "(b n) xyz -> b n xyz", b=samples) for rows in (points, cloud))
    made, given = (rows - rows.mean(dim=1, keepdim=True) for rows in (made, given))
    size = made.abs().amax(dim=(1, 2), keepdim=True)
    if not bool(given.isfinite().all() and size.isfinite().all() and (size > 0).all()):
        return False
    # A cloud that is flat has no inverse, but a pseudo-inverse.
    return bool(((made - given @ (torch.linalg.pinv(given) @ made)).abs() <= 1e-4 * size).all())


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], widths: set[int]) -> Trace:
    """Run the model once and see everything; `widths` are the channels of what may be tokens."""
    seen = Trace()

    def kept(value: Tensor) -> Tensor:
        """Keep what may be tokens, coordinates or sample numbers as it is now, whatever is done in place later."""
        wanted = value.ndim < 2 or value.shape[-1] in (3, *widths)
        return value.detach().clone() if wanted else value.detach()

    paths = {module: path for path, module in model.named_modules()}
    count = 0
    running: list[str] = []
    open_calls: list[ModuleCall] = []

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal count
        live = dict(all_arguments(inputs, named))
        call = ModuleCall(count, {steps: kept(value) for steps, value in live.items()}, live_inputs=live)
        count += 1
        running.append(paths[module])
        open_calls.append(call)
        for value in live.values():
            if value.is_floating_point() and value.ndim == 3 and value.shape[-1] == 3:
                # Points that the model has scaled, say, before it chooses among them.
                seen.given.append((call.when, rearrange(value.detach().clone(), "b n xyz -> (b n) xyz")))
        seen.calls.setdefault(paths[module], []).append(call)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        running.pop()
        call = open_calls.pop()
        call.live_outputs = dict(leaves(output))
        call.outputs = {steps: kept(value) for steps, value in call.live_outputs.items()}

    args, kwargs = attached(args, kwargs)
    for _, value in leaves((args, kwargs)):
        _note_cloud(seen, value.detach())
    functions = _Functions(model, running, seen)
    with hooked(paths, before, after), functions:
        seen.output = model(*args, **kwargs)
    seen.reads = {owner: reader for owner, reader in functions.readers.items() if owner not in seen.calls}
    seen.uses = functions.uses
    return seen


@contextmanager
def hooked(modules: Iterable[nn.Module], before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """In here, each of the modules has these hooks ahead of its forward and after it."""
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the arguments whose floating tensors take part in the graph, so that coordinates in it do."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            own = value.detach().clone()
            # Not a leaf: a model may write into its input.
            return own.requires_grad_().clone() if own.is_floating_point() else own
        if isinstance(value, dict):
            fresh = value.copy()
            fresh.update({key: copied(item) for key, item in value.items()})
            return fresh
        if isinstance(value, list):
            return [copied(item) for item in value]
        if type(value) is tuple:
            return tuple(copied(item) for item in value)
        return value

    return tuple(copied(value) for value in args), {name: copied(value) for name, value in kwargs.items()}


def _note_cloud(seen: Trace, value: Tensor) -> None:
    """Keep what may be coordinates: the first three of the channels, which come last or, in (b, c, n), second."""
    if value.ndim == 1 and not value.is_floating_point() and len(value):
        seen.samples = max(seen.samples, _sample_count(value))
    views = [value] if value.ndim in (2, 3) and 3 <= value.shape[-1] <= 16 else []
    if value.ndim == 3 and 3 <= value.shape[1] <= 16:
        views.append(rearrange(value, "b c n -> b n c"))
    for view in views:
        points = rearrange(view[..., :3], "... xyz -> (...) xyz")
        (seen.clouds if value.is_floating_point() else seen.grid).append(points)


def _sample_count(value: Tensor) -> int:
    """The number of samples that sample numbers (n,) or ends of samples (b,) speak of, 0 if they are neither."""
    steps = value.diff()
    if bool((steps < 0).any()) or int(value[0]) < 0:
        return 0
    if int(value[0]) == 0 and bool((steps <= 1).all()):
        count = int(value[-1]) + 1
        return count if count < len(value) else 0
    return len(value) if bool((steps > 0).all()) and len(value) <= 64 else 0


def reaching(seen: Trace, blocks: Sequence[str]) -> list[str]:
    """The blocks that have an influence on what the model returns first, losses apart."""
    results = returned(seen)[:1]
    outputs = {path: list(seen.calls[path][-1].live_outputs.values()) for path in blocks}
    flat = [(path, value) for path, values in outputs.items() for value in values if value.grad_fn is not None]
    return sorted({flat[number][0] for number in connected(results, [value for _, value in flat])}, key=blocks.index)


def returned(seen: Trace) -> list[Tensor]:
    """The tensors that the model returns, losses apart."""
    return [value for _, value in leaves(seen.output) if value.ndim and value.grad_fn is not None]


def connected(results: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of the tensors that the results depend on."""
    if not results or not tensors:
        return []
    total = torch.stack([value.sum() for value in results]).sum()
    return [number for number, gradient in enumerate(gradients_of(total, tensors)) if gradient is not None]


def gradients_of(value: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of a number to each of the tensors, None where it does not depend on it."""
    return torch.autograd.grad(value, list(tensors), retain_graph=True, allow_unused=True)


def channel_weights(like: Tensor) -> Tensor:
    """Weights (c,) that tell channels apart."""
    return torch.linspace(0.5, 1.5, like.shape[-1], dtype=like.dtype, device=like.device)
