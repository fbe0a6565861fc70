"""The embedding server: OpenAI's ``/v1/embeddings`` over our engine, with modes; health, models and metrics.

    GET /health   GET /v1/models   GET /metrics (Prometheus)   POST /v1/embeddings (rime_fast/serve/request.py)

``rime-fast serve`` runs it; ``make_app`` gives the ASGI application for a server of your own.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rime_fast import __version__
from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.engine.rollout import dual_mode_of
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.index import THRESHOLD, EmbeddingIndex, check_auto, truncated
from rime_fast.serve.batcher import Batcher, Job, QueueFull, Stopped
from rime_fast.serve.request import ApiError, EmbeddingRequest, Limits, parse_request


@dataclass(frozen=True)
class Result:
    """One item's answer. embedding [D], the mode it was made in, its rewrite (mode gen), decoded tokens."""

    embedding: torch.Tensor
    mode: str
    rewrite: str | None = None
    decoded: int = 0
    reached: bool = True


class EmbeddingService:
    """Parses, measures and queues requests; encodes their batches.

    embedder: the model; used by one thread only. name: what clients call it. index, threshold: for mode "auto": an
    item whose first two places in the index (of disc rows) lie closer than ``threshold`` goes to mode gen.
    max_queue: items that may wait. max_body: bytes. given_up: requests that a shutdown left without embeddings.
    """

    def __init__(
        self,
        embedder: RimeEmbedder,
        name: str,
        *,
        index: EmbeddingIndex | None = None,
        threshold: float = THRESHOLD,
        limits: Limits | None = None,
        max_queue: int = 1024,
        max_body: int = 32 << 20,
    ) -> None:
        self.embedder, self.name, self.index, self.threshold = embedder, name, index, threshold
        self.limits, self.max_body = limits or Limits(), max_body
        config = dual_mode_of(embedder.model).config
        self.modes = (*embedder.modes, *(["auto"] if index is not None else []))
        self.width: int = config.text_config.hidden_size
        if index is not None:
            check_auto(index, self.width, threshold)
        self.max_length: int = embedder.collator.max_length or config.text_config.max_position_embeddings
        # lengths are measured by request threads, beside the model's thread: with a tokenizer of their own
        processor = copy.copy(embedder.processor)
        processor.tokenizer = copy.deepcopy(embedder.processor.tokenizer)
        self._measurer = Collator(processor, embedder.collator.template, config)
        self._measuring = threading.Lock()
        self.metrics = Metrics()
        self.batcher = Batcher(self.encode, embedder.token_budget, max_queue, self.metrics.batch)
        self.metrics.queue.set_function(lambda: len(self.batcher))
        self.given_up = 0

    def encode(self, mode: str, sides: list[Side]) -> list[Result]:
        """Encode a batch, on the batcher's thread."""
        if mode == "auto":
            made = self.embedder.encode_items(sides, mode, index=self.index, threshold=self.threshold)
        else:
            made = self.embedder.encode_items(sides, mode)
        decodes = mode in ("gen", "auto")
        results = []
        for i, row in enumerate(made.embeddings):
            if decodes and made.tokens[i]:
                rewrite = made.rewrites[i] if made.rewrites else ""
                results.append(Result(row, "gen", rewrite, made.tokens[i], made.reached[i]))
            else:
                results.append(Result(row, "disc" if decodes else mode))
        return results

    def prepare(self, body: bytes) -> tuple[EmbeddingRequest, list[Job]]:
        """Read a body, decode its images, measure its items. Raises ApiError."""
        request = parse_request(
            body,
            name=self.name,
            width=self.width,
            limits=self.limits,
            template=self.embedder.collator.template,
            modes=self.modes,
        )
        decodes = request.mode in ("gen", "auto")
        part: Any = "gen" if decodes else request.mode
        with self._measuring:
            lengths = self._measurer.measure(request.sides, part)
        extra = self.embedder.max_new_tokens if decodes else 0
        jobs = []
        for side, length in zip(request.sides, lengths, strict=True):
            if length + extra > self.max_length:
                room = f"{self.max_length}" + (f" less {extra} for the rewrite" if extra else "")
                message = f"{side.id} has {length} tokens; this model takes {room}"
                raise ApiError(400, "input_too_long", message, side.id)
            jobs.append(Job(side, request.mode, length + extra))
        return request, jobs

    async def answer(self, request: Request) -> JSONResponse:
        """Answer ``POST /v1/embeddings``."""
        body = await self._body(request)
        parsed, jobs = await run_in_threadpool(self.prepare, body)
        try:
            futures = self.batcher.submit(jobs)
        except QueueFull:
            if len(jobs) > self.batcher.max_queue:
                raise ApiError(400, "too_many_items", f"this server queues {self.batcher.max_queue} items") from None
            raise ApiError(429, "queue_full", "too many items wait; try again in a second") from None
        except Stopped:
            raise ApiError(503, "shutting_down", "this server is stopping") from None
        results: list[Result] = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        rows = truncated(torch.stack([result.embedding for result in results]), parsed.dimensions)
        self.metrics.results(results)
        data = []
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            one: dict[str, Any] = {"object": "embedding", "index": i, "mode": result.mode}
            one["embedding"] = _base64(row) if parsed.base64 else row.tolist()
            if result.rewrite is not None:
                one |= {"rewrite": result.rewrite, "reached_gen_emb": result.reached}
            data.append(one)
        extra = self.embedder.max_new_tokens if parsed.mode in ("gen", "auto") else 0
        prompt = sum(job.tokens - extra for job in jobs)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + sum(result.decoded for result in results)}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_media_type", f"content-type is {kind!r}; expected application/json")
        body = bytearray()
        async for chunk in request.stream():
            if len(body) <= self.max_body:  # the rest is read and dropped, so that the client hears the answer
                body += chunk
        if len(body) > self.max_body:
            raise ApiError(413, "body_too_large", f"the body is larger than {self.max_body} bytes")
        return bytes(body)

    def state(self) -> dict[str, Any]:
        """What ``/health`` says."""
        return {
            "status": "ok",
            "model": self.name,
            "modes": list(self.modes),
            "dimensions": self.width,
            "max_length": self.max_length,
            "waiting": len(self.batcher),
            "version": __version__,
        }


class Metrics:
    """Counters in Prometheus' form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("rime_requests", "Answers to /v1/embeddings", ["status", "code"], **made)
        self.seconds = Histogram("rime_request_seconds", "From request to answer", **made)
        self.items = Counter("rime_items", "Items embedded, by the mode used", ["mode"], **made)
        self.decoded = Counter("rime_decoded_tokens", "Tokens decoded", **made)
        self.missing = Counter("rime_missing_gen", "Generations that never reached <gen_emb>", **made)
        self.sizes = Histogram(
            "rime_batch_items", "Items of a batch", ["mode"], buckets=[2**i for i in range(11)], **made
        )
        self.busy = Counter("rime_batch_seconds", "Time the model was busy", ["mode"], **made)
        self.queue = Gauge("rime_waiting_items", "Items that wait", **made)

    def batch(self, mode: str, items: int, seconds: float) -> None:
        """Count a batch."""
        self.sizes.labels(mode).observe(items)
        self.busy.labels(mode).inc(seconds)

    def results(self, results: Sequence[Result]) -> None:
        """Count what a request got."""
        for result in results:
            self.items.labels(result.mode).inc()
            self.decoded.inc(result.decoded)
            self.missing.inc(not result.reached)


def make_app(service: EmbeddingService) -> Starlette:
    """Make the ASGI application; at its shutdown it finishes what waits."""

    async def embeddings(request: Request) -> Response:
        begin = time.perf_counter()
        code, answer = "", None
        try:
            answer = await service.answer(request)
        except ApiError as error:
            code, answer = error.code, _error(error)
        except asyncio.CancelledError:  # by uvicorn, when its time to finish what is under way is over
            code = "shutting_down"
            answer = _error(ApiError(503, code, "this server is stopping"))
            service.given_up += 1
        except Exception as error:
            code = "internal_error"
            answer = _error(ApiError(500, code, f"{type(error).__name__}: {error}"))
        service.metrics.requests.labels(str(answer.status_code), code).inc()
        service.metrics.seconds.observe(time.perf_counter() - begin)
        return answer

    async def health(request: Request) -> Response:
        return JSONResponse(service.state())

    async def models(request: Request) -> Response:
        one = {"id": service.name, "object": "model", "created": 0, "owned_by": "rime-fast"}
        return JSONResponse({"object": "list", "data": [one]})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        names = {404: "unknown_path", 405: "method_not_allowed"}
        code = names.get(error.status_code, "http_error")
        return _error(ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}"))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.close)

    return Starlette(
        routes=[
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)


def _base64(row: torch.Tensor) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
