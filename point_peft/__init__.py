"""point_peft: parameter-efficient fine-tuning of 3D point-cloud models.

from point_peft import PointPEFTConfig, get_peft_model
model = get_peft_model(backbone, PointPEFTConfig())
model.print_trainable_parameters()
"""

import importlib
import pkgutil

# Before anything of the package is imported: see point_peft.tuners.
__path__ = pkgutil.extend_path(__path__, __name__)

from point_peft import tuners
from point_peft.anatomy.description import Anatomy
from point_peft.config import METHODS, PeftConfig, TunerConfig
from point_peft.errors import (
    AdapterError,
    AdapterFileError,
    AnatomyError,
    DataError,
    HubError,
    MatchError,
    PointPeftError,
)
from point_peft.extracting import convert_to_lora, extract
from point_peft.hub.pulling import list_adapters
from point_peft.library.adapter_library import AdapterLibrary, LibraryStatus
from point_peft.library.entry import LibraryEntry
from point_peft.model import PointPeftModel, describe, get_peft_model, inject_adapter
from point_peft.starting import initialise
from point_peft.tuners.bitfit import BitFitConfig
from point_peft.tuners.bottleneck import BottleneckConfig
from point_peft.tuners.dapt import DAPTConfig
from point_peft.tuners.ga_prompt import GAPromptConfig
from point_peft.tuners.gem import GEMConfig
from point_peft.tuners.gft import GFTConfig
from point_peft.tuners.ia3 import IA3Config
from point_peft.tuners.idpt import IDPTConfig
from point_peft.tuners.input_adapter import InputAdapterConfig
from point_peft.tuners.linear_probe import LinearProbeConfig
from point_peft.tuners.lora import LoraConfig
from point_peft.tuners.norm_tuning import NormTuningConfig
from point_peft.tuners.point_gst import PointGSTConfig
from point_peft.tuners.point_lora import PointLoRAConfig
from point_peft.tuners.point_peft import PointPEFTConfig
from point_peft.tuners.point_tpa import PointTPAConfig
from point_peft.tuners.ppt import PPTConfig
from point_peft.tuners.routing_bank import RoutingBankConfig
from point_peft.tuners.ssf import SSFConfig
from point_peft.tuners.stag import STAGConfig
from point_peft.tuners.vpt import VPTConfig
from point_peft.version import __version__

for _module in pkgutil.iter_modules(tuners.__path__, f"{tuners.__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "METHODS",
    "AdapterError",
    "AdapterFileError",
    "AdapterLibrary",
    "Anatomy",
    "AnatomyError",
    "BitFitConfig",
    "BottleneckConfig",
    "DAPTConfig",
    "DataError",
    "GAPromptConfig",
    "GEMConfig",
    "GFTConfig",
    "HubError",
    "IA3Config",
    "IDPTConfig",
    "InputAdapterConfig",
    "LibraryEntry",
    "LibraryStatus",
    "LinearProbeConfig",
    "LoraConfig",
    "MatchError",
    "NormTuningConfig",
    "PPTConfig",
    "PeftConfig",
    "PointGSTConfig",
    "PointLoRAConfig",
    "PointPEFTConfig",
    "PointPeftError",
    "PointPeftModel",
    "PointTPAConfig",
    "RoutingBankConfig",
    "SSFConfig",
    "STAGConfig",
    "TunerConfig",
    "VPTConfig",
    "__version__",
    "convert_to_lora",
    "describe",
    "extract",
    "get_peft_model",
    "initialise",
    "inject_adapter",
    "list_adapters",
]
