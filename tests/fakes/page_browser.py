"""Opens pages of the web UI in a real browser: Debian's Chromium without a window, controlled by Playwright.

`PageBrowser.tab` opens a tab and records its console and its requests. When the tab is closed, the test fails if the
console had an error, or if a request went to another site than the registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM: Final = "/usr/bin/chromium-headless-shell"
"""Chromium's engine as a program that has no window. It needs half of the CPU time of `chromium --headless`."""
ARGUMENTS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
TIMEOUT_MS: Final = 60_000
AA_RULES: Final = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
"""The rules that axe, the accessibility checker, applies: those of WCAG 2.2 AA, and axe's own recommendations."""


@dataclass
class Tab:
    """A tab with a profile of its own. `own`: the URL of the registry. `errors` and `urls`: the recorded console errors
    and requests. `allowed_errors`: parts of console errors that the test expects."""

    page: Page
    own: str
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    allowed_errors: list[str] = field(default_factory=list)

    def open(self, path: str) -> None:
        """Opens a page of the registry, and waits until it is loaded."""
        self.page.goto(f"{self.own}{path}", wait_until="load")

    def log_in(self, name: str, password: str) -> None:
        """Fills in and sends the login form, and waits for the page Overview."""
        self.open("/ui/login")
        self.page.fill("#user", name)
        self.page.fill("#password", password)
        self.page.click("button.main")
        self.page.wait_for_url("**/ui/overview")

    def accessibility_problems(self, *rules: str) -> list[str]:
        """Returns the violations that axe finds on the page, of these rules or, without arguments, of all rules."""
        chosen = {"type": "rule", "values": list(rules)} if rules else {"type": "tag", "values": AA_RULES}
        devtools = self.page.context.new_cdp_session(self.page)
        try:
            # Uses the browser's debugging protocol, because the page's Content-Security-Policy forbids `eval`.
            if not self._evaluate(devtools, "typeof axe === 'object'"):
                self._evaluate(devtools, AXE_SCRIPT)
            options = f"{{runOnly: {chosen!r}, resultTypes: ['violations']}}"
            found: list[dict[str, Any]] = self._evaluate(
                devtools, f"axe.run(document, {options}).then(results => results.violations)"
            )
        finally:
            devtools.detach()
        return [
            f"{each['id']}: {node['html'][:150]} {node['failureSummary']}" for each in found for node in each["nodes"]
        ]

    @staticmethod
    def _evaluate(devtools: Any, expression: str) -> Any:
        answer = devtools.send(
            "Runtime.evaluate", {"expression": expression, "awaitPromise": True, "returnByValue": True}
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def check(self) -> None:
        """Raises AssertionError if the console had an unexpected error, or if a request went to another site."""
        unexpected = [error for error in self.errors if not any(part in error for part in self.allowed_errors)]
        assert unexpected == []
        foreign = {url for url in self.urls if urlsplit(url).netloc != urlsplit(self.own).netloc}
        assert foreign == set()

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text} ({message.location})")

    def on_request(self, request: Request) -> None:
        self.urls.append(request.url)


class PageBrowser:
    """A running Chromium."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    @contextmanager
    def tab(
        self,
        own: str,
        *,
        language: str = "en-US",
        dark: bool = False,
        javascript: bool = True,
        width: int = 1200,
        **more: Any,
    ) -> Iterator[Tab]:
        """Opens a tab with a new profile until the block ends, and then checks it (`Tab.check`). `own`: the URL of the
        registry."""
        context = self._browser.new_context(
            locale=language,
            color_scheme="dark" if dark else "light",
            java_script_enabled=javascript,
            reduced_motion="reduce",  # without animations, so that axe measures only final colours
            viewport={"width": width, "height": 900},
            **more,
        )
        context.set_default_timeout(TIMEOUT_MS)
        try:
            page = context.new_page()
            tab = Tab(page, own)
            page.on("console", tab.on_console)
            page.on("pageerror", lambda error: tab.errors.append(f"page error: {error}"))
            context.on("request", tab.on_request)
            yield tab
            tab.check()
        finally:
            context.close()


@contextmanager
def page_browser(*arguments: str) -> Iterator[PageBrowser]:
    """Runs Chromium with a new profile until the block ends. Inside the block, this thread cannot run another event
    loop. From then on, `expect` waits as long as the other calls of Playwright."""
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments])
        try:
            yield PageBrowser(browser)
        finally:
            browser.close()
