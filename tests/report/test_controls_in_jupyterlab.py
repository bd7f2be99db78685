"""Notebook 13 in a real JupyterLab and a real browser: a slider changes the picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from erlib import paths
from erlib.machine import processes
from tests.support import browser
from tests.support.ports import BASE_PORT

PORT = BASE_PORT + 640
NOTEBOOK = "13_what_if.ipynb"
IS_OPEN = """
return document.querySelectorAll(".jp-Notebook .jp-Cell").length > 5
    && !!document.querySelector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
"""
PICTURES = """
return Array.from(document.querySelectorAll(".jupyter-widgets img")).map(image => image.src)
"""
SLIDER = ".jupyter-widgets .noUi-handle"


def until(seen: Callable[[], Any], timeout_s: float = 90) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := seen()):
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.2)
    return found


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a JupyterLab that has a copy of the notebook, and whatever it writes beside it."""
    shutil.copy(paths.NOTEBOOKS / NOTEBOOK, tmp_path)
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={PORT}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}", "--expose-app-in-browser"]
    log = tmp_path / "jupyterlab.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env={**os.environ, **own, "ERLIB_HOME": str(tmp_path / "home")}, stdout=file, stderr=file
        )
    try:
        processes.wait_until(partial(processes.listening, PORT), server, "JupyterLab", log, 60)
        yield f"http://127.0.0.1:{PORT}/lab/tree/{NOTEBOOK}"
    finally:
        processes.stop([server], 20)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    driver = browser.chromium(tmp_path / "browser", tmp_path, 1400, 1000)
    yield driver
    driver.quit()


@pytest.mark.slow
def test_fewer_gpus_by_the_slider_change_the_picture(chromium: webdriver.Chrome, address: str) -> None:
    chromium.get(address)
    until(lambda: chromium.execute_script(IS_OPEN))
    chromium.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    gpus = until(lambda: chromium.find_elements(By.CSS_SELECTOR, SLIDER))[0]
    before = until(lambda: chromium.execute_script(PICTURES))
    assert gpus.get_attribute("aria-valuenow") == "8.0"
    gpus.send_keys(Keys.ARROW_LEFT)
    after = until(lambda: [its for its in chromium.execute_script(PICTURES) if its not in before])
    assert gpus.get_attribute("aria-valuenow") == "7.0"
    assert len(after) == 1
