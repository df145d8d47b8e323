"""The arms of the load sweep.

An arm is a name and what `vllm serve` is told beyond what all arms share. Knows
nothing of servers and load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
from bench_e2e import NGRAM

from vllm_dspark.cli.server import speculative_arguments

PREFIX = "dspark-"
# What each DSpark arm tells the plugin besides its drafter. No number of drafts is set
# by hand: the drafter's block is the limit.
DSPARK: dict[str, dict[str, Any]] = {
    "dspark-fixed": {"policy": "fixed"},
    "dspark-threshold": {"policy": "threshold"},
    "dspark-no-bypass": {"policy": "adaptive", "bypass": False},
    "dspark-adaptive": {"policy": "adaptive"},
}
_FIXED = re.compile(r"dspark-fixed-([1-9]\d*)")
# vLLM's own ways to draft; those of the second row need a --draft-model.
PEERS: dict[str, dict[str, Any]] = {
    "ngram": NGRAM,
    "suffix": {"method": "suffix"},
    "mtp": {"method": "mtp", "num_speculative_tokens": 1},
    "dflash": {"method": "dflash"},
    "eagle3": {"method": "eagle3", "num_speculative_tokens": 3},
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 3},
}
WITH_MODEL = ("dflash", "eagle3", "draft_model")
DEFAULT = (
    "none",
    "ngram",
    *(f"dspark-fixed-{n}" for n in (1, 3, 7)),
    "dspark-threshold",
    "dspark-no-bypass",
    "dspark-adaptive",
)
NAMES = ("none", *PEERS, "dspark-fixed-N", *DSPARK)
KEYS = ("speculative_config", "additional_config")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve the target: a server to start, or one at ``url``."""

    name: str
    speculative_config: dict[str, Any] | None = None
    additional_config: dict[str, Any] | None = None
    url: str | None = None

    @property
    def arguments(self) -> list[str]:
        """Arguments of `vllm serve` that belong to this arm alone."""
        found = speculative_arguments(self.speculative_config)
        if self.additional_config:
            found += ["--additional-config", json.dumps(self.additional_config)]
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def full_name(name: str) -> str:
    """The name with which an arm's results are kept: `fixed-3` is `dspark-fixed-3`."""
    long = PREFIX + name
    return long if long in DSPARK or _FIXED.fullmatch(long) else name


def named(
    name: str,
    drafter: str | None,
    models: Mapping[str, str] | None = None,
    tokens: Mapping[str, int] | None = None,
) -> Arm:
    """An arm of `NAMES`, `dspark-` at their beginning optional.

    Args:
        drafter: model folder of the DSpark arms.
        models: model folder of arms that are `WITH_MODEL` (and of `mtp`, where the
            heads are not in the target's own folder).
        tokens: drafts of vLLM's own methods, where not as in `PEERS`.

    Raises:
        ValueError: there is none of that name, or its model is not given.
    """
    name = full_name(name)
    if name == "none":
        return Arm(name)
    if name in PEERS:
        own = dict(PEERS[name])
        if model := (models or {}).get(name):
            own["model"] = model
        elif name in WITH_MODEL:
            raise ValueError(f"arm {name!r} needs --draft-model {name}=FOLDER")
        if count := (tokens or {}).get(name):
            own["num_speculative_tokens"] = count
        return Arm(name, own)
    spec: dict[str, Any] = {"method": "dspark", "model": drafter}
    options = DSPARK.get(name)
    if fixed := _FIXED.fullmatch(name):
        spec["num_speculative_tokens"] = int(fixed[1])
        options = DSPARK["dspark-fixed"]
    if options is None:
        raise ValueError(
            f"no arm is called {name!r} (known: {', '.join(NAMES)}); define one with "
            "--arm NAME='{\"speculative_config\": {...}}'"
        )
    if drafter is None:
        raise ValueError(f"arm {name!r} needs --drafter")
    return Arm(name, spec, {"dspark": options})


def running(text: str) -> Arm:
    """An arm whose server runs already, typed as NAME=URL.

    Raises:
        ValueError: it is not of that form.
    """
    name, equals, url = text.partition("=")
    if not equals or not _is_name(name) or not url.startswith(("http://", "https://")):
        raise ValueError(f"--url is {text!r}; it must be NAME=http://HOST:PORT")
    return Arm(name, url=url)


def _is_name(name: str) -> bool:
    return bool(name) and "/" not in name


def custom(text: str) -> Arm:
    """An arm typed as NAME=JSON; the JSON's keys are `KEYS`, either may be absent.

    Raises:
        ValueError: it is not of that form.
    """
    name, equals, raw = text.partition("=")
    form = f"--arm is {text!r}; it must be NAME='{{\"speculative_config\": {{...}}}}'"
    if not equals or not _is_name(name):
        raise ValueError(form)
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{form}, but its JSON is damaged ({error})") from None
    values = config.values() if isinstance(config, dict) else [None]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{form}, and its values objects")
    if unknown := set(config) - set(KEYS):
        raise ValueError(
            f"--arm {name}: unknown key {sorted(unknown)[0]!r} "
            f"(known: {', '.join(KEYS)})"
        )
    return Arm(name, **config)
