"""Asks a running `vllm serve` for continuations, token ids in and out.

Many requests at once, each with its own temperature and seed. Token ids come back as
the target emitted them, the end-of-text token included.
"""

import asyncio
from types import TracebackType
from typing import Any, Self

from vllm_dspark.cli.server import Server
from vllm_dspark.train.prompts import Ids, Stop
from vllm_dspark.train.synthesize import Answer

# A question may wait long behind others on a slow machine; a dead server is noticed by
# its closed connection.
_TIMEOUT = 3600.0
_ATTEMPTS = 4  # of a request whose connection breaks


class Completions:
    """An `Answerer` on a server; an asynchronous context manager.

    Args:
        server: ready.
        model: the name it serves the target under.
    """

    def __init__(self, server: Server, model: str) -> None:
        from openai import AsyncOpenAI

        self._server = server
        self._model = model
        # No retries of its own: `_ask` first looks whether the server is alive.
        self._client = AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT,
        )

    async def __call__(
        self,
        prompt: Ids,
        *,
        temperature: float,
        seed: int,
        max_tokens: int,
        stop: Stop | None = None,
    ) -> Answer:
        """The target's continuation of a prompt.

        Raises:
            ValueError: the server refused the request or is gone, with its cause.
        """
        from openai import APIStatusError

        body: dict[str, Any] = {
            "return_token_ids": True,
            # The plain distribution: vLLM would take these from the target's
            # generation_config.json, and a drafter must know what it leaves out.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if stop and stop.ids:
            body["stop_token_ids"] = list(stop.ids)
        if stop and stop.text:
            body["stop"] = [stop.text]
        try:
            completion = await self._ask(
                model=self._model,
                prompt=list(prompt),
                temperature=temperature,
                top_p=1.0,
                seed=seed,
                max_tokens=max_tokens,
                extra_body=body,
            )
        except APIStatusError as error:
            raise ValueError(
                f"the server refused a request: {error.message}\n{self._server.why()}"
            ) from error
        (choice,) = completion.choices
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            raise ValueError(
                "the server's answer has no token ids; vLLM 0.32 or newer gives them"
            )
        return Answer(tuple(ids), choice.finish_reason == "stop")

    async def _ask(self, **request: Any) -> Any:
        """Send a request, again if only its connection broke.

        A server closes connections that were idle for seconds, at times just when one
        is used again. The same request has the same answer, so nothing is doubled.
        """
        from openai import APIConnectionError

        for attempt in range(_ATTEMPTS):
            try:
                return await self._client.completions.create(**request)
            except APIConnectionError as error:
                trouble = error
                await asyncio.sleep(0.5 * (attempt + 1))
                self._server.check_alive()
        raise ValueError(
            f"the server does not answer: {trouble}\n{self._server.why()}"
        ) from trouble

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()
