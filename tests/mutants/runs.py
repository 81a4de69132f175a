"""Bugs of everything around the layers: data, training, ranks, scoring, estimates, exports."""

from tests.mutation import Mutant

NORM = "tests/unit/adapters/test_norm_and_magnitude.py"
SHARDED = "tests/distributed/test_sharded.py"
DECODING = "tests/unit/evaluation/test_continuous.py"
PACKING = "tests/unit/training/test_packing.py"
NF4 = "tests/unit/export/test_nf4.py"
OPTIMIZERS = "tests/unit/training/test_optimizers.py"

MUTANTS = {
    "alpha and r swapped": Mutant(
        "config/model.py",
        "return self.alpha / (self.r**0.5 if self.rslora else self.r)",
        "return self.r / self.alpha",
        "tests/unit/adapters/test_peft_format.py::test_an_adapter_from_peft_loads_here",
    ),
    "step without a master": Mutant(
        "training/optimizer.py",
        "for master in self._rounded.values():\n                master.grad = None",
        "for parameter, master in self._rounded.items():\n                master.copy_(parameter)",
        f"{NORM}::test_the_tail_of_a_decayed_rate_moves_as_float32_does",
    ),
    "gradients averaged over ranks": Mutant(
        "distributed/fsdp.py",
        "sharded.set_gradient_divide_factor(1.0)",
        "pass",
        f"{SHARDED}::test_float32_training_is_that_of_one_process[2-qdora]",
        slow=True,
    ),
    "padding between prompt and option seen": Mutant(
        "evaluation/likelihood.py",
        "device=device) < lengths_N1",
        "device=device) < lengths_N1 + 99",
        "tests/unit/evaluation/test_likelihood.py::test_sums_are_those_of_the_models_logits",
    ),
    "a test question with its answer among the shots": Mutant(
        "tasks/shots.py",
        "clean = load_training(data, load_test(data, tokenizer).examples).train",
        "clean = load_training(data, []).train",
        "tests/unit/tasks/test_shots.py::test_they_come_from_what_is_trained_on",
    ),
    "frozen scales rounded to the adapters' dtype": Mutant(
        "distributed/fsdp.py",
        "initialize(replace(policy, param_dtype=None))",
        "initialize(policy)",
        f"{SHARDED}::test_the_initial_norms_are_the_same[2-qdora awkward bf16]",
        slow=True,
    ),
    "sharded gradients rounded to bf16": Mutant(
        "distributed/fsdp.py",
        "parameter.grad_dtype = torch.float32",
        "pass",
        f"{SHARDED}::test_bf16_adapters_differ_by_their_rounding_alone[2-qdora bf16]",
        slow=True,
    ),
    "every rank reads everything": Mutant(
        "models/load.py",
        "w_RI = self._read(name, base.rows_to_read(shard))",
        "w_RI = self._read(name, None)[base.rows_to_read(shard)]",
        f"{SHARDED}::test_a_rank_holds_and_reads_its_share[2-wide]",
        slow=True,
    ),
    "a rank's own fresh norms": Mutant(
        "distributed/fsdp.py",
        "            group.unshard()\n            yield own",
        "            yield own",
        f"{SHARDED}::test_the_initial_norms_are_the_same[2-qdora]",
        slow=True,
    ),
    "padding attended to while decoding": Mutant(
        "evaluation/continuous.py",
        "mask = ((mask[:, None] & causal_QK) | itself_QK)[:, None]",
        "mask = (causal_QK | itself_QK)[None, None]",
        f"{DECODING}::test_answers_are_those_of_transformers",
    ),
    "positions count the padding": Mutant(
        "evaluation/continuous.py",
        "(columns_Q - starts_N[:, None]).clamp_min(0)",
        "columns_Q.expand(len(starts_N), -1)",
        f"{DECODING}::test_answers_are_those_of_transformers",
    ),
    "a row moved without its first columns": Mutant(
        "evaluation/continuous.py",
        "self.cache.move_row(len(self.batch), row, slice(last.start, self.column))",
        "self.cache.move_row(len(self.batch), row, slice(last.start + 1, self.column))",
        f"{DECODING}::test_columns_and_rows_move",
    ),
    "starts left behind as columns move": Mutant(
        "evaluation/continuous.py",
        "self.starts_N = self.starts_N - start",
        "pass",
        f"{DECODING}::test_columns_and_rows_move",
    ),
    "a prefix that takes a whole prompt": Mutant(
        "evaluation/continuous.py",
        "most = min(len(prompt) for prompt in prompts) - 1",
        "most = min(len(prompt) for prompt in prompts)",
        f"{DECODING}::test_the_common_prefix",
    ),
    "tokens after the end of an answer": Mutant(
        "evaluation/continuous.py",
        "                if sequence.ended:\n                    break",
        "                if sequence.ended:\n                    continue",
        f"{DECODING}::test_the_device_is_not_asked_at_each_step",
    ),
    "joined sequences see one another": Mutant(
        "training/attention.py",
        "    if segments is None:\n        return _attend(",
        "    if True:\n        return _attend(",
        f"{PACKING}::test_joined_equals_padded_and_transformers",
    ),
    "a window of one token more": Mutant(
        "training/attention.py",
        "(back_TT < sliding_window)",
        "(back_TT <= sliding_window)",
        f"{PACKING}::test_joined_equals_padded_and_transformers",
    ),
    "positions run on through a row": Mutant(
        "data/batches.py",
        "np.concatenate([np.arange(length) for length in lengths])[None]",
        "np.arange(sum(lengths))[None]",
        f"{PACKING}::test_positions_begin_anew",
    ),
    "another layer recomputed": Mutant(
        "training/layers.py",
        "if recomputed and i % config.checkpoint_every == 0:",
        "if recomputed and i % config.checkpoint_every == 1 % config.checkpoint_every:",
        "tests/unit/training/test_layers.py::test_the_layers_that_are_asked_for_are_computed_twice",
    ),
    "layers prepared in evaluation too": Mutant(
        "training/layers.py",
        "trains = layer.training and torch.is_grad_enabled()",
        "trains = True",
        "tests/unit/training/test_layers.py::test_evaluation_computes_each_layer_as_it_is",
    ),
    "B's rate for A": Mutant(
        "config/model.py",
        '{"b_OR": self.b_rate_ratio',
        '{"a_RI": self.b_rate_ratio',
        f"{OPTIMIZERS}::test_rates_of_their_own_are_groups[adamw]",
    ),
    "an update by the norm of a shard": Mutant(
        "training/optimizers.py",
        '"StableAdamW", not_sharded=_NORM)',
        '"StableAdamW")',
        f"{OPTIMIZERS}::test_what_is_allowed_on_shards_updates_each_element_alone[stableadamw]",
    ),
    "the best adapter left out of checkpoints": Mutant(
        "commands/train.py",
        "best=self.directory.best_adapter if self.config.training.keep_best else None",
        "best=None",
        "tests/e2e/test_validation.py::test_a_resumed_run_knows_its_best_and_its_patience",
        slow=True,
    ),
    "a run that begins anew beside adapter.from": Mutant(
        "commands/train.py",
        "        put_saved(model, base, context)\n",
        "",
        "tests/e2e/test_continue.py::test_provenance",
        slow=True,
    ),
    "what a user says trained": Mutant(
        "data/batches.py",
        "            trained[slice(*gap)] = False",
        "            pass",
        "tests/unit/data/test_chats.py::TestTokenized::test_loss_is_that_of_transformers_labels[False-assistant]",
    ),
    "the end of an answer not compared": Mutant(
        "data/chats.py",
        '(("before", before), ("up to", up_to))',
        '(("before", before),)',
        "tests/unit/data/test_chats.py::test_beginnings_that_differ_are_refused_by_name[later]",
    ),
    "another tokenizer's tokens from the cache": Mutant(
        "data/token_table.py",
        "json.dumps(asdict(how)), _identity(tokenizer))",
        "json.dumps(asdict(how)))",
        "tests/unit/tasks/test_large.py::test_tokens_in_the_cache_are_those_of_the_same_input",
    ),
    "a later question of a streamed chat": Mutant(
        "data/stream.py",
        "if not any(question_key(q)",
        "if not all(question_key(q)",
        "tests/unit/data/test_stream.py::test_a_chat_that_asks_it_later_is_left_out",
    ),
    "the idle step's batch taken for the layers'": Mutant(
        "planner/shorten.py",
        "Breakdown(held | {Part.OTHER: at_rest[Part.OTHER]})",
        "Breakdown(held)",
        "tests/unit/planner/test_shorten.py::test_a_short_step_gives_the_long_one_to_the_byte[alone]",
    ),
    "a norm's backward with a sum for a mean": Mutant(
        "models/norm.py",
        "along_N1 = product_NI.mul_(weight_wide).mean(1, keepdim=True).mul_(-(inverse_N1**3))",
        "along_N1 = product_NI.mul_(weight_wide).sum(1, keepdim=True).mul_(-(inverse_N1**3))",
        "tests/unit/models/test_norm.py::test_as_near_to_float64_as_transformers",
    ),
    "a served B without s": Mutant(
        "export/nf4.py",
        "b_OR if s_O1 is None else b_OR * s_O1",
        "b_OR",
        f"{NF4}::test_transformers_and_peft_compute_the_adapted_model",
    ),
    "served scales without s": Mutant(
        "export/nf4.py",
        "scales = (scales.view(layer.out_features, -1) * s_O1).view(-1)",
        "pass",
        f"{NF4}::test_codes_stay_and_scales_take_s",
    ),
    "a share of more singular values": Mutant(
        "export/lora.py",
        "sigma_R[:r].square().sum()",
        "sigma_R.square().sum()",
        "tests/unit/export/test_lora.py::test_the_truncation_is_that_of_a_full_svd",
    ),
    "keys of a GGUF file in the order of transformers": Mutant(
        "models/formats/gguf_write.py",
        '"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads',
        '"q_proj": config.num_attention_heads',
        "tests/unit/models/test_gguf_write.py::test_transformers_reads_the_same_model",
    ),
    "scores of a GGUF file the other way round": Mutant(
        "models/formats/gguf_tokenizer.py",
        "ranks = {made: float(-rank)",
        "ranks = {made: float(rank)",
        "tests/unit/models/test_gguf_tokenizer.py::test_sentencepiece_scores",
    ),
    "modules of the export kept": Mutant(
        "export/verify.py",
        "module._parameters.update(empty)",
        "pass",
        "tests/unit/export/test_export.py::test_verification_holds_one_module_of_the_export",
    ),
}
