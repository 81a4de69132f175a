"""The configuration parser: what it refuses, and what it says."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import yaml

from qdora.config import AdapterConfig
from qdora.config_file import apply_overrides, dump_config, load_config
from qdora.errors import InputError
from qdora.experiments.arms import CompareConfig

TREE = {
    "model": {"path": "x"},
    "data": {
        "train": {"source": "synthetic", "count": 5},
        "test": {"source": "synthetic", "count": 5, "split": "test"},
    },
    "training": {"max_steps": 5},
    "output": {"dir": "r"},
}


def write(tmp_path, text=None):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TREE) if text is None else text)
    return path


def refusal(tmp_path, *overrides):
    """The message with which a file with these overrides is refused."""
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("training.max_step=3", "training.max_step", "max_steps"),
        ("outputs.dir=r", "outputs", "output"),
        ("data.train.columns.questions=q", "data.train.columns.questions", "question"),
        ("model.double_quantisation=true", "model.double_quantisation", "double_quantization"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path, override, key, nearest):
    """Catches: a mistyped key that is ignored, or a hint taken from the keys of another section."""
    message = refusal(tmp_path, override)
    assert f"unknown key {key!r}" in message
    assert f"did you mean {nearest!r}?" in message
    assert str(tmp_path / "c.yaml") in message


@pytest.mark.parametrize(
    ("override", "key", "expected", "got"),
    [
        ("adapter.r=many", "adapter.r", "integer", "'many' (str)"),
        ("adapter.r=1.5", "adapter.r", "integer", "1.5 (float)"),
        ("adapter.r=true", "adapter.r", "integer", "True (bool)"),
        ("adapter.alpha='8'", "adapter.alpha", "number", "'8' (str)"),
        ("adapter.alpha=true", "adapter.alpha", "number", "True (bool)"),
        ("adapter.rslora=1", "adapter.rslora", "boolean", "1 (int)"),
        ("model.path=7", "model.path", "string", "7 (int)"),
        ("adapter.targets=q_proj", "adapter.targets", "array", "'q_proj' (str)"),
        ("training=5", "training", "object", "5 (int)"),
        ("training.seed=null", "training.seed", "integer", "None (NoneType)"),
    ],
)
def test_a_wrong_type_is_refused_and_never_converted(tmp_path, override, key, expected, got):
    """Catches: true taken as 1, text taken as a number, one name taken as a list of letters."""
    message = refusal(tmp_path, override)
    assert f"{key}: " in message
    assert expected in message
    assert f"got {got}" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.r=0", "adapter.r: .*greater than or equal to 1, got 0"),
        ("adapter.alpha=0", "adapter.alpha: .*greater than 0, got 0"),
        ("adapter.dropout=1.0", r"adapter.dropout: .*less than 1, got 1\.0"),
        ("data.max_length=7", "data.max_length: .*greater than or equal to 8, got 7"),
        ("training.learning_rate=-1e-3", r"training.learning_rate: .*greater than 0, got -0\.001"),
        ("training.warmup_steps=-1", "training.warmup_steps: .*greater than or equal to 0"),
        ("training.clip_norm=0", "training.clip_norm: .*greater than 0"),
        ("training.max_steps=0", "training.max_steps: .*greater than or equal to 1"),
        ("training.learning_rate=1e400", "training.learning_rate: .*finite number, got inf"),
        (f"training.warmup_steps=1{'0' * 400}", "training.warmup_steps: .*less than or equal to"),
        ("training.weight_decay=.nan", "training.weight_decay: .*finite number, got nan"),
    ],
)
def test_a_value_out_of_range_is_refused(tmp_path, override, message):
    """Catches: a bound that got lost, so that the run fails late or trains nothing."""
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.mode=full"], "'full' does not go with model.quantization 'nf4'; allowed there: none"),
        (["training.mode=full", "adapter.r=4"], "trains every weight and no adapter: leave out the adapter"),
        (["adapter.type=none", "adapter.dora=false"], "trains nothing; choose adapter.type lora"),
        (
            ["adapter.type=vera", "adapter.init=gaussian"],
            "'gaussian' is a start of lora; adapter.type is 'vera'",
        ),
        (["adapter.dora=false", "adapter.magnitude=frozen"], "magnitude 'frozen' given, but adapter.dora is"),
        (["adapter.dora=false", "adapter.magnitude_start=original"], "magnitude_start 'original' given, but"),
        (["adapter.type=none", "adapter.magnitude=frozen"], "'frozen' trains nothing; choose adapter.type"),
        (["training.master_weights=false", "adapter.dtype=float32"], "is about parameters of 16 bits"),
        (["adapter.init=orthogonal", "adapter.r=3"], "'orthogonal' halves the rank: adapter.r must be even"),
        (["evaluation.quantization=nf4"], "evaluation.quantization goes with training.mode 'full' only"),
        (["adapter.method=lora"], r"'adapter.method' is now adapter.type \(lora, vera, none\), adapter.dora"),
        (["model.base=dense"], "'model.base' is now model.quantization; allowed: nf4, fp4, int8, nf3, nf2"),
        (
            [
                "data.train={source: file, path: x.json, held_out: 9}",
                "data.test={source: file, path: x.json, held_out: 9, seed: 1, split: test}",
            ],
            "train holds out 9 rows with seed 42, test takes 9 with seed 1",
        ),
        (["adapter.targets=[]"], "adapter.targets is empty"),
        (["adapter.magnitude_targets=[]"], "adapter.magnitude_targets is empty"),
        (["training.epochs=1"], "exactly one of training.max_steps and training.epochs"),
        (["training.max_steps=null"], "exactly one of training.max_steps and training.epochs"),
        (["training.gradient_accumulation=3"], "batch_size 16 does not divide into .* 3 micro-batches"),
        (
            ["training.checkpoint_every=2"],
            "checkpoint_every 2 is about layers .* set training.gradient_checkpointing: true, or",
        ),
        (
            ["training.offload_activations=true"],
            "offload_activations True is about layers that are recomputed",
        ),
    ],
)
def test_an_impossible_combination_is_refused(tmp_path, overrides, message):
    """Catches: two keys that contradict each other, of which one is silently ignored."""
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path), overrides)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("adapter.type=lor", "lora"),
        ("training.schedule=linaer", "linear"),
        ("model.dtype=bf16", "bfloat16"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_nearest(tmp_path, override, nearest):
    """Catches: a list of choices without the one that was meant."""
    assert f"did you mean {nearest!r}? allowed: " in refusal(tmp_path, override)


def test_python_callers_write_what_a_person_would():
    """Catches: a list, a single string or a torch dtype that ends in an error of pydantic."""
    config = AdapterConfig(targets=["q_proj"], magnitude_targets="v_proj", dtype=torch.float32)
    assert (config.targets, config.magnitude_targets, config.dtype) == (("q_proj",), ("v_proj",), "float32")
    assert AdapterConfig(targets="q_proj").targets == ("q_proj",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "adapter.r: Input should be greater than or equal to 1, got 0"),
        ({"targets": [1]}, "adapter.targets.0: Input should be a valid string, got 1"),
        ({"dtype": torch.float16}, "adapter.dtype: got 'float16'; did you mean 'bfloat16'"),
        ({"method": "qdora"}, "'adapter.method' is now adapter.type"),
        ({"tpye": "lora"}, "unknown key 'adapter.tpye' .*did you mean 'type'"),
        ({"targets": ()}, "^adapter.targets is empty"),
    ],
)
def test_bad_values_from_python_are_named(settings, message):
    """Catches: a raw error of pydantic in a user's notebook."""
    with pytest.raises(InputError, match=message):
        AdapterConfig(**settings)


def test_choices_that_are_numbers_are_listed(tmp_path):
    """Catches: an empty list of choices, where only the quoted ones were looked for."""
    message = refusal(tmp_path, "model.block_size=100")
    assert "model.block_size: got '100'" in message
    assert all(size in message for size in ("64", "128", "256", "512"))


def test_all_mistakes_are_named_at_once(tmp_path):
    """Catches: one mistake shown for each attempt."""
    message = refusal(tmp_path, "adapter.r=0", "training.lr=1", "adapter.type=lor")
    assert all(part in message for part in ("adapter.r", "training.lr", "adapter.type"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "expected a mapping of sections, got list"),
        ("", "expected a mapping of sections, got NoneType"),
        ("model: {path: x}\nmodel: {path: y}", "key 'model' given twice"),
        ("model: {path: x, path: y}", "key 'path' given twice"),
        ("model: {path: x}", "key 'data' is required and missing"),
        ("model: !!python/name:os.system {}", "not valid YAML"),
        ("model: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("model: &a [*a]", "an alias holds itself"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 20)), "aliases"),
        ("model: 2001-99-99", "not valid YAML: month must be in 1..12"),
        (f"model: 1{'0' * 5000}", "not valid YAML: Exceeds the limit"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    """Catches: half a file read as a whole one, the second of two equal keys winning, code in a file, a
    traceback or all of the memory for what no configuration has."""
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_required_key_is_named_with_its_section(tmp_path):
    """Catches: a message about `path` that leaves open which one."""
    tree = copy.deepcopy(TREE)
    del tree["model"]["path"], tree["data"]["test"]["source"]
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, yaml.safe_dump(tree)))
    assert "key 'model.path' is required and missing" in str(caught.value)
    assert "key 'data.test.source' is required and missing" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """Catches: a traceback for a mistyped path."""
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Catches: a traceback for a folder, or for a file that is not text."""
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"model: \xff")
    with pytest.raises(InputError, match=r"c\.yaml: cannot be read"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001", "+1e-3"])
def test_every_way_to_write_a_number_is_one(tmp_path, text):
    """Catches: 1e-3 read as text, as YAML 1.1 has it, from the file or from --set."""
    assert load_config(write(tmp_path), [f"training.learning_rate={text}"]).training.learning_rate == 1e-3
    tree = copy.deepcopy(TREE) | {"training": {"max_steps": 5, "learning_rate": "RATE"}}
    path = write(tmp_path, yaml.safe_dump(tree).replace("RATE", text))
    assert load_config(path).training.learning_rate == 1e-3


def test_overrides_reach_every_depth_and_the_last_one_wins(tmp_path):
    """Catches: an override that replaces its section, loses its type, or comes before an earlier one."""
    config = load_config(
        write(tmp_path),
        [
            "training.max_steps=1",
            "training.max_steps=20",
            "data.train.columns.question=q=1",
            "adapter.targets=[q_proj, v_proj]",
            "training.clip_norm=null",
            "output.overwrite=true",
        ],
    )
    assert config.training.max_steps == 20
    assert config.data.train.count == 5
    assert config.data.train.columns.question == "q=1"
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.training.clip_norm is None
    assert config.output.overwrite is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "'training': expected key=value, for example"),
        ("=3", "'=3': expected key=value, for example"),
        ("training.seed=[", "the value is not valid YAML"),
        ("model.path.x=1", "model.path.x: 'path' holds 'x', it has no keys below it"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, message):
    """Catches: a traceback, or an override that does nothing."""
    with pytest.raises(InputError, match="--set .*" + message):
        load_config(write(tmp_path), [override])


def test_an_override_in_a_list_is_refused():
    """Catches: a list taken for a mapping."""
    with pytest.raises(InputError, match="'arms' holds"):
        apply_overrides({"arms": [{"name": "a"}]}, ["arms.name=b"])


def test_a_configuration_cannot_be_changed(tmp_path):
    """Catches: a run whose saved configuration is not the one that it used."""
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.training.max_steps = 7


def test_the_dump_reads_back(tmp_path):
    """Catches: a resolved configuration that the parser itself refuses or reads otherwise."""
    config = load_config(
        write(tmp_path),
        ["adapter.magnitude_targets=[v_proj]", "training.clip_norm=null", "training.learning_rate=1e-5"],
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_the_dump_of_a_comparison_reads_back(tmp_path):
    """Catches: overrides or arms lost on the way through the saved comparison."""
    text = """
        base: b.yaml
        set: {training.learning_rate: 1e-5, adapter.targets: [q_proj]}
        arms: [{name: a, set: {adapter.dora: false}}, {name: b, may_differ: [adapter]}]
        output: {dir: r}
    """
    config = load_config(write(tmp_path, text), [], CompareConfig)
    assert config.set == {"training.learning_rate": 1e-5, "adapter.targets": ["q_proj"]}
    assert load_config(write(tmp_path, dump_config(config)), [], CompareConfig) == config


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("[{name: a}]", "arms: .*at least 2 items"),
        ("[{name: a}, {name: a, set: {adapter.dora: false}}]", "arm names repeat: a"),
        ("[{name: a/b}, {name: c}]", "arms.0.name: .*pattern"),
        ("[{name: a, sett: {}}, {name: c}]", "unknown key 'arms.0.sett'.*did you mean 'set'"),
        ("[{name: a, method: qlora}, {name: c}]", "'arms.0.method' is now set, .*adapter.dora: false"),
        ("[{name: a, set: {training.seed: 3}}, {name: c}]", "arm 'a' sets training.seed, .*; use seeds"),
        ("[{name: a, set: {training: {seed: 3}}}, {name: c}]", "arm 'a' sets training.seed, .*; use seeds"),
        ("[{name: a, set: {output.dir: r}}, {name: c}]", "arm 'a' sets output, .*; use output of the comp"),
        ("[{name: a, set: {evaluation.limit: 9}}, {name: c}]", "evaluation.limit, .* the same questions"),
        (
            "[{name: a, set: {adapter.r: 8, model.dtype: float32}, may_differ: [adapter]}, {name: c}]",
            "arm 'a' sets model.dtype; its may_differ covers only: adapter",
        ),
        ("[{name: a}, {name: c}]\nseeds: [1, 2, 1]", "seeds repeat: 1"),
    ],
)
def test_arms_that_make_no_comparison_are_refused(tmp_path, arms, message):
    """Catches: two arms in one folder, a name that leaves the folder, nothing to compare with."""
    text = f"base: b.yaml\narms: {arms}\noutput: {{dir: r}}\n"
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, text), [], CompareConfig)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "data.validation: .*greater than or equal to 1, got 0"),
        ("1.5", "data.validation: .*less than 1, got 1.5"),
        ("many", "data.validation: .*got 'many'"),
        ("{source: file, pth: x}", "unknown key 'data.validation.pth'.*did you mean 'path'"),
        ("{path: x}", "key 'data.validation.source' is required"),
    ],
)
def test_what_validation_may_not_be(tmp_path, value, message):
    """Catches: a message about each form that the value might have had, or about the name of such a form."""
    said = refusal(tmp_path, f"data.validation={value}")
    assert re.search(message, said)
    assert "\n" not in said
    assert "<" not in said
