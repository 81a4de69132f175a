"""Write chats to try things with: word problems in OpenAI's messages format, with system and further turns.

python -m tools.write_chats chats.jsonl --rows 1000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from qdora.tasks import synthetic

SYSTEM = "Work the problem out in one line."
FURTHER = (("Only the number, please.", "{answer}"), ("Are you sure?", "Yes. The answer is {answer}."))


def chats(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a column `messages`; the same ones for the same seed, a smaller number is their beginning."""
    random = Random(seed)
    found = []
    for problem in synthetic.generate("train", rows, seed=seed):
        turns = [("user", problem.question), ("assistant", problem.completion)]
        if random.random() < 0.4:
            turns.insert(0, ("system", SYSTEM))
        for question, answer in random.sample(FURTHER, random.choice((0, 0, 1, 2))):
            turns += [("user", question), ("assistant", answer.format(answer=problem.answer))]
        found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return found


def write(path: Path, rows: int, seed: int = 0) -> Path:
    """Write `chats` as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in chats(rows, seed)), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.path, arguments.rows, arguments.seed)


if __name__ == "__main__":
    main()
