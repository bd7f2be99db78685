"""The gallery in a real headless Chromium, opened from disk: it switches, explains, gives files, asks for nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from erlib import config, paths
from erlib.claims import verdicts
from erlib.report import canvas, gallery
from tests.support import browser as browsers
from tests.support import synthetic

matplotlib.use("agg")

DRAWN = [
    ("measured", "paper1", "fig02_ttft_base"),
    ("measured", "paper1", "fig07_p99_response_time"),
    ("measured", "paper2", "fig04_ttft"),
    ("measured", "workbench", "clusterer_map"),
    ("emulated", "paper1", "fig07_p99_response_time"),
    ("simulated-hardware", "paper1", "fig07_p99_response_time"),
    ("simulated-harness", "paper1", "fig07_p99_response_time"),
]


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    small = {"paper1.users": [1, 8, 32], "paper1.repeats": 1, "paper2.configs": ["p2.E"], "paper2.users": [8]}
    return config.load_profile("laptop", small)


@pytest.fixture(scope="module")
def scorecard(profile: config.Profile) -> pd.DataFrame:
    runs = synthetic.frame([row for paper in ("p1", "p2") for row in synthetic.load_rows(profile, paper)])
    return verdicts.evaluate({"measured": runs, "emulated": runs}, profile)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, profile: config.Profile) -> Iterator[Path]:
    """Figures of four sources; all but the first have drawn one of them only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "FIGURES", tmp_path_factory.mktemp("figures"))
        for i, (source, paper, slug) in enumerate(DRAWN):
            fig, ax = plt.subplots(figsize=(7, 3 + 0.2 * i))
            ax.plot([0, 1], [0, i])
            canvas.save(
                *(fig, profile, source, paper, slug),
                pd.DataFrame({"users": [1, 8], "value": [0.5, i]}),
                f"Picture {i} <of> {source}: x & y.",
                f"{paper}, {slug}",
                records=[] if paper == "workbench" else [f"point{i}"],
                command=f"./run_all.sh --only {i}",
                extra={"requests": {"answered": 10 + i, "failed": 0}},
            )
            plt.close(fig)
        yield paths.FIGURES / profile.name


@pytest.fixture(scope="module")
def page(home: Path, profile: config.Profile, scorecard: pd.DataFrame) -> Path:
    return gallery.write_gallery(profile, scorecard)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(page: Path, downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = browsers.chromium(tmp_path_factory.mktemp("browser"), downloads)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """The page, freshly opened from disk; afterwards, proof that it neither asked the network nor complained."""
    chromium.get("about:blank")
    chromium.get_log("performance")
    chromium.get_log("browser")
    chromium.get(page.as_uri())
    yield chromium
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in {url.partition("#")[0] for url in asked}
    assert [
        url for url in asked if url.partition("#")[0] != page.as_uri() and not url.startswith(("data:", "blob:"))
    ] == []
    # The browser remarks on a click that comes while the page opens: it keeps the focus from the search field.
    said = [
        entry for entry in chromium.get_log("browser") if "Autofocus processing was blocked" not in entry["message"]
    ]
    assert said == []


def shown(browser: webdriver.Chrome, css: str) -> list[WebElement]:
    script = "return [...document.querySelectorAll(arguments[0])].filter((element) => element.offsetParent)"
    return browser.execute_script(script, css)


def choose(browser: webdriver.Chrome, source: str) -> None:
    browser.find_element(By.XPATH, f"//fieldset//label[span='{source}']").click()


def arrived(path: Path) -> bytes:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size):  # the browser makes it before it writes it
        assert time.monotonic() < deadline, f"{path.name} was not downloaded"
        time.sleep(0.05)
    return path.read_bytes()


# --- in the browser -------------------------------------------------------------------------------------------------


def test_a_folders_readme_shows_every_picture_that_lies_there(page: Path) -> None:
    text = (page.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(str(path.relative_to(page.parent)) for path in page.parent.glob("*/*/*.png"))
    assert len(re.findall(r"^\*\*[a-z-]+\*\*: .+", text, re.MULTILINE)) == len(shown)


def test_every_figure_is_shown_with_its_caption_and_reference(browser):
    figures = shown(browser, "figure")
    assert len(figures) == len(DRAWN)
    for image in browser.find_elements(By.CSS_SELECTOR, "figure img"):
        browser.execute_script("arguments[0].loading = 'eager'", image)
        browser.execute_async_script("arguments[0].decode().then(arguments[1])", image)
        assert image.get_property("naturalWidth") > 500
    text = browser.find_element(By.TAG_NAME, "main").text
    assert "Picture 0 <of> measured: x & y." in text
    assert "paper1, fig07_p99_response_time" in text


def test_switching_the_source(browser):
    both = browser.find_element(By.ID, "paper1-fig07_p99_response_time")
    lonely = browser.find_element(By.ID, "paper1-fig02_ttft_base")
    assert len([f for f in both.find_elements(By.TAG_NAME, "figure") if f.is_displayed()]) == 4
    choose(browser, "emulated")
    (only,) = [f for f in both.find_elements(By.TAG_NAME, "figure") if f.is_displayed()]
    assert "Picture 4 <of> emulated" in only.text
    assert "Not drawn from this source." in lonely.text
    assert "Picture 3" in browser.find_element(By.ID, "workbench-clusterer_map").text  # not timed: the same for all
    sources = {row.get_dom_attribute("data-source") for row in shown(browser, ".row")}
    assert sources == {"emulated", ""}
    choose(browser, "measured")
    assert "Picture 0" in lonely.text
    choose(browser, "side by side")
    assert len(shown(browser, "figure")) == len(DRAWN)


def test_the_switch_obeys_the_keyboard(browser):
    browser.execute_script("document.querySelector('#switch input').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert {figure.get_dom_attribute("data-source") for figure in shown(browser, "figure")} == {"emulated", ""}


def test_following_the_provenance_of_a_figure(browser):
    item = browser.find_element(By.ID, "paper1-fig02_ttft_base")
    assert "./run_all.sh --only 0" not in item.text
    item.find_element(By.CSS_SELECTOR, ".provenance summary").send_keys(Keys.ENTER)
    assert "./run_all.sh --only 0" in item.text
    assert "1 points" in item.text and "10 answered, 0 failed" in item.text and "point0" in item.text
    assert re.search(r"matplotlib \d+\.\d+", item.text)


def test_downloads_are_the_files(browser, home, downloads):
    item = browser.find_element(By.ID, "paper2-fig04_ttft")
    for kind in ("csv", "svg", "json"):
        item.find_element(By.XPATH, f".//*[normalize-space(.)='{kind}' and not(*)]").click()
        original = home / f"measured/paper2/fig04_ttft.{kind}"
        assert arrived(downloads / f"paper2-fig04_ttft-measured.{kind}") == original.read_bytes()
    browser.find_element(By.CSS_SELECTOR, "#scorecard a[download]").click()
    assert arrived(downloads / "scorecard-laptop.csv").startswith(b"id,paper,where,type,claim,source,verdict")


def test_a_figure_leads_to_its_claims_and_back(browser):
    item = browser.find_element(By.ID, "paper1-fig07_p99_response_time")
    item.find_element(By.XPATH, ".//div[@class='chips']/a[contains(., 'P1-R18')]").click()
    assert browser.current_url.endswith("#P1-R18")
    claim = browser.find_element(By.ID, "P1-R18")
    claim.find_element(By.LINK_TEXT, "figure").click()
    assert browser.current_url.endswith("#paper1-fig07_p99_response_time")


def test_finding_claims(browser, scorecard):
    assert len(shown(browser, ".claim")) == scorecard["id"].nunique()
    browser.find_element(By.ID, "find").send_keys("p99 response")
    assert 0 < len(shown(browser, ".claim")) < 20
    browser.find_element(By.ID, "find").clear()
    browser.find_element(By.CSS_SELECTOR, "#verdict option:nth-child(2)").click()
    holding = scorecard[scorecard["verdict"] == "holds"]["id"].nunique()
    assert len(shown(browser, ".claim")) == holding
    assert browser.find_element(By.ID, "found").text == f"{holding} claims"
    browser.execute_script("location.hash = 'P1-S06'")  # fails, so the filter hides it
    time.sleep(0.2)
    assert browser.find_element(By.ID, "P1-S06").is_displayed()


def test_enlarging_a_figure_with_the_keyboard(browser):
    zoom = browser.find_element(By.CSS_SELECTOR, "#paper1-fig02_ttft_base .zoom")
    zoom.send_keys(Keys.ENTER)
    large = browser.find_element(By.ID, "large")
    assert large.is_displayed()
    first = large.find_element(By.TAG_NAME, "img").get_dom_attribute("alt")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert large.find_element(By.TAG_NAME, "img").get_dom_attribute("alt") != first
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not large.is_displayed()
    assert browser.switch_to.active_element.get_dom_attribute("class") == "zoom"


def _brightness(browser: webdriver.Chrome) -> int:
    colour = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_light_and_dark_by_preference_and_by_button(browser):
    try:
        for preferred in ("dark", "light"):
            media = {"features": [{"name": "prefers-color-scheme", "value": preferred}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.refresh()
            assert (_brightness(browser) < 150) == (preferred == "dark")
            browser.find_element(By.ID, "theme").click()
            assert (_brightness(browser) < 150) == (preferred == "light")
            browser.find_element(By.ID, "theme").click()
            assert (_brightness(browser) < 150) == (preferred == "dark")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_cut_on_a_small_screen(browser, width):
    small = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", small)
    try:
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        cut = "return [...document.querySelectorAll('.bar *')].filter(e => e.getBoundingClientRect().right > innerWidth"
        cut += " || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible')"
        assert browser.execute_script(f"{cut}.map(e => e.outerHTML)") == []
        assert browser.find_element(By.ID, "theme").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_sources_of_one_scale_stand_side_by_side(browser):
    """Label by label, picture by picture, caption by caption; a source of another scale has a row of its own."""
    item = browser.find_element(By.ID, "paper1-fig07_p99_response_time")
    places = {}
    for figure in item.find_elements(By.TAG_NAME, "figure"):
        for part in (".source", "img", "figcaption"):
            places[figure.get_dom_attribute("data-source"), part] = figure.find_element(By.CSS_SELECTOR, part).rect
    for left, right in (("measured", "emulated"), ("simulated-hardware", "simulated-harness")):
        for part in (".source", "img", "figcaption"):
            assert places[left, part]["y"] == pytest.approx(places[right, part]["y"], abs=1)
            assert places[left, part]["x"] + places[left, part]["width"] <= places[right, part]["x"]
    assert places["measured", "figcaption"]["y"] < places["simulated-hardware", ".source"]["y"]
    lonely = browser.find_element(By.ID, "paper1-fig02_ttft_base")
    picture, caption = (lonely.find_element(By.CSS_SELECTOR, part).rect for part in ("img", "figcaption"))
    assert caption["x"] >= picture["x"] + picture["width"]


def test_the_scorecard_stands_alone(browser, home, page):
    browser.get((home / "scorecard.html").as_uri())
    assert len(shown(browser, ".claim")) > 100
    assert shown(browser, "figure") == []
    link = browser.find_element(By.CSS_SELECTOR, "#P1-R18 a").get_dom_attribute("href")
    assert (home / link).exists()
    assert not browser.get_log("browser")
    urls = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in urls if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in asked)
    browser.get(page.as_uri())


# --- without one ----------------------------------------------------------------------------------------------------


def test_the_page_names_no_address(page):
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
    assert not re.search(r"(src|href)=\"(?!#|data:)", plain)
    assert not re.search(r"https?://|url\(|@import|fetch\(|<link rel=\"?stylesheet", plain)
    stated = float(re.search(r"one file of ([\d.]+) MB", text)[1])
    assert stated == pytest.approx(page.stat().st_size / 1e6, abs=0.06)


def test_two_renderings_are_the_same_bytes(page, profile, scorecard):
    before = page.read_bytes()
    assert gallery.write_gallery(profile, scorecard).read_bytes() == before


def test_a_profile_without_figures_is_refused(profile, scorecard, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    with pytest.raises(FileNotFoundError, match="08_figures_paper1"):
        gallery.write_gallery(profile, scorecard)
