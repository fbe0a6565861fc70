"""Rendered text to token ids, with a memory for the parts that repeat.

Control tokens split a text before a tokenizer looks at words, so each part between two of them can be encoded on its
own and the result is the encoding of the whole. The fixed parts of a prompt are thus encoded once.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from rime_fast.data.templates import CONTROL

_SPLIT = re.compile(f"({CONTROL.pattern})")
_MEMORY = 1 << 15  # parts remembered
_LONGEST = 512  # characters of a part worth remembering


class TextEncoder:
    """Encodes texts that share parts: ``encoder(texts)`` gives the ids of each, as ``tokenizer(text,
    add_special_tokens=False)`` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._memory: dict[str, list[int]] = {"": []}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "_memory": {"": []}}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Raises ValueError when a text holds a control token that the tokenizer lacks."""
        memory = self._memory
        if len(memory) > _MEMORY:
            memory = self._memory = {"": []}
        split = [_SPLIT.split(text) for text in texts]
        new = list(dict.fromkeys(part for parts in split for part in parts if part not in memory))
        fresh = dict(zip(new, self._encode(new), strict=True)) if new else {}
        memory.update({part: ids for part, ids in fresh.items() if len(part) <= _LONGEST})
        encoded = []
        for parts in split:
            ids: list[int] = []
            for part in parts:
                found = memory.get(part)
                ids += fresh[part] if found is None else found
            encoded.append(ids)
        return encoded

    def _encode(self, parts: list[str]) -> list[list[int]]:
        unknown = self.tokenizer.unk_token_id
        for part in parts:
            if CONTROL.fullmatch(part) and self.tokenizer.convert_tokens_to_ids(part) in (None, unknown):
                raise ValueError(f"the tokenizer lacks {part!r}; call add_embedding_tokens, or check the template")
        encoded = self.tokenizer(parts, add_special_tokens=False, return_attention_mask=False)
        return encoded["input_ids"]
