"""point_peft: parameter-efficient fine-tuning of 3D point-cloud models.

from point_peft import PointPEFTConfig, get_peft_model
model = get_peft_model(backbone, PointPEFTConfig())
model.print_trainable_parameters()
"""

from __future__ import annotations

import importlib
import pkgutil

from point_peft import tuners
from point_peft.anatomy import Anatomy
from point_peft.config import METHODS, PeftConfig, TunerConfig
from point_peft.errors import AdapterError, AdapterFileError, AnatomyError, MatchError, PointPeftError
from point_peft.model import PointPeftModel, describe, get_peft_model, inject_adapter
from point_peft.tuners.bitfit import BitFitConfig
from point_peft.tuners.linear_probe import LinearProbeConfig
from point_peft.tuners.lora import LoraConfig
from point_peft.tuners.point_peft import PointPEFTConfig
from point_peft.version import __version__

for _folder in pkgutil.iter_modules(tuners.__path__, f"{tuners.__name__}."):
    if _folder.ispkg:
        importlib.import_module(_folder.name)

__all__ = [
    "METHODS",
    "AdapterError",
    "AdapterFileError",
    "Anatomy",
    "AnatomyError",
    "BitFitConfig",
    "LinearProbeConfig",
    "LoraConfig",
    "MatchError",
    "PeftConfig",
    "PointPEFTConfig",
    "PointPeftError",
    "PointPeftModel",
    "TunerConfig",
    "__version__",
    "describe",
    "get_peft_model",
    "inject_adapter",
]
