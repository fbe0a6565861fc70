"""A reranker's judgement of (query, candidate), as a second filter of mined negatives.

The form is Qwen3-VL-Reranker's [known]: a chat that asks for "yes" or "no", scored by the difference of the two
tokens' logits at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rime_fast.data.records import Part, Side
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.prepare.content import digest
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.local_teacher import ChatModel
from rime_fast.prepare.mine_items import Items, MineOptions

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCT = "Given a search query, retrieve relevant candidates that answer the query."
MAX_PIXELS = 1800 * 32 * 32
_FRAMES = 16


class Reranker:
    """Scores candidates of one row at a time; what is scored is kept in ``folder``."""

    def __init__(self, chat: ChatModel, folder: Path) -> None:
        self.chat, self.folder = chat, folder
        tokenizer, model = chat.processor.tokenizer, dual_mode_of(chat.model)
        yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        if None in (yes, no) or tokenizer.unk_token_id in (yes, no):
            raise ValueError("reranker: its tokenizer has no tokens 'yes' and 'no'; expected Qwen3-VL-Reranker's form")
        head: Any = model.lm_head
        self.direction = (head.weight[yes].float() - head.weight[no].float()).detach()
        self.identity = chat.hash
        self.ledger: Ledger | None = None

    @classmethod
    def load(cls, name: str, folder: Path) -> Reranker:
        """Load it from a directory or the hub."""
        return cls(ChatModel.load(name, device=None, dtype="auto", max_pixels=MAX_PIXELS), folder)

    def __enter__(self) -> Reranker:
        self.ledger = Ledger(self.folder, "scores")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.ledger is not None:
            self.ledger.close()

    def logits(self, query: Side, documents: Sequence[Side]) -> list[float]:
        """Score each document by log(p(yes) / p(no))."""
        contents: list[list[Part]] = [
            [
                ("text", f"<Instruct>: {INSTRUCT}\n<Query>:"),
                *query.parts,
                ("text", "\n<Document>:"),
                *document.parts,
            ]
            for document in documents
        ]
        states = self.chat.last_states(self.chat.batch(SYSTEM, contents, _FRAMES))
        return (states.float() @ self.direction.to(states.device)).tolist()

    def choose(
        self,
        items: Items,
        query: int,
        target: int,
        own: Sequence[int],
        left: Sequence[tuple[int, float]],
        options: MineOptions,
    ) -> tuple[list[tuple[int, float]], list[float]]:
        """Choose the first candidates that pass, and the logits of positive, own negatives and these.

        None passes where the positive's score is not above ``reranker_min``; one passes whose score is below the
        positive's plus ``reranker_margin``.
        """
        first = self._scored(items, query, [target, *own])
        floor = torch.sigmoid(torch.tensor(first[0])).item()
        chosen: list[tuple[int, float]] = []
        logits = list(first)
        if floor > options.reranker_min:
            for start in range(0, len(left), options.negatives):
                part = left[start : start + options.negatives]
                found = self._scored(items, query, [item for item, _ in part])
                for one, logit in zip(part, found, strict=True):
                    score = torch.sigmoid(torch.tensor(logit)).item()
                    if score < floor + options.reranker_margin and len(chosen) < options.negatives:
                        chosen.append(one)
                        logits.append(logit)
                if len(chosen) == options.negatives:
                    break
        return chosen, [round(logit, 6) for logit in logits]

    def _scored(self, items: Items, query: int, targets: Sequence[int]) -> list[float]:
        """Of one batch, whose composition is part of its key: its bits do not depend on what was kept before."""
        assert self.ledger is not None
        key = digest([self.identity, items.keys["query"][query], [items.keys["target"][i] for i in targets]])
        if key not in self.ledger:
            found = self.logits(items.side("query", query), [items.side("target", i) for i in targets])
            self.ledger.append(key, [{"key": key, "logits": found}])
        return self.ledger[key]["logits"]
