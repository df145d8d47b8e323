"""`vllm-dspark demo`: a real model through vLLM's server, with DSpark and without.

Prepares the target, streams three questions through each of the two servers, one
server at a time, and prints speed, acceptance and whether the texts are equal.
"""

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.cache import cache_root
from vllm_dspark.cli import display, distribution, near_tie, report, target
from vllm_dspark.cli.arms import Arm, run_arm
from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import (
    MEASURING_ARGUMENTS,
    SERVER_ARGUMENTS,
    SERVER_ENVIRONMENT,
)
from vllm_dspark.cli.signals import interrupt

PROMPTS = {
    "math": "A shop sells pens at 3 dollars each and notebooks at 5 dollars each. "
    "Tom buys 4 pens and 6 notebooks. How much does he pay? "
    "Please reason step by step.",
    "code": "Write a Python function that checks whether a string is a palindrome, "
    "and explain how it works.",
    "chat": "What should I think about before I adopt a dog?",
}
# Best measured on two cores with the demo drafter.
DRAFT_TOKENS = 3
SERVE_PORT = 8000
EAGER = (
    "Both servers ran eager (--enforce-eager, no torch.compile), to start sooner; the "
    "ratio of compiled ones may differ: vllm-dspark demo --compile, or "
    "make demo DEMO_ARGS=--compile"
)
COMPILED = "Both servers ran compiled (torch.compile)."

_EXAMPLE = """example:
  vllm-dspark demo                       about 5 minutes on a laptop
  vllm-dspark demo --json result.json    the same, figures for machines
  vllm-dspark demo --serve               leave the server running
  vllm-dspark demo --paths               only prepare; print the folders
"""


def add_parser(subparsers: Any) -> None:
    """Add the ``demo`` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="a real model with and without DSpark",
        description="Serve SmolLM2-135M with DSpark and without, and compare.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--drafter", type=Path, help="drafter folder (default: the repository's)")
    add("--num-speculative-tokens", type=int, default=DRAFT_TOKENS, metavar="K")
    add("--max-tokens", type=int, default=128, help="tokens of an answer (%(default)s)")
    add("--repeats", type=int, default=2, help="times each prompt is measured")
    add("--port", type=int, help="port of the server (default: a free one)")
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add("--paths", action="store_true", help="prepare, print the folders as JSON, stop")
    add("--serve", action="store_true", help="leave the DSpark server running")
    add("--compile", action="store_true", help="torch.compile both servers' models")
    # For developers: another method in DSpark's place, for example ngram.
    add("--speculative-config", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    # A stopped `timeout` or CI job must not leave a server behind.
    signal.signal(signal.SIGTERM, interrupt)
    console = Console()
    if arguments.paths:
        # Standard output's last line is for machines, so progress goes elsewhere.
        console = Console(stderr=True)
        print(json.dumps({k: str(v) for k, v in _folders(arguments, console).items()}))
        return 0
    _check_arguments(arguments)
    if trouble := distribution.inspect().trouble:
        raise ValueError(trouble)
    folders = _folders(arguments, console)
    if arguments.serve:
        return _serve(arguments, folders, console)
    arms = _measure(arguments, folders, console)
    return _report(arguments, folders, arms, console)


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("num_speculative_tokens", "max_tokens", "repeats"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 1")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        # Now, not after five minutes of work.
        raise ValueError(f"--json: there is no folder {arguments.json.parent}")


def find_drafter(given: Path | None) -> Path:
    """The drafter folder: the one given, or the checkout's own."""
    path = given
    if path is None:
        path = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-dspark"
        if not path.is_dir():
            raise ValueError(
                "the demo drafter lies in the repository's models/ folder, which a "
                "pip-installed package does not carry: run from a clone with "
                "`make demo`, or give its folder with --drafter"
            )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no drafter folder: it has no config.json")
    return path.absolute()


def _folders(arguments: argparse.Namespace, console: Console) -> dict[str, Path]:
    drafter = find_drafter(arguments.drafter)

    def say(line: str) -> None:
        console.print(f"target: {line}")

    return {"target": target.prepare(say), "drafter": drafter}


def speculative_config(
    arguments: argparse.Namespace, folders: dict[str, Path]
) -> dict[str, Any]:
    """What goes into ``vllm serve --speculative-config``."""
    if arguments.speculative_config is not None:
        return dict(arguments.speculative_config)
    return {
        "method": "dspark",
        "model": str(folders["drafter"]),
        "num_speculative_tokens": arguments.num_speculative_tokens,
    }


def _server(
    arguments: argparse.Namespace,
    folders: dict[str, Path],
    name: str,
    config: dict[str, Any] | None,
    extra: list[str],
) -> Server:
    return Server(
        folders["target"],
        [
            *["--served-model-name", target.NAME],
            *SERVER_ARGUMENTS,
            *extra,
            # Without torch.compile a server starts in 30 s instead of 110 the first
            # time; two of those beside the set-up come too close to ten minutes.
            # One stream, two cores, tokens/s eager and compiled: 30 and 31 plain, 45
            # and 41 with DSpark. The result says which it was.
            *([] if arguments.compile else ["--enforce-eager"]),
            *speculative_arguments(config),
        ],
        log=cache_root() / "logs" / f"serve-{name}.log",
        environment=SERVER_ENVIRONMENT,
        port=arguments.port,
    )


def _serve(
    arguments: argparse.Namespace, folders: dict[str, Path], console: Console
) -> int:
    arguments.port = arguments.port or SERVE_PORT
    config = speculative_config(arguments, folders)
    with _server(arguments, folders, "serve", config, []) as server:
        display.wait_for(console, server, "starting vllm serve with DSpark")
        body = {
            "model": target.NAME,
            "messages": [{"role": "user", "content": PROMPTS["chat"]}],
        }
        print(
            f"\ncurl {server.url}/v1/chat/completions -H 'Content-Type: "
            f"application/json' -d {shlex.quote(json.dumps(body))}\n\n"
            "Ctrl-C stops the server.",
            flush=True,
        )
        status = server.wait()
        raise ValueError(f"vllm serve ended with status {status}\n{server.why()}")


def _measure(
    arguments: argparse.Namespace, folders: dict[str, Path], console: Console
) -> dict[str, Arm]:
    """Run both arms, one server at a time: two would share the cores."""
    config = speculative_config(arguments, folders)
    arms: dict[str, Arm] = {}
    for name, arm_config in ((str(config["method"]), config), ("none", None)):
        console.rule(
            f"{name}: {json.dumps(arm_config)}" if arm_config else "no speculation"
        )
        with _server(
            arguments, folders, name, arm_config, MEASURING_ARGUMENTS
        ) as server:
            seconds = display.wait_for(console, server, f"starting vllm serve ({name})")
            arm = arms[name] = Arm(name, seconds)
            run_arm(
                arm,
                server,
                PROMPTS,
                lambda prompt: display.answer_printer(console, prompt, PROMPTS[prompt]),
                arguments.max_tokens,
                arguments.repeats,
            )
        console.print()
    return arms


def _report(
    arguments: argparse.Namespace,
    folders: dict[str, Path],
    arms: dict[str, Arm],
    console: Console,
) -> int:
    fast, plain = arms.values()
    console.rule("result")
    console.print(display.result_table(arms))
    console.print(COMPILED if arguments.compile else EAGER)
    display.print_speculation(console, fast)
    found = near_tie.differences(folders["target"], fast.answers, plain.answers)
    display.print_differences(console, found, len(PROMPTS))
    if arguments.json:
        result = report.as_json(arms, found, PROMPTS)
        result["speculative_config"] = speculative_config(arguments, folders)
        result["server_arguments"] = SERVER_ARGUMENTS + MEASURING_ARGUMENTS
        result["server_environment"] = SERVER_ENVIRONMENT
        result["eager"] = not arguments.compile
        result["provenance"] = provenance.collect()
        provenance.write_json(arguments.json, result)
        console.print(f"written: {arguments.json}")
    sys.stdout.flush()
    return 0
