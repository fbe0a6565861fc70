"""What is worked out once about a file and kept: places of rows, lists of archives, verdicts of the check.

One folder for all ($RIME_FAST_CACHE, else $XDG_CACHE_HOME/rime-fast or ~/.cache/rime-fast). An entry is named by a
hash of what it depends on, so a changed file has another entry and nothing needs to be thrown away; everything in it
can be deleted at any time. Where several processes of a node want the same entry, one makes it and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_OLD = 90 * 86400  # seconds since its last use after which an entry is removed


def cache_folder() -> Path:
    """The folder of all entries; a temporary one of this user where the home cannot be written."""
    home = os.environ.get("RIME_FAST_CACHE")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rime-fast")
    folder = Path(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir(), f"rime-fast-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set RIME_FAST_CACHE to a folder of your own")
    return folder


def file_key(path: str | os.PathLike[str]) -> tuple[int, int]:
    """What an entry about a file depends on: (size, time of the last change in ns)."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def entry_path(key: Any, ending: str) -> Path:
    """The file in which an entry is kept. key: anything json knows, whole."""
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=20).hexdigest()
    return cache_folder() / f"{name}{ending}"


def cached_array(key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Give the array ``make()`` makes, kept under ``key`` and mapped into memory (shared by all processes that read
    it)."""
    path = entry_path(key, ".npy")

    def found() -> np.ndarray | None:
        if not path.is_file():
            return None
        os.utime(path)
        return np.load(path, mmap_mode="r") if path.stat().st_size > 1 << 16 else np.load(path)

    with suppress(ValueError, EOFError):  # an entry that a full disk cut off is made anew
        if (there := found()) is not None:
            return there
    with locked(path):
        with suppress(ValueError, EOFError):
            if (there := found()) is not None:
                return there
        made = make()
        with replacing(path, "wb") as stream:
            np.save(stream, made)
        _sweep(path.parent)
    return found()  # type: ignore[return-value]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this node into a block at a time; nothing is kept where it dies."""
    with open(f"{path}.lock", "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Write a file that takes its name once it is complete and on the disk. The partial one is always a new file of
    this process, whatever lies there under a name like it; the one of a process that died is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_orphans(path: Path) -> None:
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        owner = partial.name[len(path.name) + 2 :].split(".")[0]
        if owner.isdigit() and not Path("/proc", owner).exists() and time.time() - partial.lstat().st_mtime > 60:
            with suppress(OSError):
                partial.unlink()


def _sweep(folder: Path) -> None:
    """Entries that nobody has read for long."""
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()
