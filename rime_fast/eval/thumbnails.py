"""Small pictures of a side, as data URIs, so that a report is one file."""

from __future__ import annotations

import base64
import io

from PIL import Image

from rime_fast.data.records import ImageSource, Side, load_image

MAX_PIXELS_SIDE = 256
MAX_IMAGES = 3
MAX_FRAMES = 4


def thumbnails(side: Side) -> list[str]:
    """Up to three of the side's images, or up to four evenly spaced frames of its video; broken ones are left out."""
    sources: list[ImageSource] = list(side.images[:MAX_IMAGES])
    if not sources and isinstance(side.video, list):
        count = min(MAX_FRAMES, len(side.video))
        sources = [side.video[i * len(side.video) // count] for i in range(count)]
    found = []
    for source in sources:
        try:
            found.append(data_uri(load_image(source)))
        except ValueError:  # the encoder has raised for it already, or a file has gone since
            continue
    return found


def data_uri(image: Image.Image) -> str:
    """Encode ``image``, shrunk to at most 256 pixels a side, as a data URI: PNG where small or flat, else JPEG."""
    image = image.convert("RGB")
    image.thumbnail((MAX_PIXELS_SIDE, MAX_PIXELS_SIDE))
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= 20_000:
        return uri("image/png", png.getvalue())
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return uri("image/jpeg", jpeg.getvalue())


def uri(kind: str, data: bytes) -> str:
    """Encode ``data`` as a data URI of MIME type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
