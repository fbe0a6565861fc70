"""The tokens and tags of the responses, as text. Without torch: whoever only reads data starts in a fraction of a
second."""

from __future__ import annotations

DISC_TOKEN = "<disc_emb>"
GEN_TOKEN = "<gen_emb>"
# The learnable tokens of latent rewrites: <latent_0>, <latent_1>, ...
LATENT_TOKEN = "<latent_{}>"
REWRITE_OPEN = "<rewrite>"
REWRITE_CLOSE = "</rewrite>"

# The embeddings that a model gives; "latent" where its tokenizer has latent tokens.
MODES = ("disc", "gen", "latent")
