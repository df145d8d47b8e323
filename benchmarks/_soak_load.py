"""Mixed traffic for a soak: what clients ask of a server, and what went wrong."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)

from vllm_dspark.cli.server import Server

PREFIX = "You are a careful assistant. Think before you answer. " * 8
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
KINDS = (
    "greedy",
    "sampled",
    "seeded",
    "abort",
    "slow",
    "schema",
    "several",
    "invalid",
)
_PAUSE = 1.0  # mean seconds between two requests of a client, exponentially distributed
_SLOW = 0.25  # seconds that a slow reader looks at each piece


def connect(server: Server) -> Any:
    """A client that reports errors instead of trying again."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Load:
    """Clients that send mixed requests until told to stop.

    Args:
        server: where to.
        prompts: messages to choose from.
        seed: of the choices.
        kinds: of requests that are sent.
    """

    def __init__(
        self,
        server: Server,
        prompts: list[Any],
        seed: int,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self.server, self.prompts, self.seed = server, prompts, seed
        self.kinds = kinds
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(
        self, clients: int, seconds: float, watch: Callable[[float], object]
    ) -> None:
        """Ask for so many seconds, or until a request fails that should not.

        Args:
            clients: at once.
            seconds: then the last requests are awaited.
            watch: called every second or so with the seconds that are over.
        """
        threads = [
            threading.Thread(target=self._client, args=(i,), daemon=True)
            for i in range(clients)
        ]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while (over := time.monotonic() - start) < seconds and not self.failures:
                watch(over)
                time.sleep(min(1, max(0, seconds - over)))
        finally:
            self.stop.set()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 100 + number)
        client = connect(self.server)
        while not self.stop.wait(rng.expovariate(1 / _PAUSE)):
            kind = rng.choice(self.kinds)
            try:
                getattr(self, f"_{kind}")(client, rng)
                self.counts[kind] += 1
            except Exception as error:  # whatever it is, the soak has failed
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")

    def _ask(self, client: Any, rng: random.Random, **extra: Any) -> Any:
        messages = list(rng.choice(self.prompts))
        if rng.random() < 0.5:  # a shared prefix, so that blocks are reused
            messages = [{"role": "system", "content": PREFIX}, *messages[-1:]]
        settings: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": rng.randint(1, 192),
        }
        return client.chat.completions.create(
            model="target", messages=messages, **{**settings, **extra}
        )

    def _greedy(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, stop=["\n\n\n"])

    def _sampled(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, temperature=rng.choice((0.5, 1.0, 1.5)), top_p=0.9)

    def _seeded(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, temperature=1.0, seed=rng.randrange(1 << 31))

    def _abort(self, client: Any, rng: random.Random) -> None:
        stream = self._ask(client, rng, stream=True, max_tokens=128)
        for _, _chunk in zip(range(rng.randint(1, 10)), stream, strict=False):
            pass
        stream.close()

    def _slow(self, client: Any, rng: random.Random) -> None:
        for _chunk in self._ask(client, rng, stream=True, max_tokens=48):
            time.sleep(_SLOW)

    def _schema(self, client: Any, rng: random.Random) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        self._ask(client, rng, response_format=form)

    def _several(self, client: Any, rng: random.Random) -> None:
        self._ask(client, rng, n=2, temperature=0.8, presence_penalty=0.5)

    def _invalid(self, client: Any, rng: random.Random) -> None:
        from openai import BadRequestError

        try:
            self._ask(client, rng, temperature=-1.0)
        except BadRequestError:
            return
        raise AssertionError("a negative temperature was served")
