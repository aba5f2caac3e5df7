"""Pictures, written into the page itself."""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from ..figures import DPI
from ..summary import Picture

CSS_DPI = 96


@dataclass(frozen=True)
class Figure:
    """A picture of a summary, for the page.

    Args:
        uri: all of it; empty where it cannot be shown.
        caption: what it shows.
        size: width and height at which its letters are as large as those around it.
        problem: why it cannot be shown.
    """

    uri: str
    caption: str
    size: tuple[int, int] = (0, 0)
    problem: str = ""


def embed(picture: Picture) -> Figure:
    """Read a picture.

    Args:
        picture: a PNG file, or another that browsers show.

    Returns:
        All of it; where its file is missing or damaged, what is wrong.
    """
    name = picture.path.name
    try:
        with Image.open(picture.path) as image:
            width, height = (round(side * CSS_DPI / DPI) for side in image.size)
        kind, _ = mimetypes.guess_type(name)
        content = base64.b64encode(picture.path.read_bytes()).decode()
    except UnidentifiedImageError:
        return Figure("", picture.caption, problem=f"{name} is no picture")
    except OSError as error:
        return Figure("", picture.caption, problem=f"{name} cannot be read: {error.strerror}")
    return Figure(f"data:{kind};base64,{content}", picture.caption, (width, height))
