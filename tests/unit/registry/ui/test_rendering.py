"""How pages show values, and that no value becomes HTML."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import jinja2
import pytest

from registry.ui.page_files import HTMX, PageFiles
from registry.ui.page_limits import AT_ONCE_FOR_ONE, WAITING_FOR_ONE, PageLimits
from registry.ui.rendering import TEMPLATES, PageRenderer, format_size, make_environment, short_digest
from storage.errors import TooManyRequests
from tests.fakes.server_process import ROOT


@pytest.mark.parametrize(
    ("size", "shown"),
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
def test_sizes(size: int, shown: str) -> None:
    """A size has three digits and a binary unit."""
    assert format_size(size) == shown


def test_digests_are_short() -> None:
    """A digest is shortened after its algorithm."""
    assert short_digest("sha256:" + "0123456789abcdef" * 4) == "sha256:0123456789ab"


def test_times_are_utc_until_a_script_shows_them() -> None:
    """Times are written in UTC, whatever the time zone of the value."""
    template = make_environment("en", PageFiles()).from_string("{{ moment|time }}")
    for moment in (
        datetime(2026, 11, 29, 2, 3, 4, tzinfo=UTC),
        datetime(2026, 11, 29, 10, 3, 4, tzinfo=timezone(timedelta(hours=8))),
    ):
        assert template.render(moment=moment) == '<time datetime="2026-11-29T02:03:04Z">2026-11-29 02:03 UTC</time>'


@pytest.mark.parametrize(
    ("language", "seconds", "shown"),
    [("en", 3 * 86400, "3 days ago"), ("zh-Hans", 3 * 86400, "3天前"), ("en", -5, "1 second ago")],
)
def test_ages(language: str, seconds: int, shown: str) -> None:
    """In the visitor's language, with the time as the title. A clock that is ahead gives no age in the future."""
    template = make_environment(language, PageFiles()).from_string("{{ moment|age(now) }}")
    moment = datetime(2026, 11, 29, 2, 3, 4, tzinfo=UTC)
    age = template.render(moment=moment, now=moment + timedelta(seconds=seconds))
    title = 'datetime="2026-11-29T02:03:04Z" title="2026-11-29 02:03 UTC"'
    assert age == f"<time {title} data-age>{shown}</time>"


def test_values_are_escaped_and_must_exist() -> None:
    """Values are escaped, also in translated texts, where the text is trusted and the value is not. A missing value is
    an error."""
    environment = make_environment("zh-Hans", PageFiles())
    evil = "<script>\"'&"
    assert environment.from_string("{{ x }}").render(x=evil) == "&lt;script&gt;&#34;&#39;&amp;"
    shown = environment.from_string('{{ _("Tags of %(name)s", name=x) }}').render(x=evil)
    assert shown == "&lt;script&gt;&#34;&#39;&amp; 的标签"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ y }}").render()


def test_no_template_has_scripts_or_styles_of_its_own() -> None:
    """Templates have no inline scripts or styles, which the content security policy would block, and none switches the
    escaping off."""
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        found = re.findall(
            r"\|\s*safe|autoescape|style=|<style|javascript:|\son[a-z]+=|hx-on|<script(?! defer src| type=\S+ src)",
            text,
        )
        assert found == [], path.name


def test_files_have_one_version() -> None:
    """htmx has the version that the pages are written for, and there are no files but these."""
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
def test_a_start_does_not_wait_for_templates() -> None:
    """The application can be made without Jinja2 and Babel, which a process imports for its first page."""
    code = "import sys, registry.app; sys.exit(bool({'jinja2', 'babel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_a_template_that_fails_fails_its_page_alone() -> None:
    """After a template fails, the next page is rendered."""
    renderer = PageRenderer(PageFiles())
    with pytest.raises(jinja2.UndefinedError):
        await renderer.render("error.html", "en", {})
    layout = {"account": None, "is_admin": False, "is_open": False, "is_session_over": False, "here": "/ui/"}
    error = {"status": 404, "title": "Nothing is here", "explanation": "", "message": "", "request_id": ""}
    body = await renderer.render("error.html", "en", {**layout, **error, "version": "1", "section": ""})
    assert b"<h1>Nothing is here</h1>" in body


async def test_one_visitor_leaves_room_for_others() -> None:
    """One visitor gets some pages at a time, waits with some more, and is refused with yet more. Another one is not."""
    limits, gate, running = PageLimits(), asyncio.Event(), 0

    async def page(visitor: str) -> None:
        nonlocal running
        async with limits.page(visitor):
            running += 1
            await gate.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(WAITING_FOR_ONE):
            tasks.create_task(page("alice"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert running == AT_ONCE_FOR_ONE
        with pytest.raises(TooManyRequests):
            await page("alice")
        tasks.create_task(page("bob"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert running == AT_ONCE_FOR_ONE + 1
        gate.set()
    assert running == WAITING_FOR_ONE + 1
    await page("alice")


async def test_a_cancelled_page_gives_its_slot_back() -> None:
    """A cancelled page releases its slot, and one that waits for a slot leaves the queue."""
    limits = PageLimits()
    for _ in range(WAITING_FOR_ONE * 2):
        async with asyncio.TaskGroup() as tasks:

            async def wait() -> None:
                async with limits.page("alice"):
                    await asyncio.Event().wait()

            pages = [tasks.create_task(wait()) for _ in range(AT_ONCE_FOR_ONE + 1)]
            await asyncio.sleep(0)
            for each in pages:
                each.cancel()
    async with limits.page("alice"):
        pass
