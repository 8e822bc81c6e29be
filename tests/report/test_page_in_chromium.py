"""The pages as a browser shows them: all drawn, nothing loaded, nothing complained of, on a desk, a phone and paper.

Screenshots and printed pages go to the folder that the environment variable TENPAK_SCREENSHOTS names, if any.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, QUALITY, diagnosis, profile, search, write_json, write_model

from tenpak.report.comparison import entries
from tenpak.report.contents import read_contents
from tenpak.report.page import compare_page, report_page, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install 'tenpak[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

SCREENS = {"desk": (1280, 900), "phone": (375, 740)}
INK = "getComputedStyle(document.body).color"
TICKS = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
DRAWN = "html[data-drawn=all]"
MIXED = {"self_attn.v_proj": "int8:row", "mlp.down_proj": "int4:g16+int2:g16", "embed": "ec-int8:row"}


@dataclass
class Visit:
    """A page in the browser, and what it did besides being looked at."""

    page: Any
    noise: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as in containers; the pages are ours.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with 400 tensors and everything, one of an artifact with nothing but weights, one of several artifacts."""
    folder = tmp_path_factory.mktemp("pages")
    large = write_model(folder / "large", layers=44, recipes=MIXED, recorded=search())
    bare = write_model(folder / "bare", name=HOSTILE, prefix=f"{HOSTILE}.layers", quality=None)
    more = write_model(folder / "more", recipes=MIXED, quality={**QUALITY, "kl": 0.004})
    other = write_model(folder / "other", name=f"other/{HOSTILE}", quality={**QUALITY, "kl": 0.2})
    found = write_json(folder / "diagnosis.json", diagnosis(large))
    profiled = write_json(folder / "profile.json", profile(large))
    written = {
        "large": report_page(large, diagnosis=found, profile=profiled),
        "bare": report_page(bare),
        "several": compare_page(entries([read_contents(path) for path in (large, bare, more, other)])),
    }
    for name, page in written.items():
        write_page(folder / f"{name}.html", page)
    return {name: folder / f"{name}.html" for name in written}


NAMES = ("large", "bare", "several")


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("TENPAK_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def visit(browser: Any, path: Path, screen: str = "desk", scheme: str = "light") -> Iterator[Visit]:
    """A page, all of it drawn."""
    width, height = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    found = Visit(context.new_page())
    found.page.on("console", lambda message: found.noise.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.noise.append(f"error: {error}"))
    found.page.on("dialog", lambda dialog: found.noise.append(f"dialog: {dialog.message}"))
    found.page.on("request", lambda request: found.noise.append(f"request: {request.url}"))
    found.page.goto(path.as_uri(), wait_until="commit")
    found.page.wait_for_selector(DRAWN, state="attached")
    yield found
    context.close()


def until(page: Any, expression: str) -> None:
    """Wait for a condition; playwright's own way to would evaluate text, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not within 10 s: {expression}")


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", NAMES)
def test_all_is_drawn_and_nothing_else_happens(
    name: str, screen: str, pages: dict[str, Path], browser: Any, shots: Path
) -> None:
    width = SCREENS[screen][0]
    with visit(browser, pages[name], screen) as found:
        page = found.page
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            until(page, f"{TICKS} === {INK} && document.documentElement.dataset.drawn === 'all'")
            marks = page.eval_on_selector_all(
                ".plot", "plots => plots.map(p => p.querySelectorAll('svg.main-svg path, svg.main-svg image').length)"
            )
            assert len(marks) == page.evaluate("JSON.parse(document.getElementById('data').textContent).figures.length")
            assert min(marks) > 3
            right = "all => Math.max(...all.map(svg => svg.getBoundingClientRect().right))"
            assert page.eval_on_selector_all(".plot svg.main-svg", right) <= width
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.screenshot(path=shots / f"{name}-{screen}-{scheme}.png", full_page=True)
        assert found.noise == [f"request: {pages[name].as_uri()}"]


def test_names_show_as_text_in_figures(pages: dict[str, Path], browser: Any) -> None:
    with visit(browser, pages["bare"]) as found:
        assert HOSTILE in found.page.eval_on_selector("#plot-treemap", "plot => plot.textContent")
        found.page.hover("#plot-treemap .slice:has-text('q') path.surface >> nth=-1", timeout=10_000)
        found.page.wait_for_selector("#plot-treemap .hoverlayer .hovertext", timeout=10_000)
        assert HOSTILE in found.page.eval_on_selector("#plot-treemap .hoverlayer", "layer => layer.textContent")
        assert found.page.evaluate("document.scripts.length") == 3


def test_the_title_and_the_sections_have_names(pages: dict[str, Path], browser: Any) -> None:
    with visit(browser, pages["large"]) as found:
        assert re.fullmatch(r"someone/model, [\d.]+× smaller: tenpak report", found.page.title())
        assert found.page.evaluate("document.documentElement.lang") == "en"
        named = "[role=img], [role=region], section, figure, nav"
        assert found.page.eval_on_selector_all(
            named,
            """all => all.filter(one => !one.ariaLabel && !(one.getAttribute('aria-labelledby') || '').split(' ')
                .some(id => document.getElementById(id))).length""",
        ) == 0  # fmt: skip
        ids = found.page.eval_on_selector_all("main [id]", "all => all.map(one => one.id)")
        ids = [one for one in ids if not one.startswith(("clip", "topdefs", "defs", "legend", "g", "p"))]
        assert len(ids) == len(set(ids))
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("document.activeElement.className") == "skip"


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_on_white_and_within_the_margins(
    name: str, pages: dict[str, Path], browser: Any, shots: Path
) -> None:
    with visit(browser, pages[name], scheme="dark") as found:
        ink = found.page.evaluate(TICKS)
        found.page.evaluate(
            f"""addEventListener('beforeprint', () => {{
                window.widths = [...document.querySelectorAll('.main-svg')].map(svg => svg.width.baseVal.value)
                window.ink = {TICKS}
            }})"""
        )
        data = found.page.pdf(path=shots / f"{name}.pdf", format="A4", print_background=True)
        assert len(re.findall(rb"/Type\s*/Page\b", data)) > 1
        assert 0 < max(found.page.evaluate("window.widths")) <= 688  # pixels that A4 has between the page's margins
        assert found.page.evaluate("window.ink") == "rgb(27, 31, 36)" != ink
        until(found.page, f"{TICKS} === '{ink}'")
        assert found.noise == [f"request: {pages[name].as_uri()}"]


def test_it_is_small_and_soon_there(pages: dict[str, Path], browser: Any) -> None:
    """Within 2 s of the processor's time; the clock on the wall also counts what else runs on the machine."""
    assert pages["large"].stat().st_size <= 6_000_000
    assert min(seconds(pages["large"], browser) for _ in range(3)) <= 2.0


def seconds(path: Path, browser: Any) -> float:
    """What the page's own thread works from the request until all is drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector(DRAWN, state="attached")
    found = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    context.close()
    return float(found["TaskDuration"])
