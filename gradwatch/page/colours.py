"""Colours that the colour-blind can tell apart, for light and for dark surroundings.

Scales are straight lines in OKLab (Ottosson, 2020), so that equal steps look equal.
"""

from __future__ import annotations

import numpy as np

from gradwatch.records import Float64s

__all__ = ["AFTER", "BEFORE", "LEVELS", "LIMITS", "MORE", "NONFINITE", "THEMES", "scale"]

BEFORE, AFTER = "#2f7fc1", "#c77700"
LIMITS = "#7a7f87"
NONFINITE = "#d6006e"
LEVELS = {"alert": "#d6452b", "warning": "#c77700", "event": "#7a7f87"}
MORE = ("#2f7fc1", "#c77700", "#2a9d74", "#a3568f", "#7a7f87", "#d6452b", "#5aa0d8", "#8a6d00")

TO_LMS = np.linalg.inv(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(colour: str) -> Float64s:
    """Lightness, green to red, blue to yellow."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lab: Float64s = TO_LAB @ np.cbrt(TO_LMS @ linear)
    return lab


def scale(*colours: str, count: int = 129) -> list[str]:
    """Colours at equal distances along the way from each to the next one."""
    stops = np.array([oklab(colour) for colour in colours])
    lengths = np.linalg.norm(np.diff(stops, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    places = np.linspace(0, along[-1], count)
    return [
        _hex(np.array([np.interp(place, along, stops[:, i]) for i in range(3)])) for place in places
    ]


def diverging(low: str, centre: str, high: str) -> list[str]:
    """Two scales, so that the centre of what is shown has the colour of the centre."""
    return [*scale(low, centre, count=65), *scale(centre, high, count=65)[1:]]


def _hex(lab: Float64s) -> str:
    linear = np.clip(np.linalg.inv(TO_LMS) @ (np.linalg.inv(TO_LAB) @ lab) ** 3, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


THEMES = {
    "light": {
        "background": "#ffffff", "text": "#1d2229", "quiet": "#5b626d", "grid": "#e4e7ec",
        "departure": diverging("#0b4f8a", "#f6f6f3", "#a33600"),
        "absolute": scale("#f6f6f3", "#2f7fc1", "#0a1f3d"),
    },
    "dark": {
        "background": "#171a1f", "text": "#e7eaee", "quiet": "#a2a9b4", "grid": "#2e343d",
        "departure": diverging("#7cc4ff", "#22262c", "#ff9d4d"),
        "absolute": scale("#22262c", "#2f7fc1", "#e2f1ff"),
    },
}  # fmt: skip
"""What a page sets on each figure."""
