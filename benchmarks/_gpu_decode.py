"""Text from a Llama-like target by the hundred thousand tokens a second, on one GPU.

A fixed number of slots, each with its own K/V rows, are stepped by one CUDA graph:
every step feeds one token to every slot, of the prompt as long as it lasts and then
what was sampled. The host looks every few steps which slots are done and hands them
the next prompts. On a CPU the same runs without a graph, for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOOK_EVERY = 8  # steps between looks at what is done


@dataclass(frozen=True)
class Request:
    """One continuation asked for.

    Args:
        prompt: token ids.
        limit: most tokens of the continuation.
        temperature: 0 is greedy.
        stop: a token that ends it, besides the target's own.
        tag: anything, handed back.
    """

    prompt: tuple[int, ...]
    limit: int
    temperature: float
    stop: int = -1
    tag: Any = None


class Weights:
    """Of a Hugging Face Llama, side by side where one product will do."""

    def __init__(self, target: Any) -> None:
        config = target.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or (
            config.hidden_size // self.heads
        )
        self.eps = config.rms_norm_eps
        self.theta = float(config.rope_parameters["rope_theta"])
        self.embeddings = target.get_input_embeddings().weight
        self.lm_head = target.get_output_embeddings().weight
        self.norm = target.model.norm.weight
        self.layers = []
        for layer in target.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            if any(m.bias is not None for m in (*qkv, attention.o_proj)):
                raise ValueError("attention with biases is not known here")
            self.layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat([m.weight for m in qkv]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )


class Decoder:
    """Slots that are stepped together.

    Args:
        target: Hugging Face Llama with tied or untied embeddings, no biases.
        slots: B.
        length: T, most tokens of prompt and continuation.
        ends: the target's end tokens.
    """

    def __init__(self, target: Any, slots: int, length: int, ends: list[int]) -> None:
        self.weights = w = Weights(target)
        self.slots, self.length = slots, length
        device, dtype = w.embeddings.device, w.embeddings.dtype
        self.device = device
        ints: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.ends = torch.tensor(ends, **ints)
        self.text = torch.zeros(slots, length, **ints)
        self.at = torch.zeros(slots, **ints)
        self.prompt_len = torch.ones(slots, **ints)
        self.last = torch.zeros(slots, **ints)  # of the positions a slot may fill
        self.stop = torch.full((slots,), -1, **ints)
        self.inverse = torch.ones(slots, device=device)  # 1 / temperature
        self.noise = torch.zeros(slots, device=device)  # 0 where greedy
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.row = torch.arange(slots, **ints)
        shape = (len(w.layers), slots, w.kv_heads, length, w.dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        index = torch.arange(0, w.dim, 2, dtype=torch.float32, device=device)
        angle = torch.arange(length, device=device)[:, None] * w.theta ** (
            -index / w.dim
        )
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.graph: Any = None

    # ---- a step ----

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.weights.eps)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the next token, ``[B, V]``; writes K/V at each slot's position."""
        w, at = self.weights, self.at
        x = w.embeddings[tokens]
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]
        columns = torch.arange(self.length, device=self.device)
        hidden = columns > at[:, None]
        bias = torch.zeros(hidden.shape, dtype=x.dtype, device=self.device)
        bias = bias.masked_fill(hidden, float("-inf"))[:, None, None]
        group = w.heads // w.kv_heads
        for layer, (norm, qkv, out, norm2, gate_up, down) in enumerate(w.layers):
            states = F.linear(self._norm(x, norm), qkv).view(self.slots, -1, w.dim)
            query, key, value = states.split([w.heads, w.kv_heads, w.kv_heads], dim=1)
            query = self._rotate(query, cos, sin)
            self.keys[layer][self.row, :, at] = self._rotate(key, cos, sin)
            self.values[layer][self.row, :, at] = value
            # Heads that share keys are rows of one query.
            query = query.reshape(self.slots, w.kv_heads, group, w.dim)
            seen = F.scaled_dot_product_attention(
                query,
                self.keys[layer],
                self.values[layer],
                attn_mask=bias.expand(-1, w.kv_heads, group, -1),
            )
            x = x + F.linear(seen.reshape(self.slots, -1), out)
            gate, up = F.linear(self._norm(x, norm2), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(self._norm(x, w.norm), w.lm_head)

    def step(self) -> None:
        """One token for every slot that is not done."""
        tokens = self.text[self.row, self.at]
        scores = self.logits(tokens).float() * self.inverse[:, None]
        exponential = torch.empty_like(scores).exponential_()
        scores = scores - self.noise[:, None] * exponential.log()
        following = (self.at + 1).clamp_max(self.length - 1)
        given = following < self.prompt_len
        token = torch.where(given, self.text[self.row, following], scores.argmax(-1))
        kept = self.text[self.row, following]
        self.text[self.row, following] = torch.where(self.done, kept, token)
        ended = (token[:, None] == self.ends).any(-1) | (token == self.stop)
        ended = ended | (following >= self.last)
        done = self.done | (~given & ended)
        self.at.copy_(torch.where(self.done, self.at, following))
        self.done.copy_(done)

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the graph, on a GPU."""
        if self.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    # ---- the host ----

    @torch.inference_mode()
    def run(
        self, requests: Iterator[Request]
    ) -> Iterator[tuple[Request, list[int], bool]]:
        """Continuations as they are done: request, tokens, whether it ended itself."""
        running: list[Request | None] = [None] * self.slots
        more = True
        while True:
            free = self.done.nonzero().flatten().tolist()
            yield from self._harvest(running, free)
            if more:
                more = self._refill(running, free, requests)
            if not any(running):
                return
            for _ in range(LOOK_EVERY):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.step()

    def _harvest(
        self, running: list[Request | None], free: list[int]
    ) -> Iterator[tuple[Request, list[int], bool]]:
        ready = [slot for slot in free if running[slot] is not None]
        if not ready:
            return
        texts = self.text[ready].tolist()
        ends = self.at[ready].tolist()
        own = set(self.ends.tolist())
        for slot, text, end in zip(ready, texts, ends, strict=True):
            request = running[slot]
            assert request is not None
            running[slot] = None
            tokens = text[len(request.prompt) : end + 1]
            yield request, tokens, tokens[-1] in own or tokens[-1] == request.stop

    def _refill(
        self,
        running: list[Request | None],
        free: list[int],
        requests: Iterator[Request],
    ) -> bool:
        """Hand free slots the next requests; False when there are no more."""
        taken, rows = [], []
        for slot in free:
            request = next(requests, None)
            if request is None:
                break
            running[slot] = request
            taken.append(slot)
            rows.append(request)
        if taken:
            self._load(taken, rows)
        return len(taken) == len(free)

    def _load(self, slots: list[int], rows: list[Request]) -> None:
        text = torch.zeros(len(rows), self.length, dtype=torch.int64)
        for row, request in zip(text, rows, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        lengths = torch.tensor([len(r.prompt) for r in rows])
        limits = torch.tensor([r.limit for r in rows])
        temperature = torch.tensor([r.temperature for r in rows])
        index = torch.tensor(slots, device=self.device)
        last = (lengths + limits - 1).clamp_max(self.length - 1)
        sampled = temperature > 0
        for own, values in (
            (self.text, text),
            (self.prompt_len, lengths),
            (self.last, last),
            (self.stop, torch.tensor([r.stop for r in rows])),
            (self.inverse, torch.where(sampled, 1 / temperature, 1.0)),
            (self.noise, sampled.float()),
            (self.at, torch.zeros_like(lengths)),
            (self.done, torch.zeros(len(rows), dtype=torch.bool)),
        ):
            own[index] = values.to(self.device, own.dtype)
