"""The notebook of the documentation runs, and what is committed of it can be read by anyone."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/first_steps.ipynb"


def pictures(notebook) -> list[str]:
    """Which cells show a picture, by the figure's text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o["data"]["text/plain"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts an interpreter of its own, and a busy machine is no error
def test_the_first_steps_run(tmp_path, monkeypatch):
    """Each cell, in order, in a kernel of its own; an error in one is the error of this test, with its cell."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    (told,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert told.source.startswith("STEPS = 120 ")
    told.source = "STEPS = 8"
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [text.split("'")[1] for text in pictures(notebook)] == ["reward", "clipped", "excerpt"]
    compared = notebook.cells[-2].outputs[0]["data"]["text/plain"].splitlines()
    assert [line.split()[0] for line in compared[1:]] == ["dapo", "hapo", "mine"]
    cosine = {line.split()[0]: float(line.split()[3]) for line in compared[1:]}
    assert cosine["dapo"] == pytest.approx(1, abs=1e-4)
    assert cosine["mine"] < cosine["hapo"] < 0.99
    assert (tmp_path / "runs/first_steps/report.html").stat().st_size > 10_000


def test_the_committed_outputs_are_small_and_name_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert len(pictures(notebook)) == 3
    streams = [o["text"] for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert streams == ["runs/first_steps/report.html\n"]
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(range(1, 9))
