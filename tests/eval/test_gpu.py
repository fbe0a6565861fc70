"""Ranking and embedding on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.ranking import rank_candidates
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

pytestmark = pytest.mark.gpu


def test_ranks_with_ties_and_lists_equal_the_cpus():
    """Integer embeddings are exact on both, and full of ties."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (300, 6), generator=generator).float()
    candidates = torch.randint(-2, 3, (5000, 6), generator=generator).float()
    relevant = [[i, i + 1, 4000 + i] for i in range(300)]
    lists = [[*own, *range(2000, 2100)] for own in relevant]
    for kind in (None, lists):
        cpu = rank_candidates(queries, candidates, relevant, lists=kind, top_k=5)
        gpu = rank_candidates(queries.cuda(), candidates.cuda(), relevant, lists=kind, top_k=5)
        assert torch.equal(cpu.ranks, gpu.ranks)
        assert torch.equal(cpu.top_scores, gpu.top_scores)


def test_duplicate_candidates_tie_exactly_in_fp32():
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(700, 96, generator=generator), dim=1).cuda()
    twice = torch.cat([unit, unit])
    assert rank_candidates(unit, twice, list(range(700)), candidate_tile=512).ranks.flatten().unique().tolist() == [2]


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_embeddings_equal_the_cpus(mode):
    texts = ["a red shoe", "which one is blue ?", "seven"]
    tokenizer = tiny_tokenizer([get_template("rewrite").render_prompt(Side(text=text)) for text in texts])
    model = tiny_model("qwen2_vl", tokenizer=tokenizer, init_std=0.12)
    add_embedding_tokens(model, tokenizer)
    embedder = RimeEmbedder(DualModeModel.from_model(model), tiny_processor(tokenizer), max_new_tokens=8)
    on_cpu = embedder.encode(texts, mode)
    embedder.model.cuda()
    on_gpu = embedder.encode(texts, mode)
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)
