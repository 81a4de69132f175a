"""Every configuration that ships goes through the real parser, and every key is documented."""

from __future__ import annotations

import inspect
import json
import re
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from qdora import config as schema
from qdora.config import RunConfig, Section
from qdora.config_file import load_config, read_yaml
from qdora.errors import InputError
from qdora.experiments import arms, overlay
from qdora.experiments.arms import CompareConfig, covers, differences, expand
from qdora.experiments.grid import grid_points
from qdora.experiments.overlay import OverlayConfig, load_comparison
from qdora.tasks import TASKS, check_data

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SECTIONS = {
    v
    for v in {**vars(schema), **vars(arms), **vars(overlay)}.values()
    if inspect.isclass(v) and issubclass(v, Section)
}
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
    "An overlay": overlay.OverlayConfig,
}


def of_kind(path: Path) -> type[Section] | None:
    """The section that a shipped file holds; None for accelerate's launch files."""
    tree = read_yaml(path)
    if path.parent.name == "accelerate":
        return None
    return RunConfig if "model" in tree else CompareConfig if "base" in tree else OverlayConfig


RUNS, COMPARISONS, OVERLAYS, LAUNCHES = (
    [path for path in CONFIGS if of_kind(path) is kind]
    for kind in (RunConfig, CompareConfig, OverlayConfig, None)
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_escapes():
    """Catches: a shipped file that none of the tests below looks into."""
    assert len(RUNS) + len(COMPARISONS) + len(OVERLAYS) + len(LAUNCHES) == len(CONFIGS)
    assert all((RUNS, COMPARISONS, OVERLAYS, LAUNCHES))
    named = {
        path.parent / name for path in COMPARISONS for name in load_config(path, [], CompareConfig).small
    }
    assert named == set(OVERLAYS)


@pytest.mark.parametrize("path", RUNS, ids=name)
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


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
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
        check_data(run.config.data)
        found = run.config.model_dump(mode="json")
        for key, value in {**comparison.set, **arm.set}.items():
            assert holds(reduce(getitem, key.split("."), found), value), key


def holds(found: object, wanted: object) -> bool:
    """Whether a value, or each value of a section, is what was set.  Keys of a pattern may have dots."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(key in found and holds(found[key], value) for key, value in wanted.items())
    return found == wanted


PAPER = [path for path in COMPARISONS if path.parent.name == "paper"]


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_small_comparisons_are_small_and_keep_their_arms(path):
    """Catches: an overlay with which an arm trains a large model or for hours, which loses what the arms
    differ in, or which writes over the results of the comparison itself."""
    comparison, small = (load_comparison(path, [], [], small=small) for small in (False, True))
    base = read_yaml(path.parent / comparison.base)
    full, runs = expand(base, comparison), expand(base, small)
    assert small.output.dir == f"{comparison.output.dir}-small"
    assert len(runs) == len(full) == len({run.config.model_dump_json() for run in runs})
    for run in runs:
        config = run.config
        check_data(config.data)
        examples = (config.training.max_steps or 0) * config.training.batch_size
        assert (examples or config.data.train.limit or 10**6) <= 100
        assert (config.data.test.limit or config.data.test.count or 10**6) <= 24
        assert config.model.path.startswith("pypi:")
    free = ("training", "data.train.limit")
    for one, other in zip(full, runs, strict=True):
        axes, others = (
            {key: v for key, v in differences([first, run.config]).items() if not covers(free, key)}
            for first, run in ((full[0].config, one), (runs[0].config, other))
        )
        assert axes == others


def test_the_papers_page_lists_every_comparison_with_its_arms():
    """Catches: a comparison that nobody finds, one that is gone, or a number of arms that has changed."""
    page = (ROOT / "docs" / "paper.md").read_text()
    listed = dict(re.findall(r"(?m)^\| .*configs/paper/(\S+) \[--small\]` \| (\d+)", page))
    assert listed == {path.name: str(len(load_config(path, [], CompareConfig).arms)) for path in PAPER}


@pytest.mark.parametrize("path", LAUNCHES, ids=name)
def test_launch_configurations_load(path):
    """Catches: a launch file that accelerate refuses, or one that the commands refuse."""
    launch = load_config_from_file(str(path))
    assert launch.mixed_precision == "no"
    assert launch.distributed_type in ("NO", "MULTI_GPU", "FSDP")
    assert launch.use_cpu == ("cpu" in path.stem)


@pytest.mark.parametrize("path", [*RUNS, *COMPARISONS], ids=name)
def test_a_typo_in_a_shipped_file_is_seen(path, tmp_path):
    """Catches: a parser that lets unknown keys through, so that the tests above mean nothing."""
    kind = of_kind(path)
    assert kind is not None
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
    assert set(HEADINGS.values()) == SECTIONS - {Section}


@pytest.mark.parametrize(("heading", "section"), HEADINGS.items())
def test_every_key_is_documented_under_its_section(heading, section):
    """Catches: a key that the reference page lacks, has still, or gives another default."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page.split(f"\n## {heading}\n")[1].split("| key |")[1].split("\n\n")[0]
    rows = {cells[1].strip(" `"): cells[3].strip() for cells in map(cells_of, table.splitlines()) if cells}
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    assert list(rows) == list(fields)
    for key, field in fields.items():
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            assert rows[key] == "required", key
        elif isinstance(default, (str, bool, int, float, type(None))):
            plain = default if isinstance(default, str) else json.dumps(default)
            assert rows[key] == f"`{plain}`", key


def cells_of(line: str) -> list[str]:
    """The cells of a table's row that begins with a key; none for another line."""
    return line.split("|") if line.startswith("| `") else []
