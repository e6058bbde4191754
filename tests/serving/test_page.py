"""The page: a person types a text, sees its classes, says which is wrong, and sees the next answer change."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mach.model.model import MachModel

Live = Callable[..., str]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; PAGES=folder in the environment keeps screenshots there."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, permissions=["clipboard-read", "clipboard-write"]
    )
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    yield opened
    context.close()
    assert errors == []


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("PAGES"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def first(page: Any) -> str:
    return page.locator("#results .label").first.inner_text()


def test_a_visit(page: Any, live: Live, offline: MachModel):
    from playwright.sync_api import expect

    url = live(learn=True)
    [best] = offline.names(offline.topk("red cup ala", 1)[0])
    assert best != "green hat"
    page.goto(url)
    page.keyboard.type("red cup ala")  # the text has the focus from the beginning
    expect(page.locator("#results .label").first).to_have_text(best)
    assert page.locator("#results li").count() == 10
    assert re.fullmatch(r"\d+\.\d %", page.locator("#results .share").first.inner_text())
    keep(page, "answer")
    page.get_by_label(f"Wrong: {best}").click()
    page.keyboard.type("green h")
    page.get_by_role("button", name="green hat", exact=True).click()
    expect(page.locator("#results .label").first).to_have_text("green hat")
    expect(page.locator("#told")).to_contain_text("Learned that it is green hat")
    keep(page, "learned")
    page.fill("#text", "omo ama ene")
    page.fill("#name", "<b>teapot</b>")
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#told")).to_contain_text("Added")
    assert first(page) == "<b>teapot</b>"  # what others wrote is text, never a tag
    page.fill("#limit", "3")
    expect(page.locator("#results li")).to_have_count(3)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#told")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert (
        copied
        == f"curl '{url}/v1/projects/things/suggest' --data-urlencode 'text=omo ama ene' --data-urlencode 'limit=3'"
    )


def test_the_keyboard_is_enough_and_nothing_is_cut_off(page: Any, live: Live):
    page.goto(live(learn=True))
    page.keyboard.type("red cup")
    page.wait_for_selector("#results li")
    best = first(page)
    seen = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    assert {"project", "limit", "json", "curl", f"Right: {best}", f"Wrong: {best}", "name"} <= seen
    named = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].every((one) => one.labels.length === 1)"
    )
    assert named
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    keep(page, "dark")


def test_a_page_asks_for_the_token(page: Any, live: Live, tmp_path: Path):
    (tmp_path / "tokens").write_text("read " + "r" * 16)
    page.goto(live(token_file=tmp_path / "tokens"))
    page.wait_for_selector("#token")
    page.fill("#token", "r" * 16)
    page.get_by_role("button", name="Use token").click()
    page.wait_for_selector("#project option", state="attached")
    page.fill("#text", "red cup")
    page.wait_for_selector("#results li")
    assert page.locator(".marks").count() == 0  # learning is off
    assert page.locator("#add").is_hidden()


def test_a_class_says_why(page: Any, live: Live, offline: MachModel):
    page.goto(live())
    text = "\U0001f40b <b>Red</b> cup ala"  # whose first character JavaScript counts as two
    page.fill("#text", text)
    [best] = offline.names(offline.topk(text, 1)[0])
    page.get_by_label(f"Why: {best}").click()
    page.wait_for_selector(".why mark")
    words = {word.text for word in offline.explain(text, best).words if word.lost > 0}
    marked = [one.lower() for one in page.locator(".why mark").all_inner_texts()]
    assert marked
    assert set(marked) <= words
    assert page.locator(".why p").first.inner_text() == text
    assert "without it" in page.locator(".why p").nth(1).inner_text()
    keep(page, "why")
    page.get_by_label(f"Why: {best}").click()
    assert page.locator(".why").count() == 0
