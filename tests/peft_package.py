"""The PEFT package. It imports torchvision, which needs a hand beside a torch that is built for CPUs."""

from __future__ import annotations

import importlib
from typing import Any

from tests.zoo.operators import supply_torchvision_schemas

LIBRARY = supply_torchvision_schemas()
peft: Any = importlib.import_module("peft")
