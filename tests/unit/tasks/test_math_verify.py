"""The scorer `math_verify`: its verdicts beside those of `normalized`, and the process in which it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qdora.tasks import math_verifier
from qdora.tasks.math_verifier import Reading, compare
from qdora.tasks.scoring import score_answer, score_math_verify

BOTH, OURS, THEIRS, NEITHER = "both", "normalized", "math_verify", "neither"
VERDICTS = [
    ("The answer is 42.", "42", BOTH),
    ("It is 1,234 dollars, or $1,234.", "1234", BOTH),
    (r"The answer is $7 \frac{1}{2}$.", "7.5", BOTH),
    (r"The answer is $-\frac{1}{2}$.", "-0.5", BOTH),
    (r"So $4 \times 5 = 20$.", "20", BOTH),
    ("The answer is 5 * 3 = 15 apples", "15", BOTH),
    (r"\boxed{\sqrt{8}}", r"\sqrt{8}", BOTH),
    ("The answer is 3:2.", "3:2", BOTH),
    ("The answer is **4**.", "4", BOTH),
    ("The answer is 2^3.", "8", BOTH),
    # Characters and spellings of numbers.
    ("The answer is 7 1/2.", "7.5", OURS),
    ("The answer is ½.", "0.5", OURS),
    ("The answer is −3.", "-3", OURS),
    ("The answer is Rs.500.", "500", OURS),
    ("The answer is 1e3.", "1000", OURS),
    ("The answer is 1,5", "1.5", THEIRS),
    ("The answer is $118 000.", "118000", THEIRS),
    # Percent.
    ("The answer is 50%.", "50", BOTH),
    ("The answer is 50%.", "50.0", OURS),
    ("The answer is 50%.", "0.5", THEIRS),
    # Rounding.
    ("The answer is 0.33.", "1/3", OURS),
    ("The answer is 6.67.", "20/3", OURS),
    (r"The answer is $\sqrt{2}$.", "1.41", OURS),
    (r"The answer is $\frac{1}{3}$.", "0.333333", BOTH),
    # Which number is the answer.
    ("#### 12\nOr is the answer 7?", "12", OURS),
    ("The answer is 10-12 eggs.", "10", OURS),
    ("The answer is (3, 4).", "3", OURS),
    ("The answer is 4 or 5.", "5", NEITHER),
    # Several values in one.
    ("The answer is 3:2.", "3:4", THEIRS),
    ("The answer is 12:30.", "12:45", THEIRS),
    # Not understood by either.
    ("The answer is five.", "5", NEITHER),
    ("The answer is 2 dozen.", "24", NEITHER),
]
"""Output, gold answer, and whose verdict is `correct`."""


@pytest.mark.parametrize(("output", "gold", "by"), VERDICTS)
def test_where_the_two_differ(output: str, gold: str, by: str) -> None:
    """Catches: a reader that changed; a difference between the two that nobody has looked at."""
    verdicts = score_answer(output, gold)
    correct = [name for name in (OURS, THEIRS) if verdicts[name].correct]
    assert correct == {BOTH: [OURS, THEIRS], NEITHER: []}.get(by, [by])


def test_letters_are_those_of_the_headline() -> None:
    """Catches: a letter as gold answer compared with numbers, or read as a variable."""
    for output, correct in (("So the answer is (B).", True), ("Option C", False), ("7", False)):
        verdict = score_answer(output, "B")["math_verify"]
        assert (verdict.gold, verdict.correct) == ("B", correct)
        assert verdict == score_answer(output, "B")["normalized"]


def test_a_next_question_is_not_read() -> None:
    """Catches: an answer of a question that the model asked itself."""
    verdict = score_math_verify("The answer is 4.\n###Question:\n3 + 5?\n###Answer:\nThe answer is 8.", "4")
    assert (verdict.extracted, verdict.gold, verdict.correct) == ("4", "4", True)


def test_a_gold_answer_that_is_all_latex_is_read() -> None:
    """Catches: all answers wrong of data whose gold answers are LaTeX without the signs of a formula."""
    for gold in (r"\frac{1}{2}", r" \dfrac12", r"2\sqrt{3}", r"\boxed{4}"):
        verdict = score_math_verify(f"So it is $\\frac{{1}}{{2}}$, or $2\\sqrt{{3}}$, or {gold}", gold)
        assert verdict.gold is not None
        assert score_math_verify(gold, gold).correct
    assert not score_math_verify(r"\frac{1}{2}", r"\frac{1}{3}").correct
    assert score_math_verify(r"Not \frac{1}{2} but 5", "5").correct


def test_nothing_read_is_no_answer() -> None:
    """Catches: two texts without a number that are equal."""
    for gold in ("", "none"):
        verdict = score_math_verify("no idea", gold)
        assert (verdict.extracted, verdict.correct) == (None, False)


def test_what_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an evaluation that hangs at a tower of powers, and later answers that are lost with it."""
    monkeypatch.setattr(math_verifier, "LIMIT", 1.0)
    started = time.perf_counter()
    assert compare("The answer is $9^{9^{9^{9}}}$", "3 a") == Reading(None, None, False)
    assert time.perf_counter() - started < 60
    assert compare("The answer is 3 b", "3").correct


def test_a_process_that_was_killed_is_replaced() -> None:
    """Catches: BrokenPipeError in the middle of an evaluation."""
    assert compare("The answer is 31", "31").correct
    worker = math_verifier._worker
    assert worker is not None
    worker.process.kill()
    worker.process.wait()
    assert compare("The answer is 32", "32") in (Reading(None, None, False), Reading("32", "32", True))
    assert compare("The answer is 33", "33").correct


def test_it_works_in_any_thread_and_keeps_signal_handlers() -> None:
    """Catches: math-verify's alarm; answers of one thread given to another."""
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: compare(f"It is {100 + i}", f"{100 + i}"), range(20)))
    assert found == [Reading(f"{100 + i}", f"{100 + i}", True) for i in range(20)]
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)] == before


def test_a_forked_process_has_its_own() -> None:
    """Catches: two processes that read each other's answers; a parent's process killed by its child's end."""
    assert compare("It is 41", "41").correct
    assert math_verifier._worker is not None
    own = math_verifier._worker.process
    child = os.fork()
    if child == 0:
        code = 1
        try:
            asked = math_verifier._worker is None and compare("It is 42", "42").correct
            code = 0 if asked else 2
            math_verifier._stop()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert own.poll() is None
    assert compare("It is 43", "43").correct


def test_this_process_imports_no_sympy_and_leaves_none_behind() -> None:
    """Catches: a second more for each process that scores; a process that outlives the one that asked."""
    code = (
        "import sys; from qdora.tasks.scoring import score_answer; from qdora.tasks import math_verifier; "
        "assert score_answer('The answer is 15 apples.', '15')['math_verify'].correct; "
        "assert not {'sympy', 'math_verify'} & set(sys.modules), 'imported'; "
        "print(math_verifier._worker.process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    deadline = time.monotonic() + 10
    while _runs(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(done.stdout))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
