"""``python -m rime_fast.cli``: the command ``rime-fast`` for a launcher such as torchrun."""

import sys

from rime_fast.cli import main

sys.exit(main())
