"""The second demo's data: one figure drawn by two artists, found after a change said in words.

Emoji are pictures with names that people gave them. Two published sets draw the same 3,800: Google's (Noto) and
Twitter's (Twemoji), packed with their Unicode names as `emoji-datasource-google` and `emoji-datasource-twitter` on the
npm registry (MIT; the pictures Apache-2.0 and CC-BY 4.0). Some 70 activities have a woman and a man in five skin
tones: ten cells each.

A query is Google's picture of one cell and words that change the gender, the tone or both ("as a man with dark skin
tone"); the target is Twitter's picture of the changed cell, among those of all cells. The rewrite names it: "man
firefighter, dark skin tone". What one picture lacks, the other set's style and the change, is what the words carry.

    whole   man firefighter, dark skin tone
    wordy   a picture of a man firefighter, dark skin tone
    vague   firefighter                                     true of ten cells

Of an activity's ten cells five train, two validate, three test: a test picture, by either artist, is never trained on;
its activity, gender and tone are, in other company. Needs the two packages as .tgz files in a folder (``fetch`` gets
them); nothing else is downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from rime_fast.data.cache import replacing
from rime_fast.data.digits import Kind, Split
from rime_fast.data.records import Pair, Side
from rime_fast.data.retrieval import RetrievalSet

Artist = Literal["google", "twitter"]
SIDE = 32  # pixels of a picture
GENDERS = ("woman", "man")
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
VERSION = "16.0.0"
_URL = "https://registry.npmjs.org/emoji-datasource-{0}/-/emoji-datasource-{0}-{1}.tgz"
_SHA512 = {
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
_SPLIT_SEED = 1234
_SHARES = {"test": slice(0, 3), "val": slice(3, 5), "train": slice(5, 10)}  # of an activity's shuffled ten cells
_STREAM = {"train": 1, "val": 2, "test": 3}


class Cell(NamedTuple):
    """Names one figure: activity ("firefighter"), gender and tone, by their words."""

    activity: str
    gender: str
    tone: str

    @property
    def words(self) -> str:
        """Give its name, by which it can be told from every other cell."""
        return f"{self.gender} {self.activity}, {self.tone} skin tone"


class Emoji(NamedTuple):
    """Holds both sets.

    cells: every figure, sorted. pictures: {(artist, cell): uint8 [SIDE, SIDE, 3]}. split: the split of each cell.
    """

    cells: tuple[Cell, ...]
    pictures: dict[tuple[str, Cell], np.ndarray]
    split: dict[Cell, Split]

    def of(self, split: Split) -> list[Cell]:
        """List the cells of a split, sorted."""
        return [cell for cell in self.cells if self.split[cell] == split]


def fetch(folder: str | Path) -> Path:
    """Get the packages that ``folder`` lacks from the npm registry, each checked against its SHA-512; gives the
    folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for artist, digest in _SHA512.items():
        path = _package(folder, artist)
        if path.exists():
            continue
        with urllib.request.urlopen(_URL.format(artist, VERSION), timeout=300) as answer:
            content = answer.read()
        if base64.b64encode(hashlib.sha512(content).digest()).decode() != digest:
            raise ValueError(f"{_URL.format(artist, VERSION)}: its SHA-512 is not the published one")
        with replacing(path, "wb") as stream:
            stream.write(content)
    return folder


@lru_cache(maxsize=2)
def load_emoji(folder: str) -> Emoji:
    """Read both packages. Raises FileNotFoundError naming the one that is missing."""
    found: dict[tuple[str, Cell], np.ndarray] = {}
    for artist in _SHA512:
        path = _package(Path(folder), artist)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: npm pack emoji-datasource-{artist}@{VERSION}, or fetch()")
        pictures: dict[str, bytes] = {}
        entries: list[dict[str, Any]] = []
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name == "package/emoji.json":
                    entries = json.loads(_content(archive, member))
                elif member.name.startswith(f"package/img/{artist}/64/"):
                    pictures[Path(member.name).name] = _content(archive, member)
        found |= {(artist, cell): _pixels(pictures[name]) for cell, name in _named(entries) if name in pictures}
    both = {cell for artist, cell in found if ("google", cell) in found and ("twitter", cell) in found}
    of_activity: dict[str, list[Cell]] = {}
    for cell in sorted(both):
        of_activity.setdefault(cell.activity, []).append(cell)
    complete = {name: cells for name, cells in of_activity.items() if len(cells) == len(GENDERS) * len(TONES)}
    rng = np.random.RandomState(_SPLIT_SEED)
    split: dict[Cell, Split] = {}
    for cells in complete.values():
        shuffled = [cells[i] for i in rng.permutation(len(cells))]
        split |= {cell: part for part in ("test", "val", "train") for cell in shuffled[_SHARES[part]]}
    return Emoji(tuple(sorted(split)), found, split)


def _package(folder: Path, artist: str) -> Path:
    return folder / f"emoji-datasource-{artist}-{VERSION}.tgz"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def _named(entries: list[dict[str, Any]]) -> list[tuple[Cell, str]]:
    """(cell, file name of its picture) for the entries "WOMAN X" and "MAN X" that come in skin tones."""
    named = []
    for entry in entries:
        words = re.fullmatch(r"(WOMAN|MAN) ([A-Z ]+)", entry["name"] or "")
        # The same figure turned round; pictures of two people have 25 tones.
        if words is None or entry["name"].endswith("FACING RIGHT") or len(entry.get("skin_variations", {})) != 5:
            continue
        gender, activity = words[1].lower(), words[2].lower()
        for code, variation in entry["skin_variations"].items():
            named.append((Cell(activity, gender, TONES[code]), variation["image"]))
    return named


def _pixels(png: bytes) -> np.ndarray:
    """On white, SIDE x SIDE."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        drawn = image.convert("RGBA")
    ground = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(ground, drawn).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def change(source: Cell, target: Cell) -> str:
    """Say what leads from one cell of an activity to another: "as a man with dark skin tone"."""
    gender = f"as a {target.gender}" if source.gender != target.gender else ""
    tone = f"with {target.tone} skin tone" if source.tone != target.tone else ""
    return " ".join(filter(None, (gender, tone)))


def rewrite(cell: Cell, kind: Kind = "whole") -> str:
    """Write of a cell what a teacher writes."""
    return {"whole": cell.words, "wordy": f"a picture of a {cell.words}", "vague": cell.activity}[kind]


def query_side(emoji: Emoji, source: Cell, target: Cell, *, kind: Kind = "whole", id: str | None = None) -> Side:
    """Make a query of Google's picture and the change, with the rewrite of the target."""
    image = emoji.pictures["google", source]
    return Side(text=change(source, target), images=[image], rewrite=rewrite(target, kind), id=id)


def target_side(emoji: Emoji, cell: Cell) -> Side:
    """Make a target of Twitter's picture with its own name as the rewrite."""
    return Side(images=[emoji.pictures["twitter", cell]], rewrite=rewrite(cell), id=f"twitter {cell.words}")


class EmojiPairs(Sequence[Pair]):
    """Makes ``size`` training pairs, each when it is asked for; the same ones for the same arguments.

    wordy, vague: shares of the queries' rewrites of these kinds; the rest are whole. Pictures are moved by up to two
    pixels, brightened and noised a little.
    """

    def __init__(
        self, emoji: Emoji, split: Split, size: int, *, seed: int = 0, wordy: float = 0.0, vague: float = 0.0
    ) -> None:
        if min(wordy, vague) < 0 or wordy + vague > 1:
            raise ValueError(f"wordy is {wordy} and vague {vague}; expected shares from 0 to 1, together at most 1")
        self.emoji, self.split, self.size, self.seed = emoji, split, size, seed
        self.wordy, self.vague = wordy, vague
        self.cells = emoji.of(split)
        self.mates = {cell: [c for c in self.cells if c.activity == cell.activity and c != cell] for cell in self.cells}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index is {index}; expected 0 to {self.size - 1}")
        rng = np.random.default_rng((_STREAM[self.split], self.seed, index))
        source = self.cells[rng.integers(len(self.cells))]
        target = self.mates[source][rng.integers(len(self.mates[source]))]
        drawn = rng.random()
        kind: Kind = "wordy" if drawn < self.wordy else "vague" if drawn < self.wordy + self.vague else "whole"
        name = f"{self.split}-{self.seed}-{index}"
        query, positive = query_side(self.emoji, source, target, kind=kind, id=name), target_side(self.emoji, target)
        for side in (query, positive):
            side.images = [_disturbed(image, rng) for image in side.images or ()]
        return Pair(query, positive, id=name)


def _disturbed(image: Any, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255)
    y, x = rng.integers(0, 5, 2)
    moved = padded[y : y + SIDE, x : x + SIDE] / 255 * rng.uniform(0.95, 1.0)
    noised = moved + 0.02 * rng.standard_normal(moved.shape)
    return np.rint(noised.clip(0, 1) * 255).astype(np.uint8)


def emoji_retrieval(emoji: Emoji, split: Split, size: int, *, seed: int = 0) -> RetrievalSet:
    """Make ``size`` different queries from one cell of ``split`` to another, against Twitter's pictures of ALL cells.

    Fewer where the split has no more. The sides carry the right rewrites, which no evaluation may show to the model.
    """
    cells = emoji.of(split)
    steps = [(a, b) for a in cells for b in cells if a.activity == b.activity and a != b]
    order = np.random.RandomState(seed).permutation(len(steps))[:size]
    queries = [query_side(emoji, *steps[i], id=f"{split}-{i}") for i in order.tolist()]
    rows = {cell: row for row, cell in enumerate(emoji.cells)}
    candidates = [target_side(emoji, cell) for cell in emoji.cells]
    return RetrievalSet(queries, candidates, [[rows[steps[i][1]]] for i in order.tolist()], name=f"emoji-{split}")
