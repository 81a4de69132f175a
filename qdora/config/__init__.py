"""The configuration of a run: frozen pydantic models, a file for each part.

Every field states its unit and bounds; `qdora/config_file.py` reads them from strict YAML.
"""

from qdora.config.data import (
    AnswerKind,
    AnswersName,
    ColumnsConfig,
    DataConfig,
    DatasetConfig,
    FormatName,
    LossOn,
    PackingName,
    PromptName,
)
from qdora.config.model import (
    LLAMA_LINEARS,
    AdapterConfig,
    DtypeName,
    InitName,
    MagnitudeStart,
    ModelConfig,
    QuantizationName,
    UpdateType,
)
from qdora.config.run import (
    EvaluationConfig,
    EvaluationMethod,
    EvaluationWeights,
    OutputConfig,
    RunConfig,
    TrainingConfig,
)
from qdora.config.section import Count, Section, explain

__all__ = [
    "LLAMA_LINEARS",
    "AdapterConfig",
    "AnswerKind",
    "AnswersName",
    "ColumnsConfig",
    "Count",
    "DataConfig",
    "DatasetConfig",
    "DtypeName",
    "EvaluationConfig",
    "EvaluationMethod",
    "EvaluationWeights",
    "FormatName",
    "InitName",
    "LossOn",
    "MagnitudeStart",
    "ModelConfig",
    "OutputConfig",
    "PackingName",
    "PromptName",
    "QuantizationName",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "UpdateType",
    "explain",
]
