"""A report in, a PNG of its beginning out, by a browser that is installed here.

The picture is that of the report, so it is drawn by what draws the report. A driver or a second
plotting library would be one more thing to install; Chromium takes a picture by itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gradwatch.errors import GradwatchError

__all__ = ["BROWSERS", "take_picture"]

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "microsoft-edge", "msedge", "brave-browser",
)  # fmt: skip

SIZE = (1200, 1500)
"""Down to the layers."""

FOR_A_PICTURE = (
    "<style>.right, .switch, .under, figure:not([data-name=heat]) figcaption "
    "{ display: none } h2 { margin-top: 8px }"
    "</style></head>"
)
"""Nothing to press, and no room for explanations."""

WAIT_SECONDS = 60.0
DRAWN_MS = 10_000
"""Of the page's own clock, which does not run while it works."""

OFFLINE = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--no-default-browser-check",
)  # fmt: skip


def take_picture(report: str, output: Path, browser: str = "") -> None:
    """
    Args:
        report: HTML.
        browser: a program; empty for the first one that is found.

    Raises:
        GradwatchError: there is no browser, or it took no picture.
    """
    program = browser or next(filter(None, map(shutil.which, BROWSERS)), "")
    if not program:
        raise GradwatchError(
            "a PNG is drawn by Chromium, Chrome, Edge or Brave, and none is installed here: "
            "install one (apt-get install chromium), name one with --browser, or write .html or .md"
        )
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "report.html"), Path(folder, "report.png")
        page.write_text(report.replace("</head>", FOR_A_PICTURE, 1), encoding="utf-8")
        # Chromium's sandbox does not work for root; the page is ours and may load nothing.
        as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [
            program, "--headless=new", "--disable-gpu", "--hide-scrollbars", *as_root, *OFFLINE,
            f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--virtual-time-budget={DRAWN_MS}", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise GradwatchError(f"{program} took no picture: {error}") from error
        if not picture.exists():
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise GradwatchError(f"{program} took no picture: {said}")
        shutil.move(picture, output)
