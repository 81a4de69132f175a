"""Every configuration that ships goes through the real parser, and every key is documented."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from qdora import config as schema
from qdora.config import RunConfig, Section
from qdora.config_file import load_config, read_yaml
from qdora.errors import InputError
from qdora.experiments import arms
from qdora.experiments.arms import CompareConfig, expand
from qdora.experiments.grid import grid_points
from qdora.tasks import TASKS, check_data

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SECTIONS = [
    v for v in {**vars(schema), **vars(arms)}.values() if inspect.isclass(v) and issubclass(v, Section)
]
HEADINGS = {
    "A run": schema.RunConfig,
    "model": schema.ModelConfig,
    "adapter": schema.AdapterConfig,
    "data": schema.DataConfig,
    "data.train and data.test": schema.DatasetConfig,
    "data.train.columns and data.test.columns": schema.ColumnsConfig,
    "training": schema.TrainingConfig,
    "evaluation": schema.EvaluationConfig,
    "output": schema.OutputConfig,
    "A comparison": arms.CompareConfig,
    "An arm of a comparison": arms.ArmConfig,
}


def named(*folders: str) -> list[Path]:
    """The shipped files whose folder has one of these names."""
    return [path for path in CONFIGS if path.parent.name in folders]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_escapes():
    """Catches: a folder of configurations that none of the tests below looks into."""
    assert len(named("configs", "compare", "accelerate")) == len(CONFIGS)
    assert all(named(folder) for folder in ("configs", "compare", "accelerate"))


@pytest.mark.parametrize("path", named("configs"), ids=name)
def test_runs_parse(path):
    """Catches: a shipped run with a renamed key, a refused combination, or test data in training."""
    config = load_config(path)
    check_data(config.data)
    assert config.data.test.split == "test"
    assert config.data.train.split == "train"
    assert (config.data.train.seed, config.data.train.path, config.data.train.held_out) == (
        config.data.test.seed,
        config.data.test.path,
        config.data.test.held_out,
    )


@pytest.mark.parametrize("path", named("compare"), ids=name)
def test_comparisons_parse_with_their_base_and_every_arm(path):
    """Catches: a comparison whose base is gone, or an arm that its base refuses."""
    comparison = load_config(path, [], CompareConfig)
    runs = expand(read_yaml(path.parent / comparison.base), comparison)
    pairs = [
        (seed, arm)
        for seed in comparison.seeds
        for arm in comparison.arms
        if arm.train or seed == comparison.seeds[0]
        for _ in grid_points(comparison.sweep_of(arm))
    ]
    assert [(run.seed, run.arm) for run in runs] == [(seed, arm.name) for seed, arm in pairs]
    for (seed, arm), run in zip(pairs, runs, strict=True):
        assert run.config.training.seed == seed
        for key, value in {**comparison.set, **arm.set}.items():
            section, leaf = key.split(".")
            assert getattr(getattr(run.config, section), leaf) == value


@pytest.mark.parametrize("path", named("accelerate"), ids=name)
def test_launch_configurations_load(path):
    """Catches: a launch file that accelerate refuses, or one that the commands refuse."""
    launch = load_config_from_file(str(path))
    assert launch.mixed_precision == "no"
    assert launch.distributed_type in ("NO", "MULTI_GPU", "FSDP")
    assert launch.use_cpu == ("cpu" in path.stem)


@pytest.mark.parametrize("path", named("configs", "compare"), ids=name)
def test_a_typo_in_a_shipped_file_is_seen(path, tmp_path):
    """Catches: a parser that lets unknown keys through, so that the tests above mean nothing."""
    kind = CompareConfig if path.parent.name == "compare" else RunConfig
    mistyped = re.sub(r"(?m)^(output:.*)$", r"outptu: {}\n\1", path.read_text(), count=1)
    copy = tmp_path / path.name
    copy.write_text(mistyped)
    with pytest.raises(InputError, match=r"unknown key 'outptu'.*did you mean 'output'"):
        load_config(copy, [], kind)


def test_the_paper_files_of_a_task_differ_only_where_their_runs_did():
    """Catches: a setting changed for one of the two models and forgotten for the other."""

    def flat(name: str) -> set[str]:
        tree = load_config(ROOT / "configs" / f"{name}.yaml").model_dump(mode="json")
        return {f"{s}.{k}={json.dumps(v)}" for s, keys in tree.items() for k, v in keys.items()}

    def differing(task: str) -> set[str]:
        return {entry.partition("=")[0] for entry in flat(f"llama2-7b-{task}") ^ flat(f"llama3-8b-{task}")}

    assert differing("orca-math") == {"model.path", "output.dir"}
    assert differing("commonsense") == {"model.path", "output.dir", "training.learning_rate"}


def test_the_commonsense_page_names_every_task():
    """Catches: a task that the parser takes and the page on data formats does not know."""
    page = (ROOT / "docs" / "data-formats.md").read_text()
    assert not [task for task, facts in TASKS.items() if facts.kind == "choice" and task not in page]


def test_every_section_has_a_table():
    """Catches: a new section without a place on the reference page."""
    assert set(HEADINGS.values()) == set(SECTIONS) - {Section}


@pytest.mark.parametrize(("heading", "section"), HEADINGS.items())
def test_every_key_is_documented_under_its_section(heading, section):
    """Catches: a key that the reference page lacks, has still, or gives another default."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page.split(f"\n## {heading}\n")[1].split("| key |")[1].split("\n\n")[0]
    rows = {cells[1].strip(" `"): cells[3].strip() for cells in map(cells_of, table.splitlines()) if cells}
    assert list(rows) == list(section.model_fields)
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            assert rows[key] == "required", key
        elif isinstance(default, (str, bool, int, float, type(None))):
            plain = default if isinstance(default, str) else json.dumps(default)
            assert rows[key] == f"`{plain}`", key


def cells_of(line: str) -> list[str]:
    """The cells of a table's row that begins with a key; none for another line."""
    return line.split("|") if line.startswith("| `") else []
