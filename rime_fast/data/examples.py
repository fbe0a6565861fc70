"""The settings of examples/ by name, from a checkout and from an installed package alike."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def example(name: str) -> str:
    """The path of a file that exists, else of the example of that name: "sft", "sft.yaml", "examples/zero2.json".

    A name that is neither comes back as it is: the reader's own error then names it.
    """
    if Path(name).exists():
        return name
    wanted = Path(name)
    if wanted.parent.name in ("", "examples"):
        for folder in (PACKAGE / "examples", PACKAGE.parent / "examples"):
            for suffix in (wanted.suffix,) if wanted.suffix else (".yaml", ".json"):
                found = folder / f"{wanted.stem}{suffix}"
                if found.is_file():
                    return str(found)
    return name
