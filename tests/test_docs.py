"""The README and the pages under docs/: short enough, their links lead somewhere, their code runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tests.peft_package  # noqa: F401 - PEFT, for the page that imports it, as it has to be beside a torch for CPUs
from point_peft import LoraConfig, cli, get_peft_model
from point_peft.backbones import PointTransformer, default_backbone
from point_peft.training import pictures
from tests.following import (
    PROGRAMS,
    blocks,
    check_launcher,
    check_make,
    check_pip,
    check_python,
    commands_of,
    follow,
    read_point_peft,
    run_line,
)
from tests.hub_server import HubServer
from tests.test_train_command import BRIEF, HERE, PNG, write_rocks
from tests.zoo import operators

pytest_plugins = ["tests.hub_fixture"]

ROOT = Path(__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
]
COMPARING = "## Comparing two adapters"
"""The section of docs/many_adapters.md that tests/test_compare_command.py follows, which has runs to compare."""
FOLLOWED = {
    f"docs/{page}.md": f"test_{page}.py"
    for page in (
        "from_a_fork",
        "from_peft",
        "own_backbone",
        "own_method",
        "several_gpus",
        "sharing",
        "tour",
        "your_data",
    )
}
"""Page -> the test that follows it, and looks at what comes of it."""
READ_ONLY = {
    "README.md": "50 epochs; tests/test_your_data.py runs these commands on few clouds",
    "docs/demo.md": "a server, which never ends; tests/test_demo_browser.py runs it",
    "docs/many_adapters.md": "of a large model; tests/test_extract_command.py runs extract",
}
"""Page -> the reason why the arguments of its commands are read and no more."""


# ---- pages whose code needs something to be there --------------------------------------------------------------------


def adapters(hub: HubServer) -> None:
    """A library of one adapter."""
    model = get_peft_model(default_backbone(cls_dim=10), LoraConfig())
    model.eval()(torch.rand(2, 256, 3))
    model.save_pretrained("adapters/kitchen/grasp")


def a_checkpoint(hub: HubServer) -> None:
    """What a pre-training of Point-MAE leaves."""
    torch.save(PointTransformer(cls_dim=15).state_dict(), "pretrain.pth")


def runs(hub: HubServer) -> None:
    """A backbone of one's own, an adapter of it without a head, and runs on few clouds."""
    lines = [
        "import torch",
        "from point_peft.backbones import default_backbone",
        "def backbone():",
        "    torch.manual_seed(0)  # of the head, which is drawn",
        "    return default_backbone(10)",
        "",
    ]
    Path("my_models.py").write_text("\n".join(lines))
    torch.manual_seed(0)
    get_peft_model(default_backbone(10), LoraConfig(modules_to_save=[])).save_pretrained("adapters/lora")
    scans = write_rocks(Path("scans"))
    for name, method in {"full": "full", "first": "lora", "second": "bitfit"}.items():
        how = [*BRIEF, "--backbone", f"{HERE}:make", "--method", method]
        assert cli.main(["train", str(scans), "--out", f"runs/{name}", *how]) == 0


def operators_of_others(hub: HubServer) -> None:
    """What torch-pointcloud's models need of packages that PyPI lacks, or that are made for GPUs."""
    operators.supply_pyg_operators()
    operators.supply_ocnn()
    operators.supply_spconv_on_cpu()


PREPARED: dict[str, Callable[[HubServer], None]] = {
    "docs/backbones.md": a_checkpoint,
    "docs/files.md": runs,
    "docs/many_adapters.md": adapters,
    "docs/scenes.md": operators_of_others,
}
"""Page -> what has to be in its folder before."""


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FOLLOWED])
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
@pytest.mark.filterwarnings("ignore:the memory bank is empty:UserWarning")
def test_code_runs(page: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page).read_text("utf-8").partition(COMPARING)[0]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("curves", "confusions", "samples"):
        monkeypatch.setattr(pictures, name, lambda *arguments: PNG)
    if page in PREPARED:
        PREPARED[page](hub)
    torch.manual_seed(0)
    follow(text, {}, page, commands_run=page not in READ_ONLY)


def test_pages_that_are_followed_elsewhere_are() -> None:
    for page, test in FOLLOWED.items():
        if (ROOT / page).exists():
            assert Path(page).name in (ROOT / "tests" / test).read_text("utf-8")
    assert COMPARING in (ROOT / "tests" / "test_compare_command.py").read_text("utf-8")
    assert {*READ_ONLY, *PREPARED} <= set(PAGES)


# ---- words and links -------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def prose(page: str) -> str:
    return re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target and not target.startswith("#"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), f"{page} leads to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_all_columns(page: str) -> None:
    """Of a table whose second line has another number of columns than the first, nothing is made but text."""
    columns = 0
    for line in re.sub(r"`[^`\n]*`|\\\|", "", prose(page)).splitlines():
        is_row = line.startswith("|")
        assert not (is_row and columns) or line.count("|") == columns, f"{page}: {line}"
        columns = line.count("|") if is_row else 0


# ---- the checks themselves -------------------------------------------------------------------------------------------


def test_commands_are_taken_apart() -> None:
    text = "A=1 make test B=2   # why\npoint-peft train a \\\n  --out 'b c' && python -m x\n# a comment\n"
    assert commands_of(text) == [
        ["make", "test", "B=2"],
        ["point-peft", "train", "a", "--out", "b c"],
        ["python", "-m", "x"],
    ]
    assert blocks("```sh\na\n```\n- b\n\n  ```python\n  c\n  ```\n") == [("sh", "a\n"), ("python", "c\n")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("make nothing", "make has no target nothing"),
        ("pip install 'point-peft[dates]'", "the extras are .*data"),
        ("python -m benchmarks.nothing", "there is no such module"),
        ("python -m nothing.at.all", "No module named 'nothing'"),
        ("python -m benchmarks.arithmetic --sedes 3", "does not take --sedes 3"),
        ("python examples/nothing.py", "there is no such file"),
        ("python -m pytest tests/test_nothing.py", "tests/test_nothing.py"),
        ("torchrun --nproc_per_node 2 -m point_peft train a --outt b", "does not take"),
        ("point-peft train a --outt b", "does not take"),
        ("rm -rf /", "nothing handles rm"),
    ],
)
def test_a_wrong_command_is_found(line: str, words: str) -> None:
    (command,) = commands_of(line)
    with pytest.raises((AssertionError, ModuleNotFoundError, pytest.fail.Exception), match=words):
        run_line(command, {**PROGRAMS, "point-peft": read_point_peft})


def test_right_commands_are_found_right(tmp_path: Path) -> None:
    check_make(["docs", 'PYTEST_ARGS=""'])
    check_pip(["install", "-e", ".[data,train]"])
    check_python(["-m", "tools.capabilities", "--check"])
    check_python(["examples/export.py"])
    check_launcher(["launch", "--num_processes", "2", "-m", "point_peft", "train", "scans", "--out", "runs/a"])


def test_a_block_of_an_unknown_language_is_found() -> None:
    with pytest.raises(AssertionError, match="page has a block of toml, which nothing handles"):
        follow("```toml\n[a]\n```\n", {})
    with pytest.raises(AssertionError, match="page has a block of no language"):
        follow("```\na\n```\n", {})
