"""The `speculators` library's DSpark folders, mapped to DeepSpec's layout and back.

Both hold the same tensors under the same names; a reduced vocabulary there also has
``t2d``, a boolean ``[V]`` of the target tokens that have a draft id. The configurations
differ: the transformer's keys stand in ``transformer_layer_config``, target layers are
counted as hidden states (0 is the embeddings, hence one more than ours), and
``speculators_config`` names the target. What one layout has no key for is kept by the
other under ``from_deepspec`` or ``from_speculators``, so that converting there and back
gives the same configuration, and both readers ignore the record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_dspark.config_reader import (
    ARCHITECTURE,
    FROM_SPECULATORS,
    HEAD_TYPES,
    SLIDING_ATTENTION,
    is_int,
)

__all__ = ["is_speculators", "to_deepspec", "to_speculators"]

FROM_DEEPSPEC = "from_deepspec"
KIND = "speculators_model_type"
LAYER = "transformer_layer_config"
LAYERS = "num_target_layers"
_VERSION = "0.9.0"  # of the library whose files this module was checked against
_ARCHITECTURES = ("DSparkDraftModel", "DSparkSpeculator", ARCHITECTURE)
# The library writes these always; vLLM and the library differ in what absence means.
_REQUIRED = (
    "block_size",
    "mask_token_id",
    "draft_vocab_size",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
_SAME = (*_REQUIRED, "target_hidden_size", "dtype", "transformers_version")
# DeepSpec's keys that are no business of the library's transformer layers.
_RECORDED = ("architectures", "auto_map", "num_anchors", LAYERS, "sample_from_anchor")
_RESERVED = (
    KIND,
    LAYER,
    "speculators_config",
    "speculators_version",
    "aux_hidden_state_layer_ids",
    FROM_DEEPSPEC,
)
Config = dict[str, Any]


def is_speculators(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` object is in the library's layout."""
    return KIND in raw


def to_deepspec(
    raw: Mapping[str, Any],
    *,
    source: str = "config.json",
    num_target_layers: int | None = None,
    has_t2d: bool = True,
) -> Config:
    """The DeepSpec configuration of a speculators one.

    Args:
        raw: the library's ``config.json`` object.
        source: where it came from, for messages.
        num_target_layers: of the target, which the library does not write down; left
            out if neither this nor an earlier conversion tells.
        has_t2d: whether the folder holds ``t2d`` (or has no need of it).

    Raises:
        ValueError: not a DSpark folder, a key is missing, or a key has a value that
            DeepSpec's layout cannot express.
    """
    core = {key: value for key, value in raw.items() if key != FROM_DEEPSPEC}
    _check_expressible(core, source)
    try:
        config = _apply(_deepspec(core), raw.get(FROM_DEEPSPEC, {}), source)
        back = _difference(_speculators(config), core, nested=True)
    except (TypeError, KeyError) as error:  # of a record that was edited
        raise ValueError(
            f"{source}: {FROM_DEEPSPEC!r} is no record of a conversion ({error!r}); "
            "remove it"
        ) from error
    record: Config = {}
    if num_target_layers is not None and LAYERS not in config:
        config[LAYERS] = num_target_layers
        record["added"] = [LAYERS]
    if not has_t2d:
        record["without"] = ["t2d"]
    record = back | record
    return config | ({FROM_SPECULATORS: record} if record else {})


def to_speculators(
    raw: Mapping[str, Any],
    *,
    source: str = "config.json",
    verifier: Mapping[str, Any] | None = None,
) -> Config:
    """The speculators configuration of a DeepSpec one.

    Args:
        raw: DeepSpec's ``config.json`` object (one that `DrafterConfig` accepts).
        source: where it came from, for messages.
        verifier: ``name_or_path`` and ``architectures`` of the target, which the
            library takes embeddings and LM head from.

    Raises:
        ValueError: a key means something else in the library's layout, or what an
            earlier conversion left no longer goes with the configuration.
    """
    reserved = [key for key in _RESERVED if key in raw]
    if reserved:
        raise ValueError(
            f"{source}: {', '.join(map(repr, reserved))} cannot be expressed in the "
            "speculators layout, where the name is taken; remove or rename it"
        )
    core = {key: value for key, value in raw.items() if key != FROM_SPECULATORS}
    left: Config = raw.get(FROM_SPECULATORS, {})
    config = _apply(_speculators(core), left, source)
    if verifier is not None:
        settings = {**config["speculators_config"], "verifier": dict(verifier)}
        config["speculators_config"] = settings
    _check_expressible(config, source)
    added = left.get("added", [])
    told = {key: value for key, value in core.items() if key not in added}
    record = _difference(_deepspec(config), told)
    return config | ({FROM_DEEPSPEC: record} if record else {})


def _deepspec(spec: Mapping[str, Any]) -> Config:
    """What DeepSpec's keys can say of a speculators configuration."""
    same = {key: spec[key] for key in _SAME if spec.get(key) is not None}
    return {
        "architectures": [ARCHITECTURE],
        **spec[LAYER],
        **same,
        "tie_word_embeddings": False,  # the library never ties, whatever the layer says
        "target_layer_ids": [i - 1 for i in spec["aux_hidden_state_layer_ids"]],
    }


def _speculators(deep: Mapping[str, Any]) -> Config:
    """What the library would write for a DeepSpec configuration."""
    moved = {*_SAME, *_RECORDED, "target_layer_ids"}
    same = {key: deep[key] for key in _SAME if key in deep}
    kind = str(deep.get("markov_head_type")).lower()  # null or "none" with rank 0
    block = deep["block_size"]
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": block,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": [_ARCHITECTURES[0]],
        KIND: "dspark",
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
        },
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        **same,
        "draft_vocab_size": deep.get("draft_vocab_size") or deep["vocab_size"],
        "markov_head_type": kind if kind in HEAD_TYPES else HEAD_TYPES[0],
        "enable_confidence_head": deep.get("enable_confidence_head", False),
        "confidence_head_with_markov": deep.get("confidence_head_with_markov", False),
        "aux_hidden_state_layer_ids": [i + 1 for i in deep["target_layer_ids"]],
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        LAYER: {key: value for key, value in deep.items() if key not in moved},
    }


def _check_expressible(spec: Mapping[str, Any], source: str) -> None:
    """Refuse a speculators configuration with a meaning DeepSpec's keys lack."""

    def fail(problem: str) -> ValueError:
        return ValueError(f"{source}: {problem}")

    if spec.get(KIND) != "dspark":
        raise fail(f"{KIND!r} is {spec.get(KIND)!r}; only 'dspark' folders are read")
    objects = (LAYER, "speculators_config")
    bad = [key for key in objects if not isinstance(spec.get(key), Mapping)]
    bad += [key for key in _REQUIRED if spec.get(key) is None]
    if bad:
        raise fail(f"{bad[0]!r} is missing (the speculators library always writes it)")
    ids = spec.get("aux_hidden_state_layer_ids")
    if not isinstance(ids, list) or not all(is_int(i) and i >= 0 for i in ids):
        raise fail(
            f"'aux_hidden_state_layer_ids' is {ids!r}; it must be a list of numbers "
            "of hidden states, 0 for the embeddings"
        )
    names = spec.get("architectures") or []
    if not isinstance(names, list) or not all(n in _ARCHITECTURES for n in names):
        raise fail(f"'architectures' is {names!r}; expected {[_ARCHITECTURES[0]]!r}")
    if spec.get("sample_from_anchor") is not True:
        raise fail(
            f"'sample_from_anchor' is {spec.get('sample_from_anchor')!r} (false if "
            "absent, as vLLM reads it): a block whose anchor drafts nothing cannot be "
            "expressed in DeepSpec's layout, and vllm-dspark does not serve it"
        )
    types = spec[LAYER].get("layer_types") or []
    if not isinstance(types, list):
        raise fail(f"'layer_types' is {types!r}; it must be a list of names")
    sliding = SLIDING_ATTENTION in types
    if sliding and spec.get("sliding_window_non_causal"):
        raise fail(
            "'sliding_window_non_causal' is true with sliding layers, which cannot be "
            "expressed in DeepSpec's layout: there they are causal in the block"
        )
    if spec.get("use_aux_hidden_state") is False:
        raise fail("'use_aux_hidden_state' is false; DSpark cannot do without them")
    _check_proposal(spec, fail)


def _check_proposal(spec: Mapping[str, Any], fail: Any) -> None:
    methods = spec["speculators_config"].get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    tokens = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    if not is_int(spec["block_size"]) or not is_int(tokens):
        raise fail(
            f"'block_size' is {spec['block_size']!r} and 'speculative_tokens' of "
            f"'speculators_config' {tokens!r}; both must be integers"
        )
    assert isinstance(tokens, int)
    if tokens > spec["block_size"]:
        raise fail(
            f"'speculative_tokens' of 'speculators_config' is {tokens}, more than "
            f"'block_size', {spec['block_size']}; a record of another configuration?"
        )


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true are three things."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _difference(base: Config, wanted: Config, nested: bool = False) -> Config:
    """What `_apply` needs to make ``wanted`` of ``base``; empty if they are equal."""
    skip = {LAYER} if nested else set()
    keys = wanted.keys() - skip
    changed = {k for k in keys if k not in base or not _same(base[k], wanted[k])}
    record: Config = {
        "set": {key: wanted[key] for key in wanted if key in changed},
        "unset": sorted(base.keys() - wanted.keys()),
    }
    if nested:
        record[LAYER] = _difference(base[LAYER], wanted[LAYER])
    return {key: value for key, value in record.items() if value}


def _apply(base: Config, record: Any, source: str) -> Config:
    """The inverse of `_difference`."""
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{source}: the record of an earlier conversion is {record!r}; it must be "
            "an object, or be removed"
        )
    gone = record.get("unset", [])
    config: Config = {key: base[key] for key in base if key not in gone}
    config |= record.get("set", {})
    if LAYER in record:
        config[LAYER] = _apply(base[LAYER], record[LAYER], source)
    return config
