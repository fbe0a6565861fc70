"""Finding and reading what a suite needs: tables in parquet or JSONL, pictures inside them, folders of frames.

Only what lies on this disk is read; ``download=True`` alone may fetch a table from the hub, into the hub's own cache.
Tables are found by path, because `datasets` opens a local folder by configuration only where its README lists them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from rime_fast.data.records import DataError, Problem
from rime_fast.data.rows import iter_rows

PICTURES = (".jpg", ".jpeg", ".png")
Row = dict[str, Any]


class StoredImage(dict):
    """A picture in a parquet file, as ``{"path", "bytes"}`` whose bytes are read each time they are asked for.

    path: how messages call it. max_side: a picture with a longer side is shrunk to it (Lanczos), in bytes of PNG.
    """

    def __init__(self, name: str, file: str, group: int, row: int, column: str, max_side: int = 0) -> None:
        super().__init__(path=name, bytes=None)
        self.place = (name, file, group, row, column, max_side)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.place

    def __getitem__(self, key: str) -> Any:
        return self._bytes() if key == "bytes" else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self._bytes() if key == "bytes" else super().get(key, default)

    def renamed(self, name: str, max_side: int = 0) -> StoredImage:
        """The same picture under another name, with another limit."""
        return StoredImage(name, *self.place[1:5], max_side)

    def _bytes(self) -> bytes | None:
        _, file, group, row, column, max_side = self.place
        value = _column(file, os.stat(file).st_mtime_ns, group, column)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        return _shrunk(data, max_side) if data and max_side else data


@lru_cache(maxsize=4)
def _column(file: str, changed: int, group: int, column: str) -> Any:
    """One column of one row group, of the file as it was ``changed``. Neighbours are asked for together, so a few
    groups in memory are enough."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column]).column(column)


def _shrunk(data: bytes, max_side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = max_side / max(image.size)
        if scale >= 1:
            return data
        smaller = image.convert("RGB").resize(
            (max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    smaller.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a table may be: ``folders`` below the root in order of preference, then a hub repository's cached copy."""

    root: Path
    folders: tuple[str, ...]
    repo: str = ""
    revision: str | None = None
    download: bool = False

    @classmethod
    def of(cls, root: str | Path, local: Sequence[str], repo: str, **options: Any) -> Source:
        """Look in the usual places of a hub data set: ``local``, its full and its short name, MMEB's folder of
        documents."""
        short = repo.rpartition("/")[2]
        folders = dict.fromkeys([*local, repo, short, f"visdoc-tasks/data/{short}"])
        return cls(Path(root), tuple(folders), repo, **options)

    def rows(self, config: str | None, split: str, *, any_config: bool = False) -> list[Row]:
        """Read all rows of a configuration and split; pictures as StoredImage.

        any_config: a folder that has the split without naming configurations serves too. Raises DataError listing
        every place where the table was looked for.
        """
        tried = []
        for folder in self.places():
            tried.append(str(folder))
            wanted = [config, None] if any_config and config else [config]
            for one in wanted:
                if folder.is_dir() and (files := table_files(folder, one, split)):
                    return [row for file in files for row in read_table(file)]
        if self.download and self.repo:
            files = table_files(self._fetched(config, local_files_only=False), config, split)
            if files:
                return [row for file in files for row in read_table(file)]
        name = f"{self.repo or self.folders[0]} (configuration {config or 'default'}, split {split})"
        raise DataError(f"no table of {name}; looked in {', '.join(tried)}")

    def places(self) -> Iterator[Path]:
        """Every folder that may hold it, existing or not."""
        yield from (self.root / folder for folder in self.folders)
        if self.repo:
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                yield self._fetched(None, local_files_only=True)
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
                return

    def _fetched(self, config: str | None, local_files_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        patterns = None if config is None else ["README.md", f"{config}*", f"*/{config}*", "data/*"]
        folder = snapshot_download(
            self.repo,
            repo_type="dataset",
            revision=self.revision,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
        return Path(folder)


def table_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of a configuration and split in a data set's folder, by its README or else by the usual names."""
    patterns = _readme_patterns(folder, config, split)
    if config is None:
        patterns += [f"data/{split}-*.parquet", f"{split}-*.parquet", f"data/{split}.parquet", f"{split}.parquet"]
        patterns += [f"{split}.jsonl", f"data/{split}.jsonl", f"{split}.json", "*.jsonl"]
    else:
        patterns += [f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet", f"data/{config}/{split}-*.parquet"]
        patterns += [f"{config}/{split}.parquet", f"{config}.parquet", f"{config}-{split}.parquet"]
        patterns += [f"{config}/{split}.{end}" for end in ("jsonl", "tsv")]
        patterns += [f"{config}.{end}" for end in ("jsonl", "json", "tsv")] + [f"json/{config}.json"]
    for pattern in patterns:
        if found := sorted(folder.glob(pattern), key=lambda path: natural(path.name)):
            return found
    return []


def _readme_patterns(folder: Path, config: str | None, split: str) -> list[str]:
    """The globs that the head of README.md gives for this configuration and split."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        configs = (yaml.safe_load(head.group(1)) or {}).get("configs") or [] if head else []
    except (yaml.YAMLError, AttributeError):
        return []
    patterns: list[str] = []
    for one in configs:
        if one.get("config_name", "default") != (config or "default"):
            continue
        data = one.get("data_files") or []
        for entry in data if isinstance(data, list) else [data]:
            named = entry if isinstance(entry, dict) else {"split": split, "path": entry}
            if named.get("split") == split:
                path = named.get("path") or []
                patterns += path if isinstance(path, list) else [path]
    return [pattern for pattern in patterns if isinstance(pattern, str) and not pattern.startswith("/")]


def read_table(path: Path) -> list[Row]:
    """Read the rows of a parquet, JSON, JSONL or tab-separated file. Raises DataError naming file and row."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".tsv":
        return _read_tsv(path)
    rows, problems = [], []
    for row in iter_rows(path):
        if row.error or not isinstance(row.value, dict):
            problems.append(Problem(str(path), row.number, "", row.error or "is not an object"))
        else:
            rows.append(row.value)
    if problems:
        raise DataError(problems)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        pictures = [field.name for field in schema if _is_picture(field.type)]
        plain = [field.name for field in schema if field.name not in pictures]
        paths = [f"{name}.path" for name in pictures if pa.types.is_struct(schema.field(name).type)]
        rows: list[Row] = []
        for group in range(file.num_row_groups):
            part = file.read_row_group(group, columns=[*plain, *paths]).to_pylist()
            if not plain and not paths:
                part = [{} for _ in range(file.metadata.row_group(group).num_rows)]
            for i, row in enumerate(part):
                for name in pictures:
                    stored = row.get(name, {})
                    label = (stored or {}).get("path") or f"{path}, row {len(rows) + 1}, {name}"
                    row[name] = None if stored is None else StoredImage(label, str(path), group, i, name)
                rows.append(row)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(Problem(str(path), 0, "", f"is no readable parquet file ({error})")) from error
    return rows


def _is_picture(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def _read_tsv(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    head = lines[0].rstrip("\r").split("\t")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            cells = line.rstrip("\r").split("\t")
            if len(cells) != len(head):
                raise DataError(Problem(str(path), number, "", f"has {len(cells)} cells; expected {len(head)}"))
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def field(row: Row, *names: str) -> Any:
    """The first of these columns that the row has. Raises DataError listing what it has instead."""
    for name in names:
        if name in row:
            return row[name]
    raise DataError(f"a row has the columns {', '.join(map(str, row))}; expected {' or '.join(names)}")


# --- pictures and frames ---------------------------------------------------------------------------------------------


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that takes digits as numbers: 2.jpg before 10.jpg."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def frames(folder: Path, count: int | None) -> list[str]:
    """Pick ``count`` evenly spaced pictures of a folder in natural order, all where there are fewer (or for None); []
    where there is no such folder."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(PICTURES)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names.sort(key=natural)
    if count is not None and len(names) > count:
        names = [names[i] for i in np.linspace(0, len(names) - 1, count, dtype=int)]
    return [str(folder / name) for name in names]


def first_existing(candidates: Iterable[Path]) -> Path:
    """The first path that exists, else the first one."""
    paths = list(candidates)
    return next((path for path in paths if path.exists()), paths[0])
