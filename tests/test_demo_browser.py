"""The page to try adapters in a real browser: what a visitor sees, by mouse and by keyboard alone, in light and dark.

Each test leaves a picture of what it saw in build/screenshots.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser import chromium, needs_chromium
from tests.hanging import LONG

pytestmark = [pytest.mark.pages, needs_chromium]

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
# A cloud is drawn by WebGL, here without a graphics card.
FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}
SHOWN = """side => document.querySelector(`#pp-cloud-${side} .js-plotly-plot`).data
    .filter(trace => trace.visible === true).map(trace => `${trace.meta.task} ${trace.meta.view}`)"""
EYE = """() => { const eye = document.querySelector('.js-plotly-plot').layout.scene.camera.eye;
    return [eye.x, eye.y, eye.z]; }"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs, and so where its pictures go."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The page as the command serves it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "point_peft", "demo", "--no-browser", "--port", "0"]
    log = folder / "errors"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as run,
    ):
        try:
            assert run.stdout is not None
            line = run.stdout.readline()  # it comes, or the command ends
            assert line.startswith("the page is at http://127.0.0.1:"), line + log.read_text()
            yield line.split()[-1]
        finally:
            run.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all visits, which keeps what it has fetched."""
    with chromium(FLAGS) as launched:
        context = launched.new_context(accept_downloads=True)
        context.set_default_timeout(1000 * LONG / 5)
        yield context


class Visit:
    """One visitor's page, and all that it asked of other hosts or complained of."""

    def __init__(self, browser: Any, address: str, size: dict[str, int], scheme: str = "light") -> None:
        self.page = browser.new_page()
        self.page.set_viewport_size(size)
        self.page.emulate_media(color_scheme=scheme)
        # From the beginning: a window to choose files in must not open before playwright waits for it.
        self.page.on("filechooser", lambda chooser: None)
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self._see(request.url, address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.ready("a")

    def _see(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def ready(self, side: str) -> None:
        """Wait until a cloud is drawn."""
        self.page.wait_for_selector(f"#pp-cloud-{side} .js-plotly-plot canvas")
        self.page.wait_for_function(f"(({SHOWN})('{side}')).length === 1")

    def answers(self, side: str = "a") -> str:
        return str(self.page.locator(f"#pp-answer-{side} section:not([hidden])").inner_text())

    def choose(self, group: str, label: str) -> None:
        self.page.locator(f"#pp-{group} label", has_text=label).click()

    def shown(self, side: str = "a") -> str:
        """The task and the view of the cloud that is visible."""
        (own,) = self.page.evaluate(SHOWN, side)
        return str(own)

    def wait(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for()

    def check(self, picture: str) -> None:
        """Keep a picture, and see that axe finds nothing, that no other host was asked, and that nothing broke."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"demo_{picture}.png", full_page=True)
        found = Axe().run(self.page, options=RULES).response["violations"]
        assert not [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
        assert not self.foreign and not self.errors


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    own = Visit(browser, address, WIDE)
    yield own
    own.page.close()


@pytest.fixture(scope="module")
def ply(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cloud of the visitor's."""
    points = np.random.default_rng(0).normal(size=(400, 3))
    columns = "".join(f"property float {name}\n" for name in "xyz")
    head = f"ply\nformat ascii 1.0\nelement vertex 400\n{columns}end_header\n"
    path = tmp_path_factory.mktemp("clouds") / "mine.ply"
    path.write_text(head + "\n".join(" ".join(map(str, row)) for row in points.tolist()) + "\n")
    return path


def test_the_first_answer(visit: Visit) -> None:
    assert visit.page.title() == "Try point_peft" and visit.page.locator("h1").count() == 1
    assert "radar says the cloud is" in visit.answers() and visit.shown() == "radar attention"
    assert visit.page.locator("#pp-near section:not([hidden]) svg").count() == 8
    rows = visit.page.locator("#pp-tasks tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["radar", "digits", "ground"] and all("ms" in row for row in rows)
    assert visit.page.locator("[role=alert]").count() == 0
    visit.check("light")


def test_a_swap_is_seen_within_a_frame(visit: Visit) -> None:
    swapped = visit.page.evaluate(
        f"""() => new Promise(done => {{
            document.querySelector('#pp-adapter input[value=digits]').click();
            requestAnimationFrame(() => done([
                document.querySelector('#pp-answer-a section:not([hidden])').dataset.task,
                document.querySelector('#pp-near section:not([hidden])').dataset.task, ({SHOWN})('a')[0]]));
        }})"""
    )
    assert swapped == ["digits", "digits", "digits attention"]
    assert "digits says the cloud is" in visit.answers()
    visit.choose("adapter", "radar")
    assert "radar says the cloud is" in visit.answers() and visit.shown() == "radar attention"


def test_a_scene_and_its_colours(visit: Visit) -> None:
    visit.choose("cloud", "ground 1")
    visit.wait("[data-caption=a]", "other")
    visit.ready("a")
    assert "ground says most points are" in visit.answers() and visit.shown() == "ground label"
    pictures = []
    for label, view, key in (
        ("Height", "height", "low"),
        ("Attention", "attention", "attention to prompts in block"),
        ("Neighbourhood", "neighbourhood", "tokens: points by the nearest centre"),
        ("Label", "label", "ground"),
    ):
        visit.choose("view", label)
        assert visit.shown() == f"ground {view}"
        assert key in visit.page.locator("[data-caption=a]").inner_text()
        visit.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        pictures.append(visit.page.locator("#pp-cloud-a").screenshot())
    assert len(set(pictures)) == 4
    visit.check("scene")


def test_a_cloud_of_the_visitor_s(visit: Visit, ply: Path) -> None:
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator("#pp-upload").click()
    chooser.value.set_files(ply)
    visit.wait("#pp-cloud label.selected", "mine.ply")
    visit.ready("a")
    assert "radar says the cloud is" in visit.answers()
    assert visit.page.locator("[role=alert], .pp-note").count() == 0
    visit.choose("cloud", "digits 3")
    visit.wait("#pp-answer-a section:not([hidden]) h2", "3")
    visit.choose("cloud", "mine.ply")
    visit.wait("#pp-cloud label.selected", "mine.ply")
    visit.check("upload")


def test_a_bad_cloud_is_one_sentence(visit: Visit, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ply"
    bad.write_bytes(b"no mesh at all")
    before = visit.answers(), visit.page.locator("#pp-tasks").inner_text(), visit.shown()
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator("#pp-upload").click()
    chooser.value.set_files(bad)
    alert = visit.page.get_by_role("alert")
    alert.wait_for()
    assert "bad.ply" in alert.inner_text() and "\n" not in alert.inner_text() and "/" not in alert.inner_text()
    assert before == (visit.answers(), visit.page.locator("#pp-tasks").inner_text(), visit.shown())
    visit.check("error")
    visit.choose("cloud", "digits 3")
    alert.wait_for(state="detached")


def test_a_bad_adapter_is_one_sentence(visit: Visit) -> None:
    visit.page.get_by_label("Another adapter").fill("nowhere/at/all")
    visit.page.locator("#pp-load").click()
    alert = visit.page.get_by_role("alert")
    alert.wait_for()
    assert "nowhere/at/all" in alert.inner_text() and "radar says the cloud is" in visit.answers()


def test_two_adapters_beside_each_other(visit: Visit) -> None:
    visit.choose("other", "digits")
    visit.ready("b")
    visit.wait("#pp-compared", "different questions")
    assert visit.shown("a") == "radar attention" and visit.shown("b") == "digits attention"
    assert "radar says" in visit.answers("a") and "digits says" in visit.answers("b")
    visit.choose("view", "Neighbourhood")
    assert visit.shown("a") == "radar neighbourhood" and visit.shown("b") == "digits neighbourhood"
    visit.check("compare")
    visit.choose("other", "nothing")
    visit.page.locator("#pp-cloud-b").wait_for(state="detached")


def test_a_picture_is_written_and_downloaded(visit: Visit, folder: Path) -> None:
    visit.page.locator("#pp-write").click()
    visit.wait("#pp-note", "Written: ")
    written = (folder / "out.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    with visit.page.expect_download() as download:
        visit.page.locator("#pp-download").click()
    assert download.value.suggested_filename == "out.png" and Path(download.value.path()).read_bytes() == written
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / "demo_out.png").write_bytes(written)


def test_a_narrow_screen_scrolls_down_only(browser: Any, address: str) -> None:
    visit = Visit(browser, address, NARROW)
    right = "e.getBoundingClientRect().right"
    outside = f"() => [...document.querySelectorAll('main *')].filter(e => {right} > innerWidth + 1)"
    assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert visit.page.evaluate(f"({outside})().map(e => e.outerHTML.slice(0, 80))") == []
    visit.check("narrow")
    visit.page.close()


def test_in_the_dark(browser: Any, address: str) -> None:
    visit = Visit(browser, address, WIDE, "dark")
    colour = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 150
    visit.choose("other", "digits")
    visit.ready("b")
    visit.check("dark_compare")
    visit.choose("other", "nothing")
    visit.page.locator("#pp-cloud-b").wait_for(state="detached")
    visit.check("dark")
    visit.page.close()


def test_all_of_it_by_keyboard(visit: Visit) -> None:
    """Tab comes to every part, arrows choose and turn, Enter uploads and writes."""
    page, focused = visit.page, "() => document.activeElement.closest('[id^=pp-]')?.id ?? ''"
    parts = ["cloud", "upload", "adapter", "other", "source", "load", "view", "turn", "tilt", "write"]
    page.locator("h1").click()
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        part = page.evaluate(focused).removeprefix("pp-")
        if part in parts and part not in seen:
            seen.append(part)
            outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", part
        if part == "adapter":
            page.keyboard.press("ArrowRight")
            assert visit.shown() == "digits attention" and "digits says" in visit.answers()
        if part in ("turn", "tilt") and page.evaluate("() => document.activeElement.type") == "range":
            before = page.evaluate(EYE)
            page.keyboard.press("ArrowRight")
            page.wait_for_function(f"before => ({EYE})().some((v, i) => Math.abs(v - before[i]) > 0.01)", arg=before)
        if part == "upload":
            with page.expect_file_chooser():
                page.keyboard.press("Enter")
        if part == "write":
            page.keyboard.press("Enter")
            visit.wait("#pp-note", "Written: ")
            break
    assert seen == parts
    visit.check("keyboard")
