"""Files inside tar and zip archives, read in place: ``images.tar::a/b.jpg``.

An archive is listed once; the list is kept in the cache (cache.py), sorted by a hash of the names and mapped into
memory, so that every process looks a member up in a few microseconds and holds nothing of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from rime_fast.data.cache import cached_array, file_key

MEMBER = "::"
MAX_BYTES = 1 << 28  # of one member
_STORED, _DEFLATED, _UNREADABLE = 0, 8, -1  # zip's numbers, and one for what is encrypted
# name: two halves of a hash; offset: of the data (tar) or of the local header (zip); stored, size: bytes in the
# archive and unpacked
_ENTRY = np.dtype([("name", "<u8", 2), ("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("method", "<i8")])


class ArchiveError(OSError):
    """An archive or a member that cannot be read; the message names neither (the caller does)."""


def open_file(path: str) -> BinaryIO:
    """Open a regular file for reading; OSError for a pipe or a device, without waiting for it."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("not a file")
    return os.fdopen(handle, "rb")


def read_member(path: str) -> bytes:
    """The bytes of ``ARCHIVE::NAME``. Raises FileNotFoundError for a missing archive or member, else OSError."""
    archive, _, name = path.partition(MEMBER)
    entry = _find(archive, name)
    if entry is None:
        raise FileNotFoundError(errno.ENOENT, f"{archive} has no member {name}")
    offset, stored, size, method = (int(entry[key]) for key in ("offset", "stored", "size", "method"))
    if method not in (_STORED, _DEFLATED):
        raise ArchiveError("a member that is encrypted, or packed by another method than deflate")
    if size > MAX_BYTES or stored > MAX_BYTES:
        raise ArchiveError(f"a member of {size} bytes; at most {MAX_BYTES} are read")
    handle = _handle(archive, os.getpid())
    if archive_kind(archive) == "zip":
        head = os.pread(handle, 30, offset)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise ArchiveError("the archive was changed or is damaged")
        offset += 30 + sum(struct.unpack("<HH", head[26:30]))
    data = os.pread(handle, stored, offset)
    if method == _DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(data, size + 1)
        except zlib.error as error:
            raise ArchiveError(str(error)) from None
    if len(data) != size:
        raise ArchiveError("the archive is cut off or damaged")
    return data


def has_member(archive: str, name: str) -> bool:
    """Whether the archive is there and holds a file of that name."""
    return os.path.isfile(archive) and _find(archive, name) is not None


def archive_kind(path: str) -> str | None:
    """Tell an archive by its name's ending: "tar" or "zip", None for another file."""
    ending = os.path.splitext(path)[1].lower()
    return {".tar": "tar", ".zip": "zip"}.get(ending)


def _find(archive: str, name: str) -> np.void | None:
    names, entries = _index(archive, *file_key(archive))
    wanted = _name_hash(name)
    at = int(np.searchsorted(names, wanted[0]))
    while at < len(names) and names[at] == wanted[0]:
        if entries[at]["name"][1] == wanted[1]:
            return entries[at]
        at += 1
    return None


@lru_cache(maxsize=256)
def _index(archive: str, size: int, mtime: int) -> tuple[np.ndarray, np.ndarray]:
    """(first halves of the names' hashes, entries), both sorted by them."""
    if archive_kind(archive) is None:
        raise ArchiveError("not a .tar or .zip (compressed tars cannot be read in place)")
    entries = cached_array(("archive", 2, os.path.abspath(archive), size, mtime), lambda: _listed(archive))
    return np.ascontiguousarray(entries["name"][:, 0]), entries


def _listed(archive: str) -> np.ndarray:
    found = {}
    try:
        if archive_kind(archive) == "zip":
            with open_file(archive) as stream, zipfile.ZipFile(stream) as opened:
                for member in opened.infolist():
                    if member.is_dir():
                        continue
                    method = _UNREADABLE if member.flag_bits & 1 else member.compress_type
                    place = (member.header_offset, member.compress_size, member.file_size, method)
                    found[_name_hash(member.filename)] = place
        else:
            with open_file(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as packed:
                for entry in packed:
                    if entry.isreg() and not entry.issparse():
                        found[_name_hash(entry.name)] = (entry.offset_data, entry.size, entry.size, _STORED)
    except (zipfile.BadZipFile, tarfile.TarError, struct.error, EOFError, ValueError, NotImplementedError) as error:
        raise ArchiveError(f"not a readable archive: {error}") from None
    return np.array([(name, *place) for name, place in sorted(found.items())], dtype=_ENTRY)


def _name_hash(name: str) -> tuple[int, int]:
    """Of a name without a leading ``./`` (tars have it, rows do not)."""
    clean = name.removeprefix("./").encode("utf-8", "surrogateescape")
    return struct.unpack("<QQ", hashlib.blake2b(clean, digest_size=16).digest())


@lru_cache(maxsize=64)
def _opened(archive: str, process: int) -> _Handle:
    return _Handle(archive)


def _handle(archive: str, process: int) -> int:
    return _opened(archive, process).file.fileno()


class _Handle:
    """An open file, closed when it leaves the memory of open ones."""

    def __init__(self, path: str) -> None:
        self.file = open_file(path)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
