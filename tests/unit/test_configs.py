"""Every configuration that ships goes through the real parser, and every key is documented."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from qdora import config as schema
from qdora.cli import compare, run_command
from qdora.commands.configs import list_shipped
from qdora.config import DatasetConfig, RunConfig, Section
from qdora.config_file import find_shipped, load_config, read_yaml, shipped_names
from qdora.errors import InputError
from qdora.experiments import arms, overlay
from qdora.experiments.arms import CompareConfig, covers, differences, expand
from qdora.experiments.grid import grid_points
from qdora.experiments.overlay import OverlayConfig, base_sections, load_comparison
from qdora.experiments.schema import schema_text
from qdora.tasks import TASKS, check_data
from tools import config_page

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SECTIONS = {
    v
    for v in {**vars(schema), **vars(arms), **vars(overlay)}.values()
    if inspect.isclass(v) and issubclass(v, Section)
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
    runs = expand(base_sections(comparison, path), comparison)
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


def test_the_reference_page_and_the_schemas_are_those_of_the_code():
    """Catches: a key that the page or an editor does not know, or knows with another default or meaning; a
    section without a table (`python -m tools.config_page` writes both anew)."""
    page = config_page.PAGE.read_text()
    assert page == config_page.page_text(page)
    for kind, path in config_page.SCHEMAS.items():
        assert path.read_text() == schema_text(kind)
    assert set(re.findall(r"<!-- keys of (\w+) -->", page)) == set(config_page.sections())
    assert set(config_page.sections().values()) == SECTIONS - {Section}


def test_every_key_says_what_it_is():
    """Catches: a key without a word in the page and in the editor."""
    for name, section in config_page.sections().items():
        silent = [key for key, field in section.model_fields.items() if not field.description]
        assert not silent, (name, silent)


SCHEMA_OF = {RunConfig: "run", CompareConfig: "compare", OverlayConfig: "overlay"}
OURS = [path for path in CONFIGS if of_kind(path) is not None]


@pytest.mark.parametrize("path", OURS, ids=name)
def test_a_shipped_file_names_the_schema_that_it_follows(path):
    """Catches: a file without completion, one with the schema of another kind, a path that leads nowhere; a
    schema that refuses what the parser takes, or lets a misspelt key through."""
    jsonschema = pytest.importorskip("jsonschema", reason="a package of the extra dev")
    first = path.read_text().partition("\n")[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found, first
    kind = of_kind(path)
    assert kind is not None
    schema = (path.parent / found[1]).resolve()
    assert schema == config_page.SCHEMAS[SCHEMA_OF[kind]]
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    tree = read_yaml(path)
    assert not [error.message for error in validator.iter_errors(tree)]
    for mistyped in misspelt(tree):
        assert not validator.is_valid(mistyped), mistyped


def misspelt(tree):
    """The tree with a wrong letter in a key, once for each section and each list of dotted keys."""
    yield {**tree, "outptu": {}}
    for key in ("model", "training", "set"):
        if tree.get(key):
            first, *rest = tree[key].items()
            yield {**tree, key: {first[0] + "x": first[1], **dict(rest)}}
    if isinstance(tree.get("arms"), list):
        first, *rest = tree["arms"]
        yield {**tree, "arms": [{**first, "set": {"adapter.rr": 4}}, *rest]}


def test_every_shipped_file_has_a_name():
    """Catches: a file or architecture that a package installed without a checkout cannot be asked for."""
    for path in CONFIGS:
        own = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        assert find_shipped(f"qdora:{own}") == find_shipped(f"qdora:{own}.yaml") == path
    assert find_shipped("qdora:models/llama-3-8b") == ROOT / "configs" / "models" / "llama-3-8b"
    assert load_config("qdora:quickstart") == load_config(ROOT / "configs" / "quickstart.yaml")


def test_any_other_name_is_a_path(tmp_path):
    """Catches: a user's file that is looked for among the shipped ones, or beside the wrong file."""
    assert find_shipped("quickstart") == Path("quickstart")
    assert find_shipped("../a.yaml", beside=tmp_path / "b" / "c.yaml") == tmp_path / "b" / "../a.yaml"
    assert find_shipped(tmp_path / "a.yaml", beside=Path("c.yaml")) == tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("qdora:lama3-8b-orca-math", "llama3-8b-orca-math"),
        ("qdora:compare/quikstart.yaml", "compare/quickstart"),
        ("qdora:configs/compare/quickstart", "compare/quickstart"),
    ],
)
def test_an_unknown_shipped_name_suggests_the_nearest(name, near):
    """Catches: a typo that is answered with a path in some site-packages, or without what there is."""
    with pytest.raises(InputError) as refused:
        load_config(name)
    said = str(refused.value)
    assert f"{name!r}: nothing of that name ships; did you mean 'qdora:{near}'? allowed: " in said
    assert all(f"qdora:{other}" in said for other in shipped_names())


def test_a_comparison_of_ones_own_builds_on_shipped_files(tmp_path):
    """Catches: `base` or `small` as a name that is looked for beside the comparison's file, or an overlay of
    the command line as one."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "base: qdora:quickstart\nsmall: [qdora:paper/small/common]\noutput: {dir: runs/mine}\n"
        "arms: [{name: a}, {name: full, set: {adapter.dora: false}}]\n"
    )
    comparison = load_comparison(mine, [], ["qdora:paper/small/orca-math"], small=True)
    assert comparison.output.dir.startswith("runs/mine-small-")
    common, orca = (
        load_config(f"qdora:paper/small/{name}", [], OverlayConfig).set for name in ("common", "orca-math")
    )
    assert comparison.set == {**common, **orca}
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    compare.prepare(parser.parse_args(["--config", str(mine), "--dry-run"]))  # its base is found


def own_files(config: RunConfig) -> list[str]:
    """The keys of a configuration that name a file or folder of the user's."""
    sets = {"train": config.data.train, "test": config.data.test, "validation": config.data.validation}
    found = {name: s for name, s in sets.items() if isinstance(s, DatasetConfig)}
    return [f"data.{name}.path" for name, s in found.items() if s.path is not None and s.source != "hub"]


def test_the_list_marks_what_needs_files_of_the_user():
    """Catches: a configuration of which its user finds out at the start that data are missing; a
    comparison whose base needs some; a mark at one that needs none."""
    marked = set(re.findall(r"(?m)^qdora:(\S+) +needs data  ", list_shipped()))
    expected = {path for path in RUNS if own_files(load_config(path))}
    for path in COMPARISONS:
        comparison = load_config(path, [], CompareConfig)
        if any(own_files(run.config) for run in expand(base_sections(comparison, path), comparison)):
            expected.add(path)
    for path in OVERLAYS:
        sets = load_config(path, [], OverlayConfig).set
        if any("path" in sets.get(f"data.{name}", {}) for name in ("train", "test")):
            expected.add(path)
    assert marked == {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in expected}
    assert len(marked) > 10


@pytest.mark.parametrize("path", [path for path in RUNS if own_files(load_config(path))], ids=name)
def test_missing_data_are_said_with_where_they_are_from(
    path, tmp_path, monkeypatch, tiny_model_folder, capsys
):
    """Catches: "no such file" without what the file is, where it is from, or the keys that name it."""
    monkeypatch.chdir(tmp_path)
    shipped = f"qdora:{path.relative_to(ROOT / 'configs').with_suffix('')}"
    tiny = ["--set", f"model.path={tiny_model_folder}", "--set", "data.max_length=64"]
    assert run_command("data", ["--config", shipped, *tiny]) == 2
    said = capsys.readouterr().err
    assert ": no such file or folder; expected " in said
    assert " of github.com/AGI-Edgerunners/LLM-Adapters" in said
    assert "; say where it is with --set data.train.path=PATH --set data.test.path=PATH" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_data_names_is_missing_without_a_key(tmp_path, monkeypatch, tiny_model_folder, capsys):
    """Catches: a key of the configuration advised to somebody who gave --data."""
    monkeypatch.chdir(tmp_path)
    assert run_command("evaluate", ["--model", str(tiny_model_folder), "--data", "mine.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "mine.jsonl: no such file or folder" in said
    assert "--set" not in said


def test_an_overlay_names_the_data_of_a_comparison(tmp_path, monkeypatch, tiny_model_folder, capsys):
    """Catches: advice that `compare` does not take: its `--set` replaces the settings of the comparison."""
    monkeypatch.chdir(tmp_path)
    tiny = {"model.path": str(tiny_model_folder), "data.max_length": 256, "data.train.limit": 8}
    settings = {**tiny, "training.max_steps": 1, "data.test.limit": 2}
    arms = [{"name": "a", "set": {"adapter.r": 2}}, {"name": "b", "set": {"adapter.r": 4}}]
    mine = {"base": "qdora:arc-easy-135m", "arms": arms, "set": settings, "output": {"dir": "runs/mine"}}
    Path("mine.yaml").write_text(json.dumps(mine))
    words = ["--config", "mine.yaml", "--dry-run"]
    assert run_command("compare", words) == 2
    said = capsys.readouterr().err
    assert "arm 'a', seed 0: ../shared/data/commonsense: no such file or folder; expected a folder" in said
    advised = re.search(r"--overlay FILE with `(set: .*)`$", said.strip())
    assert advised is not None
    task = tmp_path / "here" / "ARC-Easy"
    task.mkdir(parents=True)
    for split, first in (("train", 0), ("test", 100)):
        rows = [
            {
                "instruction": f"Which is {i}?\n\nAnswer1: {i} Answer2: 7\n\nAnswer format: answer1/answer2",
                "output": "the correct answer is answer1",
                "answer": "answer1",
            }
            for i in range(first, first + 40)
        ]
        (task / f"{split}.json").write_text(json.dumps(rows))
    Path("here.yaml").write_text(advised[1].replace("PATH", str(task.parent)))
    assert run_command("compare", [*words, "--overlay", "here.yaml"]) == 0
