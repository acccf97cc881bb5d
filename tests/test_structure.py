"""The form of the code, enforced over its syntax trees: who imports whom, how long things are, which names they bear.

Imports go up one list, so that each file can be read with only those above it in mind. The core names no method: one is
added, or taken out, with its folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "point_peft"

ORDER = [
    "errors",
    "version",
    "torch_private",
    "schema",
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
    "bank",
    "routing",
    "status",
    "parameter_groups",
    "adapter_set",
    "model",
    "starting",
    "extracting",
    "profiles",
    "data",
    "library",
    "training",
    "integrations",
    "demo",
    "cli",
    "__main__",
    "quickstart",
]
"""A module imports only what stands before it. "tuners.*" is each method's folder, which sees no other method; "tuners"
is the file that gathers them."""
EXAMPLE = "quickstart"
"""The example that the package has in it: as short as the others, and in the words of its reader."""
PIPELINE = tuple(PACKAGE / name for name in ("data", "training"))
BACKBONES_SEE = {"errors", "geometry"}
"""The reference backbones know nothing of the library, and the library knows nothing of them."""
NAMES_BACKBONES = ("training.models", "demo.task", "quickstart.tour", "quickstart.compare")
"""Modules that give users backbones by name, or that are written as a user's own."""

METHODS = sorted(path.parent.name for path in PACKAGE.glob("tuners/*/__init__.py"))
MAY_NAME_METHODS = ("tuners", "integrations", "backbones", "", "cli", "__main__", "profiles", "extracting", EXAMPLE)
"""Packages that are made for methods; "" is the list of public names in point_peft/__init__.py."""
NO_NAMES_OF_METHODS = {
    "bottleneck": "the field's word for a down- and an up-projection, a layer of which several methods are made",
    "point_peft": "the name of the package; what the method of that name defines may not be named all the same",
}

TORCH_PRIVATE = "torch_private"
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_CLASS, LONGEST_EXAMPLE = 500, 60, 350, 150
READ_IN_AN_HOUR = tuple(
    f"{name}.py"
    for name in (
        "adapting/adapter",
        "adapting/planning",
        "adapting/attaching",
        "adapting/hooks",
        "running/forward",
        "running/handover",
    )
)
LATE_IMPORTS: dict[str, str] = {
    "__init__": "a method that is dropped into tuners/ is imported by the name of its folder"
}
"""Modules that import inside a function, with the reason."""
SAME_NAMES = {
    "Block": "backbones bear the names of the published code, which users' checkpoints and scripts know",
    "get_peft_model": "the bridge to PEFT has the doors of PEFT, by the names of PEFT",
}
"""Public names that two modules define, with the reason."""


@dataclass(frozen=True)
class Source:
    """A file of Python code."""

    path: Path

    @cached_property
    def lines(self) -> int:
        return len(self.path.read_text("utf-8").splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text("utf-8"))

    @cached_property
    def module(self) -> str:
        """The name inside the package; "" is the package itself."""
        return ".".join(self.path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    def definitions(self) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node


@cache
def sources(folder: Path) -> list[Source]:
    return [Source(path) for path in sorted(folder.rglob("*.py"))]


def package() -> list[Source]:
    return sources(PACKAGE)


def assert_none(broken: Iterable[str], rule: str) -> None:
    listed = sorted(set(broken))
    assert not listed, f"{rule}:\n  " + "\n  ".join(listed)


# ---- imports ---------------------------------------------------------------------------------------------------------


def unit(module: str) -> str:
    """The file or folder that a module of the package belongs to: a method's folder, else the first component."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tuners" else parts[0]


def rank(module: str) -> int:
    layer = unit(module)
    layer = "tuners.*" if layer.startswith("tuners.") else layer
    assert layer in ORDER, f"point_peft/{module} has no place: give it one in ORDER of {__file__}"
    return ORDER.index(layer)


def may_import(importer: str, imported: str) -> bool:
    if importer == "" or unit(importer) == unit(imported):
        return True
    if unit(importer) == "backbones":
        return unit(imported) in BACKBONES_SEE
    if imported == "" or unit(imported) == "backbones":
        return importer in NAMES_BACKBONES
    return rank(imported) < rank(importer)


def imports(importer: str, tree: ast.Module, modules: set[str], *, is_package: bool = False) -> set[str]:
    """The modules of the package that a tree imports anywhere; "" is the package itself."""
    package = ["point_peft", *filter(None, importer.split("."))]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = package[: len(package) - up] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                names.add(name if name.removeprefix("point_peft.") in modules else origin)
    return {name.removeprefix("point_peft").lstrip(".") for name in names if f"{name}.".startswith("point_peft.")}


def imports_of(source: Source) -> set[str]:
    modules = {other.module for other in package()}
    return imports(source.module, source.tree, modules, is_package=source.path.name == "__init__.py")


def test_imports_go_up_the_list() -> None:
    wrong = [
        f"{source} imports point_peft.{name}"
        for source in package()
        for name in imports_of(source)
        if not may_import(source.module, name)
    ]
    assert_none(wrong, "a module imports only what stands before it in ORDER")
    unknown = {unit(source.module) for source in package() if source.module} - {"backbones"}
    assert all(rank(name) >= 0 for name in unknown)


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("", "from .backbones import PointTransformer", True),
        ("hub", "from . import model", False),
        ("hub", "def late():\n    import point_peft.model", False),
        ("files", "from point_peft import get_peft_model", False),
        ("config", "from . import errors, geometry", True),
        ("backbones.point_transformer", "from ..anatomy import Anatomy", False),
        ("tuners.lora.layer", "from ...parts import base\nfrom .config import A\nfrom ... import config", True),
        ("tuners.lora.layer", "from ..prompt.layer import Prompt", False),
    ],
)
def test_imports_are_read_in_every_form(importer: str, source: str, allowed: bool) -> None:
    modules = {*ORDER, "backbones", "tuners.lora", "tuners.lora.layer", "tuners.prompt.layer"}
    assert all(may_import(importer, name) for name in imports(importer, ast.parse(source), modules)) == allowed


def test_nothing_is_imported_inside_a_function() -> None:
    late = [
        f"{source}:{inner.lineno} in {node.name}()"
        for source in package()
        if source.module not in LATE_IMPORTS
        for node in source.definitions()
        if not isinstance(node, ast.ClassDef)
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]
    assert_none(late, "imports stand at the top of a file")


def test_every_folder_is_a_package_and_so_gets_installed() -> None:
    folders = {source.path.parent for source in package()}
    assert_none([str(folder) for folder in folders if not (folder / "__init__.py").exists()], "without __init__.py")


# ---- torch's private names -------------------------------------------------------------------------------------------


def torch_private_names(tree: ast.Module) -> Iterator[str]:
    """Names of torch, or of something in it, that begin with one underscore, as `torch._C` and `torch.nn._reduction`.

    Private attributes of torch's objects (`module._parameters`) are not among them: they have no other name.
    """
    bound = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
            yield from (name for name in names if _private(name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            bound.update(alias.asname or alias.name for alias in node.names)
            yield from (name for name in (f"{node.module}.{alias.name}" for alias in node.names) if _private(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(f".{node.attr}"):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in bound:
                yield ast.unparse(node)


def _private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_torch_s_private_names_stand_in_one_file() -> None:
    used = [f"{s}: {name}" for s in package() if s.module != TORCH_PRIVATE for name in torch_private_names(s.tree)]
    assert_none(used, f"names that torch calls private stand in point_peft/{TORCH_PRIVATE}.py only")
    code = "import torch._C\nfrom torch.nn import _reduction, functional as F\ntorch._C.x()\nF._y\nself._z\ntorch.__x__"
    assert set(torch_private_names(ast.parse(code))) == {"torch._C", "torch.nn._reduction", "F._y"}


# ---- lengths ---------------------------------------------------------------------------------------------------------


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from its first decorator to its end, without its docstring and the docstrings of what it holds."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = (node.end_lineno or node.lineno) - first + 1
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(inner):
            lines -= (inner.body[0].end_lineno or 0) - inner.body[0].lineno + 1
    return lines


def test_files_functions_and_classes_are_short() -> None:
    ours = [source for name in ("point_peft", "benchmarks", "tools", "examples") for source in sources(ROOT / name)]
    long = [f"{source}: {source.lines} lines" for source in ours if source.lines > LONGEST_FILE]
    examples = [*sources(ROOT / "examples"), *sources(PACKAGE / EXAMPLE)]
    long += [f"{s}: {s.lines} lines" for s in examples if s.lines > LONGEST_EXAMPLE]
    for source in ours:
        for node in source.definitions():
            most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            if length(node) > most:
                long.append(f"{source}: {node.name} has {length(node)} lines")
    assert_none(long, f"files {LONGEST_FILE}, functions {LONGEST_FUNCTION}, classes {LONGEST_CLASS} lines at most")


def test_the_package_is_small() -> None:
    backbones, example, demo = PACKAGE / "backbones", PACKAGE / EXAMPLE, PACKAGE / "demo"
    others = {backbones, example, demo, *PIPELINE}
    sizes = {
        "the engine": (22_500, [s for s in package() if not others & set(s.path.parents)]),
        "the page to try": (1_900, [s for s in package() if demo in s.path.parents]),
        "from files to a run": (8_300, [s for s in package() if set(PIPELINE) & set(s.path.parents)]),
        "the flagship": (990, sources(PACKAGE / "tuners" / "point_peft")),
        "what is read in an hour": (950, [Source(PACKAGE / name) for name in READ_IN_AN_HOUR]),
    }
    large = []
    for what, (most, files) in sizes.items():
        lines = sum(source.lines for source in files if source.path.exists())
        missing = [str(source) for source in files if not source.path.exists()]
        if lines > most or missing:
            large.append(f"{what}: {lines} lines, at most {most} {' '.join(missing)}")
    assert_none(large, "lines in all")


# ---- names -----------------------------------------------------------------------------------------------------------


def words(identifier: str) -> list[str]:
    """The words of an identifier: `PointLoRAConfig` -> point, lo, ra, config; `ga_prompt` -> ga, prompt."""
    parts = re.split(r"_|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", identifier)
    return [part.lower() for part in parts if part]


def named_methods(identifier: str) -> list[str]:
    """The methods whose name is in an identifier: whole words of it, as an `adapter` does not name DAPT."""
    parts = words(identifier)
    runs = {"".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return [method for method in METHODS if method.replace("_", "") in runs]


def identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg
        elif isinstance(node, ast.alias):
            yield from (node.name.split(".")[-1], node.asname or "")


def core() -> list[Source]:
    return [source for source in package() if source.module.split(".")[0] not in MAY_NAME_METHODS]


def test_the_core_imports_no_method() -> None:
    wrong = [f"{s} imports point_peft.{name}" for s in core() for name in imports_of(s) if name.startswith("tuners.")]
    assert_none(wrong, "what the core asks of a method is an answer of its parts")


def test_the_core_names_no_method() -> None:
    ours = {name for source in core() for name in top_level_names(source)}
    of_methods = {name for source in sources(PACKAGE / "tuners") for name, _ in public_names(source)} - ours
    named = [
        f"{source}: {name}"
        for source in core()
        for name in set(identifiers(source.tree))
        if (name in of_methods and name[0].isupper()) or set(named_methods(name)) - set(NO_NAMES_OF_METHODS)
    ]
    registered = {method.upper() for method in METHODS} - {name.upper() for name in NO_NAMES_OF_METHODS}
    named += [
        f"{source}: {node.value!r}"
        for source in core()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value in registered
    ]
    assert_none(named, "the core names no method")


def test_the_names_of_methods_are_found_in_identifiers() -> None:
    named = {"PointLoRAConfig": ["lora", "point_lora"], "IA3Config": ["ia3"], "is_ga_prompt": ["ga_prompt"]}
    assert {name: named_methods(name) for name in named} == named
    assert not any(map(named_methods, ("adapter", "management", "explorable", "Segment")))


def top_level_names(source: Source) -> Iterator[str]:
    yield from (name for name, _ in public_names(source))
    for node in source.tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def public_names(source: Source) -> Iterator[tuple[str, int]]:
    for node in source.tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node.name, node.lineno


def test_no_two_things_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for source in package():
        for name, line in public_names(source) if unit(source.module) != EXAMPLE else ():
            places.setdefault(name, []).append(f"{source}:{line}")
    twice = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert_none([line for line in twice if line.split(":")[0] not in SAME_NAMES], "one name, one thing")
    folded: dict[str, set[str]] = {}
    for name in places:
        if name[0].isupper():
            folded.setdefault(name.lower(), set()).add(name)
    assert_none([" ".join(sorted(names)) for names in folded.values() if len(names) > 1], "names differ by case only")


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    wrong = []
    for source in package():
        for text, line in docstrings(source.tree):
            if re.match(r"(What|Whether|How|Who)\b", text):
                wrong.append(f"{source}:{line} {text.splitlines()[0]}")
    assert_none(wrong, "not with What, Whether, How or Who")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Those of modules, classes and functions, and those that stand below an attribute or a name."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, (ast.Lambda, ast.IfExp)) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value.strip(), statement.lineno
