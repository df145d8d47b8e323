"""Every option and its default, once: the drafter's config.json and our own keys.

``DrafterConfig`` is what a drafter checkpoint says about itself (the layout of
DeepSpec's released ``Qwen3DSparkModel`` folders); ordinary Hugging Face keys that
do not concern us are ignored. ``DSparkOptions`` is what users type in
``--additional-config '{"dspark": {...}}'``; there an unknown key is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_dspark.config_reader import ConfigReader, is_int


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Shape and meaning of a drafter checkpoint (paper, section 3.1).

    Built by `from_dict`; names are the checkpoint's. ``markov_head_type`` is
    ``"none"`` for ``markov_rank`` 0 (a DFlash-style drafter). ``sliding_window`` is
    None unless every layer slides; such layers are also causal inside the block (as
    vLLM runs them), while full attention is bidirectional there. ``num_target_layers``
    is None for folders of the speculators library, which do not say it.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    layer_types: tuple[str, ...]
    sliding_window: int | None
    dtype: str
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    markov_rank: int
    markov_head_type: str
    enable_confidence_head: bool
    confidence_head_with_markov: bool

    @property
    def has_reduced_vocab(self) -> bool:
        """Whether drafts come from a subset of the vocabulary (needs ``d2t``)."""
        return self.draft_vocab_size < self.vocab_size

    @property
    def feature_size(self) -> int:
        """Width of the concatenated hidden states of the tapped target layers."""
        return len(self.target_layer_ids) * self.hidden_size

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str = "config.json"
    ) -> DrafterConfig:
        """Read and check a checkpoint's ``config.json``.

        Args:
            raw: the parsed JSON object.
            source: where it came from, for messages.

        Raises:
            ValueError: a key is missing, has the wrong type or a value that cannot
                be (see the message for the value and what to do).
        """
        read = ConfigReader(raw, source)
        read.check_layout()
        return cls(**read.shape(), **read.attention(), **read.block(), **read.heads())


def resolve_num_speculative_tokens(requested: int | None, block_size: int) -> int:
    """How many tokens to draft per round: the block size unless fewer are asked.

    Args:
        requested: ``num_speculative_tokens`` as typed by the user, or None.
        block_size: γ of the drafter.

    Raises:
        ValueError: fewer than 1, or more than the drafter's block.
    """
    if requested is None:
        return block_size
    if not is_int(requested) or requested < 1:
        raise ValueError(
            f"num_speculative_tokens is {requested!r}; it must be an integer from 1 "
            f"to the drafter's block_size, {block_size}"
        )
    if requested > block_size:
        raise ValueError(
            f"num_speculative_tokens is {requested}, but the drafter's block_size is "
            f"{block_size}: ask for at most {block_size}, or leave the key out"
        )
    return requested


def _choice(default: str, *choices: str) -> Any:
    """An option with a fixed set of values."""

    def check(value: Any) -> str | None:
        return None if value in choices else f"choose one of {', '.join(choices)}"

    return field(default=default, metadata={"check": check})


def _number(default: float, low: float, high: float) -> Any:
    """An option that is a number within limits."""

    def check(value: Any) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and low <= value <= high:
            return None
        return f"it must be a number from {low:g} to {high:g}"

    return field(default=default, metadata={"check": check})


def _flag(default: bool) -> Any:
    """An option that is on or off."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, bool) else "it must be true or false"

    return field(default=default, metadata={"check": check})


def _optional_path() -> Any:
    """An option that names a file, or None."""

    def check(value: Any) -> str | None:
        if value is None or (isinstance(value, str) and value):
            return None
        return "it must be the path of a file, or null"

    return field(default=None, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class DSparkOptions:
    """Our own keys, from ``additional_config["dspark"]``.

    A new key is one new field here: its default and its check follow.

    Args:
        backend: which implementation of the operations runs: ``native`` is C++,
            ``reference`` plain torch, ``auto`` the fastest one that is there.
        trace: file to which every decoding round is appended, one JSON line each
            (``integration/trace.py`` names the keys); None writes nothing.
        step_log: file to which every engine step is appended, one JSON line each
            (``integration/step_log.py`` names the keys); None writes nothing.
        policy: how many drafts are made and verified: ``adaptive`` by calibrated
            confidence, load and what steps cost; ``fixed`` always all;
            ``threshold`` those that survive with at least `threshold` (2.3).
        threshold: a probability, for that policy.
        bypass: whether ``adaptive`` may stop drafting where it does not pay.
        slo_tps: tokens/s that each request shall get, which comes before throughput;
            0 for no such goal. A request may name its own (``vllm_xargs``).
        calibration: file instead of the drafter's ``dspark_calibration.json``.
        cost_table: file instead of the one that is measured at start and cached.
        rejection_kernel: what verifies on the V2 runner: ``vllm`` (what ``auto`` is
            there) its own kernels, ``dspark`` ours, with the same tokens. The V1
            runner has only ours.
    """

    backend: str = _choice("auto", "auto", "native", "reference")
    trace: str | None = _optional_path()
    step_log: str | None = _optional_path()
    policy: str = _choice("adaptive", "adaptive", "fixed", "threshold")
    threshold: float = _number(0.5, 0.0, 1.0)
    bypass: bool = _flag(True)
    slo_tps: float = _number(0.0, 0.0, 1e6)
    calibration: str | None = _optional_path()
    cost_table: str | None = _optional_path()
    rejection_kernel: str = _choice("auto", "auto", "vllm", "dspark")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if (problem := spec.metadata["check"](value)) is not None:
                raise ValueError(f"dspark option {spec.name!r} is {value!r}; {problem}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any] | None) -> DSparkOptions:
        """Read the ``dspark`` object of ``additional_config``; None means defaults.

        Raises:
            ValueError: not an object, an unknown key, or a value that its key
                does not take.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise ValueError(
                f'additional_config["dspark"] is {raw!r}; it must be an object, such '
                'as {"backend": "auto"}'
            )
        known = [spec.name for spec in fields(cls)]
        for key in raw:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"unknown dspark option {key!r}{hint} (known: {', '.join(known)})"
                )
        return cls(**raw)
