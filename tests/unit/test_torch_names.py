"""What the package uses of torch and Triton is in their oldest supported releases."""

from __future__ import annotations

import pytest
import torch

from tools.torch_names import PACKAGES, missing, read, record, source_files, write

TORCH = PACKAGES["torch"]


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_every_name_is_in_the_oldest_release(package):
    """Catches: a name that the installed release has and the oldest supported one lacks."""
    pytest.importorskip(package.name)
    lacking = missing(package, source_files(), read(package.path))
    assert not lacking, "\n".join(
        [
            f"not in {package.path.name}, the names of {package.name} {package.oldest}:",
            *map(str, lacking),
            "If it has them, record anew where it is installed: python -m tools.torch_names --record",
        ]
    )


def lacking(tmp_path, source: str) -> list[str]:
    file = tmp_path / "new.py"
    file.write_text(source)
    return [str(use).removeprefix(f"{file}:") for use in missing(TORCH, [file], read(TORCH.path))]


GATHER = "torch.distributed.all_gather_single"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.distributed.all_gather_single", f"2: {GATHER}"),
        ("import torch.distributed as dist\ndist.all_gather_single", f"2: {GATHER}"),
        ("from torch import distributed as d\nd.all_gather_single", f"2: {GATHER}"),
        ("from torch.distributed import all_gather_single as gather", f"1: {GATHER}"),
        ("def f():\n    import torch.newer", "2: torch.newer"),
        ("import torch\nnn, b = torch.nn, 1\nnn.Newer(3)", "3: torch.nn.Newer"),
        (
            "from torch.distributed._tools.mem_tracker import _Newer",
            "1: torch.distributed._tools.mem_tracker._Newer",
        ),
        (
            "import torch.nn.functional as F\nF.cross_entropy(x,\n  y,\n  newer=1)",
            "4: torch.nn.functional.cross_entropy(newer=)",
        ),
        ("import torch\nx = torch.ones(3)\n(x + 1).newer_().sum()", "3: .newer_"),
    ],
)
def test_a_newer_name_is_found(source, expected, tmp_path, monkeypatch):
    """Catches: a way of naming things of torch that is not followed."""
    monkeypatch.setattr(torch.Tensor, "newer_", torch.Tensor.relu_, raising=False)
    assert lacking(tmp_path, source) == [expected]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nclass A:\n    def newer_(self): ...\nA().newer_()",
        "import torch\ntorch.ops.qdora.newer(x)",
        "newer.torch.distributed.all_gather_single",
        "from .torch import newer",
        "import torch.distributed as dist\ngetattr(dist, 'all_gather_single', None)",
        "from torch.distributed.rendezvous import rendezvous",
        "import torch\ntorch.empty(3, out=x).addmm_(x, y)",
    ],
)
def test_other_names_are_left_alone(source, tmp_path, monkeypatch):
    """Catches: an own method, an own operator, another module, or an old name, taken for a newer one."""
    monkeypatch.setattr(torch.Tensor, "newer_", torch.Tensor.relu_, raising=False)
    assert lacking(tmp_path, source) == []


def test_a_list_has_what_was_recorded(tmp_path):
    """Catches: a name broken or lost at the end of a line, a name that is used and not recorded."""
    names = record(TORCH, source_files())
    write(names, tmp_path / "list.txt", "torch")
    assert read(tmp_path / "list.txt") == names
    assert missing(TORCH, source_files(), names) == []
