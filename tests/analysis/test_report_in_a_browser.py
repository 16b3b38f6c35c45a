"""The report of a comparison in a real browser: two widths, light and dark, every control, no error in its console."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.report.page import write_report
from tests.analysis.test_compare import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DARK, LIGHT = "0", "1"
"""Values of Chromium's setting `preferredColorScheme`."""
WIDTHS = (1280, 390)
HARNESS = """<!doctype html><body><pre id="out"></pre><script>
const found = {};
function visible(page, query) {
  return [...page.querySelectorAll(query)].filter(one => one.getClientRects().length > 0).length;
}
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, one = {};
  one.overflow = page.documentElement.scrollWidth - frame.clientWidth;
  one.background = view.getComputedStyle(page.body).backgroundColor;
  one.line = view.getComputedStyle(page.querySelector("svg .s0")).stroke;
  one.text = view.getComputedStyle(page.querySelector("svg text")).fill;
  one.axes = {};
  for (const input of page.querySelectorAll("input[name=axis]")) {
    page.querySelector(`label[for=${input.id}]`).click();
    const key = input.id.slice(5);
    one.axes[key] = [visible(page, ".view"), visible(page, `.view-${key}`), view.scrollY];
  }
  one.curves = {};
  for (const input of page.querySelectorAll("input[name=curve]")) {
    page.querySelector(`label[for=${input.id}]`).click();
    one.curves[input.id.slice(6)] = [visible(page, ".has-raw .raw") > 0, visible(page, ".has-raw .line") > 0];
  }
  found[frame.width] = one;
  document.getElementById("out").textContent = JSON.stringify(found);
  console.log("measured");
}
</script>%s</body>"""
FRAME = '<iframe src="report/index.html" width="{width}" height="900" onload="measure(this)"></iframe>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report about a fair pair, an unfair one and a run that diverged, and a page that measures it."""
    place = tmp_path_factory.mktemp("browser")
    noise = np.random.default_rng(0).normal(scale=0.02, size=(3, 240))
    curve = 2 + 4 * np.exp(-np.arange(240) / 40)
    runs = [make_run(place / "gqa", list(curve + noise[0]))]
    runs.append(make_run(place / "mlp", list(curve + noise[1] - 0.05), variant="kha_mlp"))
    runs.append(make_run(place / "hot", list(curve + noise[2]), variant="mha", lr=2e-3))
    runs.append(make_run(place / "lost", [*curve[:200], *(40.0 + np.arange(40))], variant="mea"))
    write_report(compare_runs(runs), place / "report")
    frames = "".join(FRAME.format(width=width) for width in WIDTHS)
    (place / "harness.html").write_text(HARNESS % frames)
    return place


def browse(folder: Path, scheme: str) -> tuple[dict[str, Any], str]:
    """What the harness measured, and what the browser printed."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / f'profile{scheme}'}", f"--blink-settings=preferredColorScheme={scheme}",
        "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", f"file://{folder / 'harness.html'}",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (measured,) = re.findall(r'<pre id="out">(.*?)</pre>', ended.stdout, re.DOTALL)
    return json.loads(unescape(measured)), ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_fits_two_widths_light_and_dark_and_its_controls_switch_every_figure(folder: Path) -> None:
    found = {}
    for scheme in (LIGHT, DARK):
        found[scheme], said = browse(folder, scheme)
        told = [line for line in said.splitlines() if "CONSOLE" in line]
        assert len(told) == len(WIDTHS) and all('"measured"' in line for line in told), said
        assert set(found[scheme]) == {str(width) for width in WIDTHS}
        for one in found[scheme].values():
            assert one["overflow"] <= 0, "the page is wider than its window"
            shown = {tuple(counts[:2]) for counts in one["axes"].values()}
            ((every, of_axis),) = shown
            assert every == of_axis > 3, "one view of each figure, that of the chosen axis"
            assert {counts[2] for counts in one["axes"].values()} == {0}, "a choice does not scroll the page"
            assert one["curves"] == {"both": [True, True], "smooth": [False, True], "raw": [True, False]}
    light, dark = (found[scheme]["1280"] for scheme in (LIGHT, DARK))
    for name in ("background", "line", "text"):
        assert light[name] != dark[name], f"{name} does not follow the scheme"
