"""The sdist and the wheel: what is in them, and that a wheel alone, without this repository, does the main job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from point_peft.version import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", ".github", "benchmarks", "docs", "examples", "point_peft", "tests", "tools")
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
}
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "OMP_NUM_THREADS": "1",
}
"""Without PYTHONPATH, by which the repository would be found."""


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that has to succeed."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files(*folders: str) -> set[str]:
    """The files of folders of the repository, without what Python leaves there."""
    paths = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


@dataclass(frozen=True)
class Built:
    """The two files of a release."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both files from a copy of the checkout, which stays clean; the wheel is made from the sdist."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in sorted(source_files(*FOLDERS) | FILES):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    (checkout / "tuners").symlink_to("point_peft/tuners")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to run in."""

    bin: Path
    cwd: Path

    def run(self, program: str, *arguments: str) -> str:
        return run(self.bin / program, *arguments, cwd=self.cwd)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An environment of its own, which sees torch and the like where they are, but not this repository.

    A line in a .pth file adds a folder without the .pth files in it, such as that of an editable installation. It is
    written last, for pip would take that installation for this one.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-index", "--no-deps", built.wheel, cwd=folder)
    others = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    Path(own.strip(), "others.pth").write_text("\n".join(others), encoding="utf-8")
    return Installed(python.parent, tmp_path_factory.mktemp("empty"))


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    about = f"point_peft-{__version__}.dist-info"
    with ZipFile(built.wheel) as archive:
        files = {name for name in archive.namelist() if not name.startswith(f"{about}/")}
        assert files == source_files("point_peft")
        assert {"point_peft/py.typed", "point_peft/backbones/point_mae_small.safetensors"} <= files
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = Parser().parsestr(archive.read(f"{about}/METADATA").decode())
    assert (metadata["Version"], metadata["Requires-Python"], metadata["License-Expression"]) == (
        __version__,
        ">=3.10",
        "Apache-2.0",
    )
    assert {"torch>=2.4", "einops>=0.7"} <= set(metadata.get_all("Requires-Dist", []))


def test_the_sdist_is_the_checkout(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive), "links, which some systems cannot make"
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in files if name.startswith("point_peft.egg-info/"))}
    assert files - made == source_files(*FOLDERS) | FILES


def test_the_command_is_installed(installed: Installed) -> None:
    assert installed.run("point-peft", "--version") == f"point-peft {__version__}\n"
    assert installed.run("python", "-m", "point_peft", "--version") == f"point-peft {__version__}\n"


def test_the_quickstart_needs_no_repository(installed: Installed) -> None:
    find = "import importlib.util; print(importlib.util.find_spec('point_peft').origin)"
    assert Path(installed.run("python", "-c", find).strip()).is_relative_to(installed.bin.parent)
    sizes = ("--epochs", "1", "--train", "20", "--val", "10", "--test", "20")
    printed = installed.run("python", "-m", "point_peft.quickstart", *sizes)
    for words in ("train: 20 of ", "epoch 1/1", "bit for bit", "second task", "microseconds", "file sizes: "):
        assert words in printed
    (made,) = installed.cwd.iterdir()
    assert made.name == "build"
    for name in ("first/adapter_model.safetensors", "second/adapter_model.safetensors", "quickstart.png"):
        assert (made / "quickstart" / name).is_file()
