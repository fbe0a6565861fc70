"""The tokens and tags of the responses, as text. Without torch: whoever only reads data starts in a fraction of a
second."""

from __future__ import annotations

DISC_TOKEN = "<disc_emb>"
GEN_TOKEN = "<gen_emb>"
REWRITE_OPEN = "<rewrite>"
REWRITE_CLOSE = "</rewrite>"
