"""The report of a load sweep: one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _sweep_slo as slo
from _sweep_plots import DOTS_PER_INCH
from _sweep_report import figures, number
from _sweep_summary import BEST, SUBJECT

from vllm_dspark import provenance

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .88rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: pre; line-height: 1.25; }
.wide { overflow-x: auto; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .note { color: #555; font-size: .88rem; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .8rem; }
.headline { display: flex; flex-wrap: wrap; gap: 1rem; }
.headline div { background: #f2f5fa; border-radius: .4rem; padding: .6rem 1rem; }
.headline b { font-size: 1.5rem; display: block; }
.bad { color: #a00; }
"""
# Each figure's file, and what it shows.
FIGURES = {
    "pareto.png": "Throughput against speed per user; the number is the load.",
    "throughput.png": "Throughput by load, and its ratio to no speculation (paired).",
    "slo.png": "Throughput that is carried at a service level (read off the curves).",
    "matched.png": "Speed per user against no speculation's at equal throughput.",
    "lengths.png": "Drafts verified and made per request and step, by load.",
    "domains.png": "Drafts verified of each domain while all are served together.",
    "open_loop.png": "Open loop: speed per user and TTFT by arriving requests.",
}


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html`` with the figures that are in the folder."""
    parts = [
        "<h1>Load sweep</h1>",
        _conditions(result),
        _headline(result),
        _left_out(result["left_out"]),
        *(_figure(folder / name, text) for name, text in FIGURES.items()),
        _ratios(result),
        _levels(result["slo"]),
        _arms(result),
        _texts(result.get("texts")),
        _provenance(result),
    ]
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Load sweep</title><style>{_STYLE}</style>\n<body>\n{body}\n</body>\n"
    )
    file = folder / "report.html"
    file.write_text(page)
    return file


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    table = f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
    return f'<div class="wide">{table}</div>'


def _figure(file: Path, caption: str) -> str:
    if not file.exists():
        return ""
    content = file.read_bytes()
    data = base64.b64encode(content).decode()
    text = html.escape(caption)
    # All figures at one scale: a PNG has its width at this place.
    width = int.from_bytes(content[16:20], "big") * 96 // DOTS_PER_INCH
    return (
        f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _conditions(result: dict[str, Any]) -> str:
    settings, where = result["settings"], result["provenance"]
    machine = where["machine"]
    versions = where["versions"]
    names = [f"{n} {versions[n]}" for n in ("vllm", "vllm-dspark") if n in versions]
    ends = "or fewer" if settings["stop_at_eos"] else "on average, none ends earlier"
    text = (
        f"{Path(settings['target']).name} on {machine['cores']} cores of "
        f"{machine['cpu']}; {', '.join(names)}. Answers of "
        f"{settings['output_tokens']} tokens {ends}; {_rounds(result)}."
    )
    return f"<p>{html.escape(text)}</p>"


def _rounds(result: dict[str, Any]) -> str:
    groups = (result["arms"], result["open_loop"])
    runs = [row["runs"] for by in groups for at in by.values() for row in at.values()]
    least, most = min(runs), max(runs)
    found = f"{most}" if least == most else f"{least} to {most}"
    return f"{found} round{'s' if most > 1 else ''} at each load"


def _headline(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    found = []
    for other, name in ((slo.BASE, "no speculation"), (BEST, "the best other arm")):
        by_load = {c: row["median"] for c, row in ratios.get(other, {}).items()}
        if by_load:
            low, high = (f(by_load, key=by_load.__getitem__) for f in (min, max))
            found += [
                (by_load[high], f"times {name} at best (C = {high})"),
                (by_load[low], f"times {name} at worst (C = {low})"),
            ]
    matched = result["matched"].get(SUBJECT, {})
    if matched:
        at = max(matched, key=matched.__getitem__)
        found.append((matched[at], f"times the speed per user at equal {at} tok/s"))
    if not found:
        return ""
    cells = [f"<div><b>{number(v, 2)}</b>{html.escape(t)}</div>" for v, t in found]
    title = html.escape(f"{SUBJECT}: output throughput")
    return f'<h2>{title}</h2><div class="headline">{"".join(cells)}</div>'


def _left_out(found: dict[str, str]) -> str:
    if not found:
        return ""
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd><pre>{html.escape(why)}</pre></dd>"
        for name, why in found.items()
    )
    return f"<h2>Arms that could not be served, and why</h2><dl>{rows}</dl>"


def _ratios(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    loads = sorted({load for row in ratios.values() for load in row}, key=int)
    rows = []
    for other in sorted(ratios, key=lambda name: name == BEST):
        cells = [ratios[other].get(load) for load in loads]
        rows.append([other, *(_spread(cell) for cell in cells)])
    if not rows:
        return ""
    names = [ratios[BEST].get(load, {}).get("arm", "-") for load in loads]
    rows.append(["(that is)", *(name.removeprefix("dspark-") for name in names)])
    title = f"<h2>Throughput of {html.escape(SUBJECT)} to other arms</h2>"
    note = (
        '<p class="note">Of the same round, then the median over rounds; in brackets '
        "the lowest and highest round. The best other arm is chosen at each load by "
        "its median throughput.</p>"
    )
    return title + note + _table(["clients", *loads], rows)


def _spread(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    runs = cell["runs"]
    spread = f"\n({min(runs):.2f} to {max(runs):.2f})" if len(runs) > 1 else ""
    return f"{cell['median']:.3f}{spread}"


def _levels(found: dict[str, Any]) -> str:
    text = ""
    for key, label, at_least in (slo.SPEED, slo.TTFT):
        if levels := found.get(key):
            arms = list(next(iter(levels.values())))
            rows = [
                [arm, *(number(row[arm], 1) for row in levels.values())] for arm in arms
            ]
            sign = "≥" if at_least else "≤"
            text += _table([f"{label} {sign}", *levels], rows)
    if not text:
        return ""
    return f"<h2>Output tok/s at a service level</h2>{text}"


def _arms(result: dict[str, Any]) -> str:
    columns = ["arm", "tok/s", "lowest", "highest", "/ none", "tok/s/user"]
    columns += ["TTFT p50", "p99 ms", "goodput/s", "τ", "verified", "drafted"]
    text = ""
    groups = (("clients", result["arms"]), ("", result["open_loop"]))
    for unit, arms in groups:
        loads = dict.fromkeys(load for by in arms.values() for load in by)
        for load in sorted(loads, key=lambda key: float(key.removesuffix("/s"))):
            rows = [_row(a, by[load]) for a, by in arms.items() if load in by]
            text += f"<h3>{load} {unit}</h3>" + _table(columns, rows)
    return f"<h2>All figures (medians over rounds)</h2>{text}"


def _row(arm: str, row: dict[str, Any]) -> list[str]:
    ratio = row.get("ratio_to_none") or row.get("speed_to_none") or {}
    low, high = row["output_throughput_range"]
    return [
        arm,
        *figures(row, "output_throughput"),
        number(low, 1),
        number(high, 1),
        number(ratio.get("median"), 3),
        *figures(row, "tok_s_per_user", "ttft_p50_ms", "ttft_p99_ms"),
        *figures(row, "request_goodput", "tau", "verify_length", "draft_length"),
    ]


def _texts(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    rows = "".join(
        f'<li class="{"bad" if entry["passed"] is False else ""}">{html.escape(arm)}: '
        f"{html.escape(entry['verdict'])}</li>"
        for arm, entry in found["arms"].items()
    )
    title = f"<h2>Are greedy texts those of {html.escape(found['reference'])}?</h2>"
    return f"{title}<ul>{rows}</ul>"


def _provenance(result: dict[str, Any]) -> str:
    kept = {key: result[key] for key in ("settings", "provenance", "idle_cores")}
    kept = provenance.portable(kept)  # a page is passed on
    text = html.escape(json.dumps(kept, indent=1, ensure_ascii=False))
    return (
        "<h2>Where this comes from</h2><details><summary>Settings, versions, machine"
        f"</summary><pre>{text}</pre></details>"
    )
