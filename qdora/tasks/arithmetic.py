"""Arithmetic word problems of LLM-Adapters' math evaluation: AddSub, MultiArith, SVAMP.

Beware: of the questions of AddSub and MultiArith most stand word for word in LLM-Adapters' math training
file; `data.test` removes them from the training set.

Source: LLM-Adapters, arXiv:2304.01933, `dataset/`; SVAMP also in the format of its own repository.
"""

from __future__ import annotations

import re

from qdora.config import DatasetConfig
from qdora.data.rows import Example, Row, text_of
from qdora.tasks.base import LlmAdaptersTask, Mixture

_ZERO_DECIMALS = re.compile(r"(?<=\d)\.0+(?!\d)")


class Svamp(LlmAdaptersTask):
    """SVAMP in either format; its own has Body, Question, Equation and Answer, and no worked solution."""

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """Body and question; the equation and its result, whole numbers without their decimals."""
        if "Body" not in row.values:
            return super().example(config, row)
        question = f"{text_of(row, 'Body')} {text_of(row, 'Question')}"
        equation, answer = (_ZERO_DECIMALS.sub("", text_of(row, part)) for part in ("Equation", "Answer"))
        completion = f"{equation} = {answer}. The answer is {answer}."
        return Example(question, completion, answer, self.name, row.origin)


_LLM_ADAPTERS = "LLM-Adapters (arXiv:2304.01933); "

ARITHMETIC = (
    LlmAdaptersTask("AddSub", _LLM_ADAPTERS + "Hosseini et al., EMNLP 2014, D14-1058", "Apache-2.0"),
    LlmAdaptersTask("MultiArith", _LLM_ADAPTERS + "Roy and Roth, arXiv:1608.01413", "Apache-2.0"),
    Svamp("SVAMP", _LLM_ADAPTERS + "arkilpatel/SVAMP, arXiv:2103.07191", "MIT"),
)

ARITHMETIC_MIXTURE = Mixture(
    "arithmetic",
    provenance="LLM-Adapters (arXiv:2304.01933)",
    licence="as its tasks",
    members=ARITHMETIC,
)
