"""What the modules import: a refused command neither torch nor transformers, no command inductor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import qdora
from qdora.benchmark.gpu.sizes import STAGE_NAMES
from qdora.benchmark.gpu.stages import STAGES
from qdora.cli import COMMANDS
from qdora.config import QuantizationName
from qdora.errors import EXTRAS
from qdora.export import FORMATS, OPTIONS, merged
from qdora.export.job import load_format
from tests.e2e.runs import ROOT, tiny_tree, write_config

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "datasets", "pandas", "scipy", "matplotlib")
HEAVY += ("statsmodels", "jinja2")
REPORT = """
import atexit, json, sys
atexit.register(lambda: print("LOADED", json.dumps(sorted(sys.modules)), file=sys.stderr))
"""


def loaded(script: str, code: int = 0) -> tuple[set[str], str]:
    """The modules that a script has imported at its end, and what it said."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT + script],
        cwd=ROOT,
        env={**os.environ, **ours},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    said, _, modules = done.stderr.rpartition("LOADED ")
    return set(json.loads(modules)), said + done.stdout


def command(*words: str) -> str:
    return f"from qdora.cli import main\nmain({list(words)!r})"


def refused(tmp_path: Path) -> dict[str, tuple[str, ...]]:
    """A command line of each kind that is refused, by a part of the message."""
    tree = tiny_tree(tmp_path, tmp_path / "model")
    config = write_config(tmp_path, tree)
    contradiction = write_config(
        tmp_path, tree | {"adapter": {"dora": False, "magnitude_targets": ["q_proj"]}}, "contradiction.yaml"
    )
    unknown = ("--set", "data.train.source=gsm9k")
    out, run = ("--output", str(tmp_path / "out")), ("--run", str(tmp_path / "nowhere"))
    return {
        "did you mean 'max_steps'?": ("train", "--config", config, "--set", "training.max_stps=3"),
        "did you mean 'train'?": ("trian",),
        "unrecognized arguments: --bogus": ("train", "--bogus"),
        "adapter.dora is false": ("train", "--config", contradiction),
        "unknown source 'gsm9k'; did you mean 'gsm8k'?": ("train", "--config", config, *unknown),
        "ranks the options of a choice": ("train", "--config", config, "--set", "evaluation.method=rank"),
        "--threads 0; allowed: 1 or more": ("train", "--config", config, "--threads", "0"),
        "nowhere: not a run directory": ("evaluate", *run),
        "--formats: 'nf5'; did you mean 'nf4'?": ("analyze", "quantization", *run, "--formats", "nf3,nf5"),
        "--sparsity: '1'; allowed: numbers": ("analyze", "prune", *run, "--sparsity", "0.5,1"),
        "invalid choice: 'fp8'": ("export", *run, *out, "--dtype", "fp8"),
        "--r is an option of --format lora; --format nf4 takes --dtype, --requantize": (
            *("export", *run, *out, "--format", "nf4", "--r", "8"),
        ),
        "--format lora needs --r N": ("export", *run, *out, "--format", "lora"),
        "key 'arms' is required": ("compare", "--config", config),
        "--gpu-memory 'much'": ("estimate", "--config", config, "--gpu-memory", "much"),
        "--rounds 0; allowed: 1 or more": ("benchmark", "layer", "--rounds", "0"),
        "there is no stage 'kernel'; did you mean 'kernels'?": ("benchmark", "gpu", "--stages", "kernel"),
        "--max-rank 0; allowed: 1 or more": ("analyze", "ranks", "--max-rank", "0"),
        "none.yaml: no such configuration file": ("demo", "--config", "none.yaml"),
    }


def test_a_refused_command_imports_nothing_heavy(tmp_path):
    """Catches: ten seconds of imports before a typo is named."""
    for message, words in refused(tmp_path).items():
        modules, said = loaded(command(*words), code=2)
        assert message.lower() in said.lower()
        assert "Traceback" not in said
        assert modules.isdisjoint(HEAVY), (words, modules.intersection(HEAVY))


def test_help_imports_nothing_heavy():
    """Catches: seconds of imports for a list of options, of one command or of all; the schema of
    configurations, a quarter of a second, for the list of commands."""
    modules, _ = loaded("from qdora.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n")
    assert "pydantic" not in modules
    script = "from qdora.cli import main\n"
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        script += f"try: main({words!r})\nexcept SystemExit as stop: assert stop.code == 0\n"
    modules, said = loaded(script)
    assert modules.isdisjoint(HEAVY), modules.intersection(HEAVY)
    assert all(f"usage: qdora {name}" in said for name in COMMANDS)


def test_a_command_imports_what_it_uses_when_it_uses_it():
    """Catches: inductor, bitsandbytes, matplotlib or the code of models imported with a command's module; a
    command that cannot be imported without the packages of the extras."""
    hidden = f"import sys\nfor name in {list(EXTRAS)}: sys.modules[name] = None\n"
    # The others generate with transformers, or measure bitsandbytes' own layers.
    own = ("train", "export", "estimate", "analyze", "demo")
    modules, _ = loaded(hidden + "\n".join(f"import qdora.commands.{name}" for name in own))
    late = {"torch._inductor.compile_fx", "bitsandbytes", "transformers.modeling_utils"}
    late |= {"scipy", "pandas", "datasets", "tensorboard"}
    assert modules.isdisjoint(late), modules.intersection(late)


def test_a_quantized_weight_brings_no_inductor():
    """Catches: bitsandbytes' import compiling functions that nothing here calls, a second of every run; the
    setting that prevents it left behind for the rest of the process; a kernel fetched from the hub and run,
    as with AVX512-BF16 where the package `kernels` is installed."""
    modules, said = loaded(
        "import os, sys, torch, types\n"
        "sys.modules['kernels'] = types.ModuleType('kernels')\n"
        "sys.modules['kernels'].get_kernel = lambda *_, **__: print('FETCHED')\n"
        "from qdora.quant import Quantization\n"
        "weight = Quantization('nf4').from_dense(torch.ones(2, 64))\n"
        "print(weight.dense().sum().item(), 'TORCHDYNAMO_DISABLE' in os.environ)\n"
    )
    assert "bitsandbytes" in modules
    assert "torch._inductor.compile_fx" not in modules
    assert "128.0 False" in said
    assert "kernels" in modules
    assert "FETCHED" not in said


def test_the_first_weight_of_a_process_may_be_a_fake_one():
    """Catches: tables of codes made under an estimate's fake tensors, or on the meta device, and kept."""
    modes = "with FakeTensorMode(allow_non_fake_inputs=True), torch.device('meta'):\n"
    _, said = loaded(
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from qdora.quant import Quantization\n"
        "values = torch.ones(2, 64)\n"
        + modes
        + "    for name in ('nf4', 'fp4', 'int8', 'nf3'): Quantization(name).from_dense(values)\n"
        "names = ('nf4', 'fp4', 'int8', 'nf3')\n"
        "print([Quantization(name).from_dense(values).dense().sum().item() for name in names])\n"
    )
    assert "[128.0, 128.0, 128.0, 128.0]" in said


def test_the_package_names_what_it_exports():
    """Catches: an exported name that completion does not show, or that cannot be imported; torch loaded by
    `import qdora` alone."""
    assert set(qdora.__all__) <= set(dir(qdora))
    assert all(getattr(qdora, name) is not None for name in qdora.__all__)
    modules, said = loaded("import qdora\nprint(qdora.AdapterConfig, qdora.InputError)")
    assert "AdapterConfig" in said
    assert modules.isdisjoint(HEAVY)


def test_names_written_out_for_the_options_are_those_that_there_are():
    """Catches: a stage or a format that no option reaches, or an option that ends in a traceback."""
    from typing import get_args

    from qdora.quant import QUANTIZATIONS

    assert tuple(STAGES) == STAGE_NAMES
    assert set(OPTIONS["--dtype"]["choices"]) == set(merged.DTYPES)
    for name, row in FORMATS.items():
        assert row.options.keys() <= OPTIONS.keys()
        steps = ("check", "write", "verify") if row.needs_base else ("copy_adapter",)
        assert all(callable(getattr(load_format(name), step)) for step in steps)
    assert set(get_args(QuantizationName)) == set(QUANTIZATIONS)
