"""Load that jumps: so many streaming clients, then at once so many others."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from _sweep_client import answer_tokens
from _sweep_prompts import Prompts


class Load:
    """Clients that each keep one greedy streamed chat request going.

    Args:
        url: of the server.
        model: the name it serves.
        prompts: what is asked, in turn.
        tokens: of an answer on average.
        spread: see `_sweep_client.answer_tokens`.
    """

    def __init__(
        self, url: str, model: str, prompts: Prompts, tokens: int, spread: float
    ) -> None:
        self._url, self._model, self._prompts = url, model, prompts
        self._tokens, self._spread = tokens, spread
        self._numbers = itertools.count()

    def run(
        self, loads: Sequence[int], seconds: float, tell: Callable[[str], None]
    ) -> list[float]:
        """Keep each load up for so long; returns when each began (monotonic clock).

        Clients that a jump leaves too many break off in the middle of their answers.

        Raises:
            ValueError: a request failed.
        """
        return asyncio.run(self._run(loads, seconds, tell))

    async def _run(
        self, loads: Sequence[int], seconds: float, tell: Callable[[str], None]
    ) -> list[float]:
        import aiohttp

        unlimited = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        clients: list[asyncio.Task[None]] = []
        marks = []
        async with aiohttp.ClientSession(
            timeout=unlimited, connector=connector
        ) as session:
            for load in loads:
                marks.append(time.monotonic())
                while len(clients) > load:
                    clients.pop().cancel()
                while len(clients) < load:
                    clients.append(asyncio.create_task(self._client(session)))
                tell(f"{load} clients for {seconds:.0f} s")
                ended, _ = await asyncio.wait(
                    clients, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                for client in ended:
                    client.result()  # they end with an error only
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            # The log is whole when a request ends and no other is left.
            await self._ask(session, 2)
        return marks

    async def _client(self, session: Any) -> None:
        while True:
            place = next(self._numbers)
            await self._ask(session, answer_tokens(self._tokens, self._spread, place))

    async def _ask(self, session: Any, tokens: int) -> None:
        from vllm.benchmarks.lib.endpoint_request_func import (
            RequestFuncInput,
            async_request_openai_chat_completions,
        )

        number = next(self._numbers)
        (prompt,) = self._prompts.take(number, 1)
        request = RequestFuncInput(
            prompt="",
            chat_messages=prompt.messages,
            api_url=f"{self._url}/v1/chat/completions",
            prompt_len=prompt.tokens,
            output_len=tokens,
            model=self._model,
            extra_body={"temperature": 0.0},
            ignore_eos=True,
            request_id=f"burst-{number}",
        )
        output = await async_request_openai_chat_completions(request, session)
        if not output.success:
            reason = output.error.strip().splitlines() or ["no reason given"]
            raise ValueError(f"a request failed: {reason[-1]}")
