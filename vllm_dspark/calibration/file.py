"""`dspark_calibration.json`: reading with every check, and writing.

The file lies beside a drafter's weights and names them by their hash. `read` raises
ValueError with the cause whatever is wrong; whether that ends a command or is only
reported (a server must not die of it) is for the caller to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_dspark.calibration.fitting import Fit
from vllm_dspark.calibration.json_file import read_object, write_object
from vllm_dspark.calibration.scaling import Mixing, Scaling

NAME = "dspark_calibration.json"
KIND = "dspark-calibration"
SCHEMA = 1
# Values outside say nothing but that something went wrong.
_TEMPERATURE = (0.01, 100.0)
_BIAS = (-20.0, 20.0)
_WEIGHT = (-100.0, 100.0)


@dataclass(frozen=True)
class Calibration:
    """A file's content.

    Args:
        weights_hash: of the drafter it belongs to (`model.checkpoint.weights_hash`).
        settings: scaling by the requests' temperature, at least one.
        label: where the data came from.
    """

    weights_hash: str
    settings: Mapping[float, Scaling]
    label: str

    def scaling(self, temperature: float) -> Scaling:
        """For requests of a temperature: the nearest setting of the same kind.

        Greedy requests (temperature 0) are one kind, sampled ones the other; a kind
        without a setting takes the nearest of the other.
        """
        same = [t for t in self.settings if (t == 0) == (temperature == 0)]
        nearest = min(same or self.settings, key=lambda t: abs(t - temperature))
        return self.settings[nearest]


def read(path: Path, weights_hash: str | None = None) -> Calibration:
    """Read and check a calibration.

    Args:
        path: the file.
        weights_hash: of the drafter at hand, if it is to be compared.

    Raises:
        ValueError: it cannot be read, is damaged, of another schema, or belongs to
            another drafter.
    """
    raw = read_object(path, "calibration")
    if raw.get("kind") != KIND:
        raise ValueError(f"{path}: 'kind' is {raw.get('kind')!r}; expected {KIND!r}")
    if raw.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: 'schema' is {raw.get('schema')!r}; this version reads {SCHEMA}: "
            "calibrate again with it"
        )
    found = raw.get("weights_hash")
    if not isinstance(found, str) or not found:
        raise ValueError(f"{path}: 'weights_hash' is {found!r}; it must be a string")
    if weights_hash is not None and found != weights_hash:
        raise ValueError(
            f"{path} was made for a drafter with weights {found[:12]}…, but these are "
            f"{weights_hash[:12]}…: calibrate this drafter (vllm-dspark calibrate)"
        )
    data = raw.get("data")
    label = data.get("label") if isinstance(data, dict) else None
    return Calibration(found, _settings(raw.get("settings"), path), str(label or ""))


def _settings(rows: Any, path: Path) -> dict[float, Scaling]:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: 'settings' is {rows!r:.60}; expected a list")
    found: dict[float, Scaling] = {}
    for i, row in enumerate(rows):
        where = f"{path}: settings[{i}]"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {row!r:.60}; expected an object")
        (request,) = _numbers([row.get("request_temperature")], (0.0, 100.0), where)
        temperature = _numbers(row.get("temperature"), _TEMPERATURE, where)
        zeros = [0.0] * len(temperature)
        bias = _numbers(row.get("bias", zeros), _BIAS, where)
        if len(bias) != len(temperature):
            raise ValueError(
                f"{where}: {len(temperature)} temperatures but {len(bias)} biases"
            )
        if request in found:
            raise ValueError(f"{where}: request_temperature {request:g} appears twice")
        mixing = _mixing(row.get("with_certainty"), len(bias), where)
        found[request] = Scaling(temperature, bias, mixing)
    if len({scaling.width for scaling in found.values()}) > 1:
        raise ValueError(f"{path}: settings cover different numbers of positions")
    return found


def _mixing(raw: Any, width: int, where: str) -> Mixing | None:
    if raw is None:
        return None
    where = f"{where}: 'with_certainty'"
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {raw!r:.60}; expected an object")
    limits = {"weight": _WEIGHT, "certainty": _WEIGHT, "bias": _BIAS}
    found = [_numbers(raw.get(key), limits[key], where) for key in limits]
    if any(len(values) != width for values in found):
        raise ValueError(f"{where} does not cover the {width} positions of the rest")
    return Mixing(*found)


def _numbers(values: Any, limits: tuple[float, float], where: str) -> tuple[float, ...]:
    low, high = limits
    if not isinstance(values, list) or not 0 < len(values) <= 256:
        raise ValueError(f"{where}: {values!r:.60} is no list of numbers by position")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # NaN is not either
            raise ValueError(
                f"{where}: {value!r:.60} is no number from {low:g} to {high:g}"
            )
    return tuple(float(value) for value in values)


def setting(request_temperature: float, fit: Fit, **facts: Any) -> dict[str, Any]:
    """One entry of ``settings``: a fit for requests of one temperature.

    Args:
        facts: more keys that say how the rounds were made.
    """
    mixing = fit.scaling.mixing
    mixed = {}
    if mixing is not None:
        after = {"ece_after": _nulls(fit.ece_after)}
        mixed["with_certainty"] = asdict(mixing) | after
    return {
        "request_temperature": request_temperature,
        "temperature": list(fit.scaling.temperature),
        "bias": list(fit.scaling.bias),
        **mixed,
        "map": list(fit.kinds),
        "fit_size": list(fit.fit_size),
        "ece_before": _nulls(fit.ece_before),
        "ece_after": _nulls(fit.ece_alone),
        "ece_of_perfect": _nulls(fit.ece_floor),
        "auc_before": _nulls(fit.auc_before),
        "auc_after": _nulls(fit.auc_after),
        "note": fit.note,
        **facts,
    }


def _nulls(values: tuple[float, ...]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def write(
    path: Path,
    weights_hash: str,
    settings: list[dict[str, Any]],
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write a calibration as a whole or not at all, and read it back.

    Args:
        settings: of `setting`.
        data: where the rounds came from; ``label`` says it in a few words.
        facts: more keys, such as the provenance.

    Raises:
        ValueError: it would not be readable.
        OSError: the folder cannot be written.
    """
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "weights_hash": weights_hash,
        "settings": settings,
        "data": dict(data),
        **facts,
    }
    write_object(path, content, lambda file: read(file, weights_hash))
