"""The second demo's data, on packages made here with the published ones' layout: cells, splits, words, fetching."""

from __future__ import annotations

import base64
import colorsys
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rime_fast.cli import main
from rime_fast.data import emoji
from rime_fast.data.emoji import TONES, Cell, EmojiPairs, change, emoji_retrieval, fetch, load_emoji
from rime_fast.demo.emoji import run_emoji

ACTIVITIES = ("firefighter", "in steamy room", "judge")
TONE = list(TONES)


def picture(artist: str, *place: int) -> bytes:
    """A PNG whose colour tells artist, activity, gender and tone, transparent above."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    activity, gender, tone = place
    colour = colorsys.hsv_to_rgb(activity / 3 + 0.1 * gender, 1.0 if artist == "google" else 0.7, 0.4 + 0.1 * tone)
    image.paste((*(int(255 * c) for c in colour), 255), (0, 16, 64, 64))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_package(folder: Path, artist: str) -> Path:
    entries: list[dict[str, Any]] = [{"name": "HUNDRED POINTS", "image": "100.png"}, {"name": None}]
    members: dict[str, bytes] = {"package/img/other/64/a-b-c.png": b"not this set's"}
    for a, activity in enumerate(ACTIVITIES):
        for g, gender in enumerate(("WOMAN", "MAN")):
            variations = {code: {"image": f"{a}-{g}-{code}.png".lower()} for code in TONE}
            entries.append({"name": f"{gender} {activity.upper()}", "skin_variations": variations})
            entries.append({"name": f"{gender} {activity.upper()} FACING RIGHT", "skin_variations": variations})
            for t, code in enumerate(TONE):
                members[f"package/img/{artist}/64/{variations[code]['image']}"] = picture(artist, a, g, t)
    # A woman alone: no change of gender leads to her, so her activity is left out.
    entries.append({"name": "WOMAN WALKING", "skin_variations": {code: {"image": "0-0-1f3fb.png"} for code in TONE}})
    members["package/emoji.json"] = json.dumps(entries).encode()
    path = folder / f"emoji-datasource-{artist}-{emoji.VERSION}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    for artist in ("google", "twitter"):
        write_package(folder, artist)
    return folder


def test_ten_cells_an_activity_five_three_and_two(packages: Path) -> None:
    found = load_emoji(str(packages))
    assert len(found.cells) == 10 * len(ACTIVITIES)
    assert {cell.activity for cell in found.cells} == set(ACTIVITIES)
    for split, count in (("train", 5), ("test", 3), ("val", 2)):
        assert len(found.of(split)) == count * len(ACTIVITIES)  # type: ignore[arg-type]
    image = found.pictures["google", Cell("judge", "man", "dark")]
    assert image.shape == (emoji.SIDE, emoji.SIDE, 3)
    assert image[0].min() == 255  # transparent is white
    assert image[-1].min() < 255


def test_training_never_shows_a_test_picture(packages: Path) -> None:
    found = load_emoji(str(packages))
    pairs = EmojiPairs(found, "train", 200, seed=1, wordy=0.3, vague=0.3)
    names = {cell.words for cell in found.of("train")}
    kinds = set()
    for pair in pairs:
        assert pair.target.rewrite in names
        kinds.add((pair.query.rewrite or "").split()[0])
    assert {"a", "woman", "man"} < kinds  # wordy, whole, and the vague ones that begin with the activity
    again = EmojiPairs(found, "train", 200, seed=1, wordy=0.3, vague=0.3)
    assert pairs[7].query.rewrite == again[7].query.rewrite
    assert np.array_equal(pairs[7].target.images[0], again[7].target.images[0])  # type: ignore[index]
    with pytest.raises(IndexError, match="index is 200"):
        pairs[200]
    with pytest.raises(ValueError, match=r"wordy is 0\.6 and vague 0\.6"):
        EmojiPairs(found, "train", 1, wordy=0.6, vague=0.6)


def test_the_change_leads_from_the_picture_to_the_right_candidate(packages: Path) -> None:
    found = load_emoji(str(packages))
    data = emoji_retrieval(found, "test", 512)
    assert len(data.queries) == 6 * len(ACTIVITIES)  # every ordered pair of three cells, each once
    assert len(data.candidates) == len(found.cells)
    for query, (row,) in zip(data.queries, data.correct, strict=True):
        target = found.cells[row]
        assert data.candidates[row].rewrite == query.rewrite == target.words
        sources = [c for c in found.cells if np.array_equal(found.pictures["google", c], query.images[0])]  # type: ignore[index]
        assert [change(source, target) for source in sources] == [query.text]
    assert change(Cell("a", "man", "dark"), Cell("a", "woman", "light")) == "as a woman with light skin tone"


def test_a_missing_package_is_named_and_fetched_packages_are_checked(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"emoji-datasource-google-.*npm pack"):
        load_emoji(str(tmp_path))
    content = {a: (packages / f"emoji-datasource-{a}-{emoji.VERSION}.tgz").read_bytes() for a in ("google", "twitter")}
    opened: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        opened.append(url)
        return io.BytesIO(content["google" if "google" in url else "twitter"])

    monkeypatch.setattr(emoji.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="SHA-512"):
        fetch(tmp_path)
    assert not list(tmp_path.iterdir())
    right = {a: base64.b64encode(hashlib.sha512(content[a]).digest()).decode() for a in content}
    monkeypatch.setattr(emoji, "_SHA512", right)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for artist in content:  # links where partial files were once written
        (tmp_path / f"emoji-datasource-{artist}-{emoji.VERSION}.part").symlink_to(mine)
    fetch(tmp_path)
    assert mine.read_text() == "mine"
    assert len(opened) == 3
    fetch(tmp_path)
    assert len(opened) == 3  # what is there is not fetched again
    assert len(load_emoji(str(tmp_path)).cells) == 30


def test_the_demo_runs_on_it(packages: Path, tmp_path: Path) -> None:
    words = ["demo", "--task", "emoji", "--emoji_dir", str(packages), "--output_dir", str(tmp_path), "--fast"]
    assert main(words) == 0
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert set(numbers["sft"]) == {"disc-disc", "disc-gen", "gen-disc", "gen-gen"}
    report = (tmp_path / "report.html").read_text()
    assert "emoji by two artists" in report
    assert report.count("data:image/png;base64,") > 10


def test_both_teachers_over_seeds(packages: Path, tmp_path: Path) -> None:
    report = run_emoji(packages, tmp_path, seeds=(0,), fast=True)
    assert [(run["teacher"], run["seed"]) for run in report["runs"]] == [("noisy", 0), ("whole", 0)]
    assert set(report["runs"][0]["refine"]) == {"disc-disc", "disc-gen", "gen-disc", "gen-gen", "tokens", "seconds"}
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["sft_steps"] == 12
