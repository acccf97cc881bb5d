"""The adapted model, and the functions that adapt one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.attaching import follow_modules
from point_peft.adapting.fitting import fit_inputs
from point_peft.adapting.heads import HeadSource
from point_peft.adapting.proving import begin_proof, end_proof
from point_peft.adapting.site import CHILD, SITE
from point_peft.anatomy.description import Anatomy
from point_peft.config import PeftConfig, TunerConfig
from point_peft.errors import AdapterError, AnatomyError, PointPeftError
from point_peft.hub.pulling import Place, Token
from point_peft.running.forward import close_forward, open_forward, opened, reopen, replica
from point_peft.running.reading import depth, unwind
from point_peft.running.replay import mark
from point_peft.torch_private import is_compiled
from point_peft.tracing import understand

M = TypeVar("M", bound=nn.Module)


class PointPeftModel(AdapterSet):
    """A frozen backbone with adapters. Made by `get_peft_model` or `from_pretrained`.

    What it does not have itself is looked up on the backbone: `model.forward_features(x)` runs the adapted backbone's.
    """

    def _hold(self, model: nn.Module) -> None:
        self.base_model = model
        self._state_signature()

    def _state_signature(self) -> None:
        kind: Any = type(self)
        model: Any = type(self.base_model)
        self.__class__ = _with_signature(kind, model)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class that was made for this backbone has no name that pickle would find it by; it is made again.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _blank, type(self).__bases__, *reduced[2:]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._state_signature()

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | str | None = None, **kwargs: Any) -> Any:
        """Run the backbone with the active adapters; arguments and result are the backbone's.

        `adapter_names` names an adapter for each sample instead, None for the plain backbone, or is "auto" for those
        that `route` chooses; see `forward_mixed`.
        """
        before, reads = opened(self), depth()
        try:
            if adapter_names is not None:
                return self.forward_mixed(args, kwargs, adapter_names)
            if self.__dict__.get("_is_replica", False):
                with replica(self):
                    return self.base_model(*args, **kwargs)
            return self.base_model(*args, **kwargs)
        finally:
            # Hooks end a forward, but not one that Ctrl-C ends.
            reopen(self, before)
            unwind(reads)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:
                raise
            value = getattr(self.base_model, name)
        if inspect.ismethod(value) and value.__self__ is self.base_model:
            return _Method(self, name)
        return value

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        source: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        heads: Mapping[str, HeadSource] | None = None,
        example_inputs: Any = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> PointPeftModel:
        """Adapt a backbone, in place, with the adapter of a folder or of a repository of the Hub ("owner/name").

        On any error the backbone is as it was. See `load_adapter`.
        """
        _check_plain(model)
        peft_model = PointPeftModel(model, understood(model, example_inputs))
        place = Place(subfolder, revision, token, cache_dir, local_files_only, force_download)
        peft_model._load(source, adapter_name, is_trainable, heads, autocast_adapter_dtype, place)
        return peft_model


def _blank(kind: type[M]) -> M:
    """An object of a class, without state: the beginning of a copy."""
    return kind.__new__(kind)


@functools.lru_cache(maxsize=256)
def _with_signature(kind: type[Any], model: type[nn.Module]) -> type[Any]:
    """The class of adapted models whose forward states the arguments of that of a class of models.

    Trainers ask a model's class which columns of a data set it takes, and whether labels are among them.
    """
    signature = inspect.signature(model.forward)
    own = dict(inspect.signature(kind.forward).parameters)
    parameters = {**signature.parameters, "adapter_names": own["adapter_names"]}
    order = sorted(parameters.values(), key=lambda parameter: parameter.kind)
    forward = FunctionType(kind.forward.__code__, kind.forward.__globals__, "forward", kind.forward.__defaults__)
    functools.update_wrapper(
        forward, kind.forward, assigned=("__doc__", "__kwdefaults__", "__module__", "__qualname__")
    )
    forward.__dict__["__signature__"] = signature.replace(parameters=order)
    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__})


class _Method:
    """A method of the backbone, run as a forward of the adapted model."""

    def __init__(self, root: PointPeftModel, name: str) -> None:
        self.root = root
        self.name = name
        functools.update_wrapper(self, getattr(root.base_model, name), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        base, output = self.root.base_model, None
        follow_modules(base, args)
        forward = open_forward(self.root, args, kwargs)
        forward.method = self.name
        try:
            args, kwargs = fit_inputs(forward)
            begin_proof(forward, base)
            output = getattr(base, self.name)(*args, **kwargs)
        finally:
            close_forward(forward)
            end_proof(forward, base, output)
        if torch.is_grad_enabled():
            mark(self.root.key, forward, output)
        return output


def get_peft_model(
    model: nn.Module,
    config: TunerConfig | PeftConfig,
    adapter_name: str = "default",
    *,
    example_inputs: Any = None,
    memory_bank: Tensor | None = None,
    heads: Mapping[str, HeadSource] | None = None,
    autocast_adapter_dtype: bool = True,
) -> PointPeftModel:
    """Freeze a backbone and give it a trainable adapter. The given model is changed in place.

    `example_inputs` (a tensor, a tuple of positional or a dict of named arguments) lets one forward be traced, for a
    model that no preset describes, or to verify what a preset says. `memory_bank` (rows, c) is the bank of Point-PEFT,
    if it is at hand. `heads` gives the adapter heads of its own shape: module name -> module, or a function that makes
    one. What is trained is float32 where the backbone is in half precision, as an optimizer and a gradient scaler need
    it; `autocast_adapter_dtype=False` keeps the backbone's type.

    On any error the model is as it was, bit for bit.

    >>> import torch
    >>> from point_peft import LoraConfig, get_peft_model
    >>> from point_peft.backbones import PointTransformer
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> model, clouds = get_peft_model(backbone, LoraConfig(r=4)), torch.rand(4, 64, 3)
    >>> model(clouds).shape
    torch.Size([4, 15])
    """
    _check_plain(model)
    peft_model = PointPeftModel(model, understood(model, example_inputs))
    peft_model.add_adapter(
        adapter_name, config, heads=heads, memory_bank=memory_bank, autocast_adapter_dtype=autocast_adapter_dtype
    )
    return peft_model


def inject_adapter(
    model: M,
    config: TunerConfig | PeftConfig,
    adapter_name: str = "default",
    *,
    example_inputs: Any = None,
    memory_bank: Tensor | None = None,
    heads: Mapping[str, HeadSource] | None = None,
    autocast_adapter_dtype: bool = True,
) -> M:
    """Like `get_peft_model`, for a model that keeps its own class and forward; returns that model.

    Its adapters are its child `point_peft` (an `AdapterSet`), with all that can be done to them; a further call adds a
    further adapter. The model's own tensors keep their names; a checkpoint of the backbone alone still loads.

    >>> from point_peft import LoraConfig, inject_adapter
    >>> from point_peft.backbones import PointTransformer
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> backbone = inject_adapter(backbone, LoraConfig(r=4))
    >>> backbone.point_peft.active_adapters
    ('default',)
    """
    adapters = adapters_for(model, example_inputs)
    adapters.add_adapter(
        adapter_name, config, heads=heads, memory_bank=memory_bank, autocast_adapter_dtype=autocast_adapter_dtype
    )
    model._modules[CHILD] = adapters
    return model


def adapters_for(model: nn.Module, example_inputs: Any = None) -> AdapterSet:
    """The adapters that a model holds as its child, or for one that has none an empty set, which is not put there."""
    held = model._modules.get(CHILD)
    if isinstance(held, AdapterSet):
        return held
    _check_plain(model)
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise AdapterError(f"a {type(model).__name__} would run its adapters as one of its layers: use get_peft_model")
    return AdapterSet(model, understood(model, example_inputs))


def describe(model: nn.Module, *example_inputs: Any) -> Anatomy:
    """The library's understanding of a backbone; `str()` of the result is readable.

    Without example inputs only what structure and presets tell; with them, a forward is traced, which also verifies
    what a preset says. Of an adapted model it is what its adapters go by.

    >>> from point_peft import describe
    >>> from point_peft.backbones import PointTransformer
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> [block.path for block in describe(backbone).blocks]
    ['blocks.blocks.0', 'blocks.blocks.1']
    """
    held = model if isinstance(model, AdapterSet) else model._modules.get(CHILD)
    if isinstance(held, AdapterSet) and held.anatomy is not None:
        return held.anatomy
    return understand(model, example_inputs or None)


def understood(model: nn.Module, example_inputs: Any) -> Anatomy | AnatomyError:
    """The anatomy of a model, or why it is not known."""
    try:
        return understand(model, example_inputs)
    except AnatomyError as error:
        return error


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PointPeftError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, AdapterSet):
        raise AdapterError("the model is adapted already: use add_adapter")
    for path, module in model.named_modules():
        if is_compiled(module):
            raise AdapterError(
                f"'{path or type(model).__name__}' is compiled already, and what is compiled sees no adapter: adapt "
                "first, then compile, torch.compile(get_peft_model(model, ...))"
            )
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            raise AdapterError(
                f"'{path or type(model).__name__}' is a module of TorchScript, in which nothing can be put: adapt "
                "first, then compile or export"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise AdapterError(
                f"'{path or type(model).__name__}' is wrapped by DistributedDataParallel already, which would not see "
                "the tensors of an adapter: adapt first, then wrap"
            )
        if SITE in module.__dict__ or isinstance(module, AdapterSet):
            raise AdapterError(
                f"'{path or type(model).__name__}' is part of an adapted model already: use its add_adapter"
            )
