"""Open every page of the built site in headless Chromium, at three widths.

    python scripts/look_at_site.py build/site build/screenshots

Reports console messages, requests that fail or leave the machine, pages that scroll sideways,
tables of which a laptop shows a part, and a search that finds nothing. A folder with the
``report.html`` of a pipeline can be looked at too; it has no search. Needs the system's chromium
and chromedriver, and the extra ``docs``.
"""

import functools
import http.server
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

WIDTHS = {"phone": (500, 900), "laptop": (1366, 768), "desktop": (1920, 1080)}
"""CSS pixels: width, height."""
# The first elements that reach out of the page; what scrolls inside itself is as it should be.
_TOO_WIDE = """
const wide = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth <= wide) return [];
const inside = e => e && (getComputedStyle(e).overflowX != 'visible' || inside(e.parentElement));
return [...document.body.querySelectorAll('*')]
  .filter(e => e.getBoundingClientRect().right > wide + 1 && !inside(e.parentElement))
  .slice(0, 3).map(e => e.outerHTML.slice(0, 120));
"""
# Tables that scroll sideways by themselves, which only a phone may need.
_CUT_TABLES = """
return [...document.querySelectorAll('.md-typeset__scrollwrap, .scroll')]
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80));
"""


def look(site: Path, screenshots: Path) -> list[str]:
    """Visit all pages at all widths.

    Returns:
        What is wrong, one line each.
    """
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    wrong = []
    with _served(site) as address:
        for device, size in WIDTHS.items():
            # Source files are hundreds of pages of one form: one width shows them.
            seen = [p for p in pages if device == "laptop" or not p.startswith("source/")]
            with _browser(*size) as browser:
                for page in seen:
                    browser.get(f"{address}/{page}")
                    found = [*_complaints(browser, address)]
                    found += [] if device == "phone" else _cut_tables(browser)
                    wrong += [f"{device} {page}: {text}" for text in found]
                    if not page.startswith("source/"):
                        _screenshot(browser, screenshots / device / f"{page}.png")
                if "index.html" in pages:
                    wrong += [f"{device} search: {text}" for text in _search(browser, address)]
    return wrong


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are not worth a line each."""

    def do_GET(self) -> None:
        """Browsers ask every server for an icon, which a report opened as a file has no need of."""
        if self.path == "/favicon.ico":
            self.send_response(http.HTTPStatus.NO_CONTENT)
            return self.end_headers()
        super().do_GET()


@contextmanager
def _served(site: Path) -> Iterator[str]:
    """The site on a port of this machine."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def _browser(width: int, height: int) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium())
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    metrics = {"width": width, "height": height, "pixelRatio": 1.0, "mobile": width < 600}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def chromium() -> str | None:
    """The system's Chromium, None when there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found if shutil.which("chromedriver") else None


def _complaints(browser: webdriver.Chrome, address: str) -> Iterator[str]:
    for entry in browser.get_log("browser"):
        yield f"console: {entry['message']}"
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if urlsplit(url).scheme.startswith("http") and not url.startswith(address):
                yield f"asks for {url}"
        elif message["method"] == "Network.responseReceived":
            response = message["params"]["response"]
            if response["status"] >= 400:
                yield f"{response['status']} for {response['url']}"
    for element in browser.execute_script(_TOO_WIDE):
        yield f"wider than the screen: {element}"


def _cut_tables(browser: webdriver.Chrome) -> list[str]:
    return [f"a table is cut: {text!r}" for text in browser.execute_script(_CUT_TABLES)]


def _screenshot(browser: webdriver.Chrome, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(path))


def _search(browser: webdriver.Chrome, address: str) -> Iterator[str]:
    browser.get(f"{address}/index.html")
    browser.execute_script("document.querySelector('#__search').click()")
    field = browser.find_element(By.CSS_SELECTOR, ".md-search__input")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys("ffn_hidden_size")
    try:
        results = "return document.querySelectorAll('.md-search-result__item').length"
        WebDriverWait(browser, 10).until(lambda b: b.execute_script(results) > 2)
    except Exception as error:  # selenium's timeout says nothing but "Message:"
        yield f"no results ({type(error).__name__})"
    yield from _complaints(browser, address)


if __name__ == "__main__":
    found = look(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"{len(found)} complaints; screenshots are in {sys.argv[2]}\n")
    sys.exit(bool(found))
