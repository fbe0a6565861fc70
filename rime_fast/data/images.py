"""Images by reference: what names one, where it may lie, how it is opened.

An image is data from outside: only files are opened (no device, no pipe), only by the decoders of FORMATS, and only
below a number of pixels that is read from the head before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Union

import numpy as np
from PIL import Image

from rime_fast.data.archives import MEMBER, open_file, read_member

# A path, an open image, an [H, W, 3] uint8 array, or what `datasets` stores for an undecoded image.
ImageSource = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, dict[str, Any]]

# Pillow's decoders that are used. Left out are those that start programs (EPS) and those of no data set (DDS, PSD, ..).
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
    if name in Image.OPEN  # AVIF: from Pillow 11.3 on
)
# Pillow's own bound of what is no bomb: 268 MB of RGB pixels. A 169-megapixel PNG may have 21 kB.
MAX_PIXELS = 89_478_485

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAGS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type xmp")


@dataclass(frozen=True)
class ImageRoot:
    """The folder that a file's image paths start from, and how far they may lead.

    path: "" for the working directory. outside: whether a path may lead out of it (by ``..`` or as an absolute one;
    links inside the folder are its owner's). urls: whether ``https://``, ``s3://`` and whatever else fsspec opens are
    read.
    """

    path: str = ""
    outside: bool = False
    urls: bool = False

    def resolve(self, source: ImageSource) -> ImageSource:
        """Give a path as seen from the root, anything else as it is. Raises ValueError for what may not be opened."""
        if isinstance(source, dict):
            held = source.get("bytes") is not None
            return source if held or not source.get("path") else {**source, "path": self.resolve(source["path"])}
        if not isinstance(source, (str, os.PathLike)):
            return source
        text = os.fspath(source)
        if "\0" in text:
            raise ValueError("holds a zero byte, which no path does")
        if is_url(text):
            if not self.urls:
                raise ValueError(f"is a URL ({text[:80]}); they are opened with allow_urls only")
            return text
        whole = os.path.join(self.path, text)
        if not self.outside:
            root = os.path.abspath(self.path or os.curdir)
            # the member's name stays inside its archive, whatever it is
            place = os.path.abspath(whole.split(MEMBER)[0])
            if os.path.commonpath([root, place]) != root:
                raise ValueError(f"{text[:200]} is outside of image_root {root}; allow_outside opens it all the same")
        return whole


def is_url(text: str) -> bool:
    """Whether fsspec, not the file system, would open it."""
    return "://" in text[:32]


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image, fully read, turned upright where its EXIF says so; of an animation the first frame.

    Grey levels of 16 bits keep their upper 8 (Pillow's own conversion would clip them). Other modes stay as they are.

    Raises ValueError naming the source when it is missing, broken, larger than ``max_pixels`` or of an unknown kind.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(_checked(source))
    with _opened(source, max_pixels) as (image, name):
        try:
            image.load()
            return _eight_bits(_turned(image, _orientation(image)))
        except Exception as error:  # a decoder may raise anything on bytes that no encoder wrote
            raise _broken(name, error) from None


def image_size(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the upright image; of a file only the head is read, of a PNG the list of its chunks too.
    Raises as ``load_image``."""
    if isinstance(source, np.ndarray):
        height, width = _checked(source).shape[:2]
        return height, width
    with _opened(source, max_pixels) as (image, _):
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def hash_image(source: ImageSource, digest: Any) -> None:
    """Add to ``digest`` what tells this image from others: its bytes or pixels where they are there, else its path."""
    if isinstance(source, dict):
        held = source.get("bytes")
        digest.update(b"bytes\0" + held if isinstance(held, bytes) else os.fsencode(source.get("path") or ""))
    elif isinstance(source, np.ndarray):
        digest.update(f"{source.dtype}{source.shape}".encode() + np.ascontiguousarray(source).tobytes())
    elif isinstance(source, Image.Image):
        colours = source.getpalette("RGBA") if source.mode in ("P", "PA") else None
        digest.update(f"{source.mode}{source.size}{colours}{source.info.get('transparency')}".encode())
        digest.update(source.tobytes())
        if (orientation := _orientation(source)) != 1:
            digest.update(f"orientation {orientation}".encode())
    else:
        digest.update(os.fsencode(source))


def content_digest(source: ImageSource, *, max_bytes: int = 1 << 28) -> str:
    """A hash of what a picture shows, for caches keyed by content: of its encoded bytes (of a file: read whole), else
    of its pixels, so that the same picture under another path has the same one. Raises ValueError as ``load_image``."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, (Image.Image, np.ndarray)):
        hash_image(source, digest)
        return digest.hexdigest()
    stream, name = _stream(source)
    with stream:
        read = stream.read(max_bytes + 1)
    if len(read) > max_bytes:
        raise ValueError(f"broken image: {name} (more than {max_bytes} bytes)")
    digest.update(read)
    return digest.hexdigest()


def stored_image(source: ImageSource) -> dict[str, Any]:
    """Make of an image what `datasets` stores, ``{"bytes", "path"}``: pixels as PNG, a path as it is."""
    if isinstance(source, dict):
        return {"bytes": source.get("bytes"), "path": source.get("path")}
    if isinstance(source, (str, os.PathLike)):
        return {"bytes": None, "path": os.fspath(source)}
    image = load_image(source)
    stream = io.BytesIO()
    (image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: Any, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """The image of any source but an array, its head read, and what messages call it."""
    if isinstance(source, Image.Image):
        _limit(source, "open image", max_pixels)
        _check_depth(source, "open image")
        yield source, "open image"
        return
    stream, name = _stream(source)
    with stream:
        try:
            lift_bound(max_pixels)
            image = Image.open(stream, formats=FORMATS)
        except Exception as error:  # see load_image
            raise _broken(name, error) from None
        with image:
            _limit(image, name, max_pixels)
            _check_depth(image, name)
            yield image, name


def lift_bound(max_pixels: int) -> None:
    """Let Pillow open images of ``max_pixels`` too, where the caller asks for more than it opens on its own."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def _limit(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise ValueError(f"broken image: {name} ({width} x {height} pixels)")
    if width * height > max_pixels:
        raise ValueError(f"image too large: {name} ({width} x {height} pixels; at most {max_pixels} are decoded)")


def _check_depth(image: Image.Image, name: str) -> None:
    """Refuse 32-bit and floating-point pixels. Pillow opens 16-bit PNG and PPM in its 32-bit mode."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"broken image: {name} (pixels of mode {image.mode}; expected 8 or 16 bits a channel)")


def _stream(source: Any) -> tuple[BinaryIO, str]:
    """The encoded bytes of a path, a member of an archive, a URL, or a dict with bytes or a path; and its name."""
    opened, name = source, str(source)
    if isinstance(source, dict):
        name = str(source.get("path") or "image bytes")
        opened = source.get("bytes") if source.get("bytes") is not None else source.get("path")
        if isinstance(opened, bytes):
            return io.BytesIO(opened), name
        if source.get("bytes") is not None:
            raise ValueError(f"image bytes are {type(opened).__name__}; expected bytes")
    if not isinstance(opened, (str, os.PathLike)) or opened == "":
        raise ValueError(f"image is {type(source).__name__}; expected a path, a PIL image, an array or bytes")
    path = os.fspath(opened)
    try:
        if is_url(path):
            return remote_file(path), name
        if MEMBER in path:
            return io.BytesIO(read_member(path)), name
        return open_file(path), name
    except FileNotFoundError:
        raise ValueError(f"missing image: {name}") from None
    except OSError as error:
        raise _broken(name, error) from None


def remote_file(url: str) -> BinaryIO:
    """Read a URL's bytes through fsspec; FileNotFoundError or OSError."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as stream:
            return io.BytesIO(stream.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each file system has its own
        raise OSError(f"{type(error).__name__}: {error}") from None


def _broken(name: str, error: Exception) -> ValueError:
    text = str(error) or type(error).__name__
    if "cannot identify image file" in text:
        text = f"not an image of {', '.join(FORMATS)}"
    return ValueError(f"broken image: {name} ({text})")


# --- pixels ----------------------------------------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 where there is none or it cannot be read. (Pillow turns a TIFF itself.)"""
    try:
        if image.format == "PNG" and _has_late_tags(image):
            image.load()  # Pillow reads the chunks behind the pixels with them
        if image.format == "TIFF" or not any(tag in image.info for tag in _TAGS):
            return 1
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged block says nothing
        return 1
    return found if found in _TURNS else 1


def _has_late_tags(image: Image.Image) -> bool:
    """Whether an orientation may stand behind the pixels of a PNG that are not read yet; of an animation's first
    frame."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return False
    before, pixels = stream.tell(), False
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8 and (kind := head[4:]) != b"IEND":
            length = int.from_bytes(head[:4], "big")
            if pixels and kind == b"fcTL":
                return False
            if pixels and kind == b"eXIf":
                return True
            if pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword = stream.read(min(length, 80)).partition(b"\0")[0]
                if keyword.decode("latin-1") in _TAGS:
                    return True
                length -= min(length, 80)
            pixels |= kind == b"IDAT"
            stream.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        stream.seek(before)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    upright = image.transpose(_TURNS[orientation])
    for tag in _TAGS:  # or it would be turned again
        upright.info.pop(tag, None)
    return upright


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _checked(array: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, 3] or [H, W, 4] bytes."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    right = array.dtype == np.uint8 and array.size and (array.ndim == 2 or array.shape[2:] in ((3,), (4,)))
    if not right:
        raise ValueError(f"image array is {array.dtype} {array.shape}; expected uint8 [H, W] or [H, W, 3], not empty")
    return array
