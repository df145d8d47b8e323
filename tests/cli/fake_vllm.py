"""Stands in for `vllm serve`: health, models, streamed answers, metrics, completions.

Run as a script with a port and a mode. ``speculate`` answers in chunks of two tokens
and counts one accepted draft a round; ``plain`` in chunks of one and counts nothing;
``differ`` is plain with another last token; ``die`` stops with an error; ``vanish``
stops at the 20th completion, ``refuse`` refuses them, ``hiccup`` drops connections.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

PROMPT_IDS = [1, 2, 3]
WORDS = ["The ", "answer ", "is ", "42", ".", "!"]


class Handler(BaseHTTPRequestHandler):
    """Answers what the demo asks of a vLLM server."""

    mode: ClassVar[str] = "plain"
    rounds: ClassVar[int] = 0
    completions: ClassVar[int] = 0

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(json.dumps({"object": "list", "data": [{"id": "fake"}]}))
        elif self.path == "/metrics":
            self._send(self._metrics())
        else:
            self._send("")

    def _metrics(self) -> str:
        if self.mode != "speculate":
            return "other_total 1\n"
        labels = 'engine="0",model_name="fake"'
        lines = [
            f"vllm:spec_decode_num_{name}_total{{{labels}}} {count}"
            for name, count in (
                ("drafts", self.rounds),
                ("draft_tokens", 2 * self.rounds),
                ("accepted_tokens", self.rounds),
            )
        ]
        for position, count in ((0, self.rounds), (1, 0)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{{labels},position="{position}"}} {count}')
        return "\n".join(lines) + "\n"

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(size))
        if self.path == "/v1/completions":
            self._complete(asked)
            return
        assert asked["temperature"] == 0 and asked["return_token_ids"]
        words = WORDS[: asked["max_tokens"]]
        step = 2 if self.mode == "speculate" else 1
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event([], "", PROMPT_IDS)
        for start in range(0, len(words), step):
            ids = list(range(start, min(start + step, len(words))))
            if self.mode == "differ" and start == len(words) - 1:
                ids = [99]
            self._event(ids, "".join(words[start : start + step]), None)
            type(self).rounds += 1
            time.sleep(0.002)
        self.wfile.write(b"data: [DONE]\n\n")

    def _complete(self, asked: dict[str, Any]) -> None:
        """Token ids that follow from prompt and seed; a user turn ends with 98, LF."""
        assert asked["return_token_ids"] and asked["top_p"] == 1.0
        assert asked["top_k"] == 0 and asked["repetition_penalty"] == 1.0
        type(self).completions += 1
        if self.mode == "hiccup" and self.completions % 7 == 0:
            self.close_connection = True  # without an answer
            return
        if self.mode == "vanish" and self.completions >= 20:
            print("(EngineCore pid=2) ERROR 11-23 [x.py:1] MemoryError: no more")
            sys.stdout.flush()
            os._exit(9)
        if self.mode == "refuse":
            body = json.dumps({"error": {"message": "prompt too long", "code": 400}})
            self._send(body, status=400)
            return
        start = sum(asked["prompt"]) + (asked["seed"] if asked["temperature"] else 0)
        length = asked["max_tokens"] - 3
        ids = [40 + (start * (i + 1) + start // 50 * i * i) % 50 for i in range(length)]
        ids.append(98 if asked.get("stop") == ["\n"] else 2)
        choice = {"index": 0, "text": "x", "finish_reason": "stop", "token_ids": ids}
        body = {"id": "x", "object": "text_completion", "created": 0, "model": "fake"}
        self._send(json.dumps({**body, "choices": [choice]}))

    def _event(self, ids: list[int], text: str, prompt_ids: list[int] | None) -> None:
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}}
        choice |= {"token_ids": ids, "finish_reason": None}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0}
        body = {**chunk, "model": "fake", "choices": [choice]}
        body["prompt_token_ids"] = prompt_ids
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def _send(self, text: str, status: int = 200) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the log to what the tests look for."""


def main() -> None:
    port, Handler.mode = int(sys.argv[1]), sys.argv[2]
    print("(APIServer pid=1) INFO 11-23 09:22:07 [launcher.py:195] getting ready")
    sys.stdout.flush()
    if Handler.mode == "die":
        print(
            "(APIServer pid=1) WARNING 11-23 [x.py:1] may cause `OSError: [Errno 24]`"
        )
        print(
            "(EngineCore pid=2) ERROR 11-23 09:22:07 [x.py:1] ValueError: bad drafter"
        )
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(3)
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
