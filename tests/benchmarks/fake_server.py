"""Stands in for `vllm serve` under load: streamed chat answers, and its counters.

Run as a script with a port, a number of drafts and, for a server that shall fail, the
number of requests after which it exits. Each chunk is one decoding step, whose drafts
are all accepted; a token is a word. Every request is appended to PORT.requests in the
working directory, one JSON object a line.
"""

import json
import os
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

PROMPT_TOKENS = 5


class Handler(BaseHTTPRequestHandler):
    """Answers what vLLM's benchmark client and the sweep ask."""

    drafts: ClassVar[int] = 0
    most: ClassVar[float] = float("inf")
    counts: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()
    requests: ClassVar[Path] = Path()

    def do_GET(self) -> None:
        models = json.dumps(
            {"object": "list", "data": [{"id": "m", "object": "model"}]}
        )
        texts = {"/metrics": self._metrics(), "/v1/models": models}
        self._send(texts.get(self.path, ""))

    def _metrics(self) -> str:
        names = ["inter_token_latency_seconds_count", "num_preemptions_total"]
        if self.drafts:
            names += [
                f"spec_decode_num_{n}_total"
                for n in ("drafts", "draft_tokens", "accepted_tokens")
            ]
            names.append("dspark_drafted_tokens_total")
        lines = [f'vllm:{n}{{engine="0"}} {self.counts[n]}' for n in names]
        if self.drafts:
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{position="0"}} 0')
        return "\n".join(lines) + "\n"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.counts["requests"] += 1
            with self.requests.open("a") as file:
                file.write(json.dumps(asked) + "\n")
            if self.counts["requests"] > self.most:
                os._exit(3)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        total = asked.get("max_completion_tokens") or asked["max_tokens"]
        self._words(1)
        left = total - 1
        while left:
            tokens = min(left, 1 + self.drafts)
            self._words(tokens)
            left -= tokens
            self._count(tokens)
        usage = {"completion_tokens": total, "prompt_tokens": PROMPT_TOKENS}
        fields: dict[str, Any] = {"usage": usage}
        if asked.get("vllm_xargs", {}).get("dspark_stats"):
            steps = (total - 1) // (1 + self.drafts)
            sums = {"drafted": 2 * self.drafts, "verified": self.drafts}
            sums["accepted"] = self.drafts
            told = {"rounds": steps} | {k: v * steps for k, v in sums.items()}
            fields["metrics"] = {"speculative_decoding": {"dspark": told}}
        self._event([], **fields)
        self.wfile.write(b"data: [DONE]\n\n")

    def _words(self, tokens: int) -> None:
        delta = {"content": "w " * tokens}
        self._event([{"index": 0, "delta": delta, "token_ids": [7] * tokens}])

    def _count(self, tokens: int) -> None:
        with self.lock:
            self.counts["inter_token_latency_seconds_count"] += 1
            self.counts["spec_decode_num_drafts_total"] += 1
            self.counts["spec_decode_num_draft_tokens_total"] += self.drafts
            self.counts["spec_decode_num_accepted_tokens_total"] += tokens - 1
            self.counts["dspark_drafted_tokens_total"] += 2 * self.drafts

    def _event(self, choices: list[Any], **fields: Any) -> None:
        body = json.dumps({"choices": choices, **fields})
        self.wfile.write(f"data: {body}\n\n".encode())

    def _send(self, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the log empty."""


def main() -> None:
    port, Handler.drafts = int(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        Handler.most = int(sys.argv[3])
        if Handler.most < 0:
            print("(EngineCore pid=2) ERROR 11-23 [x.py:1] ValueError: bad drafter")
            sys.exit(3)
    Handler.requests = Path(f"{port}.requests")
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
