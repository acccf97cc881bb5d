"""Imports go down one list of layers, so that each file can be read with only those above it in mind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "point_peft"

# A module imports only what stands before it. "tuners.*" is each method's folder, which sees no other method;
# "tuners" is the file that gathers them.
LAYERS = [
    "errors",
    "version",
    "nearest",
    "expressions",
    "matching",
    "geometry",
    "anatomy",
    "running",
    "tracing",
    "parts",
    "config",
    "tuners.*",
    "tuners",
    "adapting",
    "heads",
    "files",
    "hub",
    "model",
    "integrations",
    "cli",
    "__main__",
]
# The reference backbones know nothing of the library, and the library knows nothing of them.
BACKBONES_SEE = {"errors", "geometry"}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def unit(module: str) -> str:
    """The file or folder that a module of the package belongs to: a method's folder, else the first component."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tuners" else parts[0]


def rank(module: str) -> int:
    layer = unit(module)
    if layer.startswith("tuners.") and layer not in LAYERS:
        layer = "tuners.*"
    assert layer in LAYERS, f"point_peft/{module} is in no layer: give it its place in LAYERS of {__file__}"
    return LAYERS.index(layer)


def may_import(importer: str, imported: str) -> bool:
    if importer == "" or unit(importer) == unit(imported):
        return True
    if unit(importer) == "backbones":
        return unit(imported) in BACKBONES_SEE
    if imported == "" or unit(imported) == "backbones":
        return False
    return rank(imported) < rank(importer)


def imports(importer: str, source: str, modules: set[str], *, is_package: bool = False) -> set[str]:
    """The modules of the package that a source imports anywhere; "" is the package itself."""
    package = ["point_peft", *filter(None, importer.split("."))]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = package[: len(package) - up] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                found.add(name if name.removeprefix("point_peft.") in modules else origin)
    return {name.removeprefix("point_peft").lstrip(".") for name in found if f"{name}.".startswith("point_peft.")}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    if module and unit(module) != "backbones":
        rank(module)
    path = FILES[module]
    seen = imports(module, path.read_text("utf-8"), set(FILES), is_package=path.name == "__init__.py")
    wrong = sorted(name for name in seen if not may_import(module, name))
    assert not wrong, f"{path} may not import {', '.join(f'point_peft.{name}' for name in wrong)}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values()}), ids=lambda path: path.name)
def test_every_folder_is_a_package_and_so_gets_installed(folder: Path) -> None:
    assert folder == PACKAGE or (folder / "__init__.py").exists()


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("", "from .backbones import PointTransformer", True),
        ("model", "from point_peft.hub import push\nimport torch, point_peft.errors", True),
        ("hub", "from point_peft import model", False),
        ("hub", "from . import model", False),
        ("hub", "from .model import PointPeftModel", False),
        ("integrations.peft", "import peft\nfrom point_peft.model import PointPeftModel", True),
        ("integrations.peft", "from point_peft import PointPeftModel", False),
        ("hub", "import point_peft.integrations.peft", False),
        ("hub", "def late():\n    import point_peft.model", False),
        ("files", "import point_peft", False),
        ("files", "from point_peft import get_peft_model", False),
        ("config", "from point_peft_other import hub", True),
        ("config", "from . import errors, geometry", True),
        ("anatomy", "from .backbones import PointTransformer", False),
        ("backbones.point_transformer", "from ..geometry import knn\nfrom . import layers", True),
        ("backbones.point_transformer", "from ..anatomy import Anatomy", False),
        ("tuners.lora.layer", "from ...parts import base\nfrom .config import LoraConfig\nfrom ... import config", True),
        ("tuners.lora.layer", "from ..prompt.layer import Prompt", False),
        ("tuners.lora.layer", "from ...model import PointPeftModel", False),
        ("parts", "from .tuners.lora.layer import Lora", False),
        ("adapting", "from .tuners.lora import Lora", True),
    ],
)
def test_the_rule_itself(importer: str, source: str, allowed: bool) -> None:
    modules = {*LAYERS, "backbones", "integrations.peft", "tuners.lora", "tuners.lora.layer", "tuners.prompt.layer"}
    assert all(may_import(importer, name) for name in imports(importer, source, modules)) == allowed


def test_an_unknown_file_is_refused() -> None:
    with pytest.raises(AssertionError, match="LAYERS"):
        rank("utils")
