"""``rime-fast serve``: an OpenAI-style embedding server over our engine."""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class ServeOptions:
    """What is served, where, and how much a client may ask for."""

    model: str = field(metadata={"help": "Directory or hub name."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: every one."})
    port: int = field(default=8000, metadata={"help": "Port; 0: any free one, printed at the start."})
    name: str | None = field(
        default=None, metadata={"help": "What clients call the model; default: its folder's name."}
    )
    index: str | None = field(
        default=None, metadata={"help": "Folder of `rime-fast index` (disc rows): allows mode 'auto'."}
    )
    threshold: float = field(
        default=0.05,
        metadata={"help": "Mode auto: gen where the index's first two places lie closer than this, else disc. [ours]"},
    )
    max_queue: int = field(default=1024, metadata={"help": "Items that may wait; more are answered 429."})
    max_items: int = field(default=256, metadata={"help": "Items of one request."})
    max_images: int = field(default=8, metadata={"help": "Images of one item."})
    max_image_pixels: int = field(default=16_777_216, metadata={"help": "Largest image, read from its head."})
    max_body_mb: int = field(default=32, metadata={"help": "Largest request, in MiB."})
    drain_seconds: int = field(default=30, metadata={"help": "After SIGTERM or Ctrl-C: time for what is under way."})


def run(values: dict[str, Any]) -> int:
    """Load, listen, serve until a signal."""
    required(values, "model")
    options, loading = build(ServeOptions, values), build(EmbedderOptions, values)
    model_exists(options.model)
    try:
        import uvicorn

        from rime_fast.serve.app import EmbeddingService, make_app
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}; pip install 'rime-fast[serve]'") from None
    from rime_fast.eval.index import EmbeddingIndex
    from rime_fast.serve.request import Limits

    index = EmbeddingIndex.load(options.index) if options.index else None
    if index is not None and index.facts.get("mode") != "disc":
        raise UsageError(f"--index {options.index} holds {index.facts.get('mode')} rows; mode auto needs disc rows")
    # taken first: a port in use is known before a large model is read
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    with listener:
        service = EmbeddingService(
            load_embedder(options.model, loading),
            options.name or Path(options.model).resolve().name,
            index=index,
            threshold=options.threshold,
            limits=Limits(options.max_items, options.max_images, options.max_image_pixels),
            max_queue=options.max_queue,
            max_body=options.max_body_mb << 20,
        )
        settings = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=options.drain_seconds,
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {service.name} at http://{shown}:{port}/v1 (health, metrics beside it)", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has drained
            signal.signal(number, lambda *_: None)
        uvicorn.Server(settings).run(sockets=[listener])
    left = f"{service.given_up} requests were given up" if service.given_up else "nothing was left waiting"
    print(f"stopped; {left}", flush=True)
    return 0


COMMAND = Command(
    name="serve",
    text="Serves OpenAI's /v1/embeddings: texts, pictures as data URLs, chat messages; mode disc (one prefill), gen "
    "(decodes a rewrite) or auto (gen only where the index is unsure), and dimensions. Requests share batches by "
    "token budget; bodies, pixels and the queue are limited with named errors. /health, /metrics (Prometheus). "
    "SIGTERM answers what is under way, then ends.",
    examples=(
        ("on this machine", "rime-fast serve runs/refine"),
        (
            "for others, with mode auto",
            "rime-fast serve runs/refine --host 0.0.0.0 --index runs/index --threshold 0.05",
        ),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.serve", "ServeOptions"),
        Group("How", "rime_fast.cli.loading", "EmbedderOptions"),
    ),
    positional="model",
)
