"""Mode latent of a saved model: the embedder, the table of mutual retrieval, `embed` and the server's own parts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rime_fast.cli import main
from rime_fast.data.records import Side
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.mutual import evaluate_mutual
from tests.serve.conftest import save_model


@pytest.fixture(scope="module")
def latent_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("latent"), latent_tokens=3)


@pytest.fixture(scope="module")
def embedder(latent_dir):
    return RimeEmbedder.from_pretrained(latent_dir, max_new_tokens=4)


def test_embed_writes_what_the_embedder_gives(latent_dir, embedder, items_file, tmp_path, capsys):
    words = ["embed", "--model", latent_dir, "--data", items_file, "--mode", "latent", "--output_dir", tmp_path]
    assert main([str(word) for word in words]) == 0
    assert "0.0 decoded tokens an item" in capsys.readouterr().out
    rows = load_file(tmp_path / "embeddings.safetensors")["latent"]
    items = [json.loads(line) for line in items_file.read_text().splitlines()]
    alone = torch.cat(
        [embedder.encode(item["text"], mode="latent") for item in items if len(item) == 2 and "id" in item]
    )
    torch.testing.assert_close(rows[:1], alone, rtol=1e-4, atol=1e-5)
    assert (rows - embedder.encode("a red shoe")).abs().max() > 1e-2
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(items)))


def test_mutual_retrieval_is_three_by_three(embedder):
    data = RetrievalSet([Side(text="a"), Side(text="red")], [Side(text="blue"), Side(text="shoe")], [[0], [1]])
    result = evaluate_mutual(embedder, data)
    assert list(result.cells) == [f"{q}-{t}" for q in embedder.modes for t in embedder.modes]
    assert len(result.cells) == 9
    assert (result.cost["latent"]["query_tokens"], result.cost["latent"]["target_tokens"]) == (0.0, 0.0)
    assert result.cost["latent"]["query_seconds"] > 0


def test_the_server_serves_it(embedder):
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    from rime_fast.serve.app import EmbeddingService

    service = EmbeddingService(embedder, "m")
    assert service.state()["modes"] == ["disc", "gen", "latent"]
    request, jobs = service.prepare(json.dumps({"input": "a red shoe", "mode": "latent"}).encode())
    [result] = service.encode(request.mode, request.sides)
    service.batcher.close()
    assert (result.mode, result.decoded, result.rewrite) == ("latent", 0, None)
    torch.testing.assert_close(result.embedding[None], embedder.encode("a red shoe", "latent"))
    assert jobs[0].tokens == embedder.collator.measure(request.sides, "latent")[0]
