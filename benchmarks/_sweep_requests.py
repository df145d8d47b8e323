"""What each request's answer says of its speculation, read while vLLM's client does.

The server's counters know no datasets; a request that asks (`dspark_stats`) gets its
own numbers with the usage at the end of its stream. vLLM's client drops them: so its
request function is given a session through which the stream's end is seen as well.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

BACKEND = "openai-chat-dspark"
ASK = {"vllm_xargs": {"dspark_stats": True}}
Counts = dict[str, float]
# Longer than the last events of a stream.
_TAIL = 4096


class RequestCounts:
    """Numbers of single requests, by request id.

    Its `register` puts a backend of the name `BACKEND` among those of vLLM's client.
    """

    def __init__(self) -> None:
        self.found: dict[str, Counts] = {}

    def register(self) -> None:
        """Make `BACKEND` report here from now on."""
        from vllm.benchmarks.lib import endpoint_request_func as functions

        chat = functions.ASYNC_REQUEST_FUNCS["openai-chat"]

        async def request(
            request_func_input: Any, session: Any, pbar: Any = None, **rest: Any
        ) -> Any:
            def end(tail: bytes) -> None:
                if counts := counts_in(tail):
                    self.found[request_func_input.request_id] = counts

            return await chat(request_func_input, _Session(session, end), pbar, **rest)

        functions.ASYNC_REQUEST_FUNCS[BACKEND] = request

    def take(self) -> dict[str, Counts]:
        """What was found since the last call."""
        found, self.found = self.found, {}
        return found


def counts_in(tail: bytes) -> Counts | None:
    """The plugin's numbers in the last bytes of a stream, if there are any."""
    for event in reversed(tail.decode(errors="replace").split("\n\n")):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            data = json.loads(event.strip().removeprefix("data: "))
            counts: Counts = data["metrics"]["speculative_decoding"]["dspark"]
            return counts
    return None


class _Session:
    """Stands in for aiohttp's session: what is asked of it is a POST."""

    def __init__(self, session: Any, end: Callable[[bytes], None]) -> None:
        self._session, self._end = session, end

    @contextlib.asynccontextmanager
    async def post(self, **arguments: Any) -> AsyncIterator[Any]:
        async with self._session.post(**arguments) as response:
            yield _Response(response, self._end)


class _Response:
    """An answer whose stream is seen as it is read."""

    def __init__(self, response: Any, end: Callable[[bytes], None]) -> None:
        self._response, self._end = response, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    @property
    def content(self) -> _Response:
        return self

    async def iter_any(self) -> AsyncIterator[bytes]:
        tail = b""
        async for chunk in self._response.content.iter_any():
            tail = (tail + chunk)[-_TAIL:]
            yield chunk
        self._end(tail)
