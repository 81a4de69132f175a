"""Everything a user can get wrong ends in one clear sentence, exit code 2, and nothing written."""

from __future__ import annotations

import shutil

import pytest

from qdora.cli import run_command
from tests.tiny import write_tiny_model

from .runs import finish, start, tiny_tree, write_config

pytestmark = pytest.mark.e2e


def failing(capsys, command: str, *words: str) -> str:
    """The message of a command that must end with exit code 2."""
    assert run_command(command, words) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=3", "did you mean 'max_steps'?"),
        ("adapter.r=0", "adapter.r: Input should be greater than or equal to 1, got 0"),
        ("adapter.method=lora", "key 'adapter.method' is now adapter.type"),
        ("adapter.targets=[q_prj]", "'q_prj' matches no linear layer; did you mean 'q_proj'?"),
        ("adapter.r=40", "larger than the smaller side of model.layers.0.self_attn.k_proj (32x64)"),
        ("model.path=/nowhere/at-all", "/nowhere/at-all"),
        ("data.train.path=/nowhere/train.jsonl", "/nowhere/train.jsonl"),
        ("data.max_length=4000", "longer than the model's context"),
        ("data.max_length=48", "train.jsonl:"),
        ("data.prompt=chat", "no chat template"),
        ("training.batch_size=9", None),
    ],
)
def test_train(tmp_path, tiny_model_folder, capsys, override, message):
    """Catches: a traceback, a wrong exit code, or a run directory that holds half a run."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    if message is None:
        words = ("--set", override, "--set", "training.gradient_accumulation=2")
        error = failing(capsys, "train", "--config", config, *words)
        assert "does not divide into training.gradient_accumulation 2" in error
    else:
        assert message in failing(capsys, "train", "--config", config, "--set", override)
    assert not (tmp_path / "run").exists()


def test_text_of_special_tokens_is_said_and_kept(tmp_path, tiny_model_folder, capsys):
    """Catches: </s> in the data of which nobody hears; a run that goes on with other ids."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": "a</s>b", "answer": "The answer is 1."}\n')
    assert run_command("train", ("--config", config)) == 0
    shown = capsys.readouterr()
    assert "examples with the text of a special token: 1, the first " in shown.out + shown.err
    assert "train.jsonl:97 ('</s>'); it is read as ordinary text" in shown.out + shown.err
    words = ("--config", config, "--resume", "--set", "data.parse_special_tokens=true")
    assert "written with data.parse_special_tokens = False, this run has True" in failing(
        capsys, "train", *words
    )


def test_bad_rows_are_named_by_line(tmp_path, tiny_model_folder, capsys):
    """Catches: 'KeyError: answer' from somewhere inside a data set of 200,000 rows."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = '{"question": "and the rest?"}'
    path.write_text("\n".join(lines))
    error = failing(capsys, "train", "--config", config)
    assert "train.jsonl:7" in error
    assert "answer" in error
    assert run_command("train", ["--config", config, "--set", "data.bad_rows=skip"]) == 0


def test_a_run_is_not_written_over(tmp_path, tiny_model_folder, capsys):
    """Catches: yesterday's run lost to a repeated command."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "already holds a run" in failing(capsys, "train", "--config", config)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run_command("train", ["--config", config, "--set", "output.overwrite=true"]) == 0
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    error = failing(capsys, "evaluate", "--run", str(tmp_path / "run"))
    assert "the run has no adapter, it was not finished; its newest checkpoint is" in error
    error = failing(capsys, "export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"))
    assert "the run has no adapter" in error
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base(tmp_path, tiny_model_folder, capsys):
    """Catches: scores of an adapter on a base that it was not trained on."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    other = write_tiny_model(tmp_path / "other", seed=4)
    error = failing(capsys, "evaluate", "--run", str(tmp_path / "run"), "--model", str(other))
    assert "made for another base" in error


def test_truncated_model(tmp_path, tiny_model_folder, capsys):
    """Catches: a model whose missing half becomes zeros, or a message without the file's name."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = write_config(tmp_path, tiny_tree(tmp_path, broken, max_steps=1))
    assert str(weights) in failing(capsys, "train", "--config", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "--run", "/nowhere"), "not a run directory"),
        (("evaluate", "--model", "x"), "name a data file with --data"),
        (("evaluate",), "name a"),
        (("export", "--output", "out"), "name a run with --run"),
        (("train", "--config", "/nowhere.yaml"), "no such configuration file"),
        (("compare", "--config", "/nowhere.yaml"), "no such configuration file"),
    ],
)
def test_commands(tmp_path, monkeypatch, capsys, words, message):
    """Catches: a missing argument that ends in a traceback."""
    monkeypatch.chdir(tmp_path)  # without --run the newest run under runs/ is taken
    assert message in failing(capsys, *words)


def test_exit_code_of_the_script_itself():
    """Catches: a script that swallows the code, or prints a traceback, outside the test process."""
    output = finish(start("launch/train.py", "--config", "/nowhere.yaml"), code=2)
    assert output.strip() == "qdora train: error: /nowhere.yaml: no such configuration file"
    output = finish(start("launch/train.py", "--config", "/nowhere.yaml", launcher=True), code=1)
    assert "no such configuration file" in output
    assert "Traceback" not in output
