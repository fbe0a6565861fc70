"""``rime-fast rewrite`` against a server on loopback: what is asked, what is accepted, faults, and ``kill -9``."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rime_fast.prepare import ledger
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.rewrite import rewrite_rows
from rime_fast.prepare.rewrite_work import RewriteOptions
from rime_fast.prepare.teachers import OpenAITeacher
from tests.prepare.stub_server import Stub, asked, by_content, completion, pictures, serve, shown


def pairs(path: Path, count: int = 24) -> Path:
    rows = [
        {"query": {"text": f"what is number {i // 2} — ü?"}, "target": {"text": f"the answer number {i % 5}"}, "id": i}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def teacher(url: str, **options: Any) -> OpenAITeacher:
    return OpenAITeacher("stub", url, "key", **options)


def test_equal_sides_are_asked_about_once_and_nothing_twice(tmp_path):
    stub = Stub(by_content)
    with serve(stub) as url:
        for _ in range(2):
            report = rewrite_rows(pairs(tmp_path / "p.jsonl"), teacher(url), tmp_path / "o.jsonl")
    assert (report["sides"], report["unique_sides"], report["accepted"], len(stub.requests)) == (48, 17, 17, 17)
    rows = read(tmp_path / "o.jsonl")
    assert all(asked_text in row["query"]["rewrite"] for row in rows for asked_text in [row["query"]["text"]])
    assert len({row["target"]["rewrite"] for row in rows}) == 5


REJECTED = {
    "no form at all": "form",
    "": "empty",
    "Answer:   ": "empty",
    "Answer: a <gen_emb> b": "control token",
    "Answer: a <|im_end|> b": "control token",
    "Answer: what is it, exactly?": "copies the input",
    "Answer: " + "word " * 501: "too long",
    "Answer: " + "again and again " * 40: "repeats itself",
    "Answer: это совсем другой язык": "language",
    "I'm sorry, but I cannot help.": "refusal",
    "Answer: ...": "empty",
}


def test_rejects_come_with_their_reason_after_a_second_try_at_another_seed(tmp_path):
    texts = list(REJECTED)
    rows = [{"query": {"text": "what is it, exactly?", "id": str(i)}, "target": {"text": f"t{i}"}} for i in range(11)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(rows[i]) + "\n")
        stub = Stub(lambda request, seen, text=text: text)
        with serve(stub) as url:
            options = RewriteOptions(sides=["query"])
            report = rewrite_rows(tmp_path / f"{i}.jsonl", teacher(url), tmp_path / f"o{i}.jsonl", options)
        assert report["rejected"] == {REJECTED[text]: 1}, text
        assert [request["seed"] for request in stub.requests] == [0, 1]
        assert "rewrite" not in read(tmp_path / f"o{i}.jsonl")[0]["query"]
        assert read(tmp_path / f"o{i}.jsonl.rejects.jsonl")[0]["reason"] == REJECTED[text]


def test_a_cut_answer_is_no_rewrite_and_the_truth_is_shown_only_on_request(tmp_path):
    stub = Stub(lambda request, seen: (200, completion("Answer: half a", "length"), {}))
    with serve(stub) as url:
        options = RewriteOptions(with_truth=True, sides=["query"], leak_rows=3)
        report = rewrite_rows(pairs(tmp_path / "p.jsonl", 4), teacher(url), tmp_path / "o.jsonl", options)
    assert report["rejected"] == {"not finished": 4}
    assert report["leak"]["queries"] == 3
    told = ["the answer number" in shown(request) for request in stub.requests]
    # 4 with the truth; the 3 without it are of 2 queries at most; each twice
    assert told.count(True) == 8
    assert 2 <= told.count(False) <= 4


@pytest.mark.parametrize(
    "body",
    [{"choices": [{}]}, {"choices": [{"message": None}]}, {"choices": {"a": 1}}, "<html>", "{oops", "[1]", "null"],
    ids=str,
)
def test_an_answer_that_is_none_stops_with_what_came(tmp_path, body):
    with serve(Stub(lambda request, seen: (200, body, {}))) as url, pytest.raises(RuntimeError, match=r"127\.0\.0\.1"):
        rewrite_rows(pairs(tmp_path / "p.jsonl", 2), teacher(url, max_retries=0), tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


def test_fields_of_the_wrong_type_do_not_break_a_run(tmp_path):
    """Servers that imitate OpenAI's give numbers as text, no counts, names of their own."""
    whole = completion("Answer: a fine thing")

    def run(body, name):
        with serve(Stub(lambda request, seen: (200, body, {}))) as url:
            return rewrite_rows(pairs(tmp_path / "p.jsonl", 2), teacher(url), tmp_path / name)

    for i, usage in enumerate(("x", [1], {"completion_tokens": "12"})):
        assert run({**whole, "usage": usage}, f"{i}.jsonl")["accepted"] == 3
    assert run({**whole, "choices": [{**whole["choices"][0], "finish_reason": 3}]}, "f.jsonl")["rejected"] == {"3": 3}
    for content in (5, {"text": "Answer: a fine thing"}):
        with pytest.raises(RuntimeError, match=r"127\.0\.0\.1.*content is no text"):
            run({**whole, "choices": [{"index": 0, "message": {"content": content}}]}, "c.jsonl")


def test_chains_of_thought_and_the_frames_of_a_video(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [{"query": {"text": "what happens?", "video": "clip"}, "target": {"text": "it gets red"}}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    stub = Stub(lambda request, seen: "<think>It grows.</think>\nAnswer: a red square gets brighter")
    with serve(stub) as url:
        options = RewriteOptions(sides=["query"], template="cot", frames=3)
        report = rewrite_rows(tmp_path / "p.jsonl", teacher(url), tmp_path / "o.jsonl", options)
    assert report["accepted"] == 1
    assert len(pictures(stub.requests[0])) == 3
    rewrite = read(tmp_path / "o.jsonl")[0]["query"]["rewrite"]
    assert rewrite == "<think>It grows.</think><answer>a red square gets brighter</answer>"


def test_a_slow_server_and_text_in_parts(tmp_path):
    with serve(Stub(by_content, seconds=2)) as url, pytest.raises(RuntimeError, match="timed out"):
        rewrite_rows(pairs(tmp_path / "p.jsonl", 1), teacher(url, timeout=0.2, max_retries=0), tmp_path / "o.jsonl")
    message = {"role": "assistant", "content": [{"type": "text", "text": "Answer: a red bus"}]}
    answer = completion("") | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    with serve(Stub(lambda request, seen: (200, answer, {}))) as url:
        rewrite_rows(tmp_path / "p.jsonl", teacher(url), tmp_path / "o.jsonl")
    assert read(tmp_path / "o.jsonl")[0]["query"]["rewrite"] == "a red bus"


def test_faults_of_a_server_are_waited_out_and_what_is_done_is_kept(tmp_path):
    def flaky(request, seen):
        return by_content(request) if seen > 1 else random.choice([(500, "{}", {}), (429, "{}", {"retry-after": "0"})])

    plain, stub = Stub(by_content), Stub(flaky)
    with serve(plain) as url:
        rewrite_rows(pairs(tmp_path / "p.jsonl", 4), teacher(url), tmp_path / "a.jsonl")
    with serve(stub) as url:
        rewrite_rows(tmp_path / "p.jsonl", teacher(url), tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    served = Stub(lambda request, seen: by_content(request) if "number 0" in asked(request) else (503, "{}", {}))
    options = RewriteOptions(batch_size=1)
    with serve(served) as url, pytest.raises(RuntimeError, match="503"):
        rewrite_rows(tmp_path / "p.jsonl", teacher(url, max_retries=0), tmp_path / "c.jsonl", options)
    assert not (tmp_path / "c.jsonl").exists()
    with serve(plain) as url:
        rewrite_rows(tmp_path / "p.jsonl", teacher(url), tmp_path / "c.jsonl", options)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_an_output_that_is_another_ones_is_left_alone(tmp_path):
    source = pairs(tmp_path / "p.jsonl", 2)
    (tmp_path / "o.jsonl").write_text("mine\n")
    with serve(Stub(by_content)) as url:
        with pytest.raises(ValueError, match="made otherwise"):
            rewrite_rows(source, teacher(url), tmp_path / "o.jsonl")
        with pytest.raises(ValueError, match="the data itself"):
            rewrite_rows(source, teacher(url), source)
        rewrite_rows(source, teacher(url), tmp_path / "o.jsonl", RewriteOptions(overwrite=True))
    assert len(read(tmp_path / "o.jsonl")) == 2


def test_shards_make_the_same_file(tmp_path):
    source = pairs(tmp_path / "p.jsonl")
    with serve(Stub(by_content)) as url:
        rewrite_rows(source, teacher(url), tmp_path / "whole.jsonl", RewriteOptions(batch_size=4))
        for k in (2, 0, 1):
            options = RewriteOptions(batch_size=4, shard=f"{k}/3")
            report = rewrite_rows(source, teacher(url), tmp_path / "parts.jsonl", options)
            assert ("missing" in report) == (k != 1)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "parts.jsonl").read_bytes()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(tmp_path, kills):
    source, stub = pairs(tmp_path / "p.jsonl", 80), Stub(by_content, seconds=0.15)
    rng = random.Random(kills)
    with serve(stub) as url:
        rewrite_rows(source, teacher(url), tmp_path / "whole.jsonl", RewriteOptions(batch_size=2))
        once = set(stub.counts)
        stub.requests.clear()
        words = ["rewrite", "--data", source, "--model", "stub", "--backend", "openai", "--base_url", url]
        words += ["--output", tmp_path / "o.jsonl", "--batch_size", "2"]
        command = [sys.executable, "-m", "rime_fast.cli", *map(str, words)]
        for _ in range(kills):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            before = len(stub.requests)
            limit = time.monotonic() + 60
            while len(stub.requests) == before and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            process.wait()
        assert subprocess.run(command, capture_output=True).returncode == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "o.jsonl").read_bytes()
    for name in ("report.json", "rejects.jsonl"):
        assert (tmp_path / f"whole.jsonl.{name}").read_bytes() == (tmp_path / f"o.jsonl.{name}").read_bytes()
    assert set(stub.counts) == once
    # a kill costs at most the batch in flight
    assert len(stub.requests) <= len(once) + 2 * kills


def test_a_ledger_that_grows_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    with Ledger(tmp_path, "0-of-2") as mine:
        mine.append("a", [{"key": "1"}, {"key": "2"}])
        mine.append("b", [{"key": "3"}])
    file = tmp_path / "0-of-2.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # as far as the other shard's write has come
    read = ledger._entry

    def entry(line):
        if not line.endswith(b"\n"):
            file.write_bytes(whole)  # it has come further by the time the cut line is looked at
        return read(line)

    monkeypatch.setattr(ledger, "_entry", entry)
    with Ledger(tmp_path, None) as seen:
        assert ("1" in seen, "2" in seen, "3" in seen) == (True, True, False)
    with Ledger(tmp_path, None) as seen:
        assert seen["3"]["batch"] == "b"
