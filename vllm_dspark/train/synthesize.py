"""Let the target answer: the text that a drafter is trained on.

Items of a plan are asked many at a time and handed to the ledger in their order. It
knows nothing of vLLM: who answers is an `Answerer`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_dspark.train.ledger import Answer, Ledger, Outcome
from vllm_dspark.train.plan import Item, Settings, plan
from vllm_dspark.train.prompts import Ids, Prompt, Renderer, Stop
from vllm_dspark.train.tokens import TokenWriter

__all__ = ["Answer", "Answerer", "Goal", "Synthesis"]

ITEMS_PER_SHARD = 256
TURN_TEMPERATURE = 1.0  # of the user turns that the target writes
# Finished answers that wait for an earlier one, in multiples of the concurrency.
_AHEAD = 8


class Answerer(Protocol):
    """Asks the target; may be called many times at once."""

    async def __call__(
        self,
        prompt: Ids,
        *,
        temperature: float,
        seed: int,
        max_tokens: int,
        stop: Stop | None = None,
    ) -> Answer:
        """The continuation of a prompt.

        Raises:
            ValueError: the target cannot answer any more, with the cause.
        """


@dataclass(frozen=True, slots=True)
class Goal:
    """When to stop: at whichever number is reached first, None being never."""

    samples: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.samples is None and self.tokens is None:
            raise ValueError("say when to stop: --samples N or --tokens N, or both")
        for name in ("samples", "tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; at least 1")

    def reached(self, samples: int, tokens: int) -> bool:
        """Whether so many samples with so many response tokens are enough."""
        return (self.samples is not None and samples >= self.samples) or (
            self.tokens is not None and tokens >= self.tokens
        )


class Synthesis:
    """A run that fills a token folder; also one that continues an earlier run.

    Args:
        settings: what is asked.
        prompts: of files; for a base target without any, its beginning of text.
        renderer: of the target.
        writer: the folder.
        answer: asks the target.
        items_per_shard: what is at most lost when killed.

    Attributes:
        ledger: what was kept and dropped.
        generated: tokens of this run, those of dropped answers and own turns included.
    """

    def __init__(
        self,
        settings: Settings,
        prompts: Sequence[Prompt],
        renderer: Renderer,
        writer: TokenWriter,
        answer: Answerer,
        items_per_shard: int = ITEMS_PER_SHARD,
    ) -> None:
        self.ledger = Ledger(writer, settings.min_response_tokens, items_per_shard)
        self.generated = 0
        self._settings = settings
        self._plan = plan(settings, prompts)
        self._renderer = renderer
        self._answer = answer
        self._header: Ids = ()
        self._stop = Stop()
        if settings.self_share:
            self._header, self._stop = renderer.user_header()

    async def run(
        self, goal: Goal, concurrency: int, progress: Callable[[], None]
    ) -> bool:
        """Ask until the goal is reached; what was taken is in shards afterwards.

        Args:
            goal: counts the folder's samples of earlier runs too.
            concurrency: questions at a time.
            progress: called after each step; look at the attributes.

        Returns:
            Whether the goal was reached; if not, the prompts are used up.

        Raises:
            ValueError: as `Ledger.take` and `Answerer`.
        """
        items = itertools.islice(self._plan, self.ledger.next_item, None)
        running: set[asyncio.Task[Outcome]] = set()
        done: dict[int, Outcome] = {}
        try:
            while not self._reached(goal):
                while self._may_ask(goal, concurrency, len(running), len(done)):
                    if (item := next(items, None)) is None:
                        break
                    running.add(asyncio.create_task(self._ask(item)))
                if not running:
                    return False
                finished, _ = await asyncio.wait(
                    running, return_when=asyncio.FIRST_COMPLETED
                )
                done |= {t.result().item.number: t.result() for t in finished}
                running -= finished
                while self.ledger.next_item in done and not self._reached(goal):
                    self.ledger.take(done.pop(self.ledger.next_item))
                progress()
            return True
        finally:
            for task in running:
                task.cancel()
            self.ledger.flush()
            await asyncio.gather(*running, return_exceptions=True)

    def _reached(self, goal: Goal) -> bool:
        return goal.reached(self.ledger.samples, self.ledger.response_tokens)

    def _may_ask(self, goal: Goal, concurrency: int, running: int, done: int) -> bool:
        if running >= concurrency or done > _AHEAD * concurrency:
            return False
        # More than are still wanted would be asked for nothing.
        wanted = goal.samples
        return wanted is None or self.ledger.samples + running + done < wanted

    async def _ask(self, item: Item) -> Outcome:
        prompt = item.prompt
        if prompt is None:
            own = await self._own_prompt(item)
            if isinstance(own, str):
                return Outcome(item, dropped=own)
            prompt = own
        answer = await self._answer(
            prompt,
            temperature=item.temperature,
            seed=item.seed,
            max_tokens=self._settings.max_response_tokens,
        )
        self.generated += len(answer.ids)
        return Outcome(item, prompt, answer)

    async def _own_prompt(self, item: Item) -> Ids | str:
        """Let the target write a user turn: the prompt, or why it is of no use."""
        turn = await self._answer(
            self._header,
            temperature=TURN_TEMPERATURE,
            seed=item.turn_seed,
            max_tokens=self._settings.max_turn_tokens,
            stop=self._stop,
        )
        self.generated += len(turn.ids)
        if not turn.finished:
            return "unfinished prompt"
        prompt = self._renderer.own_prompt(turn.ids, self._stop)
        if isinstance(prompt, str):
            return prompt
        if len(prompt) > self._settings.max_prompt_tokens:
            return "long prompt"
        # The ledger would drop it too, but now the answer can be spared.
        return "duplicate prompt" if self.ledger.knows_prompt(prompt) else prompt
