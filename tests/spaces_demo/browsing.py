"""Chromium, driven by Playwright. The tests of the page and the screenshot program use it."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(os.environ.get("AXE", "build/axe/node_modules/axe-core/axe.min.js"))
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WAIT = 60_000


@contextmanager
def chromium():
    """Opens a browser and closes it at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


def open_page(browser, address, viewport=DESKTOP, dark=False):
    color_scheme = "dark" if dark else "light"
    context = browser.new_context(viewport=viewport, color_scheme=color_scheme, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address + ("/?__theme=dark" if dark else ""))
    page.wait_for_selector("#examples button")
    return page


def wait_for(page, text, place="#status"):
    page.wait_for_function(
        "([place, text]) => document.querySelector(place)?.innerText.includes(text)", arg=[place, text]
    )


def choose_example(page, number=0):
    page.locator("#examples button").nth(number).click()
    page.wait_for_selector("#share")
    page.wait_for_function("() => /Done|Ready/.test(document.querySelector('#status').innerText)")


def ask(page, question):
    page.fill("#question textarea, #question input", question)
    page.click("#ask")
    wait_for(page, question, "#chat")
    wait_for(page, question, "#result")
    wait_for(page, "Done.")
