"""What each format costs a layer: the error of its weight, and of its output on real inputs.

Of a base model and of the merged weights of runs on it: does what was trained change how few bits the weights
can have?  Errors are those of rounding the dense weight to the format, one layer at a time.

Shape legend: N tokens, I in_features, O out_features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from qdora.adapters.inject import decoder_linears
from qdora.adapters.layer import AdaptedLinear
from qdora.config import ModelConfig, RunConfig
from qdora.data.batches import collate
from qdora.data.tokenize import TokenizedExample, tokenize_examples
from qdora.data.vocabulary import check_ids, embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.files import write_csv, write_file, write_json
from qdora.models.formats import Checkpoint
from qdora.models.load import load_with_adapter, required_tokenizer
from qdora.quant import Quantization
from qdora.resources import release_freed_memory
from qdora.tasks import check_data
from qdora.tasks.prepare import load_test

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base"
"""Name of the base model among the models that are compared."""

_COLORS = ("#1f6fb4", "#d1622b", "#2a8a4a", "#8456a8", "#b03060", "#1aa0a8")
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Subject:
    """A model whose weights are measured.

    Attributes:
        name: in tables and figures.
        settings: how its base is loaded.
        adapter: folder in PEFT's format; None for the base alone.
    """

    name: str
    settings: ModelConfig
    adapter: Path | None


class Errors(NamedTuple):
    """Relative errors of a weight Ŵ that stands for W, each at least 0.

    Attributes:
        weight: ‖W - Ŵ‖ / ‖W‖, Frobenius norms.
        largest: max |W - Ŵ| / max |W|.
        output: ‖x (W - Ŵ)ᵀ‖ / ‖x Wᵀ‖ over all inputs x; a bias does not count.
    """

    weight: float
    largest: float
    output: float


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer of one model in one format.

    Attributes:
        model: name of the subject.
        layer: full name of the layer.
        format: as in `model.quantization`.
        errors: of its weight and output.
    """

    model: str
    layer: str
    format: str
    errors: Errors

    @property
    def module(self) -> str:
        """The kind of layer, `q_proj` say."""
        return self.layer.rsplit(".", 1)[-1]


def calibration_examples(config: RunConfig, checkpoint: Checkpoint, count: int) -> list[TokenizedExample]:
    """The first examples of a run's test set, prompt and completion, as training would see them.

    Args:
        count: at most so many.
    Raises: InputError: the test set cannot be read, or an example is longer than `data.max_length`.
    """
    check_data(config.data)
    data = config.data
    tokenizer, rows = required_tokenizer(checkpoint, data.chat_template), embedding_rows(checkpoint.config)
    fit_padding(tokenizer, rows)
    chosen = load_test(data, tokenizer).examples[:count]
    examples, skipped = tokenize_examples(
        chosen,
        tokenizer,
        data.prompt,
        data.max_length,
        data.bad_rows,
        parse_special_tokens=data.parse_special_tokens,
    )
    if not examples:
        raise InputError(f"no example to measure with: {skipped[0]}")
    check_ids(tokenizer, rows, [(example.origin, example.input_ids) for example in examples])
    return examples


def measure(
    subjects: Sequence[Subject],
    checkpoint: Checkpoint,
    examples: Sequence[TokenizedExample],
    formats: Sequence[Quantization],
    context: DistributedContext,
) -> list[LayerErrors]:
    """The errors of every linear layer of the decoder, in every format, of each model in turn.

    In memory are one model as it is stored, and one dense layer.

    Args:
        subjects: models of one base.
        checkpoint: that base.
        examples: on which the layers' inputs are taken, of each model its own.
    Raises: InputError: a model cannot be loaded, or a format cannot hold a layer.
    """
    found = []
    for subject in subjects:
        model = load_with_adapter(checkpoint, subject.settings, context, subject.adapter)
        for layer, by_format in layer_errors(model, examples, formats, subject.name).items():
            found += [LayerErrors(subject.name, layer, name, errors) for name, errors in by_format.items()]
        del model
        release_freed_memory()
    return found


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    formats: Sequence[Quantization],
    name: str = "",
) -> dict[str, dict[str, Errors]]:
    """The errors of a model's merged weights by layer and format, on the inputs that each layer has.

    A hook measures a layer when its input arrives, so that no input is kept.

    Args:
        model: of `load_model`, not sharded; its linear layers with or without adapters.
        name: of the model, on the progress bar.
    Raises: InputError: a format cannot hold a layer; both are named.
    """
    batch = collate(examples, pad_id=0).to(next(model.parameters()).device)
    width = batch.input_ids_BT.shape[1]
    # Padding on the right: under the causal mask no token attends to it, and its own inputs do not count.
    tokens = [row * width + i for row, e in enumerate(examples) for i in range(len(e.input_ids))]
    tokens_N = torch.tensor(tokens, device=batch.input_ids_BT.device)
    layers = {n: layer for n, layer in decoder_linears(model).items() if isinstance(layer, AdaptedLinear)}
    found: dict[str, dict[str, Errors]] = {}

    def hook(layer_name: str) -> Callable[[AdaptedLinear, tuple[torch.Tensor, ...]], None]:
        def on_input(layer: AdaptedLinear, inputs: tuple[torch.Tensor, ...]) -> None:
            x_NI = inputs[0].flatten(0, -2).index_select(0, tokens_N).float()
            try:
                found[layer_name] = errors_of(layer.merged(torch.float32), x_NI, formats)
            except ValueError as error:
                raise InputError(f"{layer_name}: {error}") from None
            bar.update()

        return on_input

    with tqdm(total=len(layers), desc=name, unit="layer", leave=False, mininterval=1) as bar:
        handles = [layer.register_forward_pre_hook(hook(key)) for key, layer in layers.items()]
        try:
            model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    assert found.keys() == layers.keys(), "a layer of the decoder that it does not call"
    return found


def errors_of(w_OI: torch.Tensor, x_NI: torch.Tensor, formats: Iterable[Quantization]) -> dict[str, Errors]:
    """The errors of a dense weight in each format, by its name.

    Args:
        w_OI: (O, I) float32.
        x_NI: (N, I) float32, inputs of the layer.
    Raises: ValueError: a format cannot hold the shape.
    """
    size, largest, of_output = _norm(w_OI), float(w_OI.abs().max()), _norm(x_NI @ w_OI.T)
    found: dict[str, Errors] = {}
    for quantization in formats:
        squares = squares_of_output = most = 0.0
        for rows, w_tile in quantization.from_dense(w_OI).tiles(torch.float32):
            difference = w_OI[rows] - w_tile
            squares += _norm(difference) ** 2
            squares_of_output += _norm(x_NI @ difference.T) ** 2
            most = max(most, float(difference.abs().max()))
        found[quantization.name] = Errors(
            _ratio(squares**0.5, size), _ratio(most, largest), _ratio(squares_of_output**0.5, of_output)
        )
    return found


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _ratio(error: float, size: float) -> float:
    """0 of a weight or output that is zero, and so without error."""
    return error / size if size else 0.0


def medians(found: Sequence[LayerErrors]) -> list[dict[str, Any]]:
    """Medians over the layers, by model, kind of layer and format; `all` kinds together come last.

    Keys: model, module, format, layers (their number), weight, largest, output; and of another model than the
    first `output_to_first`, the median over layers of the ratio of its output error to the first model's.
    """
    first = {
        (entry.layer, entry.format): entry.errors.output for entry in found if entry.model == found[0].model
    }
    groups: dict[tuple[str, str, str], list[LayerErrors]] = {}
    for module in [*dict.fromkeys(entry.module for entry in found), "all"]:
        for entry in found:
            if module in ("all", entry.module):
                groups.setdefault((entry.model, module, entry.format), []).append(entry)
    rows = []
    for (model, module, format_), entries in groups.items():
        row: dict[str, Any] = {"model": model, "module": module, "format": format_, "layers": len(entries)}
        for field in Errors._fields:
            row[field] = statistics.median(getattr(entry.errors, field) for entry in entries)
        if model != found[0].model:
            ratios = [_ratio(e.errors.output, first[e.layer, e.format]) for e in entries]
            row["output_to_first"] = statistics.median(ratios)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians as text: errors in percent, a column a format; below them the ratios to the first model.

    Args:
        rows: of `medians`.
    """
    formats = list(dict.fromkeys(row["format"] for row in rows))
    by_key = {(row["module"], row["model"], row["format"]): row for row in rows}
    lines = list(dict.fromkeys((row["module"], row["model"]) for row in rows))
    order = list(dict.fromkeys(module for module, _ in lines))
    lines.sort(key=lambda line: order.index(line[0]))

    def cells(line: tuple[str, str], show: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [*line, *(show(by_key[*line, name]) for name in formats)]

    def errors(row: Mapping[str, Any]) -> str:
        return f"{100 * row['weight']:.2f} / {100 * row['output']:.2f}"

    text = "relative error in %, weight / output, medians over layers\n"
    text += tabulate([cells(line, errors) for line in lines], headers=["layers", "model", *formats])
    others = [line for line in lines if line[1] != rows[0]["model"]]
    if others:
        text += f"\n\noutput error divided by that of {rows[0]['model']}, medians over layers\n"
        shown = [cells(line, lambda row: f"{row['output_to_first']:.3f}") for line in others]
        text += tabulate(shown, headers=["layers", "model", *formats], disable_numparse=True)
    return text


def write_results(folder: Path, found: Sequence[LayerErrors], settings: Mapping[str, Any]) -> None:
    """Write errors.csv (a row a model, layer and format), errors.png, and figures.json with the medians too.

    Args:
        settings: how it was measured, for the JSON file.
    """
    rows = [
        {"model": e.model, "layer": e.layer, "module": e.module, "format": e.format, **e.errors._asdict()}
        for e in found
    ]
    write_csv(folder / "errors.csv", rows)
    write_json(folder / "figures.json", {**settings, "medians": medians(found), "layers": rows})
    plot(found, folder / "errors.png")


def describe_subject(subject: Subject) -> dict[str, Any]:
    """A subject as JSON."""
    adapter = None if subject.adapter is None else str(subject.adapter)
    return {"name": subject.name, "adapter": adapter, "model": subject.settings.model_dump(mode="json")}


def plot(found: Sequence[LayerErrors], path: Path) -> None:
    """Relative output error over the depth, a panel for each kind of layer.

    A color a format, a line style a model.

    Args:
        path: PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    models = list(dict.fromkeys(entry.model for entry in found))
    formats = list(dict.fromkeys(entry.format for entry in found))
    modules = list(dict.fromkeys(entry.module for entry in found))
    columns = min(4, len(modules))
    lines = -(-len(modules) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines + 1), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, module in zip(panels, modules, strict=False):
        for color, format_ in zip(_COLORS, formats, strict=False):
            for style, model in zip(_styles(models), models, strict=True):
                errors = [
                    100 * entry.errors.output
                    for entry in found
                    if (entry.model, entry.module, entry.format) == (model, module, format_)
                ]
                panel.plot(errors, style, color=color, linewidth=1.3)
        panel.set_title(module, fontsize=10)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        panel.grid(alpha=0.25, which="both")
    for panel in panels[len(modules) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(modules) - columns) : len(modules)]:
        panel.tick_params(labelbottom=True)  # also above a panel that is off
    legend = [Line2D([], [], color=c, label=f) for c, f in zip(_COLORS, formats, strict=False)]
    legend += [
        Line2D([], [], color="black", linestyle=s, label=m)
        for s, m in zip(_styles(models), models, strict=True)
        if len(models) > 1
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    figure.supxlabel("layer of the decoder", fontsize=10)
    figure.supylabel("relative error of the output (%)", fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _styles(models: Sequence[str]) -> list[Any]:
    return [_LINES[i % len(_LINES)] for i in range(len(models))]
