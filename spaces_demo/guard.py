"""
Middleware in front of gradio. It only lets requests pass whose route is used by the page or its API, and whose body is
not too large, too slow or nested too deeply.
"""

import re
from typing import Any

import anyio
import anyio.to_thread
import gradio as gr
from checks import MAX_DEPTH, is_too_deep, parse_json
from images import MAX_BYTES
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uploads import is_full


MAX_JSON = 512 * 1024  # bytes; the longest link has 200,000 letters, the largest edit 20,000 points
MAX_CONTAINERS = 40_000  # lists and objects; their number costs gradio much more time than their bytes
MAX_UPLOAD = MAX_BYTES + 64 * 1024  # a file and its form
JSON_SECONDS, UPLOAD_SECONDS = 30.0, 300.0  # time limits of a whole body
# This much of a refused body is read and discarded: a client does not see the answer if it is cut off while sending.
SKIPPED_BYTES, SKIPPED_SECONDS = 64 * 1024**2, 10.0

# Other routes of gradio fetch URLs (file=, proxy=), convert videos and write the page's state to disk.
READABLE = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)/?|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|openapi\.json|app_id|startup-events|theme\.css|user|queue/data|queue/status|upload_progress)/?"
    r"|/gradio_api/(call|call/v2)/[^/]+/[^/]+|/gradio_api/heartbeat/[^/]+|/gradio_api/file=(?!(?i:https?:)).+"
)
WRITABLE = re.compile(
    r"/gradio_api/((?P<route>upload|cancel|reset|queue/join)|(run|api|call|call/v2)/(?P<name>[^/]+))/?"
)


class Rejected(Exception):
    """A request that is not passed on to gradio."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


class Guard:
    """
    ASGI middleware.

    Args:
        app: the ASGI app that gets the accepted requests.
        blocks (`gr.Blocks`): the functions that requests may call.
    """

    def __init__(self, app: ASGIApp, blocks: gr.Blocks):
        self.app, self.blocks = app, blocks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websockets
            return None
        body = _Body(receive, dict(scope["headers"]).get(b"content-length", b""))
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if scope["method"] in ("GET", "HEAD") and READABLE.fullmatch(path):
                return await self.app(scope, receive, send)
            called = WRITABLE.fullmatch(path)
            if scope["method"] != "POST" or not called:
                raise Rejected(404, "There is nothing here.")
            if called["route"] == "upload":
                body.limit(MAX_UPLOAD, UPLOAD_SECONDS)
                if await anyio.to_thread.run_sync(is_full):
                    raise Rejected(503, "The storage for images is full. Please try again in two minutes.")
                return await self.app(scope, body.for_form, send)
            body.limit(MAX_JSON, JSON_SECONDS)
            content = await body.read()
            self.check(called, content)
        except Rejected as rejected:
            await body.skip()
            return await JSONResponse({"detail": rejected.message}, rejected.status)(scope, receive, send)
        return await self.app(scope, body.replay(content), send)

    def check(self, called: re.Match, content: bytes) -> None:
        """
        Checks the body of a request.

        Raises:
            Rejected: if the body is not a JSON object, has too many parts, is nested too deeply, or calls an unknown
                function.
        """
        if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
            raise Rejected(400, f"The body has more than {MAX_CONTAINERS:,} lists and objects.")
        try:
            values = parse_json(content)
        except ValueError as error:
            raise Rejected(400, f"The body cannot be read as JSON: {error}.") from None
        if not isinstance(values, dict):
            raise Rejected(400, "The body must be a JSON object.")
        session = values.get("session_hash")
        if session is not None and not (isinstance(session, str) and re.fullmatch(r"[\w-]{1,100}", session, re.ASCII)):
            raise Rejected(400, "session_hash: up to 100 letters, digits, - and _ are accepted.")
        labels = self.labels(called, values.get("fn_index"))
        if is_too_deep(values):
            data = values.get("data")
            named = [*zip(labels, data if isinstance(data, list) else [])]
            named += [(name, values.get(name)) for name in (*labels, "event_data")]  # call/v2 passes inputs by name
            name = next((name for name, value in named if is_too_deep(value, MAX_DEPTH - 2)), "The body")
            raise Rejected(400, f"{name}: this is nested too deeply; the limit is {MAX_DEPTH} levels.")

    def labels(self, called: re.Match, index: Any) -> list[str]:
        """Returns the names of the inputs of the called function."""
        if called["route"] in ("cancel", "reset"):
            return []
        functions = self.blocks.fns
        if index is not None:  # the page calls by number, at /run/predict or /queue/join
            function = functions.get(index) if isinstance(index, int) else None
            missing = "fn_index: there is no function with this number."
        else:
            function = next((each for each in functions.values() if each.api_name == called["name"]), None)
            names = [f"/{each.api_name}" for each in functions.values() if each.api_visibility == "public"]
            missing = f"There is no such endpoint; there are: {', '.join(names)}."
        if function is None:
            raise Rejected(404, missing)
        return [str(getattr(component, "label", None)) for component in function.inputs]


class _Body:
    """Reads the body of a request within limits."""

    def __init__(self, receive: Receive, declared: bytes):
        self._receive = receive
        self.declared = int(declared) if declared.isdigit() else 0
        self.taken, self.ended = 0, False

    def limit(self, most: int, seconds: float) -> None:
        self.most, self.deadline = most, anyio.current_time() + seconds
        if self.declared > most:
            raise self.too_large()

    def too_large(self) -> Rejected:
        return Rejected(413, f"The body is larger than the maximum allowed size of {self.most // 1024} KB.")

    async def receive(self) -> Message:
        message = await self._receive()
        self.taken += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message

    async def receive_within_limits(self) -> Message:
        with anyio.move_on_after(self.deadline - anyio.current_time()):
            message = await self.receive()
            if self.taken > self.most:
                raise self.too_large()
            return message
        raise Rejected(408, "The body took too long.")

    async def for_form(self) -> Message:
        """Raises the error of the form parser. gradio then deletes the files it has written, and answers."""
        if self.ended:
            return await self._receive()
        try:
            return await self.receive_within_limits()
        except Rejected as rejected:
            await self.skip()
            raise MultiPartException(rejected.message) from None

    async def read(self) -> bytes:
        parts = []
        while not self.ended:
            parts.append((await self.receive_within_limits()).get("body", b""))
        return b"".join(parts)

    def replay(self, content: bytes) -> Receive:
        waiting = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await self._receive()

        return receive

    async def skip(self) -> None:
        with anyio.move_on_after(SKIPPED_SECONDS):
            while not self.ended and self.taken < SKIPPED_BYTES:
                await self.receive()
