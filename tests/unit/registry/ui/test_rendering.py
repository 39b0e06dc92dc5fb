"""How pages show sizes, digests and times, that values are escaped in HTML, and how the number of pages at a time is
limited."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import jinja2
import pytest

from registry.ui.page_files import HTMX, PageFiles
from registry.ui.pages import MAX_PENDING_PAGES_PER_VISITOR, MAX_RENDERED_PAGES_PER_VISITOR, PageLimits
from registry.ui.rendering import TEMPLATES, PageRenderer, format_size, make_environment, short_digest
from storage.errors import TooManyRequests
from tests.fakes.server_process import ROOT


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (123 * 1024**2, "123 MiB"),
        (5 * 1024**3, "5.00 GiB"),
        (3 * 1024**4, "3.00 TiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    """A size has three digits and a binary unit."""
    assert format_size(size) == text


def test_digests_are_short() -> None:
    """A digest is shown with its algorithm and twelve digits."""
    assert short_digest("sha256:" + "0123456789abcdef" * 4) == "sha256:0123456789ab"


def test_times_are_shown_in_utc() -> None:
    """Times are written in UTC, whatever the time zone of the value. (In the browser, a script then shows them in local
    time.)"""
    template = make_environment("en", PageFiles()).from_string("{{ moment|time }}")
    for moment in (
        datetime(2026, 11, 29, 2, 3, 4, tzinfo=UTC),
        datetime(2026, 11, 29, 10, 3, 4, tzinfo=timezone(timedelta(hours=8))),
    ):
        assert template.render(moment=moment) == '<time datetime="2026-11-29T02:03:04Z">2026-11-29 02:03 UTC</time>'


@pytest.mark.parametrize(
    ("language", "seconds", "text"),
    [("en", 3 * 86400, "3 days ago"), ("zh-Hans", 3 * 86400, "3天前"), ("en", -5, "1 second ago")],
)
def test_ages(language: str, seconds: int, text: str) -> None:
    """An age is written in the visitor's language, with the time as the title. If a time is in the future because of a
    wrong clock, the age is one second."""
    template = make_environment(language, PageFiles()).from_string("{{ moment|age(now) }}")
    moment = datetime(2026, 11, 29, 2, 3, 4, tzinfo=UTC)
    age = template.render(moment=moment, now=moment + timedelta(seconds=seconds))
    title = 'datetime="2026-11-29T02:03:04Z" title="2026-11-29 02:03 UTC"'
    assert age == f"<time {title} data-age>{text}</time>"


def test_values_are_escaped_and_must_exist() -> None:
    """Values are escaped, even within translated texts, which are not escaped themselves. A missing value is an
    error."""
    environment = make_environment("zh-Hans", PageFiles())
    hostile = "<script>\"'&"
    assert environment.from_string("{{ x }}").render(x=hostile) == "&lt;script&gt;&#34;&#39;&amp;"
    rendered = environment.from_string('{{ _("Tags of %(name)s", name=x) }}').render(x=hostile)
    assert rendered == "&lt;script&gt;&#34;&#39;&amp; 的标签"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ y }}").render()


def test_templates_have_no_inline_scripts_or_styles() -> None:
    """Templates have no inline scripts or styles, because the content security policy would block them. No template
    turns the escaping off."""
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        violations = re.findall(
            r"\|\s*safe|autoescape|style=|<style|javascript:|\son[a-z]+=|hx-on|<script(?! defer src| type=\S+ src)",
            text,
        )
        assert violations == [], path.name


def test_files_have_one_version() -> None:
    """The static files have one version, which is in their paths. htmx has the version for which the pages are written.
    Only the listed files exist."""
    files = PageFiles()
    assert files.path("page.css") == f"/ui/static/{files.version}/page.css"
    assert PageFiles().version == files.version
    htmx = files.content(HTMX)
    assert htmx is not None
    assert b'version:"2.' in htmx
    assert files.content("../rendering.py") is None
    with pytest.raises(KeyError):
        files.path("none.css")


@pytest.mark.slow
def test_the_start_does_not_import_the_template_engine() -> None:
    """The application starts without an import of Jinja2 and Babel. A process imports them for its first page."""
    code = "import sys, registry.app; sys.exit(bool({'jinja2', 'babel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_a_failing_template_does_not_affect_other_pages() -> None:
    """After a template has failed, the next page is rendered."""
    renderer = PageRenderer(PageFiles())
    with pytest.raises(jinja2.UndefinedError):
        await renderer.render("error.html", "en", {})
    layout = {"account": None, "is_admin": False, "is_registry_open": False, "is_session_over": False, "here": "/ui/"}
    error = {"status": 404, "title": "Nothing is here", "explanation": "", "message": "", "request_id": ""}
    body = await renderer.render("error.html", "en", {**layout, **error, "version": "1", "section": ""})
    assert b"<h1>Nothing is here</h1>" in body


async def test_the_pages_of_one_visitor_are_limited() -> None:
    """One visitor gets a few pages at a time. Some further requests of this visitor wait, and more are refused. Other
    visitors are not affected."""
    limits, finish, running = PageLimits(), asyncio.Event(), 0

    async def page(visitor: str) -> None:
        nonlocal running
        async with limits.rendering_slot(visitor):
            running += 1
            await finish.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(MAX_PENDING_PAGES_PER_VISITOR):
            tasks.create_task(page("alice"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert running == MAX_RENDERED_PAGES_PER_VISITOR
        with pytest.raises(TooManyRequests):
            await page("alice")
        tasks.create_task(page("bob"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert running == MAX_RENDERED_PAGES_PER_VISITOR + 1
        finish.set()
    assert running == MAX_PENDING_PAGES_PER_VISITOR + 1
    await page("alice")


async def test_a_cancelled_page_releases_its_slot() -> None:
    """A cancelled page releases its slot. A cancelled request that waits for a slot leaves the queue."""
    limits = PageLimits()
    for _ in range(MAX_PENDING_PAGES_PER_VISITOR * 2):
        async with asyncio.TaskGroup() as tasks:

            async def wait() -> None:
                async with limits.rendering_slot("alice"):
                    await asyncio.Event().wait()

            pages = [tasks.create_task(wait()) for _ in range(MAX_RENDERED_PAGES_PER_VISITOR + 1)]
            await asyncio.sleep(0)
            for each in pages:
                each.cancel()
    async with limits.rendering_slot("alice"):
        pass
