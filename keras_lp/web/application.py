"""The requests of `phone_server`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from keras_lp.web.rounds import NotTaken, Rounds

_UPLOAD = 600  # seconds for an update to arrive
_DISCARD = 10  # seconds to read what is refused
_TICK = 1.0  # seconds between two looks at the clock
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Application:
    """Answers the requests of devices, and serves the page.

    Args:
        rounds: the rounds.
        local_epochs: passes of a device over its examples in a round.
        requests_per_minute: limit per client, and for joining and wrong tokens per address.

    Attributes:
        app: the ASGI application.
    """

    def __init__(self, rounds: Rounds, local_epochs: int, requests_per_minute: int) -> None:
        self._rounds = rounds
        self._local_epochs = local_epochs
        self._limiter = _Limiter(requests_per_minute)
        self._uploading: set[int] = set()  # clients
        routes = [
            Route("/join", self._answered(self._join), methods=["POST"]),
            Route("/round", self._answered(self._round)),
            Route("/weights", self._answered(self._weights)),
            Route("/update", self._answered(self._update), methods=["POST"]),
            Mount("/", StaticFiles(directory=self._rounds.folder / "site", html=True)),
        ]
        self.app = Starlette(routes=routes, lifespan=self._clock)

    @contextlib.asynccontextmanager
    async def _clock(self, _: Any) -> AsyncIterator[None]:
        """Ends rounds whose time is over while nobody asks."""

        async def tick() -> None:
            while True:
                await asyncio.sleep(_TICK)
                await run_in_threadpool(self._rounds.end_if_due)

        task = asyncio.create_task(tick())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def _answered(
        self, work: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Turns refusals into answers."""

        async def answer(request: Request) -> Response:
            try:
                response = await work(request)
            except NotTaken as refusal:
                response = JSONResponse({"reason": refusal.reason}, refusal.status)
                await self._discard(request)
            response.headers.update(_HEADERS)
            return response

        return answer

    async def _join(self, request: Request) -> Response:
        self._limiter.count(f"join {_address(request)}")
        return JSONResponse({"token": await run_in_threadpool(self._rounds.join)})

    async def _round(self, request: Request) -> Response:
        client = await self._client(request)
        now = await run_in_threadpool(self._rounds.current, client)
        return JSONResponse({**now, "local_epochs": self._local_epochs, "wait": 2})

    async def _weights(self, request: Request) -> Response:
        await self._client(request)
        path = await run_in_threadpool(self._rounds.weights_path)
        return FileResponse(path, media_type="application/zip")

    async def _update(self, request: Request) -> Response:
        client = await self._client(request)
        number, examples = (_whole(request, name) for name in ("round", "examples"))
        await run_in_threadpool(self._rounds.check, client, number)
        if client in self._uploading:
            raise NotTaken(429, "another update of this device is arriving")
        self._uploading.add(client)
        try:
            await self._upload(request, client, number, examples)
        finally:
            self._uploading.discard(client)
        return JSONResponse({"round": number})

    async def _upload(self, request: Request, client: int, number: int, examples: int) -> None:
        with tempfile.NamedTemporaryFile(
            dir=self._rounds.folder / "updates",
            prefix=f"{number}-",
            suffix=".partial",
            delete=False,
        ) as file:
            path = Path(file.name)
            try:
                async with asyncio.timeout(_UPLOAD):
                    await self._read_body(request, file)
                file.flush()
                os.fsync(file.fileno())
                file.close()
                await run_in_threadpool(self._rounds.receive, client, number, examples, path)
            except TimeoutError:
                raise NotTaken(408, f"it did not arrive within {_UPLOAD} seconds") from None
            finally:
                path.unlink(missing_ok=True)

    async def _read_body(self, request: Request, file: Any) -> None:
        largest = self._rounds.largest_update
        too_large = NotTaken(413, f"an update of this model has at most {largest:,} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > largest:
            raise too_large
        received = 0
        async for part in request.stream():
            received += len(part)
            if received > largest:
                raise too_large
            file.write(part)

    async def _discard(self, request: Request) -> None:
        """Reads what a client is still sending, so that it gets the answer."""
        left = self._rounds.largest_update
        with contextlib.suppress(TimeoutError, RuntimeError):  # it may have been read
            async with asyncio.timeout(_DISCARD):
                async for part in request.stream():
                    left -= len(part)
                    if left < 0:
                        return

    async def _client(self, request: Request) -> int:
        """Returns the client of a request, within its limit of requests."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise NotTaken(401, "a token is needed: `Authorization: Bearer ...`")
        try:
            client = await run_in_threadpool(self._rounds.client, token)
        except NotTaken:
            self._limiter.count(f"wrong {_address(request)}")
            raise
        self._limiter.count(f"client {client}")
        return client


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _whole(request: Request, name: str) -> int:
    value = request.query_params.get(name, "")
    if not value.isascii() or not value.isdecimal() or len(value) > 12 or int(value) < 1:
        raise NotTaken(400, f"`{name}` must be a whole number above 0")
    return int(value)


class _Limiter:
    """Refuses what comes too often.

    Args:
        per_minute: how many requests are allowed in a minute.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: dict[str, deque[float]] = {}

    def count(self, key: str) -> None:
        """Counts a request; raises `NotTaken` above the limit."""
        now = time.monotonic()
        if len(self._times) > 10_000:
            recent = ((k, one) for k, one in self._times.items() if one and one[-1] > now - 60)
            self._times = dict(recent)
        times = self._times.setdefault(key, deque())
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self._per_minute:
            raise NotTaken(429, f"more than {self._per_minute} requests in a minute; wait")
        times.append(now)
