"""The server, asked by a real client over loopback; one process for the whole file."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from rime_fast.cli import main
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.index import EmbeddingIndex, truncated
from tests.serve.conftest import picture

for name in ("openai", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name)

SMALL = ["--max_new_tokens", "6", "--max_body_mb", "1", "--max_items", "8", "--max_image_pixels", "20000"]


class Server:
    """``rime-fast serve`` in a process of its own."""

    def __init__(self, *words, port="0"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "rime_fast.cli", "serve", *map(str, words), "--port", port]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if "serving" not in line:
            raise AssertionError(line + self.process.communicate()[1])
        self.url = line.split(" at ")[1].split(" ")[0]
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def get(self, path):
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, body, path="/embeddings", kind="application/json", method="POST"):
        """(status, JSON) of a raw request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def client(self, **options):
        from openai import OpenAI

        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120, **options)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        rest = self.process.stdout.read()
        return self.process.wait(60), rest


def data_url(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


@pytest.fixture(scope="module")
def embedder(model_dir):
    return RimeEmbedder.from_pretrained(model_dir, max_new_tokens=6)


AUTO = ["a red shoe", "it", "blue", "one which a"]


@pytest.fixture(scope="module")
def index(embedder, tmp_path_factory):
    """(folder, a threshold that two of AUTO stay below)."""
    folder = tmp_path_factory.mktemp("index")
    made = EmbeddingIndex(embedder.encode(["a red shoe", "blue", "which one"]), facts={"mode": "disc"})
    made.save(folder)
    margins = made.margins(embedder.encode(AUTO)).sort().values
    assert margins[2] - margins[1] > 1e-5
    return folder, float(margins[1:3].mean())


@pytest.fixture(scope="module")
def server(model_dir, index):
    made = Server(model_dir, "--name", "tiny", "--index", index[0], "--threshold", index[1], *SMALL)
    yield made
    assert made.stop()[0] == 0


def ask(client, given, **extra):
    dims = {"dimensions": extra.pop("dimensions")} if "dimensions" in extra else {}
    answer = client.embeddings.create(model="tiny", input=given, extra_body=extra or None, **dims)
    return torch.tensor([one.embedding for one in answer.data]), answer


IMAGE = picture(37, 53)
ITEMS = ["a red shoe", {"image": data_url(IMAGE)}, {"text": "which one", "image": data_url(IMAGE)}]
OURS = ["a red shoe", IMAGE, {"text": "which one", "image": IMAGE}]


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_modes_equal_encode(mode, server, embedder):
    rows, answer = ask(server.client(), ITEMS, mode=mode)
    wanted = embedder.encode(OURS, mode=mode)
    torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-5)
    assert [one.mode for one in answer.data] == [mode] * 3
    assert (getattr(answer.data[0], "rewrite", None) is not None) == (mode == "gen")
    assert answer.usage.prompt_tokens == sum(embedder.collator.measure([*map(_side, OURS)], mode))
    assert (answer.usage.total_tokens > answer.usage.prompt_tokens) == (mode == "gen")


def _side(item):
    from rime_fast.eval.embedder import as_side

    return as_side(item)


def test_auto_sends_unsure_items_to_gen(server, embedder, index):
    rows, answer = ask(server.client(), AUTO, mode="auto")
    disc, gen = embedder.encode(AUTO), embedder.encode(AUTO, mode="gen")
    unsure = EmbeddingIndex.load(index[0]).margins(disc) < index[1]
    assert int(unsure.sum()) == 2
    assert [one.mode for one in answer.data] == ["gen" if u else "disc" for u in unsure]
    torch.testing.assert_close(rows, torch.where(unsure[:, None], gen, disc), rtol=0, atol=1e-5)


def test_dimensions_and_messages_and_encodings(server, embedder):
    client = server.client()
    wanted = embedder.encode(["a red shoe"])
    rows, _ = ask(client, "a red shoe", dimensions=8)
    torch.testing.assert_close(rows, truncated(wanted, 8), rtol=0, atol=1e-5)
    floats = client.embeddings.create(model="tiny", input="a red shoe", encoding_format="float").data[0].embedding
    torch.testing.assert_close(torch.tensor([floats]), wanted, rtol=0, atol=1e-5)
    parts = [{"type": "image_url", "image_url": {"url": data_url(IMAGE)}}, {"type": "text", "text": "which one"}]
    for content in (parts, parts[::-1]):  # a picture stands before the text, as in training
        status, answer = server.post({"messages": [{"role": "user", "content": content}]})
        assert status == 200
        row = torch.tensor([answer["data"][0]["embedding"]])
        torch.testing.assert_close(row, embedder.encode(OURS[2:]), rtol=0, atol=1e-5)


def test_200_concurrent_requests(server, embedder):
    texts = [f"{['red', 'blue', 'it'][i % 3]} {'a ' * (i % 17)}{i}" for i in range(200)]
    client = server.client()
    with ThreadPoolExecutor(50) as pool:
        rows = torch.cat(list(pool.map(lambda text: ask(client, text)[0], texts)))
    torch.testing.assert_close(rows, embedder.encode(texts), rtol=0, atol=1e-5)
    assert json.loads(server.get("/health"))["waiting"] == 0


def test_health_models_and_metrics(server):
    ask(server.client(), ["it", "a"])
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    state = json.loads(server.get("/health"))
    assert state["status"] == "ok"
    assert state["modes"] == ["disc", "gen", "auto"]
    server.post(b"{")
    metrics = server.get("/metrics")
    for line in (
        'rime_requests_total{code="",status="200"}',
        'rime_requests_total{code="invalid_json",status="400"}',
        'rime_items_total{mode="disc"}',
        'rime_batch_items_bucket{le="+Inf",mode="disc"}',
        "rime_waiting_items 0.0",
        "rime_request_seconds_count",
    ):
        assert line in metrics


def test_the_parity_check_reads_a_server(server, model_dir, items_file, capsys):
    assert main(["export", str(model_dir), "--check", server.url, str(items_file)]) == 0
    assert f"6 items by {server.url}, largest difference" in capsys.readouterr().out


def cut(form):
    head, data = data_url(picture(64, 64), form).split(",")
    return f"{head},{base64.b64encode(base64.b64decode(data)[:-200]).decode()}"


def bomb():
    """A PNG of a few bytes whose head says 30,000 x 30,000."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def item(**given):
    return {"input": given}


def part(**given):
    return {"messages": [{"role": "user", "content": [given]}]}


PNG = data_url(picture(16, 16))
MALFORMED = [
    (b"", 400, "empty_body"),
    (b"  \n", 400, "empty_body"),
    (b"{", 400, "invalid_json"),
    (b"{'input': 'a'}", 400, "invalid_json"),
    (b'{"input": "a"} x', 400, "invalid_json"),
    (b'{"input": NaN}', 400, "invalid_json"),
    (b'{"input": "\xff"}', 400, "invalid_json"),
    (b"[" * 100000, 400, "invalid_json"),
    (b'{"dimensions": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b'{"input": "a", "input": "b"}', 400, "duplicate_field"),
    (b"[]", 400, "invalid_body"),
    (b"null", 400, "invalid_body"),
    (b'"text"', 400, "invalid_body"),
    ({}, 400, "input_or_messages"),
    ({"input": "a", "messages": []}, 400, "input_or_messages"),
    ({"inputs": "a"}, 400, "unknown_field"),
    (b'{"\\ud800": 1}', 400, "unknown_field"),
    (b'{"\\ud800": 1, "\\ud800": 2}', 400, "duplicate_field"),
    (b'{"input": [{"\\ud800": "a"}]}', 400, "unknown_field"),
    ({"input": "a", "model": "gpt"}, 404, "model_not_found"),
    ({"input": "a", "model": 3}, 400, "invalid_model"),
    ({"input": "a", "model": None}, 400, "invalid_model"),
    ({"input": "a", "user": 3}, 400, "invalid_user"),
    ({"input": "a", "mode": "fast"}, 400, "invalid_mode"),
    ({"input": "a", "mode": ["disc"]}, 400, "invalid_mode"),
    ({"input": "a", "mode": "latent"}, 400, "latent_unavailable"),
    ({"input": "a", "encoding_format": "int8"}, 400, "invalid_encoding_format"),
    ({"input": "a", "dimensions": 0}, 400, "invalid_dimensions"),
    ({"input": "a", "dimensions": 33}, 400, "invalid_dimensions"),
    ({"input": "a", "dimensions": 8.0}, 400, "invalid_dimensions"),
    ({"input": "a", "dimensions": True}, 400, "invalid_dimensions"),
    ({"input": "a", "dimensions": "8"}, 400, "invalid_dimensions"),
    ({"input": []}, 400, "empty_input"),
    ({"input": ["a"] * 9}, 400, "too_many_items"),
    ({"input": [1, 2, 3]}, 400, "token_input"),
    ({"input": [[1, 2], [3]]}, 400, "token_input"),
    ({"input": None}, 400, "invalid_item"),
    ({"input": ["a", 1.5]}, 400, "invalid_item"),
    ({"input": ""}, 400, "empty_item"),
    ({"input": ["a", " \n"]}, 400, "empty_item"),
    (item(), 400, "empty_item"),
    (item(txt="a"), 400, "unknown_field"),
    (item(text=3), 400, "invalid_text"),
    (item(text="\ud800"), 400, "invalid_text"),
    (item(text="<|im_end|>"), 400, "control_token"),
    ({"input": "say <gen_emb>"}, 400, "control_token"),
    (item(image=PNG, images=[PNG]), 400, "image_and_images"),
    (item(images=PNG), 400, "invalid_images"),
    (item(images=[PNG] * 9), 400, "too_many_images"),
    (item(image=3), 400, "invalid_image"),
    (item(image="https://example.org/a.png"), 400, "remote_image"),
    (item(image="file:///etc/passwd"), 400, "remote_image"),
    (item(image="/etc/passwd"), 400, "invalid_data_url"),
    (item(image="data:text/plain;base64,aGk="), 400, "invalid_data_url"),
    (item(image="data:image/png,abc"), 400, "invalid_data_url"),
    (item(image="data:image/png;base64,?!"), 400, "invalid_base64"),
    (item(image="data:image/png;base64,"), 400, "invalid_image"),
    (item(image="data:image/png;base64,aGVsbG8="), 400, "invalid_image"),
    (item(image=data_url(picture(16, 16), "TIFF")), 400, "invalid_image"),
    (item(image=cut("PNG")), 400, "invalid_image"),
    (item(image=cut("JPEG")), 400, "invalid_image"),
    (item(image=data_url(Image.new("RGB", (200, 200)))), 413, "image_too_large"),
    (item(image=bomb()), 413, "image_too_large"),
    (item(image=data_url(Image.new("RGB", (1, 201)))), 400, "image_too_thin"),
    ({"input": "red " * 5000}, 400, "input_too_long"),
    ({"input": "a " * (1 << 20)}, 413, "body_too_large"),
    ({"messages": []}, 400, "invalid_messages"),
    ({"messages": "a"}, 400, "invalid_messages"),
    ({"messages": ["a"]}, 400, "invalid_message"),
    ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, 400, "unknown_field"),
    ({"messages": [{"role": "system", "content": "a"}]}, 400, "invalid_role"),
    ({"messages": [{"content": "a"}]}, 400, "invalid_role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_content"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "empty_item"),
    (part(type="audio"), 400, "invalid_part"),
    (part(text="a"), 400, "invalid_part"),
    (part(type="text", text=None), 400, "invalid_text"),
    (part(type="image_url"), 400, "invalid_image"),
    (part(type="image_url", image_url={"url": "http://x/a.png"}), 400, "remote_image"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, 400, "invalid_part"),
]


def test_malformed_bodies_are_named(server):
    """Each a 4xx with its own name and a message, in OpenAI's form; none reaches the model or ends the server."""
    assert len(MALFORMED) >= 40
    for body, status, code in MALFORMED:
        found, answer = server.post(body)
        shown = body if isinstance(body, bytes) else json.dumps(body)
        assert (found, answer.get("error", {}).get("code")) == (status, code), shown[:200]
        assert answer["error"]["type"] == "invalid_request_error"
        assert len(answer["error"]["message"]) > 10
    assert server.post({"input": "a"}, kind="text/plain")[1]["error"]["code"] == "unsupported_media_type"
    assert server.post({"input": "a"}, path="/chat/completions")[1]["error"]["code"] == "unknown_path"
    assert server.post(b"", method="PUT")[1]["error"]["code"] == "method_not_allowed"
    assert server.post({"input": "a"})[0] == 200


def test_a_client_hears_openais_errors(server):
    import openai

    with pytest.raises(openai.BadRequestError, match="latent tokens") as raised:
        ask(server.client(), "a", mode="latent")
    assert raised.value.code == "latent_unavailable"
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="other", input="a")


def test_a_full_queue_a_kill_a_restart_and_a_drain(model_dir, embedder):
    """More waits than may: refused by name. Killed, it starts again on its port. What was taken before SIGTERM is
    answered after it."""
    import openai

    options = ("--name", "tiny", "--max_queue", "40", "--max_new_tokens", "6", "--token_budget", "128")
    server = Server(model_dir, *options)
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="mode 'auto' needs margins"):
        ask(client, "a", mode="auto")
    with pytest.raises(openai.BadRequestError, match="queues 40 items"):
        ask(client, ["a"] * 41)

    def texts(i):
        return [f"red {i} {j}" for j in range(20)]

    def one(i):
        try:
            return ask(client, texts(i), mode="gen")[0]
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    taken = [i for i, answer in enumerate(answers) if isinstance(answer, torch.Tensor)]
    assert taken
    assert refused
    assert {error.code for error in refused} == {"queue_full"}
    assert refused[0].response.headers["retry-after"] == "1"
    for i in taken[:2]:
        torch.testing.assert_close(answers[i], embedder.encode(texts(i), mode="gen"), rtol=0, atol=1e-5)

    before = ask(client, "a red shoe")[0]
    server.stop(signal.SIGKILL)
    with pytest.raises(openai.APIConnectionError):
        ask(client, "a red shoe")
    again = Server(model_dir, *options, port=server.url.split(":")[2].split("/")[0])
    assert again.url == server.url
    assert torch.equal(ask(client, "a red shoe")[0], before)

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(one, 99)
        while not json.loads(again.get("/health"))["waiting"] and not late.done():
            pass
        code, rest = again.stop()
        torch.testing.assert_close(late.result(), embedder.encode(texts(99), mode="gen"), rtol=0, atol=1e-5)
    assert code == 0
    assert "stopped" in rest


def test_what_the_time_to_drain_does_not_reach_is_refused_by_name(model_dir):
    server = Server(model_dir, "--max_new_tokens", "300", "--token_budget", "400", "--drain_seconds", "0")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(server.post, {"input": ["red"] * 200, "mode": "gen"})
        while not json.loads(server.get("/health"))["waiting"] and not late.done():
            pass
        code, rest = server.stop()
        status, answer = late.result()
    assert (code, rest) == (0, "stopped; 1 requests were given up\n")
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
