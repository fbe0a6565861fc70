"""Teachers behind an interface of chat messages: a vLLM engine in this process, or any server that speaks OpenAI's.

Pictures travel as JPEG in the messages, shrunk to ``max_pixels``; of a video some frames do. A teacher in this
process without vLLM is local_teacher.py's.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from rime_fast.data.images import ImageSource, load_image
from rime_fast.data.records import Part
from rime_fast.data.video import FrameSampling, Video, load_frames
from rime_fast.prepare.prompts import Request


@dataclass(frozen=True)
class Decoding:
    """Says how one writes. temperature 0 is greedy; a second try is made at ``retry_temperature`` and the next seed.
    max_pixels: of a picture. frames: of a video."""

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    max_pixels: int = 1280 * 28 * 28
    frames: int = 8
    retry_temperature: float = 0.7

    def again(self) -> Decoding:
        """Give the second try's."""
        warm = max(self.temperature, self.retry_temperature)
        return Decoding(self.max_tokens, warm, self.seed + 1, self.max_pixels, self.frames)


@dataclass(frozen=True)
class Completion:
    """Holds one answer. finish: "stop", "length" (cut by max_tokens), or why there is no text. tokens: written ones."""

    text: str
    finish: str
    tokens: int


class Teacher(Protocol):
    """Writes texts. prompted: False for one that has its own prompt and reads the side alone. retries: whether a second
    try can differ."""

    prompted: bool
    retries: bool

    def identity(self) -> dict[str, Any]:
        """Name what its texts depend on besides request and decoding: part of every key."""

    def write(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Write a completion for each request."""


# --- messages --------------------------------------------------------------------------------------------------------


def flat_parts(content: Sequence[Part], frames: int) -> Iterator[tuple[str, Any]]:
    """Flatten content to ("text", text) and ("image", source); of a video its frames. Neighbouring texts become one."""
    waiting = ""
    for kind, value in content:
        if kind == "text":
            waiting += value
            continue
        if kind == "video":
            waiting += "[frames of a video, in order]"
        if waiting:
            yield "text", waiting
        waiting = ""
        yield from (("image", source) for source in ([value] if kind == "image" else _frames(value, frames)))
    if waiting:
        yield "text", waiting


def _frames(video: Video, count: int) -> Sequence[ImageSource]:
    found = load_frames(Video(video.source), FrameSampling(frames=count)).images or ()
    if len(found) <= count:
        return found
    return [found[int((i + 0.5) * len(found) / count)] for i in range(count)]


def chat_messages(request: Request, decoding: Decoding) -> list[dict[str, Any]]:
    """Write the request as OpenAI's chat messages. Raises ValueError for a picture that cannot be opened."""
    parts: list[dict[str, Any]] = []
    for kind, value in flat_parts(request.content, decoding.frames):
        if kind == "text":
            # half a surrogate pair is no UTF-8, and no request either
            parts.append({"type": "text", "text": value.encode("utf-8", "replace").decode()})
        else:
            parts.append({"type": "image_url", "image_url": {"url": _data_url(value, decoding.max_pixels)}})
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": parts}]


def _data_url(source: ImageSource, max_pixels: int) -> str:
    image = load_image(source)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        whole = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(whole, image.convert("RGBA"))
    image = image.convert("RGB")
    if image.width * image.height > max_pixels:
        scale = (max_pixels / (image.width * image.height)) ** 0.5
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# --- a server --------------------------------------------------------------------------------------------------------


class OpenAITeacher:
    """Asks a server with ``/v1/chat/completions`` by the ``openai`` package (``pip install 'rime-fast[rewrite]'``).

    base_url, api_key: None takes OPENAI_BASE_URL and OPENAI_API_KEY. Errors of the network, timeouts, 408, 409, 429
    (``Retry-After`` is followed) and 5xx are tried again ``max_retries`` times, waiting longer each time, and end the
    run then. A request that the server refuses for what it holds (400, 413, 422) is a reject; where it refuses the very
    first ones, all of them, the run ends.
    """

    prompted = retries = True

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 300.0,
        max_retries: int = 8,
        concurrency: int = 16,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError("backend 'openai' needs the openai package: pip install 'rime-fast[rewrite]'") from None
        self.openai, self.model = openai, model
        try:
            self.client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=max_retries)
        except openai.OpenAIError:  # a server of one's own wants no key, but the client does
            self.client = openai.OpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=max_retries)
        self.pool = ThreadPoolExecutor(concurrency)
        self.served = False

    def identity(self) -> dict[str, Any]:
        """Give the model's name: a server tells no more."""
        return {"backend": "openai", "model": self.model}

    def write(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Do what ``Teacher`` says.

        Raises RuntimeError where the server cannot be reached, does not know the model or key, or
        keeps failing."""
        waiting = [self.pool.submit(self._one, request, decoding) for request in requests]
        try:
            found = [one.result() for one in waiting]
        except BaseException:
            for one in waiting:
                one.cancel()
            raise
        refused = [one.finish for one in found if one.finish.startswith("refused")]
        self.served = self.served or len(refused) < len(found)
        if not self.served:
            raise RuntimeError(f"{self.client.base_url} refused every request of the first batch: {refused[0]}")
        return found

    def _one(self, request: Request, decoding: Decoding) -> Completion:
        errors, messages = self.openai, chat_messages(request, decoding)
        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=decoding.max_tokens,
                temperature=decoding.temperature,
                seed=decoding.seed,
            )
        except errors.APIStatusError as error:
            message = f"{error.status_code} {' '.join(str(error.message).split())[:200]}"
            if error.status_code in (400, 413, 422):
                return Completion("", f"refused: {message}", 0)
            raise RuntimeError(f"{self.client.base_url} answers {message}") from None
        except errors.APIError as error:  # no connection, a timeout, an answer that is none
            raise RuntimeError(f"{self.client.base_url}: {error}") from None
        except ValueError as error:
            raise RuntimeError(f"{self.client.base_url}: the answer is not JSON ({error})") from None
        choices: Any = getattr(answer, "choices", None)
        reply = getattr(choices[0], "message", None) if choices and isinstance(choices, list) else None
        if reply is None:
            raise RuntimeError(f"{self.client.base_url}: the answer holds no choices: {str(answer)[:200]}")
        text: Any = reply.content or ""
        if isinstance(text, list):  # parts, as some servers give them
            text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
        if not isinstance(text, str):
            raise RuntimeError(f"{self.client.base_url}: the answer's content is no text: {str(answer)[:200]}")
        tokens = getattr(answer.usage, "completion_tokens", 0)
        return Completion(text, str(choices[0].finish_reason or "stop"), tokens if isinstance(tokens, int) else 0)


# --- vLLM ------------------------------------------------------------------------------------------------------------


class VllmTeacher:
    """Runs ``vllm.LLM`` in this process (``pip install 'rime-fast[vllm]'``): one chat call a batch, scheduled by vLLM.

    llm, sampling_params: given in tests; made and imported otherwise. images: pictures a request may hold.
    """

    prompted = retries = True

    def __init__(
        self,
        model: str,
        *,
        images: int = 16,
        max_model_len: int = 8192,
        tensor_parallel_size: int = 1,
        llm: Any = None,
        sampling_params: Any = None,
    ) -> None:
        if llm is None or sampling_params is None:
            try:
                from vllm import LLM, SamplingParams
            except ImportError:
                raise ImportError("backend 'vllm' needs vLLM: pip install 'rime-fast[vllm]'") from None
            llm, sampling_params = LLM, SamplingParams
        self.model, self.sampling_params = model, sampling_params
        self.llm = llm(
            model=model,
            limit_mm_per_prompt={"image": images},
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
        )

    def identity(self) -> dict[str, Any]:
        """Give the model's name, and its commit where it is the hub's."""
        config = getattr(getattr(self.llm, "llm_engine", None), "model_config", None)
        commit = getattr(getattr(config, "hf_config", None), "_commit_hash", None)
        return {"backend": "vllm", "model": self.model, "revision": commit}

    def write(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Do what ``Teacher`` says."""
        parameters = self.sampling_params(
            max_tokens=decoding.max_tokens, temperature=decoding.temperature, seed=decoding.seed
        )
        messages = [chat_messages(request, decoding) for request in requests]
        answers = self.llm.chat(messages, parameters, use_tqdm=False)
        if len(answers) != len(requests):
            raise RuntimeError(f"vLLM gave {len(answers)} answers to {len(requests)} requests")
        outputs = [answer.outputs[0] for answer in answers]
        return [Completion(one.text, one.finish_reason or "stop", len(one.token_ids)) for one in outputs]
