"""`PageRenderer`: renders the HTML of pages from templates and values, in the language of the visitor.

A process imports Jinja2 for its first page, and compiles each template when a page first needs the template. Pages are
rendered in a thread, one after the other, so that rendering slows pulls in the event loop only a little.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.browse.models import utc_time
from registry.clients.client_setup import Hint
from registry.single_flight import finish_in_thread
from registry.ui.languages import LANGUAGES, load_translations
from registry.ui.page_files import PageFiles

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES: Final = Path(__file__).parent / "templates"
_SHORT_DIGEST_CHARACTERS: Final = 12
"""How many characters of a digest's hash a page shows."""


class PageRenderer:
    """Renders pages. `files`: the style sheet and the scripts that pages link to."""

    def __init__(self, files: PageFiles) -> None:
        self._files = files
        self._building = threading.Lock()  # held while an environment is made, so that each is made once
        self._turn = asyncio.Lock()  # held while a page is rendered

    async def render(self, template: str, language: str, values: Mapping[str, object]) -> bytes:
        """Returns a page in UTF-8. `template`: the name of a file in `templates`. Raises jinja2.TemplateError,
        and the errors of the functions in `values`. After a cancellation, the thread still finishes the page."""
        async with self._turn:
            return await finish_in_thread(partial(self.render_now, template, language, values))

    def render_now(self, template: str, language: str, values: Mapping[str, object]) -> bytes:
        """Returns a page as `render` does, but renders it in the calling thread."""
        with self._building:
            environment = make_environment(language, self._files)
        return environment.get_template(template).render(values).encode("utf-8")


@cache
def make_environment(language: str, files: PageFiles) -> Environment:
    """Returns the environment that compiles the templates for one language. The environment escapes every value, and
    treats a name without a value as an error. The result is cached, so that a process compiles each template once for
    each language."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        cache_size=-1,  # keeps all compiled templates
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    environment.policies["ext.i18n.trimmed"] = True
    translations = load_translations(language)
    environment.install_gettext_translations(translations, newstyle=True)  # type: ignore[attr-defined]
    environment.globals |= {
        "language": language,
        "languages": LANGUAGES,
        "static": files.path,
        "hint_text": lambda hint: _hint_text(hint, translations.gettext),
    }
    environment.filters |= {
        "size": format_size,
        "time": _time_element,
        "age": lambda moment, now: _age_element(moment, now, language),
        "short_digest": short_digest,
    }
    return environment


def format_size(size: int) -> str:
    """Returns a number of bytes as text, in the largest binary unit that fits.

    - In the unit B, the number is whole (`7 B`).
    - In other units, a number below 100 has three significant digits (`1.50 MiB`), and a larger number is whole
      (`1023 KiB`)."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.5:  # larger values would be rounded to 1024
            return f"{size} B" if unit == "B" else f"{value:.{_decimals(value)}f} {unit}"
        value /= 1024
    return f"{value:.{_decimals(value)}f} TiB"


def _decimals(value: float) -> int:
    """Returns with how many decimals to show `value`. From 9.995 on, two decimals would give `10.00` and not `10.0`;
    from 99.95 on, one decimal would give `100.0` and not `100`."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def short_digest(digest: str) -> str:
    """Returns a digest with only the first characters of its hash, such as `sha256:0123456789ab`."""
    algorithm, colon, encoded = digest.partition(":")
    return f"{algorithm}{colon}{encoded[:_SHORT_DIGEST_CHARACTERS]}"


def _time_element(moment: datetime | float) -> Markup:
    """Returns a `<time>` element in UTC. A script of the page shows the time in the time zone of the visitor. If
    `moment` is a float, it is a time in seconds since 1970."""
    from markupsafe import Markup

    utc = moment.astimezone(UTC) if isinstance(moment, datetime) else utc_time(moment)
    return Markup('<time datetime="{}">{}</time>').format(
        utc.strftime("%Y-%m-%dT%H:%M:%SZ"), utc.strftime("%Y-%m-%d %H:%M UTC")
    )


def _age_element(moment: datetime, now: datetime, language: str) -> Markup:
    """Returns a `<time>` element with the time since `moment`, such as `3 days ago`. The title of the element is
    `moment` in UTC."""
    from babel.dates import format_timedelta
    from markupsafe import Markup

    age = max(now - moment, timedelta(seconds=1))  # clocks differ a little
    utc = moment.astimezone(UTC)
    return Markup('<time datetime="{}" title="{}" data-age>{}</time>').format(
        utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        utc.strftime("%Y-%m-%d %H:%M UTC"),
        format_timedelta(-age, add_direction=True, locale=language.replace("-", "_")),
    )


def _hint_text(hint: Hint, translate: Any) -> str:
    """Returns a hint about the setup of a client, as a translated sentence. `translate`: the function `gettext` of a
    language."""
    text: str = translate(hint.text).format_map(hint.values)
    return text[:1].upper() + text[1:]
