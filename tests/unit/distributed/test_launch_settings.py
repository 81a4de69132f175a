"""FSDP's fields in a launch configuration: each is honoured or refused by its name."""

from __future__ import annotations

import pytest

from qdora.distributed.launch import FsdpSettings, read_flag, read_fsdp_settings
from qdora.errors import InputError

# What accelerate 1.15 sends for `fsdp_config: {fsdp_version: 2}` and no more.
DEFAULTS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}])
def test_no_fsdp_no_settings(environment):
    """Catches: sharding, or a refusal, in a launch that did not ask for FSDP."""
    assert read_fsdp_settings(environment) is None


def test_what_accelerate_sends_by_itself_is_no_request():
    """Catches: a refusal of a default that says nothing in version 2 (its loading, its flat parameters)."""
    assert read_fsdp_settings(DEFAULTS) == FsdpSettings()
    assert read_fsdp_settings({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}) == FsdpSettings()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            "LlamaDecoderLayer, LlamaMLP",
            {"layer_classes": ("LlamaDecoderLayer", "LlamaMLP")},
        ),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "None", {}),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", {}),
        ("FSDP_AUTO_WRAP_POLICY", "no_wrap", {"wrap": False}),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", {"reshard_after_forward": False}),
        ("FSDP_RESHARD_AFTER_FORWARD", "none", {}),
        ("FSDP_OFFLOAD_PARAMS", "True", {"offload": True}),
        ("FSDP_OFFLOAD_PARAMS", "yes", {"offload": True}),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", {"activation_checkpointing": True}),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", {"state_dict_type": "full"}),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", {}),
        ("FSDP_BACKWARD_PREFETCH", "NO_PREFETCH", {}),
        ("FSDP_SHARDING_STRATEGY", "1", {}),
        ("FSDP_SYNC_MODULE_STATES", "false", {}),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", {}),
    ],
)
def test_a_field_is_honoured(variable, value, expected):
    """Catches: a field that is read into the wrong setting, or into none, or in one spelling only."""
    assert read_fsdp_settings({**DEFAULTS, variable: value}) == FsdpSettings(**expected)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", r"fsdp_version .*'1'; allowed: set `fsdp_version: 2`"),
        ("FSDP_VERSION", "", r"fsdp_version .*'1'; allowed: set `fsdp_version: 2`"),
        (
            "FSDP_AUTO_WRAP_POLICY",
            "SIZE_BASED_WRAP",
            r"fsdp_auto_wrap_policy .*allowed: NO_WRAP, TRANSFORMER_B",
        ),
        ("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT", r"fsdp_state_dict_type .*allowed: FULL_.*, SHARDED_"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED", r"did you mean 'SHARDED_STATE_DICT'\?"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", r"fsdp_sharding_strategy .*allowed: FULL_SHARD"),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", r"set `fsdp_reshard_after_forward: false`"),
        ("FSDP_RESHARD_AFTER_FORWARD", "full_shard", r"fsdp_reshard_after_forward .*allowed: true, false"),
        ("FSDP_OFFLOAD_PARAMS", "maybe", r"fsdp_offload_params .*'maybe'; allowed: true, false"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE", r"fsdp_backward_prefetch .*allowed: leave it out"),
        ("FSDP_FORWARD_PREFETCH", "true", r"fsdp_forward_prefetch .*allowed: false"),
        ("FSDP_USE_ORIG_PARAMS", "false", r"fsdp_use_orig_params .*allowed: true"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", r"fsdp_activation_checkpointing_offload .*: false"),
        ("FSDP_IGNORED_MODULES", ".*norm", r"fsdp_ignored_modules .*'\.\*norm'; allowed: leave it out"),
        (
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            "['LlamaDecoderLayer']",
            r"fsdp_transformer_layer_cls_to_wrap .*allowed: names of classes",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(variable, value, words):
    """Catches: a field that silently does nothing; an error without the key to change and what it may be."""
    with pytest.raises(InputError, match=words):
        read_fsdp_settings({**DEFAULTS, variable: value})


def test_classes_to_gather_contradict_gathering_all_at_once():
    """Catches: layer classes that NO_WRAP silently drops."""
    asked = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    with pytest.raises(InputError, match=r"fsdp_transformer_layer_cls_to_wrap .*NO_WRAP"):
        read_fsdp_settings({**DEFAULTS, **asked})


def test_another_kind_of_flag_is_refused_by_its_variable():
    """Catches: a message that names a key of FSDP for a variable that is none."""
    with pytest.raises(InputError, match=r"launch configuration: ACCELERATE_USE_CPU is 'perhaps'; allowed"):
        read_flag({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU")
