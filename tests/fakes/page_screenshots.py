"""`python -m tests.fakes.page_screenshots FOLDER` writes pictures of the web UI in each language, for the
documentation."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.page_browser import page_browser
from tests.fakes.page_site import page_site

ADDRESS = {"ENTREPOT_PUBLIC_URL": "http://registry.example.com:5000"}
PAGES = {
    "overview": "/ui/overview",
    "repositories": "/ui/repositories?in=docker.io",
    "repository": "/ui/repositories/docker.io/library/ubuntu",
    "image": "/ui/repositories/crew/web:1.4",
    "search": "/ui/search?q=ubuntu",
    "set-up": "/ui/setup?client=k3s",
    "mirror": "/ui/mirror",
    "upkeep": "/ui/upkeep",
    "access": "/ui/access/rights?account=alice&repository=crew/app",
    "activity": "/ui/activity",
    "system": "/ui/system",
}
LANGUAGES = {"en": ("en-US", False), "zh": ("zh-CN", True)}
"""For each suffix of the pictures' file names: the browser's language, and whether the page has dark colours."""


def main(folder: Path) -> None:
    """Writes the pictures as `PAGE-LANGUAGE.png`. Ends the program if there is no font with Chinese characters."""
    fonts = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True, check=False)
    if not fonts.stdout.strip():
        sys.exit("The pictures need a Chinese font; on Debian: apt-get install fontconfig fonts-noto-cjk")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, page_site(Path(data), **ADDRESS) as site, page_browser() as browser:
        for suffix, (language, is_dark) in LANGUAGES.items():
            with browser.tab(site.server.url, language=language, dark=is_dark, width=1000) as tab:
                tab.open("/ui/login")
                tab.page.screenshot(path=folder / f"login-{suffix}.png")
                tab.log_in(ADMIN, PASSWORD)
                for name, path in PAGES.items():
                    tab.open(path)
                    tab.page.screenshot(path=folder / f"{name}-{suffix}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
