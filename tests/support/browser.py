"""A real headless Chromium; a test that asks for it skips where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
_QUIET = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage"
)


def chromium(profile: Path, downloads: Path, width: int = 1280, height: int = 900) -> webdriver.Chrome:
    """Started with a `profile` of its own; whoever asks for it quits it."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_QUIET.split(), f"window-size={width},{height}", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
