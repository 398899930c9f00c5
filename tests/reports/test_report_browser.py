"""The page in a real browser: quiet, self-contained, usable by hand, by keyboard and by screen reader.

Needs chromium and chromedriver. The accessibility audit needs axe-core besides: ``LMIM_AXE`` names an
``axe.min.js``, or ``npm install axe-core`` has put it into ``node_modules``. Neither is ever downloaded.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmim_bench.reports
from lmim_bench.bench.types import Artefact
from lmim_bench.reports.html import build_report

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
EVIL = "<img src=x onerror=\"document.title='owned'\">"
SCRIPT = "</script><script>document.title='owned'</script>"
LONG = "checkpoint_" + "latent-mim.vit_base_patch16_224.e800/" * 4
RTL = "نموذج الترميز ٢"
LABELS = (EVIL, SCRIPT, LONG, RTL)
CLOUD = {"x": [0, 1, 0.5], "y": [0, 0.2, 1], "group": [0, 1, 2], "groups": [EVIL, LONG, "road"]}
CLOUD["colours"] = ["#a01020", "#20a010", "#1020a0"]
SIMILARITY = "artefacts/pairs.npz"
STEPS = np.array([[0, 50, 100, 150, 200, 255], [255, 0, 9, 8, 7, 6]], dtype=np.uint8)
"""Of two pictures with 2 x 2 patches each: pairs 01 02 03 12 13 23, from the lowest cosine to the highest."""
VIEWS = [(390, "light"), (390, "dark"), (1600, "light"), (1600, "dark")]

# Pairs of texts that cover one another by more than a hair, among the rows of text in the given elements.
OVERLAPS = """
const boxes = [];
for (const root of document.querySelectorAll(arguments[0])) {
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    const holder = node.parentElement;
    if (!node.data.trim() || !holder.checkVisibility() || holder.closest("svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) boxes.push([node, box]);
  }
}
const covers = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
const found = [];
boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
  if (one !== other && covers(a, b)) found.push([one.data.trim(), other.data.trim()]);
}));
return [boxes.length, found.slice(0, 10)];
"""
WIDER = "const s = document.scrollingElement; return s.scrollWidth - s.clientWidth;"
AUDIT = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then((found) => done(found.violations
  .filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => [v.id, v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200))])), (error) => done(String(error)));
"""


class Browser:
    """Headless chromium, driven over its own protocol where WebDriver has no word for it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1600, theme: str = "light", media: str = "") -> None:
        """Load a page as a reader with this width and theme sees it; the logs begin anew."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        # A page that glides to where it is sent moves away from under the pointer.
        wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.cdp("Emulation.setEmulatedMedia", media=media, features=features)
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(page.as_uri())

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", css)
        return found

    def requests(self) -> list[str]:
        """Address of all that was asked for since ``open``; the page's own address is the first."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url != "about:blank"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip(f"no {'chromium' if program is None else 'chromedriver'} on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_program)
    try:
        driver = webdriver.Chrome(options=options, service=service)
    except WebDriverException as error:
        pytest.skip(f"chromium does not start: {(error.msg or '').splitlines()[0]}")
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def built() -> dict[str, Path]:
    """Pages that a test has built and others may look at."""
    return {}


def artefacts(label: str, index: int, seed: int) -> tuple[Artefact, ...]:
    """Every kind that a task can save, each as one, as few and as many as there may be."""
    shift = 0.1 * index + 0.01 * seed
    many = [f"class {i}" for i in range(60)] + [EVIL, SCRIPT, LONG, RTL]
    base = f"artefacts/{index}-{seed}"
    line = {"x": [1, 10, 100], "log_x": True, "x_label": "k", "y_label": "accuracy"}
    panels = {f"{LONG} {i}": [0.3, shift, 0.4] for i in range(4)}
    return (
        Artefact(name="k", kind="curve", title="Over k", data=line | {"series": {SCRIPT: [0.4, shift, 0.5]}}),
        Artefact(name="p", kind="curve", title="By depth", caption=EVIL, data=line | {"series": panels}),
        Artefact(
            name="t",
            kind="curve",
            title="By part",
            data={"x": [LONG, RTL], "y_label": "IoU", "x_label": "", "series": {"s": [0.1, shift]}},
        ),
        Artefact(
            name="c",
            kind="bars",
            title="By class",
            data={"labels": many, "values": [(i * 7 % 64) / 99 + shift / 9 for i in range(64)]},
        ),
        Artefact(name="f", kind="bars", title=LONG, data={"labels": [LONG, RTL], "values": [0.2, shift]}),
        Artefact(name="one", kind="image", title="One picture", caption=SCRIPT, files=(f"{base}/one.png",)),
        *(
            Artefact(
                name=f"strip-{i}",
                kind="image",
                title=f"Strip {i}",
                caption=f"{label} {i}",
                files=tuple(f"{base}/strip-{i}-{j}.png" for j in range(8)),
                data={"sequence": True} if i == 0 else {},
            )
            for i in range(4)
        ),
        Artefact(name="cloud", kind="points", title="Plane", data=CLOUD),
        Artefact(
            name="pairs",
            kind="image",
            title="Patches",
            files=tuple(f"{base}/pairs-{j}.png" for j in range(4)),
            data={"similarity": SIMILARITY},
        ),
    )


@pytest.fixture
def page(
    built: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    result: Callable[..., Any],
    score: Callable[..., Any],
    write_run: Callable[..., Path],
) -> Path:
    """Four checkpoints with hostile names, two tasks, two data sets, five seeds, failures, all exhibits."""
    if "page" in built:
        return built["page"]
    folder = tmp_path_factory.mktemp("browser") / "run"
    results: list[Any] = []
    items: dict[str, Any] = {}
    for index, label in enumerate(LABELS):
        info = {"dropped": {EVIL: SCRIPT, LONG: RTL}, "random_weights": index == 3}
        info["parameters"] = 10 ** (5 + index)
        for task, data, seeds in (("knn", "toy", 5), ("knn", LONG, 1), ("seg", "toy", 2)):
            for seed in range(seeds):
                right = np.random.default_rng(seed).random(200) < 0.4 + 0.1 * index
                detail = {"C": EVIL, LONG: RTL}
                made = result(
                    label,
                    task,
                    data,
                    seed,
                    info=info,
                    scores=(
                        score("top1@k=20", float(right.mean()), chance=0.1, detail=detail),
                        score("top1@k=1", 0.3 + 0.01 * seed, None),
                        score("nll", 1.0 + index),
                    ),
                    artefacts=artefacts(label, index, seed) if data == "toy" and task == "knn" else (),
                    notes=(f"note {SCRIPT}", f"WARNING: {LONG}", f"WARNING: {EVIL}"),
                    task_summary=f"Finds neighbours of {EVIL}.\n\n    deviation ``{LONG}``",
                )
                results.append(made)
                items[made.cell] = right.astype(np.float32)
        failed = {"error": f"no frames in {LONG}\n{EVIL}"} if index % 2 else {}
        results.append(result(label, "vos", info=info, **failed))
    # Labels are no file names: the cells of this run are numbered.
    numbered = [made.model_copy(update={"cell": f"cell-{i}"}) for i, made in enumerate(results)]
    write_run(folder, numbered)
    np.savez(folder / SIMILARITY, grid=np.array([2, 2]), steps=STEPS, range=[[-0.5, 0.52], [0, 1]])
    (folder / "items").mkdir()
    for old, new in zip(results, numbered, strict=True):
        if old.cell in items:
            np.savez(folder / "items" / f"{new.cell}.npz", **{"top1@k=20": items[old.cell]})
    built["page"] = build_report(folder, published=True)
    return built["page"]


# ------------------------------------------------------------------------------------------- quiet


def test_the_console_stays_silent_and_no_request_leaves_the_page(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    asked = browser.requests()
    assert asked[0] == page.as_uri()
    assert [url[:200] for url in asked[1:] if not url.startswith("data:")] == []
    assert browser.driver.get_log("browser") == []


def test_a_request_and_an_error_of_another_page_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text('<!doctype html><img src="https://images.invalid/x.png"><script>missing()</script>')
    browser.open(other)
    assert "https://images.invalid/x.png" in browser.requests()
    assert "missing is not defined" in str(browser.driver.get_log("browser"))


def test_hostile_names_stay_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.driver.title.startswith("lmim-bench: ")
    assert len(browser.all("script")) == 1
    assert browser.all("img[onerror], img:not([src^='data:'])") == []
    heads = [cell.text for cell in browser.all("table.summary tbody th .label")]
    assert heads == list(LABELS)
    text = browser.run("return document.body.textContent")
    assert text.count(EVIL) > 20
    assert text.count(SCRIPT) > 20


def test_published_numbers_stand_apart_with_their_sources(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = [head.text for head in browser.all("#published thead th")]
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")]
        for row in browser.all("#published tbody tr")
    ]
    (row,) = [r for r in rows if r[heads.index("Method")] == "Latent MIM"]
    assert row[heads.index("Value (%)")] == "50.1"
    assert "LatentMIM @" in row[heads.index("Source")]
    assert "Not comparable" in row[heads.index("Setting")]


def test_every_picture_of_the_page_can_be_seen(browser: Browser, page: Path) -> None:
    browser.open(page)
    pictures = browser.run("return [...document.images].map((p) => [p.naturalWidth, p.alt])")
    assert len(pictures) == len(LABELS) * (1 + 4 * 8 + 4)
    assert all(width > 0 and alt.strip() for width, alt in pictures)


# --------------------------------------------------------------------------------------- by hand


def column_of(browser: Browser, index: int) -> list[float | str]:
    """What the summary table is sorted by, from top to bottom."""
    cells = browser.all(f"table.summary tbody tr > :nth-child({index + 1})")
    return [float(value) if (value := c.get_attribute("data-value")) else c.text for c in cells]


def test_a_click_on_a_head_sorts_down_then_up_and_says_so(browser: Browser, page: Path) -> None:
    browser.open(page)
    values = [v for v in column_of(browser, 1) if isinstance(v, float)]
    assert values == sorted(values)
    assert len(set(values)) == len(LABELS)
    heads = browser.all("table.summary thead th")
    assert [head.get_attribute("aria-sort") for head in heads] == [None] * len(heads)
    button = heads[1].find_element("css selector", "button")
    assert button.accessible_name.startswith("Sort by The knn task, toy")
    button.click()
    assert heads[1].get_attribute("aria-sort") == "descending"
    assert column_of(browser, 1) == values[::-1]
    button.click()
    assert heads[1].get_attribute("aria-sort") == "ascending"
    assert column_of(browser, 1) == values
    heads[0].find_element("css selector", "button").click()
    assert [head.get_attribute("aria-sort") for head in heads[:2]] == ["descending", None]


def test_a_checkpoint_is_switched_off_and_on_everywhere(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    parts = browser.all('[data-c="1"]')
    assert {part.tag_name for part in parts} >= {"tr", "td", "div", "g", "li"}
    seen = {part for part in parts if part.is_displayed()}
    buttons = browser.all("button.toggle")
    assert len(buttons) == len(LABELS)
    assert buttons[1].get_attribute("aria-pressed") == "true"
    buttons[1].click()
    assert buttons[1].get_attribute("aria-pressed") == "false"
    assert not any(part.is_displayed() for part in parts)
    assert any(part.is_displayed() for part in browser.all('[data-c="0"]'))
    buttons[1].send_keys(Keys.SPACE)
    assert {part for part in parts if part.is_displayed()} == seen
    buttons[1].send_keys(Keys.SPACE)
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    tables = "table:is(.summary, .metrics, .likeness, .plain):not(#failures *) .label"
    names = f"{tables}, [aria-label='Average ranks'] svg text"
    found = [name for name in browser.all(names) if name.is_displayed()]
    texts = [name.get_attribute("textContent") for name in found]
    assert any(text.startswith(EVIL[:20]) for text in texts)
    assert not any(text.startswith(SCRIPT[:20]) for text in texts)


COLOUR_AT = """
const [map, x, y] = arguments;
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [map.naturalWidth, map.naturalHeight];
const pen = canvas.getContext("2d");
pen.drawImage(map, 0, 0);
return [...pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
"""


def test_a_click_on_a_patch_shows_its_similarity_under_every_checkpoint(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    pictures = browser.all("img[data-similar]")
    assert [p.get_attribute("data-place") for p in pictures] == ["0", "1"] * len(LABELS)
    maps = [p.find_element("xpath", "following-sibling::img[1]") for p in pictures]
    before = [one.get_attribute("src") for one in maps]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", pictures[0])
    x, y = browser.run(
        "const b = arguments[0].getBoundingClientRect();return [b.x + b.width * 0.75, b.y + b.height * 0.25]",
        pictures[0],
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    after = [one.get_attribute("src") for one in maps]
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, False] * len(LABELS)
    # The patch at the top right is number 1: its cosines to 0, 2 and 3 are steps 0, 150 and 200 of 1.02/255.
    assert maps[0].get_attribute("title") == "cosines from -0.50 (dark) to 0.30 (yellow)"
    corners = [browser.run(COLOUR_AT, maps[0], x, y) for x, y in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.75))]
    assert corners[0] == [24, 15, 62]
    assert corners[2] == [253, 231, 37]
    assert corners[1] not in (corners[0], corners[2])
    pictures[0].send_keys(Keys.ARROW_DOWN)
    assert maps[0].get_attribute("src") != after[0]
    pictures[0].send_keys(Keys.ESCAPE)
    assert [one.get_attribute("src") for one in maps] == before
    assert browser.driver.get_log("browser") == []


def test_a_strip_of_frames_plays_and_stops(browser: Browser, page: Path) -> None:
    browser.open(page)
    film = browser.all("[data-film]")[0]
    frames = film.find_elements("css selector", "img")
    button = film.find_element("xpath", "preceding-sibling::*").find_element("css selector", "button")
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert button.text.endswith("Stop")
    assert sum(frame.is_displayed() for frame in frames) == 1
    button.click()
    assert button.text.endswith("Play")
    assert all(frame.is_displayed() for frame in frames)


def test_failures_sort_below_all_scores_in_both_directions(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = browser.all("table.summary thead th")
    failing = next(i for i, head in enumerate(heads) if "vos" in head.text)
    for _ in range(2):
        heads[failing].find_element("css selector", "button").click()
        assert [type(v) for v in column_of(browser, failing)] == [float, float, str, str]


def test_numbers_behind_texts_sort_and_gaps_come_last(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "sorted.html"
    rows = ("0.0002", "0.9", "", "0.04")
    cells = "".join(f"<tr><td{f' data-value={p}>~' if p else '>–'}</td></tr>" for p in rows)
    script = Path(lmim_bench.reports.__file__).parent / "templates" / "report.js"
    page.write_text(
        f"<!doctype html><table class=sortable><thead><tr><th>p</th></tr></thead><tbody>{cells}</tbody>"
        f"</table><script>{script.read_text()}</script>"
    )
    browser.open(page)
    found = []
    for _ in range(2):
        browser.find(".sort").click()
        found.append([cell.get_attribute("data-value") for cell in browser.all("td")])
    assert found == [["0.9", "0.04", "0.0002", None], ["0.0002", "0.04", "0.9", None]]


@pytest.mark.parametrize("key", ["ENTER", "SPACE"])
def test_the_keyboard_sorts_and_the_focus_is_seen(browser: Browser, page: Path, key: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    values = column_of(browser, 1)
    browser.find("table.summary thead th:nth-child(2) a").send_keys(Keys.TAB)
    focused = browser.driver.switch_to.active_element
    assert focused.get_attribute("class") == "sort"
    assert browser.run("return getComputedStyle(arguments[0]).outlineStyle", focused) == "solid"
    focused.send_keys(getattr(Keys, key))
    assert column_of(browser, 1) == values[::-1]
    assert browser.driver.switch_to.active_element == focused


def test_folds_open_and_close_by_click_and_by_keyboard(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    fold = browser.find(".exhibit details")
    summary, table = (fold.find_element("css selector", css) for css in ("summary", "table"))
    assert not table.is_displayed()
    summary.click()
    assert table.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert not table.is_displayed()
    summary.send_keys(Keys.SPACE)
    assert table.is_displayed()


def test_the_first_stop_of_the_keyboard_leads_to_the_results(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.find("body").send_keys(Keys.TAB)
    skip = browser.driver.switch_to.active_element
    assert skip.text == "Skip to the results"
    assert skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    assert browser.driver.current_url.endswith("#summary")


# ------------------------------------------------------------------------------ widths and themes


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_no_text_covers_another_and_the_page_never_scrolls_sideways(
    browser: Browser, page: Path, width: int, theme: str
) -> None:
    browser.open(page, width, theme)
    shade = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade))) > 380) == (theme == "light")
    assert browser.run("return innerWidth") == width
    assert browser.run(WIDER) <= 0
    texts, covered = browser.run(OVERLAPS, "nav, header, .banner, #summary, #comparison")
    assert texts > 100
    assert covered == []
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.run(WIDER) <= 0


def test_texts_that_cover_one_another_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text(
        "<!doctype html><main><p style='margin:0'>one</p><p style='margin:-1em 0 0;width:3000px'>two</p>"
        "<p>three</p></main>"
    )
    browser.open(other)
    assert browser.run(OVERLAPS, "main") == [3, [["one", "two"]]]
    assert browser.run(WIDER) > 0


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    root = Path(__file__).parents[2]
    named = os.environ.get("LMIM_AXE")
    path = Path(named) if named else root / "node_modules" / "axe-core" / "axe.min.js"
    if not path.is_file():
        pytest.skip(f"no axe-core: {f'{named} is no file' if named else 'set LMIM_AXE to its axe.min.js'}")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_an_accessibility_audit_finds_nothing_serious(
    browser: Browser, page: Path, axe: str, width: int, theme: str
) -> None:
    browser.open(page, width, theme)
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    browser.run(axe)
    browser.driver.set_script_timeout(120)
    assert browser.driver.execute_async_script(AUDIT) == []


def test_an_audit_of_a_faulty_page_finds_its_faults(browser: Browser, axe: str, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text(
        "<!doctype html><html lang=en><title>t</title><main><button></button><p style='color:#ccc'>pale"
    )
    browser.open(other)
    browser.run(axe)
    found = [name for name, _ in browser.driver.execute_async_script(AUDIT)]
    assert found == ["button-name", "color-contrast"]


# ---------------------------------------------------------------------------- scripts off and paper


def test_the_page_reads_without_scripts(browser: Browser, page: Path) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.all("button") == []
        assert [cell.text for cell in browser.all("table.summary tbody th .label")] == list(LABELS)
        assert browser.find(".panel svg").is_displayed()
        assert browser.find(".film img").is_displayed()
        fold = browser.find(".exhibit details")
        fold.find_element("css selector", "summary").click()
        assert fold.find_element("css selector", "table").is_displayed()
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_has_no_navigation_and_no_buttons(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.find("nav").is_displayed()
    browser.open(page, theme="dark", media="print")
    assert not browser.find("nav").is_displayed()
    assert not any(button.is_displayed() for button in browser.all("button:not(.toggle)"))
    assert browser.find("table.summary").is_displayed()
    shade = browser.run("return getComputedStyle(document.documentElement).getPropertyValue('--surface')")
    assert shade == "#fff"


def test_nothing_is_wider_than_a_sheet(browser: Browser, page: Path) -> None:
    browser.open(page, width=718, media="print")  # A4 without chromium's margins
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.run(WIDER) <= 0
    wide = """return [...document.querySelectorAll("main table, main figure, main svg")]
      .filter((e) => e.getBoundingClientRect().right > 720).map((e) => e.outerHTML.slice(0, 200));"""
    assert browser.run(wide) == []
    texts, covered = browser.run(OVERLAPS, "#comparison table, .exhibits")
    assert texts > 100
    assert covered == []


def test_names_in_columns_of_numbers_are_not_squeezed(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    browser.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    names = browser.all(".numbers td bdi:not(.label)")
    assert names
    assert all(name.rect["width"] >= 7 * 16 for name in names)
    style = "return [getComputedStyle(arguments[0]).whiteSpace, arguments[0].offsetWidth]"
    for head in browser.all(".numbers thead .label.long"):
        space, width = browser.run(style, head)
        assert space == "normal"
        assert 11 * 16 <= width < 400


def test_printing_unfolds_the_page_and_folds_it_again(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = "[document.querySelectorAll('details').length, document.querySelectorAll('details[open]').length]"
    browser.find(".exhibit details summary").click()
    total, opened = browser.run(f"return {count}")
    assert 0 < opened < total
    browser.run(f"addEventListener('beforeprint', () => {{ window.seen = {count}; }})")
    assert base64.b64decode(browser.cdp("Page.printToPDF")["data"]).startswith(b"%PDF")
    assert browser.run("return window.seen") == [total, total]
    assert browser.run(f"return {count}") == [total, opened]


# ------------------------------------------------------------------------------------------- size


def test_the_page_is_small_soon_there_and_the_same_each_time(page: Path) -> None:
    started = time.process_time()
    again = build_report(page.parent, page.parent / "again.html", published=True)
    assert time.process_time() - started < 10
    assert again.read_bytes() == page.read_bytes()
    assert page.stat().st_size < 8_000_000
