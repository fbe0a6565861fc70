"""Rows of anything that holds them, by number: JSON and JSONL, Parquet, Arrow, `datasets` folders, Python objects.

``open_rows`` looks at a file once (places of its rows or of its row groups, a few bytes a row, kept in the cache);
after that any row is read alone, by any process. ``write_rows`` writes JSONL, a JSON list or Parquet.
"""

from __future__ import annotations

import glob
import json
import os
import pickle
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rime_fast.data.cache import cache_folder, file_key, replacing
from rime_fast.data.json_rows import JsonRows
from rime_fast.data.records import DataError, Problem
from rime_fast.data.rows import Row, RowSource

_KEPT_BYTES = 1 << 28  # decoded row groups that a process holds


def open_rows(source: Any, *, name: str = "dataset", max_rows: int | None = None) -> RowSource:
    """The rows of a file, a folder, a list, a `datasets.Dataset` or any map-style dataset; or of an iterable.

    source: a path (told apart by what is in it: JSON list or JSONL, Parquet, Arrow), a pattern (``part-*.parquet``, in
    the order of the names), a folder (of ``Dataset.save_to_disk``, or of Parquet files); an object with ``len`` and
    ``[]``; or an iterable, which is read once, at most ``max_rows`` of it, in its own order, into a temporary file.
    name: what messages call a source without a path.

    Raises DataError for a file that is missing, empty or of no such kind, and for an iterable that fails; TypeError
    for another object.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _open_path(os.fspath(source))
        if not len(rows) and rows.problem is None:
            raise DataError(Problem(rows.name, 0, "", "is empty"))
        return rows
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, dict):
        return SequenceRows(source, name)
    if hasattr(source, "__iter__") and not isinstance(source, (dict, bytes)):
        return SpooledRows(_told(_undecoded(source), name), name, max_rows)
    raise TypeError(f"{name} is {type(source).__name__}; expected a path, a list of Pair or a map-style dataset")


def _open_path(path: str) -> RowSource:
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "dataset_info.json")):
            return _arrow_folder(path)
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet")))
        if not files:
            raise DataError(Problem(path, 0, "", "is a folder with neither a saved dataset nor Parquet files"))
        return ParquetRows(files, path)
    if not os.path.exists(path) and glob.has_magic(path):
        files = sorted(glob.glob(path))
        if not files or not all(file.endswith(".parquet") for file in files):
            raise DataError(Problem(path, 0, "", "no such file" if not files else "a pattern opens Parquet files only"))
        return ParquetRows(files, path)
    if not os.path.isfile(path):
        raise DataError(Problem(path, 0, "", "is not a file" if os.path.exists(path) else "no such file"))
    with open(path, "rb") as stream:
        head = stream.read(6)
    if head[:4] == b"PAR1":
        return ParquetRows([path], path)
    if head == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return _arrow_file(path, head == b"ARROW1")
    return JsonRows(path)


class ParquetRows(RowSource):
    """Rows of Parquet files, by row group: a process holds the last few groups, at most _KEPT_BYTES of them."""

    def __init__(self, files: Sequence[str], name: str) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        self.name = name
        self.files = [os.path.abspath(file) for file in files]
        self.folder = os.path.dirname(self.files[0])
        groups = []
        for i, file in enumerate(self.files):
            try:
                metadata = parquet.read_metadata(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(Problem(file, 0, "", f"is not a readable Parquet file: {error}")) from None
            groups += [(i, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self.starts = np.concatenate([[0], np.cumsum(self.groups[:, 2])])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_open": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self) -> Any:
        return [[file, *file_key(file)] for file in self.files]

    def read(self, index: int) -> Any:
        at = int(np.searchsorted(self.starts, index, side="right")) - 1
        one = self._group(at).slice(index - int(self.starts[at]), 1)
        try:
            (row,) = one.to_pylist()
        except Exception as error:  # a text that is no UTF-8, a time that Python has none for
            raise DataError(Problem(self.name, index + 1, "", f"cannot be read: {error}")) from None
        return row

    def between(self, start: int, stop: int) -> Iterator[Row]:
        for at in range(len(self.groups)):
            first, last = int(self.starts[at]), int(self.starts[at + 1])
            begin, end = max(start, first), min(stop, last)
            for batch in range(begin, end, 256):  # a group of images is not turned into Python objects at once
                part = self._group(at).slice(batch - first, min(256, end - batch))
                try:
                    rows = part.to_pylist()
                except Exception:  # of one of them: each is read alone
                    yield from super().between(batch, batch + len(part))
                    continue
                yield from (Row(batch + i + 1, 0, 0, row) for i, row in enumerate(rows))

    def locality(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, indices, side="right") - 1

    def _group(self, at: int) -> Any:
        import pyarrow
        import pyarrow.parquet as parquet

        kept = self._kept
        if at not in kept:
            file, group, _ = self.groups[at].tolist()
            try:
                if file not in self._open:
                    self._open[file] = parquet.ParquetFile(self.files[file], memory_map=True)
                kept[at] = self._open[file].read_row_group(group, use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(
                    Problem(self.files[file], 0, f"row group {group}", f"cannot be read: {error}")
                ) from None
            while len(kept) > 1 and sum(table.nbytes for table in kept.values()) > _KEPT_BYTES:
                kept.popitem(last=False)
        kept.move_to_end(at)
        return kept[at]


class SequenceRows(RowSource):
    """Rows of a list or of a map-style dataset. Image columns of a `datasets.Dataset` are left undecoded, so that a
    broken picture has a name and Pillow's bounds are ours."""

    def __init__(self, source: Any, name: str, *, folder: str = "", files: Sequence[str] = ()) -> None:
        self.source, self.name, self.folder, self.files = _undecoded(source), name, folder, list(files)

    def __len__(self) -> int:
        return len(self.source)

    def key(self) -> Any:
        return [[file, *file_key(file)] for file in self.files] or None

    def read(self, index: int) -> Any:
        try:
            return self.source[index]
        except DataError:
            raise
        except Exception as error:  # a dataset may decode, download or compute
            message = f"cannot be read: {type(error).__name__}: {error}"
            raise DataError(Problem(self.name, index + 1, "", message)) from error


class SpooledRows(SequenceRows):
    """Rows of an iterable, read once in its own order into a temporary file that goes with this object."""

    def __init__(self, source: Iterable[Any], name: str, max_rows: int | None) -> None:
        super().__init__((), name)
        handle, self.path = tempfile.mkstemp(prefix="spool-", suffix=".rows", dir=cache_folder())
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())
        places = [0]
        with os.fdopen(handle, "wb") as stream:
            for row in source:
                if max_rows is not None and len(places) > max_rows:
                    break
                pickle.dump(row, stream, protocol=pickle.HIGHEST_PROTOCOL)
                places.append(stream.tell())
        self.places = np.array(places, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_finalizer"}

    def __len__(self) -> int:
        return len(self.places) - 1

    def read(self, index: int) -> Any:
        with open(self.path, "rb") as stream:
            stream.seek(int(self.places[index]))
            return pickle.load(stream)


def _told(source: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows of the caller's iterable; what it raises is told with the row that it was to give."""
    number = 1
    try:
        for row in source:
            yield row
            number += 1
    except DataError:
        raise
    except Exception as error:  # it may decode, download or compute
        message = f"cannot be read: {type(error).__name__}: {error}"
        raise DataError(Problem(name, number, "", message)) from error


def _remove(path: str, process: int) -> None:
    if os.getpid() == process and os.path.exists(path):  # not a forked worker's to remove
        os.unlink(path)


def _arrow_folder(path: str) -> RowSource:
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # datasets raises many kinds
        raise DataError(Problem(path, 0, "", f"is not a readable dataset folder: {error}")) from None
    if isinstance(found, datasets.DatasetDict):
        raise DataError(
            Problem(path, 0, "", f"holds the splits {', '.join(found)}; name one: {path}/{next(iter(found))}")
        )
    files = [file["filename"] for file in found.cache_files]
    return SequenceRows(found, path, folder=os.path.abspath(path), files=files)


def _arrow_file(path: str, random_access: bool) -> RowSource:
    import datasets
    import pyarrow

    try:
        if random_access:
            with pyarrow.memory_map(path) as mapped:
                found = datasets.Dataset(pyarrow.ipc.open_file(mapped).read_all())
        else:
            found = datasets.Dataset.from_file(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(Problem(path, 0, "", f"is not a readable Arrow file: {error}")) from None
    return SequenceRows(found, path, folder=os.path.dirname(os.path.abspath(path)), files=[os.path.abspath(path)])


def _undecoded(source: Any) -> Any:
    features = getattr(source, "features", None)
    if features is None or not hasattr(source, "cast"):
        return source
    if getattr(source, "_format_type", None) is not None or getattr(source, "_formatting", None) is not None:
        return source  # the caller's own transform
    import datasets

    def bare(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(mode=feature.mode, decode=False)
        if isinstance(feature, dict):
            return {key: bare(value) for key, value in feature.items()}
        if isinstance(feature, (list, tuple)):
            return [bare(value) for value in feature]
        if isinstance(feature, datasets.Sequence) or type(feature).__name__ in ("List", "LargeList"):
            inner = bare(feature.feature)
            return feature if inner == feature.feature else type(feature)(inner)
        return feature

    wanted = datasets.Features({key: bare(value) for key, value in features.items()})
    return source if wanted == features else source.cast(wanted)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_rows(path: str | Path, rows: Iterable[Any]) -> int:
    """Write decoded rows to a file that takes its name once it is complete; returns how many there were.

    The ending names the form: ``.json`` one list, ``.parquet`` Parquet (which takes bytes; a column holds one type),
    anything else JSONL.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _write_parquet(path, rows)
    as_list, count = path.suffix == ".json", 0
    with replacing(path) as stream:
        stream.write("[\n" if as_list else "")
        for count, value in enumerate(rows, 1):
            stream.write((",\n" if as_list and count > 1 else "") + dump_row(value) + ("" if as_list else "\n"))
        stream.write("\n]\n" if as_list else "")
    return count


def dump_row(value: Any) -> str:
    """Make one line of JSON of a row; half a surrogate pair, which is no UTF-8, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or text.encode("utf-8", "ignore").decode() == text else json.dumps(value)


def _write_parquet(path: Path, rows: Iterable[Any]) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    spooled = SpooledRows(rows, str(path), None)
    chunks = [(start, min(start + 1000, len(spooled))) for start in range(0, len(spooled), 1000)]
    schema = pyarrow.schema([])
    for start, stop in chunks:
        values = [row.value for row in spooled.between(start, stop)]
        names = list(dict.fromkeys(name for value in values for name in value))
        try:
            columns = {name: pyarrow.array([value.get(name) for value in values]).type for name in names}
            schema = pyarrow.unify_schemas([schema, pyarrow.schema(columns)], promote_options="permissive")
        except (pyarrow.ArrowException, TypeError) as error:
            raise ValueError(f"{path}: rows {start + 1} to {stop} do not fit in columns: {error}") from None
    with replacing(path, "wb") as stream, parquet.ParquetWriter(stream, schema) as writer:
        for start, stop in chunks:
            values = [row.value for row in spooled.between(start, stop)]
            writer.write_table(pyarrow.Table.from_pylist(values, schema=schema), row_group_size=256)
    return len(spooled)
