"""point_peft's methods in the PEFT package: import this module, then PEFT takes point_peft's configurations.

    import peft
    import point_peft.integrations.peft
    from point_peft import PointPEFTConfig

    model = peft.get_peft_model(backbone, PointPEFTConfig())

`peft.get_peft_model` and `add_adapter` are replaced by functions that take point_peft's configurations as well, and
leave all others to PEFT. Code that did `from peft import get_peft_model` before this import still has PEFT's function;
it passes `wrap(config)`. A saved adapter is a folder as point_peft writes it, and either package loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from point_peft import model as point_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.site import SITE
from point_peft.config import CombinationType, MajoritySign, PeftConfig, TunerConfig
from point_peft.errors import AdapterError, PointPeftError
from point_peft.files.format import KEY_PREFIX, PEFT_TYPE
from point_peft.hub.pulling import Place, download
from point_peft.model import PointPeftModel
from point_peft.status import LayerStatus, ModelStatus
from point_peft.torch_private import IncompatibleKeys

try:
    import peft
except ImportError as error:
    raise ImportError("point_peft.integrations.peft needs the package peft: pip install point-peft[peft]") from error

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType, TaskType, register_peft_method

TASK_TYPE = "POINT_CLOUD"

Config = TunerConfig | PeftConfig


def _add_member(kind: type[Enum], name: str) -> None:
    """Add a member to an enumeration of strings; PEFT dispatches on members and has no function that adds one."""
    member: Any = str.__new__(kind, name)  # type: ignore[type-var]
    member._name_ = member._value_ = name
    setattr(kind, name, member)
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[name] = member


_add_member(PeftType, PEFT_TYPE)
_add_member(TaskType, TASK_TYPE)


@dataclass
class BridgeConfig(peft.PeftConfig):
    """A configuration of point_peft as PEFT holds it: its JSON values, for PEFT writes to its configurations.

    The fields are those of `point_peft.PeftConfig`, then those of a saved adapter, which PEFT reads by itself.
    """

    peft_type: str | PeftType | None = PEFT_TYPE
    task_type: str | TaskType | None = TASK_TYPE
    tuners: list[dict[str, Any]] = field(default_factory=list)
    modules_to_save: str | list[str] | None = None
    anatomy: dict[str, Any] | None = None
    heads: dict[str, Any] | None = None
    adapted_modules: list[str] | None = None
    base_fingerprint: dict[str, Any] | None = None
    format_version: int | None = None
    point_peft_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type, self.task_type = PeftType(PEFT_TYPE), TaskType(TASK_TYPE)

    @property
    def stated(self) -> PeftConfig:
        return PeftConfig.from_json({item.name: getattr(self, item.name) for item in fields(PeftConfig)})

    @property
    def from_file(self) -> bool:
        """True if this comes from a saved adapter."""
        return self.base_fingerprint is not None


def wrap(config: Config) -> BridgeConfig:
    """A configuration of point_peft for PEFT's own functions; it is not changed, whatever they do to the result."""
    return BridgeConfig(**PeftConfig.of(config).to_json())


class PointPeftTuner(nn.Module):
    """A tuner in PEFT's words, around a `PointPeftModel`, which has whatever PEFT does not ask for by another name."""

    uses_shared_state = True
    """PEFT's mark of tuners that are more than layers put into a model: `inject_adapter_in_model` refuses them."""
    model: PointPeftModel

    def __init__(self, model: nn.Module, peft_config: dict[str, BridgeConfig], adapter_name: str) -> None:
        super().__init__()
        if any(isinstance(module, (BaseTunerLayer, peft.PeftModel, peft.PeftMixedModel)) for module in model.modules()):
            raise AdapterError(
                f"PEFT has adapted this {type(model).__name__} already: point_peft's methods cannot be put on top of "
                "PEFT's; call unload() first"
            )
        config = peft_config[adapter_name]
        self.peft_config = peft_config
        self.model = point_peft_model.get_peft_model(model, config.stated, adapter_name)
        self.set_requires_grad(adapter_name, not config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.model.active_adapters)

    def inject_adapter(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False) -> None:
        """Add the adapter that `peft_config` has under this name; as in PEFT, it is neither active nor trained yet."""
        self.model.add_adapter(adapter_name, self.peft_config[adapter_name].stated)
        self.model.freeze_adapter(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add a LoRA adapter that combines others, see `point_peft.PointPeftModel.add_weighted_adapter`."""
        self.model.add_weighted_adapter(
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        self.peft_config[adapter_name] = wrap(get_adapter(self.model, adapter_name).config)

    def load(self, folder: Path, adapter_name: str, is_trainable: bool) -> None:
        """Add the adapter of a folder, or put it in the place of the one of this name; on any error nothing changes."""
        active, replaces = self.model.active_adapters, adapter_name in self.model.adapters
        if replaces:
            # The check that it fits, while the present one is still there.
            spare = f"{adapter_name[:90]}-checked"
            self.model.load_adapter(folder, spare)
            self.model.delete_adapter(spare)
            self.model.delete_adapter(adapter_name)
        self.model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        if replaces:
            self.model.set_adapter(active)
        self.peft_config[adapter_name] = wrap(get_adapter(self.model, adapter_name).config)
        self.peft_config[adapter_name].inference_mode = not is_trainable

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones and, unless for inference, those that are trained."""
        self.model.set_adapter(adapter_name)
        self.model.freeze_adapter(list(self.model.adapters))
        self.set_requires_grad(adapter_name, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if requires_grad:
            self.model.train_adapter(adapter_names)
        else:
            self.model.freeze_adapter(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first of the others is active then, as in PEFT."""
        self.model.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        if self.peft_config and not self.active_adapters:
            self.set_adapter(next(iter(self.peft_config)))

    @classmethod
    def _get_adapter_state_dict(
        cls, *, model: PeftModelForPointCloud, adapter_name: str, state_dict: Mapping[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        """For `peft.get_peft_model_state_dict`: the adapter's tensors by their names in a file."""
        return {name: state_dict[key] for name, key in _keys(model, adapter_name).items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # a name in a file has none

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, *, model: PeftModelForPointCloud, adapter_name: str, state_dict: Mapping[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        """For `peft.set_peft_model_state_dict`: the tensors of a file by their names in the model."""
        keys = _keys(model, adapter_name)
        return {keys.get(name, name): tensor for name, tensor in state_dict.items()}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold one adapter into the backbone's weights; it is checked to be finite, asked for or not."""
        self.model.merge(_single(adapter_names))

    def unmerge_adapter(self) -> None:
        self.model.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold one adapter into the backbone for good and return the backbone."""
        return self.model.merge_and_unload(_single(adapter_names))


def _keys(model: PeftModelForPointCloud, adapter_name: str) -> dict[str, str]:
    """Name of a tensor of an adapter in its file -> key in the model's `state_dict()`."""
    keys = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    tensors = get_adapter(model.base_model.model, adapter_name).tensors()
    return {KEY_PREFIX + name: keys[id(tensor)] for name, tensor in tensors.items()}


def _single(names: list[str] | None) -> str | None:
    if names is not None and len(names) != 1:
        raise AdapterError(f"adapter_names is {names}; one adapter can be merged at a time: name one")
    return names[0] if names else None


class PeftModelForPointCloud(peft.PeftModel):
    """A backbone with adapters of point_peft as a `peft.PeftModel`.

    What it does not have itself is looked up on the `PointPeftModel` inside, then on the backbone.
    """

    base_model: PointPeftTuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: peft.PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        # Without PEFT's wishes for types and memory: point_peft makes adapters in the backbone's type and checks files
        # without memory anyway.
        super().__init__(model, peft_config, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model.get_base_model()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, and only in this thread or task, the model is the plain backbone."""
        with self.base_model.model.disable_adapter():
            yield

    def get_layer_status(self) -> list[LayerStatus]:  # type: ignore[override]
        return self.base_model.model.get_layer_status()

    def get_model_status(self) -> ModelStatus:  # type: ignore[override]
        return self.base_model.model.get_model_status()

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: peft.PeftConfig | Config,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter of any of point_peft's methods; it is not active until `set_adapter`."""
        config = _accepted(peft_config)
        if not isinstance(config, BridgeConfig):
            raise AdapterError(
                f"{type(config).__name__} is a configuration of PEFT: one model cannot have PEFT's adapters and "
                "point_peft's; point_peft has LoRA of its own, point_peft.LoraConfig"
            )
        super().add_adapter(adapter_name, config)

    def load_adapter(
        self,
        model_id: str | PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Add the adapter of a folder or of a repository, or put it in the place of the one of this name.

        Everything is checked first, see `point_peft.PointPeftModel.load_adapter`; the tensors go to the backbone's
        device. PEFT's options that say how to load are taken, and change nothing.
        """
        place = Place(**{item.name: kwargs[item.name] for item in fields(Place) if item.name in kwargs})
        config = self.peft_config.get(adapter_name)
        # PeftModel.from_pretrained has made an adapter by the file's configuration, to be replaced here.
        begun = len(self.peft_config) == 1 and isinstance(config, BridgeConfig) and config.from_file
        try:
            local = Path(model_id) / (place.subfolder or "")
            folder = local if local.is_dir() else download(str(model_id), place)
            self.base_model.load(folder, adapter_name, is_trainable)
        except PointPeftError:
            if begun:
                self.base_model.model.unload()
            raise
        if not is_trainable:
            self.eval()
        return IncompatibleKeys([], [])

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as `point_peft.PointPeftModel.save_pretrained` does, in the folders where PEFT has them.

        These are the folder itself for an adapter named "default", and a subfolder of its name for any other.
        """
        if not safe_serialization:
            raise AdapterError("safe_serialization is False; adapters of point_peft are saved as safetensors only")
        if not is_main_process:
            return
        for name in self.peft_config if selected_adapters is None else selected_adapters:
            folder = Path(save_directory) / ("" if name == "default" else name)
            self.base_model.model.save_pretrained(folder, name, format="point_peft")


# ---- what PEFT is told -----------------------------------------------------------------------------------------------


def _accepted(config: peft.PeftConfig | Config) -> peft.PeftConfig:
    return wrap(config) if isinstance(config, (TunerConfig, PeftConfig)) else config


_get_peft_model: Callable[..., Any] = peft.get_peft_model


@functools.wraps(_get_peft_model)
def get_peft_model(
    model: nn.Module,
    peft_config: peft.PeftConfig | Config,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    config = _accepted(peft_config)
    if isinstance(config, BridgeConfig):
        if mixed:
            raise AdapterError("mixed is True; a PeftMixedModel cannot have adapters of point_peft")
        # A copy, and a fresh adapter even where the configuration comes from a file.
        own = replace(config, revision=revision or config.revision, base_fingerprint=None)
        return PeftModelForPointCloud(model, own, adapter_name)
    if any(SITE in module.__dict__ for module in model.modules()):
        raise AdapterError(
            f"point_peft has adapted this {type(model).__name__} already: PEFT's methods cannot be put on top of "
            "point_peft's; call unload() first"
        )
    return _get_peft_model(model, config, adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage)


def _accepting(add_adapter: Callable[..., None]) -> Callable[..., None]:
    """The `add_adapter` of a model of PEFT's own methods: it has a sentence for ours too, once it understands them."""

    @functools.wraps(add_adapter)
    def accepting(self: nn.Module, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        add_adapter(self, adapter_name, _accepted(peft_config), *args, **kwargs)

    return accepting


register_peft_method(name=PEFT_TYPE.lower(), config_cls=BridgeConfig, model_cls=PointPeftTuner)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASK_TYPE] = PeftModelForPointCloud
setattr(peft, "get_peft_model", get_peft_model)  # noqa: B010
setattr(peft.mapping_func, "get_peft_model", get_peft_model)  # noqa: B010
for _kind in (peft.PeftModel, peft.PeftMixedModel):
    setattr(_kind, "add_adapter", _accepting(_kind.add_adapter))  # noqa: B010
