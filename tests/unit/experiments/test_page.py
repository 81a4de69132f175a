"""The HTML page of a report, as text and in a real browser."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdora.experiments.grid import GridPoint
from qdora.experiments.report import write_report
from tests.browser import Page, browser_page, find_browser

from .runs import arm_of, scores_of

TASKS = {
    "numbers": ("normalized", "published"),
    "choices": ("first_answer_word", "likelihood", "per_character"),
}
ARMS = {
    "qlora": {"adapter.dora": False},
    "qdora": {},
    "qdora-with-a-very-long-name.and-r-64": {
        "adapter.r": 64,
        "adapter.targets": ["q_proj", "k_proj", "v_proj"],
    },
    "zero-shot": {"evaluation.batch_size": 8},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with everything that one can have."""
    folder = tmp_path_factory.mktemp("report")
    generator = random.Random(0)
    runs = []
    for seed in (0, 1, 2):
        for number, (name, settings) in enumerate(ARMS.items()):
            scores = []
            for task, scorers in TASKS.items():
                first = [generator.random() < 0.3 + 0.15 * number for _ in range(60)]
                answers = {s: "".join("FT"[generator.random() < 0.1 or t] for t in first) for s in scorers}
                scores.append(scores_of(answers, task))
            changed = {} if "r" not in name else {"initial_a": f"a{seed}"}
            trained = name != "zero-shot"
            runs.append(
                arm_of(name, scores, seed, settings=settings, loss=number, trained=trained, **changed)
            )
    grid = [
        GridPoint("qdora", {"training.learning_rate": rate, "adapter.r": 8}, n, 64, n == 40, f"grid/{n}")
        for n, rate in ((20, 1e-5), (40, 1e-4), (30, 1e-3))
    ]
    published = {"qdora": {"numbers": 61.5, "average": 70.0, "elsewhere": 5.0}}
    write_report(
        folder, runs, {"base": runs[0].scores}, grid, published=published, published_source="A paper"
    )
    return folder / "report.html"


def test_nothing_comes_from_elsewhere_and_nothing_runs(page):
    """Catches: a script, a font, a style sheet or a picture that is fetched; text that becomes markup;
    figures with the ids of other figures."""
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert text.count("<svg") == 2 * 3 + 1


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    browser = find_browser()
    if browser is None:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    with browser_page(browser) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (400, True)])
def test_in_a_browser(page, tab, tmp_path, width, dark):
    """Catches: a page that is blank, wider than the phone, dark on dark, or that asks the network."""
    tab.open(page.as_uri(), width, dark=dark)
    assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    heights = tab.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert len(heights) == 7
    assert min(heights) > 80
    colors = tab.evaluate(
        "[...new Set([...document.querySelectorAll('figure svg text')].map("
        "text => getComputedStyle(text).fill == getComputedStyle(document.body).color))]"
    )
    assert colors == [True]
    tab.screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)[::2]
    assert pixels.shape[1] == width
    ground = pixels[2, 2]
    assert (ground.mean() < 60) == dark
    drawn = np.abs(pixels - ground).max(axis=2)
    assert 0.02 < np.mean(drawn > 100) < 0.3  # text and figures stand out
    assert len(np.unique(pixels @ [1 << 16, 1 << 8, 1])) > 100
