"""``rime-fast doctor``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rime_fast.cli.command import Command
from rime_fast.cli.options import Group
from rime_fast.cli.values import build


@dataclass
class DoctorOptions:
    """Options of ``doctor``."""

    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})


def run(values: dict[str, Any]) -> int:
    """Examine the installation and print what it found; always 0: a missing part is an answer, not a failure."""
    options = build(DoctorOptions, values)
    from rime_fast import doctor

    findings = doctor.examine()
    if options.json:
        print(json.dumps(findings.to_dict(), indent=1))
    else:
        doctor.show(findings)
    return 0


COMMAND = Command(
    name="doctor",
    text="Prints which parts are active here, which are missing and what their lack costs, and which backend each "
    "operator takes and why. Exits 0 in a bare environment too.",
    examples=(("tables", "rime-fast doctor"), ("for a bug report", "rime-fast doctor --json > doctor.json")),
    run=run,
    groups=(Group("Options", "rime_fast.cli.doctor", "DoctorOptions"),),
)
