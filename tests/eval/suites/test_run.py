"""Evaluating suites with a tiny model: shards, interrupted runs, both modes, ties, files, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import Encoded, RimeEmbedder
from rime_fast.eval.metrics import mean_cosine
from rime_fast.eval.suites import cache as cache_module
from rime_fast.eval.suites import evaluate_suite, load_suite
from rime_fast.eval.suites.cache import Lock, SideCache
from rime_fast.eval.suites.check import check_suite
from rime_fast.eval.suites.score import PAIRED, score_cell
from rime_fast.eval.suites.tasks import TaskData
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from tests.eval.suites.layout import GOLDENS, write_beir, write_goldens, write_mrmr, write_uvrb
from tests.ranks import run_ranks

TASKS = ["OK-VQA", "WebQA", "MSVD", "ViDoRe_arxivqa"]


def tiny_embedder(seed: int = 0, **options) -> RimeEmbedder:
    tokenizer = tiny_tokenizer([get_template("rewrite").render_prompt(Side(text="find a picture"))])
    model = tiny_model("qwen2_vl", tokenizer=tokenizer, seed=seed, init_std=0.12)
    add_embedding_tokens(model, tokenizer)
    return RimeEmbedder(model.eval(), tiny_processor(tokenizer), **{"max_new_tokens": 4, **options})


@pytest.fixture(scope="module")
def embedder() -> RimeEmbedder:
    return tiny_embedder()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_goldens(tmp_path_factory.mktemp("mmeb"), list(GOLDENS))


@pytest.fixture(scope="module")
def few(root):
    return load_suite("mmeb-v2", root, protocol="plain").select(TASKS)


@pytest.fixture
def small_chunks(monkeypatch):
    for module in ("cache", "run"):
        monkeypatch.setattr(f"rime_fast.eval.suites.{module}.CHUNK", 2)


def kept(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on how it was made."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {name: path for name, path in files.items() if not name.endswith((".cost.json", "summary.json"))}
    assert not any(name.endswith((".tmp", ".lock")) for name in own)
    return {name: path.read_bytes() for name, path in own.items()}


def test_shards_and_an_interrupted_run_equal_one_run(embedder, few, tmp_path, small_chunks, monkeypatch):
    whole = evaluate_suite(embedder, few, output_dir=tmp_path / "one")
    expected = kept(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in expected) > 8

    second = evaluate_suite(embedder, few, output_dir=tmp_path / "two", shard=(1, 2))
    assert evaluate_suite(embedder, few, output_dir=tmp_path / "two", shard=(0, 2)).overall == whole.overall
    assert second.overall == whole.overall  # the second took what the first had not begun
    assert kept(tmp_path / "two") == expected

    original, calls = RimeEmbedder.encode_items, 0

    def dying(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RimeEmbedder, "encode_items", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(embedder, few, output_dir=tmp_path / "three")
    assert len(list((tmp_path / "three").rglob("*.safetensors"))) == 3
    evaluate_suite(embedder, few, output_dir=tmp_path / "three")
    assert kept(tmp_path / "three") == expected
    evaluate_suite(embedder, few, output_dir=tmp_path / "three")  # all is there: nothing is embedded
    assert calls == 4 + sum(name.endswith(".safetensors") for name in expected) - 3


def _shard(rank: int, world: int, root: str, out: str) -> None:
    suite = load_suite("mmeb-v2", root, protocol="plain").select(TASKS)
    cache_module.CHUNK = 2
    from rime_fast.eval.suites import run

    run.CHUNK = 2
    result = evaluate_suite(tiny_embedder(), suite, output_dir=out, shard=(rank, world))
    assert result.tasks or rank


@pytest.mark.dist
def test_two_processes_at_once(embedder, few, root, tmp_path, small_chunks):
    evaluate_suite(embedder, few, output_dir=tmp_path / "one")
    run_ranks(_shard, 2, str(root), str(tmp_path / "two"))
    assert kept(tmp_path / "two") == kept(tmp_path / "one")


def test_no_partial_file_is_written_through_a_link(tmp_path):
    mine, one = tmp_path / "mine", SideCache(tmp_path / "task", "qry", "disc", 2)
    mine.write_text("mine")
    one.folder.mkdir()
    names = [f"{one.file(0, end).name}.{os.getpid()}.tmp" for end in ("jsonl", "cost.json")]
    names += [one.file(0, f"{os.getpid()}.tmp").name, f"meta.json.{os.getpid()}.tmp"]
    for name in names:
        (one.folder / name).symlink_to(mine)
    (one.folder / ".meta.json.999999999.a.partial").write_text("of a process that died")
    os.utime(one.folder / ".meta.json.999999999.a.partial", (0, 0))
    cache_module.check_meta(one.folder, {"a": 1}, None)
    rows = Encoded(torch.eye(2), None, [1, 1], [True] * 2, [True] * 2, 0.0)
    one.write(0, [1, 0], ["a", "b"], rows, 0)
    assert torch.equal(one.read().embedding, torch.eye(2).flip(0))
    assert mine.read_text() == "mine"
    made = {"meta.json", *(one.file(0, end).name for end in ("jsonl", "cost.json", "safetensors"))}
    assert {path.name for path in one.folder.iterdir()} == made | set(names)


def test_a_lock_of_a_process_that_ended_is_taken_over(tmp_path):
    one = SideCache(tmp_path, "qry", "disc", 3)
    with one.taken(0) as mine, one.taken(0) as other:
        assert mine is not None
        assert other is None
        mine.alive()
    lock = Lock(one.file(0, "lock"))
    lock.file.write_text("elsewhere 1")
    assert not lock.take()
    os.utime(lock.file, (0, 0))
    assert lock.take()
    lock.file.write_text(f"{os.uname().nodename} 999999999")
    assert lock.stale()
    one.file(0).touch()
    with one.taken(0) as done:
        assert done is None


def test_both_modes_from_one_prefill(embedder, few, tmp_path):
    both = evaluate_suite(embedder, few, output_dir=tmp_path / "both", dims=[16, 4096])
    disc = evaluate_suite(embedder, few, output_dir=tmp_path / "disc", modes=["disc"])
    assert both.cells == ["disc-disc", "disc-gen", "gen-disc", "gen-gen"]
    for name in TASKS:
        made = load_file(str(tmp_path / "both/mmeb-v2" / name / "qry-gen.00000.safetensors"))
        alone = load_file(str(tmp_path / "disc/mmeb-v2" / name / "qry-disc.00000.safetensors"))
        assert torch.equal(made["index"], alone["index"])
        torch.testing.assert_close(made["disc"], alone["embedding"], rtol=0, atol=1e-6)
        assert both.tasks[name].score("disc-disc") == disc.tasks[name].score("disc-disc")
        assert set(both.tasks[name].dims) == {16}
        best = max(both.tasks[name].score("disc-disc"), both.tasks[name].score("gen-gen"))
        assert both.tasks[name].oracle >= best
    cost = both.cost()
    assert cost["gen"]["query_tokens"] > 0
    assert cost["disc"]["query_tokens"] == 0
    assert 0 < cost["disc"]["query_seconds"] < cost["gen"]["query_seconds"]
    # disc first, gen into the same folder later: the disc embeddings of then stay
    later = evaluate_suite(embedder, few, output_dir=tmp_path / "disc")
    assert later.overall["gen-gen"] == both.overall["gen-gen"]
    assert "tied first places" in later.table()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda suite, root: (tiny_embedder(template="cot"), suite), "template"),
        (lambda suite, root: (tiny_embedder(1), suite), "model"),
        (lambda suite, root: (tiny_embedder(token_budget=64), suite), "token_budget"),
        (lambda suite, root: (tiny_embedder(max_new_tokens=3), suite), "gen"),
        (lambda suite, root: (tiny_embedder(), load_suite("mmeb-v2", root, "vlm2vec").select(["OK-VQA"])), "data"),
    ],
)
def test_embeddings_made_otherwise_are_refused(embedder, root, tmp_path, change, field):
    suite = load_suite("mmeb-v2", root, protocol="plain").select(["OK-VQA"])
    evaluate_suite(embedder, suite, output_dir=tmp_path)
    other, changed = change(suite, root)
    with pytest.raises(ValueError, match=f"made with {field} "):
        evaluate_suite(other, changed, output_dir=tmp_path)
    evaluate_suite(other, changed, output_dir=tmp_path, overwrite=True)


def test_limit_keeps_all_candidates(embedder, root, tmp_path):
    suite = load_suite("mmeb-v2", root, protocol="plain").select(["WebQA"])
    result = evaluate_suite(embedder, suite, modes=["disc"], limit=1, output_dir=tmp_path)
    assert (result.tasks["WebQA"].n_queries, result.tasks["WebQA"].n_candidates) == (1, 3)
    assert result.to_dict()["partial"]
    with pytest.raises(ValueError, match="limited to 1 queries"):
        result.leaderboard()
    with pytest.raises(ValueError, match="made with data "):
        evaluate_suite(embedder, suite, modes=["disc"], output_dir=tmp_path)


def test_files_of_the_official_tools(embedder, few, tmp_path):
    result = evaluate_suite(embedder, few, output_dir=tmp_path, model_name="tiny")
    folder = tmp_path / "mmeb-v2"
    score = json.loads((folder / "image/OK-VQA_gen_disc_score.json").read_text())
    assert score["num_pred"] == score["num_data"] == 1
    assert {"hit@1", "ndcg_linear@5", "ndcg_exponential@10", "precision@1", "recall@5", "f1@1", "map@5", "mrr@10"} <= {
        *score
    }
    line = json.loads((folder / "image/OK-VQA_disc_disc_pred.jsonl").read_text().splitlines()[0])
    assert sorted(line["prediction"]) == ["cat", "race"]
    assert (line["label"], line["rel_scores"]) == (["race"], None)
    board = result.leaderboard("disc-disc", url="https://example.org")
    assert {modality: len(tasks) for modality, tasks in board["metrics"].items()} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }
    assert board["metrics"]["image"]["OK-VQA"] == result.tasks["OK-VQA"].metrics("disc-disc")
    assert board["metrics"]["visdoc"]["ViDoSeek-page-fixed"] == "FILE_N/A"
    assert board["metadata"]["model_name"] == "tiny"
    assert board["metadata"]["embedding_dimension"] == 64
    assert json.loads((folder / "summary.json").read_text())["overall"] == result.overall
    for wrong in ({"cell": "gen"}, {"colour": "red"}):
        with pytest.raises(ValueError, match="expected"):
            result.leaderboard(**wrong)


def test_official_pairing_of_graded_relevance(embedder, root):
    """Names of digits and a gain that is not one: the official number stands beside the right one."""
    suite = load_suite("mmeb-v2", root, protocol="plain").select(["ViDoRe_arxivqa"])
    metrics = evaluate_suite(embedder, suite, modes=["disc"]).tasks["ViDoRe_arxivqa"].metrics("disc-disc")
    assert PAIRED in metrics
    # labels [33, 8] with relevance [3, 1], perfectly ranked: the set gives 8 first
    eye = torch.eye(2)
    data = TaskData([Side("q")], [Side("a"), Side("b")], ["33", "8"], [[0, 1]], gains=[[3.0, 1.0]])
    cell = score_cell(data, "ndcg_linear@5", torch.tensor([[1.0, 0.5]]), eye)
    assert cell.metrics["ndcg_linear@5"] == pytest.approx(1.0)
    assert cell.metrics[PAIRED] == pytest.approx(0.797, abs=5e-4)


class Constant:
    """Gives every item the same place."""

    def encode_items(self, items, mode, progress=None):
        from rime_fast.eval.embedder import Encoded

        n = len(items)
        same = torch.nn.functional.normalize(torch.ones(n, 8), dim=1)
        return Encoded(same, ["r"] * n, [2] * n, [True] * n, [True] * n, 1.0, same, 0.5)


def test_a_collapsed_encoder_is_seen(root):
    suite = load_suite("mmeb-v2", root).select(["ImageNet-1K", "OK-VQA", "CIRR"])
    for ties, expected in (("pessimistic", 0.0), ("official", 1.0)):
        result = evaluate_suite(Constant(), suite, ties=ties)
        for task in result.tasks.values():
            assert task.score("disc-disc") == task.score("gen-gen") == expected
            assert task.cells["gen-disc"].tied == 1.0
            assert task.cosine["gen"]["target"] == pytest.approx(1.0)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0.0)


def test_queries_without_a_right_candidate_score_nothing():
    eye = torch.eye(3)
    data = TaskData([Side(str(i)) for i in range(3)], [Side(str(i)) for i in range(3)], list("abc"), [[0], [], [2]])
    data.pools = [[0, 1], [1], [0, 1]]
    data.categories = ["x", "x", "y"]
    cell = score_cell(data, "ndcg@10", eye, eye)
    assert cell.metrics["hit@1"] == pytest.approx(1 / 3)
    assert cell.metrics["recall@1"] == pytest.approx(2 / 3)
    assert cell.categories == {"x": 0.5, "y": 0.0}
    assert cell.predictions[0] == ["a", "b"]
    data.pools[2] = []
    assert score_cell(data, "ndcg@10", eye, eye).metrics["recall@1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("name", "writer", "all"), [("mrmr", write_mrmr, False), ("beir", write_beir, True)])
def test_other_suites_run(embedder, tmp_path, name, writer, all):
    suite = load_suite(name, writer(tmp_path / "data"), protocol="plain")
    result = evaluate_suite(embedder, suite, modes=["disc"], output_dir=tmp_path / "out")
    assert ("all" in result.overall["disc-disc"]) == all
    if name == "mrmr":
        assert result.tasks["knowledge"].cells["disc-disc"].categories.keys() == {"Art", "Science"}


def test_missing_files_stop_before_anything_is_embedded(tmp_path):
    write_uvrb(tmp_path)
    (tmp_path / "MS-TI/images/q0.jpg").unlink()
    suite = load_suite("uvrb", tmp_path, protocol="plain").select(["MSRVTT", "MS-TI"])
    with pytest.raises(ValueError, match=r"MS-TI: 1 pictures are missing: .*q0\.jpg"):
        evaluate_suite(Constant(), suite, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = {one.name: one for one in check_suite(suite)}
    assert found["MSRVTT"].gaps == ["2 queries; the published set has 1,000"]
    assert len(found["MS-TI"].gaps) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ["fast"]}, "modes is"),
        ({"modes": "disc"}, "modes is"),
        ({"limit": 0}, "limit is 0"),
        ({"ties": "lucky"}, "ties is 'lucky'"),
        ({"dims": [0]}, "dims is"),
        ({"shard": (2, 2)}, "shard is 2/2"),
        ({"shard": (0, 2), "overwrite": True}, "overwrite needs one process"),
    ],
)
def test_wrong_arguments(few, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_suite(Constant(), few, **arguments)
