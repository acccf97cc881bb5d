"""The notebook of the examples: it runs from top to bottom without a word of warning, and shows its pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

pytestmark = pytest.mark.pages

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
MOST_BYTES = 600_000


def outputs(notebook: Any, of: str) -> list[str]:
    """The pictures ("image/png") or other data of all cells."""
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[of] for output in made if of in output.get("data", {})]


def printed(notebook: Any, stream: str) -> str:
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in made if output.get("name") == stream)


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_with_its_pictures(committed: Any) -> None:
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert len(outputs(committed, "image/png")) == 7
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_it_runs_from_top_to_bottom(committed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.from_dict(committed)
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "kernel")}})  # no port, no network
    NotebookClient(notebook, config=config, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert printed(notebook, "stderr") == ""
    pictures = [base64.b64decode(picture) for picture in outputs(notebook, "image/png")]
    assert len(pictures) == 7 and all(picture.startswith(b"\x89PNG") and len(picture) > 3000 for picture in pictures)
    said = printed(notebook, "stdout")
    for words in ("trainable params: 216,795", "of 128 test clouds", "answers as before: True", "bit for bit: True"):
        assert words in said
