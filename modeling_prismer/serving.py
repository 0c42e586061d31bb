"""
An HTTP server with the chat completions of OpenAI's API. Requests of one moment run as one batch. `prismer serve`
starts it. It needs fastapi and uvicorn, the extra `serve`.
"""

import asyncio
import json
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from PIL import Image
from pydantic import BaseModel, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from .processing.chat import read_messages
from .processing.image_loading import load_image


logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256  # of checkpoints whose generation_config.json has no limit
MAX_BODY_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 25_000_000
MAX_IMAGES = 16
MAX_TEXT = 100_000  # letters of all messages
MAX_ERROR = 500  # letters of an error: it may quote what the client has sent
_UNSUPPORTED = ("tools", "functions", "response_format", "logprobs", "logit_bias", "modalities", "audio")
_DONE = "data: [DONE]\n\n"


# ---- batches ----


@dataclass(eq=False)
class Job:
    """
    A conversation to answer.

    Args:
        messages (`list[dict]`): as from [`read_messages`], with opened images.
        settings (`dict`): arguments of `generate`. Jobs with the same settings can share a batch.
        deliver (`Callable`): gets the text piece by piece if the job `streams`, then an [`Answer`]; or an exception.
        stops (`list[str]`): the text ends before the first of them.
    """

    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    deliver: Callable[[Any], object]
    stops: list[str] = field(default_factory=list)
    streams: bool = False
    is_cancelled: bool = False
    sent: str = ""

    def send(self, text: str, is_finished: bool) -> None:
        """Delivers what is new in a text. The beginning of a stop string is held back until more is known."""
        if not is_finished:
            held = max((len(stop) for stop in self.stops), default=1) - 1
            text = text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > len(self.sent) and text.startswith(self.sent):
            self.deliver(text[len(self.sent) :])
            self.sent = text


@dataclass
class Answer:
    """A finished text, why it ended (`"stop"` or `"length"`), and numbers of tokens."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Batcher:
    """
    Answers conversations in a thread of its own. Jobs that wait at the same time are answered in one batch.

    Args:
        network (`PreTrainedModel`): a Prismer or a PrismerLM.
        processor (`ProcessorMixin`): its processor, with a chat template.
        batch_size (`int`, *optional*, defaults to 16): the largest number of jobs in a batch.
        wait (`float`, *optional*, defaults to 0.01): seconds to wait for further jobs if none are waiting.
        experts (`list[str]` or `"auto"`, *optional*): names of the experts to use; all by default.
    """

    def __init__(
        self,
        network: Any,
        processor: Any,
        batch_size: int = 16,
        wait: float = 0.01,
        experts: list[str] | str | None = None,
    ):
        if processor.chat_template is None:
            raise ValueError(
                "the checkpoint has no chat template, which a server needs: set processor.chat_template and save the "
                "processor"
            )
        self.network = network
        self.processor = processor
        self.batch_size = batch_size
        self.wait = wait
        self.experts = experts
        eos = network.generation_config.eos_token_id
        self.ends = set(eos if isinstance(eos, list) else [eos])
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._thread = threading.Thread(target=self._run, name="prismer-serve", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        self._incoming.put(job)

    def warm_up(self) -> None:
        """Answers a question about a gray image, so that the experts are loaded before the first request."""
        image = Image.new("RGB", (64, 64), "gray")
        items = [{"type": "image", "image": image}, {"type": "text", "text": "Is it gray?"}]
        self._generate([Job([{"role": "user", "content": items}], {"max_new_tokens": 1}, lambda event: None)])

    def close(self) -> None:
        """Ends the thread after the jobs that are running."""
        self._incoming.put(None)
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_jobs():
            self._answer([job for job in jobs if not job.is_cancelled])

    def _next_jobs(self) -> list[Job]:
        """The longest waiting job and others with its settings; none once the batcher is closed."""
        waiting = self._waiting
        if not waiting:
            job = self._incoming.get()
            if job is None:
                return []
            waiting.append(job)
        end = time.monotonic() + self.wait
        while sum(job.settings == waiting[0].settings for job in waiting) < self.batch_size:
            try:
                job = self._incoming.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return []
            waiting.append(job)
        jobs = [job for job in waiting if job.settings == waiting[0].settings][: self.batch_size]
        self._waiting = deque(job for job in waiting if job not in jobs)
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        try:
            if jobs:
                self._generate(jobs)
        except Exception as error:  # noqa: BLE001  the server goes on
            if len(jobs) > 1 and not any(job.sent for job in jobs):
                for job in jobs:  # a mistake in one of them must not fail the others
                    self._answer([job])
            else:
                for job in jobs:
                    job.deliver(error)

    def _generate(self, jobs: list[Job]) -> None:
        inputs = self.processor.apply_chat_template(
            [job.messages for job in jobs],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            processor_kwargs={"experts": self.experts},
        ).to(self.network.device)
        prompts, mask = inputs["input_ids"], inputs["attention_mask"]
        settings = self._with_limit(jobs[0].settings, prompts.shape[1])
        if self._num_beams(settings) == 1 and any(job.streams for job in jobs):
            settings["streamer"] = _Streamer(self, jobs)
        settings["stopping_criteria"] = StoppingCriteriaList([_Cancelled(jobs)])
        with torch.inference_mode():
            sequences = self.network.generate(**inputs, **settings).tolist()
        for job, row, prompt_tokens in zip(jobs, sequences, mask.sum(1).tolist()):
            answer = self._read(job, row, prompts.shape[1], prompt_tokens)
            if job.streams:
                job.send(answer.text, is_finished=True)
            job.deliver(answer)

    def _with_limit(self, settings: dict[str, Any], prompt_length: int) -> dict[str, Any]:
        """The settings with at most as many new tokens as the network has positions for."""
        config = self.network.generation_config
        limit = settings.get("max_new_tokens")
        if limit is None and config.max_new_tokens is None and config.max_length is None:
            limit = MAX_NEW_TOKENS
        if limit is None:
            return dict(settings)
        text_config = self.network.config.get_text_config(decoder=True)
        positions = getattr(text_config, "max_position_embeddings", None) or float("inf")
        if self.network.config.model_type == "prismer":  # as in RoBERTa, the first position is that after padding
            positions -= text_config.pad_token_id + 1
        return {**settings, "max_new_tokens": max(1, min(limit, positions - prompt_length))}

    def _num_beams(self, settings: dict[str, Any]) -> int:
        return settings.get("num_beams", self.network.generation_config.num_beams) or 1

    def text_of(self, job: Job, row: list[int], prompt_length: int) -> tuple[str, bool]:
        """The text of prompt and continuation, and whether a stop string ended it."""
        (text,) = self.processor.post_process_generation([row], prompt_length)
        cut = min((text.find(stop) for stop in job.stops if stop in text), default=len(text))
        return text[:cut], cut < len(text)

    def _read(self, job: Job, row: list[int], prompt_length: int, prompt_tokens: int) -> Answer:
        new = row[prompt_length:]
        end = next((number for number, token in enumerate(new) if token in self.ends), None)
        text, is_stopped = self.text_of(job, row, prompt_length)
        reason = "length" if end is None and not is_stopped else "stop"
        return Answer(text, reason, prompt_tokens, len(new) if end is None else end + 1)


class _Streamer(BaseStreamer):
    """Gets a token of each row from `generate`, and sends the new text of the rows whose jobs stream."""

    def __init__(self, batcher: Batcher, jobs: list[Job]):
        self.batcher = batcher
        self.jobs = jobs
        self.rows: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.rows:
            self.rows = value.tolist()
            self.prompt_length = len(self.rows[0])
            return
        for job, row, token in zip(self.jobs, self.rows, value.tolist()):
            if job.streams and not self.batcher.ends.intersection(row[self.prompt_length :]):
                row.append(token)
                text, is_stopped = self.batcher.text_of(job, row, self.prompt_length)
                job.send(text, is_finished=is_stopped)

    def end(self) -> None:
        pass


class _Cancelled(StoppingCriteria):
    """Ends the rows whose clients have gone."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        cancelled = torch.tensor([job.is_cancelled for job in self.jobs], device=input_ids.device)
        return cancelled.repeat_interleave(len(input_ids) // len(self.jobs))  # beams of a row follow each other


# ---- requests ----


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields of a request that are read. Fields that would change the text but are not supported are refused."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    num_beams: int | None = Field(None, ge=1, le=16)  # not in OpenAI's API
    stop: str | list[str] | None = Field(None, max_length=100)
    n: int = Field(1, ge=1, le=1)

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in _UNSUPPORTED:
                if data.get(name) not in (None, False, [], {}, {"type": "text"}, ["text"]):
                    raise ValueError(f"{name} is not supported")
        return data

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `generate`; what is not given is as in the checkpoint's generation_config.json."""
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "num_beams": self.num_beams,
        }
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            settings["num_beams"] = self.num_beams or 1
        elif self.temperature == 0:
            settings["do_sample"] = False
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or ()) if stop]

    def read(self, allow_urls: bool, max_pixels: int) -> list[dict[str, Any]]:
        """
        The messages with opened images.

        Raises:
            ValueError: if a message or an image cannot be read, or if an image is no `data:` URI.
        """
        messages, images = read_messages(self.messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is one of the assistant; a message of the user is needed")
        schemes = ("data:", "http://", "https://") if allow_urls else ("data:",)
        for image in images:
            if not isinstance(image, str) or not image.lower().startswith(schemes):
                raise ValueError(f"an image of a message is not a URL that starts with {' or '.join(schemes)}")
        if len(images) > MAX_IMAGES:
            raise ValueError(f"the messages have {len(images)} images; accepted are up to {MAX_IMAGES}")
        items = [item for message in messages for item in message.get("content", ())]
        if (length := sum(len(item.get("text", "")) for item in items)) > MAX_TEXT:
            raise ValueError(f"the messages have {length:,} letters; accepted are up to {MAX_TEXT:,}")
        for number, item in enumerate(item for item in items if item["type"] == "image"):
            item["image"] = load_image(item["image"], max_pixels=max_pixels, name=f"image {number}")
            max_pixels -= item["image"].width * item["image"].height  # of all images
        return messages


# ---- responses ----


def _error(status: int, message: str) -> JSONResponse:
    if len(message) > MAX_ERROR:
        message = f"{message[:MAX_ERROR]}…"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def _http_error(error: Exception) -> HTTPException:
    if isinstance(error, ValueError | TemplateError):
        return HTTPException(400, str(error))
    logger.error("a request failed", exc_info=error)
    return HTTPException(500, "the server failed to answer; its log has the reason")


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


class _LimitBody:
    """Refuses requests with more than `max_bytes` in their body, before they are read as a whole."""

    def __init__(self, app: Any, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = _error(413, f"the body has more than {self.max_bytes:,} bytes")
        if length.isdigit() and int(length) > self.max_bytes:
            return await refusal(scope, receive, send)
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, f"the body has more than {self.max_bytes:,} bytes")
            return message

        await self.app(scope, counted, send)


def build_app(
    batcher: Batcher,
    name: str,
    allow_urls: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> FastAPI:
    """
    The server's application: `POST /v1/chat/completions`, `GET /v1/models` and `GET /health`.

    Args:
        batcher ([`Batcher`]): answers the requests. It is closed with the application.
        name (`str`): the model's name in requests.
        allow_urls (`bool`, *optional*, defaults to `False`):
            Whether images may be http(s) URLs on public addresses; see [`load_image`]. Otherwise only `data:` URIs.
        max_body_bytes (`int`, *optional*, defaults to 20,000,000): larger requests are refused with 413.
        max_pixels (`int`, *optional*, defaults to 25,000,000): larger images are refused with 400.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="prismer serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_LimitBody, max_bytes=max_body_bytes)
    # limits the number of opened images in memory
    slots = asyncio.Semaphore(2 * batcher.batch_size)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "prismer"}

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{place}: {first['msg']}" if place else first["msg"])

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"}) if batcher.is_alive else _error(503, "the model has stopped")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        _check_name(asked)
        return model

    def _check_name(asked: str) -> None:
        if asked != name:
            raise HTTPException(404, f"the model {asked[:100]!r} does not exist; this server has {name!r}")

    async def events_of(request: ChatRequest) -> AsyncGenerator[Any, None]:
        """The pieces of the text if the request streams, and the [`Answer`]."""
        events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        async with slots:
            try:
                messages = await asyncio.to_thread(request.read, allow_urls, max_pixels)
            except (ValueError, OSError) as error:  # OSError: an image cannot be fetched
                raise HTTPException(400, str(error)) from error
            job = Job(
                messages,
                request.settings,
                lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
                request.stops,
                request.stream,
            )
            batcher.submit(job)
            try:
                while True:
                    event = await events.get()
                    if isinstance(event, Exception):
                        raise _http_error(event) from event
                    yield event
                    if isinstance(event, Answer):
                        return
            finally:
                job.is_cancelled = True

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Any:
        _check_name(request.model)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        events = events_of(request)
        first = await anext(events)  # what is wrong with a request is known before a stream begins
        if request.stream:
            return StreamingResponse(_stream(request, head, first, events), media_type="text/event-stream")
        await events.aclose()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": first.text},
            "finish_reason": first.finish_reason,
        }
        return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(first)}

    return app


async def _stream(
    request: ChatRequest, head: dict[str, Any], first: Any, events: AsyncGenerator[Any, None]
) -> AsyncIterator[str]:
    def chunk(delta: dict[str, str], finish_reason: str | None = None, **fields: Any) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        data = {**head, "object": "chat.completion.chunk", "choices": choices, **fields}
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    async with aclosing(events):
        yield chunk({"role": "assistant", "content": ""})
        event = first
        try:
            while isinstance(event, str):
                yield chunk({"content": event})
                event = await anext(events)
        except HTTPException as error:
            yield f"data: {json.dumps({'error': {'message': error.detail, 'type': 'server_error'}})}\n\n"
            return
        yield chunk({}, event.finish_reason)
        if request.stream_options and request.stream_options.include_usage:
            yield chunk({}, choices=[], usage=_usage(event))
        yield _DONE
