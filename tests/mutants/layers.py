"""Bugs of adapters, products, kernels and number formats."""

from tests.mutation import Mutant

CLOSED_FORM = "tests/unit/adapters/test_closed_form.py"
NORM = "tests/unit/adapters/test_norm_and_magnitude.py"
SIXTEEN = "tests/unit/adapters/test_sixteen_bits.py"
KERNELS = "tests/unit/adapters/kernels/test_closed_form.py"
SHARDS = "tests/unit/quant/test_shards.py"
SHARDED = "tests/distributed/test_sharded.py"
ACCELERATED = "tests/unit/adapters/test_accelerate.py"

MUTANTS = {
    "scale dropped": Mutant(
        "adapters/product.py",
        "small_NO = mm_scaled(inner_NR, b_OR.to(dtype).T, settings.scale)",
        "small_NO = mm_scaled(inner_NR, b_OR.to(dtype).T, 1.0)",
        f"{CLOSED_FORM}::test_float32_matches_the_closed_form",
    ),
    "scale dropped from the norm": Mutant(
        "adapters/magnitude.py",
        "factored_norm(w2_O, wa_OR, a_RI, b_OR, factors.scale)",
        "factored_norm(w2_O, wa_OR, a_RI, b_OR, 1.0)",
        f"{NORM}::test_norm_is_that_of_the_dense_sum",
    ),
    "bias scaled": Mutant(
        "adapters/product.py",
        "return (y_NO + given.bias_O).to(dtype)",
        "return (y_NO + given.bias_O * s_O).to(dtype)",
        f"{CLOSED_FORM}::test_float32_matches_the_closed_form",
    ),
    "norm undetached": Mutant(
        "adapters/layer.py",
        'self.exact_norm_gradient = config.norm_gradient == "exact"',
        "self.exact_norm_gradient = True",
        f"{CLOSED_FORM}::test_float32_matches_the_closed_form",
    ),
    "norm over the wrong axis": Mutant(
        "adapters/magnitude.py",
        "torch.linalg.vector_norm(w_tile, dim=1, out=norms_O[rows])",
        "norms_O[rows] = torch.linalg.vector_norm(w_tile, dim=0)[: w_tile.shape[0]].mean()",
        f"{NORM}::test_norm_is_that_of_the_dense_sum",
    ),
    "stale norm after a step": Mutant(
        "adapters/magnitude.py",
        "return self._norm_O is not None and self._versions == self._current(factors)",
        "return self._norm_O is not None",
        f"{NORM}::test_norm_is_computed_once_per_optimizer_step",
    ),
    "stale norm after a fused step": Mutant(
        "adapters/magnitude.py",
        "    _steps += 1",
        "    _steps += 0",
        "tests/unit/training/test_loop.py::test_the_norm_follows_the_update",
    ),
    "update added to what is rounded": Mutant(
        "adapters/tiles.py",
        "y_NO[:, rows].addmm_(x_NI, w_tile.T, beta=beta, alpha=alpha)",
        "y_NO[:, rows].mul_(beta).add_(x_NI @ w_tile.T, alpha=alpha)",
        f"{SIXTEEN}::test_small_moves_come_through[torch-qlora-update-0.0-start]",
    ),
    "tile on the grid": Mutant(
        "adapters/tiles.py",
        "OFF_GRID = 1.841",
        "OFF_GRID = 1.0",
        f"{SIXTEEN}::test_small_moves_come_through[torch-dora-magnitude-0.0-start]",
    ),
    "factor not taken back": Mutant(
        "adapters/product.py",
        "onto_NI=small_NI, alpha=1 / ctx.factor",
        "onto_NI=small_NI, alpha=1.0",
        f"{SIXTEEN}::test_small_moves_come_through[kernels-qdora-update-0.0-start]",
    ),
    "compiled norm of an earlier step": Mutant(
        "adapters/magnitude.py",
        "torch.compiler.is_compiling() or not self.is_fresh(factors)",
        "not self.is_fresh(factors)",
        "tests/unit/adapters/test_compile.py::test_a_layer_is_one_graph[qdora-dtype0-1e-06-False-0.0]",
    ),
    "tile off by one": Mutant(
        "quant/blockwise.py",
        "scales[first // self.block_size : -(-last // self.block_size)]",
        "scales[first // self.block_size - (start > 0) : -(-last // self.block_size)]",
        "tests/unit/quant/test_nf4.py::test_tiles_are_the_whole_whatever_their_size",
    ),
    "last tile lost": Mutant(
        "quant/blockwise.py",
        "for start in range(0, self.out_features, step):\n            stop =",
        "for start in range(0, max(1, self.out_features - step + 1), step):\n            stop =",
        f"{CLOSED_FORM}::test_any_shape_and_tile",
    ),
    "second base product with dropout": Mutant(
        "adapters/layer.py",
        "if dropout and self.published_dropout and self.magnitude is not None:",
        "if dropout and self.magnitude is not None:",
        "tests/unit/adapters/test_cost.py::test_one_base_product_each_way",
    ),
    "magnitude stored in bf16": Mutant(
        "adapters/magnitude.py",
        "self.initial_O = norm_O",
        "self.initial_O = torch.zeros_like(norm_O)\n        self.offset_O.data.copy_(norm_O)",
        f"{NORM}::test_bf16_magnitude_moves_as_float32_does",
    ),
    "nibbles swapped": Mutant(
        "adapters/kernels/triton_kernels.py",
        "tl.join(high, low)",
        "tl.join(low, high)",
        f"{KERNELS}::test_tile_is_that_of_bitsandbytes",
    ),
    "s of the tile's rows": Mutant(
        "adapters/kernels/triton_kernels.py",
        "tl.load(s + row0 + row_O",
        "tl.load(s + row0 - first + row_O",
        f"{KERNELS}::test_tile_is_the_scaled_sum",
    ),
    "padded ranks counted again": Mutant(
        "adapters/kernels/triton_kernels.py",
        "rank_R = rank0 + tl.arange(0, BLOCK_R)",
        "rank_R = (rank0 + tl.arange(0, BLOCK_R)) % R",
        f"{KERNELS}::test_tile_is_the_scaled_sum",
    ),
    "parts of the tokens lost": Mutant(
        "adapters/kernels/triton_gradients.py",
        "mask=(split_S < splits)[:, None]",
        "mask=(split_S < splits - 1)[:, None]",
        f"{KERNELS}::test_the_magnitudes_gradient_is_a_sum_over_tokens",
    ),
    "ranks of a second program over those of the first": Mutant(
        "adapters/kernels/triton_gradients.py",
        "rank_R = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)",
        "rank_R = tl.arange(0, BLOCK_R)",
        f"{KERNELS}::test_the_gradient_of_b_is_a_product_over_tokens",
    ),
    "offset rounded with the sum": Mutant(
        "adapters/kernels/triton_gradients.py",
        "m_O = tl.load(initial + row_O, mask=inside_O, other=0) + tl.load(",
        "m_O = tl.load(initial + row_O, mask=inside_O, other=0).to(tl.bfloat16).to(tl.float32) + tl.load(",
        f"{KERNELS}::test_row_scale",
    ),
    "columns beyond the weight in the norm": Mutant(
        "adapters/kernels/triton_kernels.py",
        "scale_OC = tl.where(inside_OC, scale_OC, 0.0)",
        "pass",
        f"{KERNELS}::test_row_norm_is_that_of_the_sum",
    ),
    "blocks cut at the shard": Mutant(
        "quant/blockwise.py",
        "slice(start // block_size * block_size, min(",
        "slice(start, min(",
        f"{SHARDS}::test_shards_are_the_full_weight",
    ),
    "scales of the neighbour": Mutant(
        "quant/blockwise.py",
        "first_block = blocks.start - values.start // self.block_size",
        "first_block = 0",
        f"{SHARDS}::test_shards_are_the_full_weight",
    ),
    "sharded norm never stale": Mutant(
        "adapters/magnitude.py",
        "return _steps, *(t._version for t in self._watched)",
        "return ()",
        f"{SHARDED}::test_float32_training_is_that_of_one_process[2-qdora]",
        slow=True,
    ),
    "one rank's rows saved": Mutant(
        "adapters/base.py",
        "stored = stored.full_tensor()",
        "stored = stored.to_local()",
        f"{SHARDED}::test_the_adapter_file_is_what_one_process_writes[2-qdora]",
        slow=True,
    ),
    "masters saved": Mutant(
        "adapters/base.py",
        "return stored.to(storage)",
        "return stored",
        f"{SHARDED}::test_the_adapter_file_is_what_one_process_writes[2-qdora bf16]",
        slow=True,
    ),
    "rows not scaled as the embedding's": Mutant(
        "adapters/tokens.py",
        "        if scale is not None:",
        "        if False:",
        "tests/unit/adapters/test_tokens.py::test_other_families[scaled embedding]",
    ),
    "the sides of a convolution's output swapped": Mutant(
        "adapters/convolution.py",
        "reshape(*x.shape[:-3], self.out_channels, *size)",
        "reshape(*x.shape[:-3], self.out_channels, *size[::-1])",
        "tests/unit/adapters/test_convolution.py::test_a_convolution_is_that_of_peft",
    ),
    "a norm of the scale before": Mutant(
        "adapters/magnitude.py",
        "return _steps, factors.scale, *numbers",
        "return _steps, *numbers",
        f"{ACCELERATED}::test_a_norm_is_never_stale",
    ),
}
