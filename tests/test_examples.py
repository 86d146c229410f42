"""The pages of examples/ run as they stand, print what they say they print, and draw their figures.

``XCE_WRITE_EXAMPLES=1`` writes what they print, and the figures, into the pages.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("the examples are not installed with the package", allow_module_level=True)
PAGES = sorted(EXAMPLES.glob("*.md"))
WRITES = os.environ.get("XCE_WRITE_EXAMPLES") == "1"

# a block of code, and the block of its output if it has one
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"!\[[^\]]+\]\((\w+\.png)\)")
MARK = "=== next block"


def test_there_are_pages() -> None:
    assert {page.stem for page in PAGES} >= {"binary", "numpy", "pytorch"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for library in ("torch", "matplotlib"):
        if f"import {library}" in text:
            pytest.importorskip(library)
    blocks = BLOCK.findall(text)
    assert blocks
    code = f"\nprint({MARK!r})\n".join(code for code, _ in blocks)
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    outputs = run.stdout.split(f"{MARK}\n")
    if WRITES:
        write(page, text, outputs, tmp_path)
    assert outputs == [expected for _, expected in blocks]
    check_figures(text, tmp_path)


def check_figures(text: str, drawn: Path) -> None:
    """Every figure of a page is drawn by it and lies beside it, and there is something to see."""
    names = FIGURE.findall(text)
    assert {path.name for path in drawn.glob("*.png")} == set(names)
    for name in names:
        image = pytest.importorskip("matplotlib.image").imread(drawn / name)
        assert image.shape == pytest.importorskip("matplotlib.image").imread(EXAMPLES / name).shape
        assert image[..., :3].std() > 0.05


def write(page: Path, text: str, outputs: list[str], drawn: Path) -> None:
    results = iter(outputs)

    def with_output(match: re.Match[str]) -> str:
        output = next(results)
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

    page.write_text(BLOCK.sub(with_output, text), encoding="utf-8")
    for figure in drawn.glob("*.png"):
        (EXAMPLES / figure.name).write_bytes(figure.read_bytes())
