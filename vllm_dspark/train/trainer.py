"""The training loop: steps, validations, checkpoints, and how a run ends (3.3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dspark import provenance
from vllm_dspark.config import DrafterConfig
from vllm_dspark.train import state
from vllm_dspark.train.blocks import Blocks, build_blocks, num_rows
from vllm_dspark.train.continued import Start
from vllm_dspark.train.data import Sequence, TrainingData
from vllm_dspark.train.export import checkpoint_state, export
from vllm_dspark.train.features import FeatureSource, channel_scale
from vllm_dspark.train.initial import drafter_config, fresh_drafter, target_parts
from vllm_dspark.train.optim import Optimizers, world
from vllm_dspark.train.options import TrainOptions
from vllm_dspark.train.packing import pack_sequences
from vllm_dspark.train.record import Log, step_line, validation_line
from vllm_dspark.train.step import SequenceLoss, StepSums, total_weight
from vllm_dspark.train.validate import Validation, Validator
from vllm_dspark.train.vocabulary import (
    DraftVocabulary,
    choose_mask_token,
    draft_vocabulary,
    known_vocabulary,
)

_SCALE_SEQUENCES = 32
_GIB = 1 << 30
# Sequences in one pass on a GPU; those of a step that are left follow.
_TOGETHER = 32
# Where the channel scale lies among a checkpoint's tensors.
_SCALE, _WEIGHTS, _MOMENTA = "scale", "weights.", "momenta."


@dataclass(frozen=True, slots=True)
class Report:
    """What a run tells whoever watches it.

    Args:
        progress: steps done and time taken.
        total_steps: of the whole run.
        sums: of the step just done, or None after a validation.
        validation: its result, or None after a step.
    """

    progress: state.Progress
    total_steps: int
    sums: StepSums | None = None
    validation: Validation | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: ``reason`` is finished, early stop or diverged."""

    reason: str
    progress: state.Progress
    coverage: float


class Trainer:
    """One run, fresh or resumed.

    Args:
        target: the Hugging Face target, in the dtype and on the device to train in.
        special_ids: the tokenizer's special tokens.
        data: texts.
        options: everything else.
        out: the drafter's folder.
        origin: what the export's provenance says of target and data.
        start: a drafter to go on from; its shape is in ``options``
            (`fitting_options`).

    Raises:
        ValueError: target, data, options or the folder's earlier run do not fit.
    """

    def __init__(
        self,
        target: Any,
        special_ids: list[int],
        data: TrainingData,
        options: TrainOptions,
        out: Path,
        origin: dict[str, Any],
        start: Start | None = None,
    ) -> None:
        self.data, self.options, self.out, self.origin = data, options, out, origin
        self.start = start
        parts = target_parts(target)
        self.vocabulary, self.config = self._shape(parts.config, special_ids)
        checked = DrafterConfig.from_dict(self.config, "the drafter to be trained")
        self.source = FeatureSource(
            target,
            checked.target_layer_ids,
            options.top,
            int(options.cache_gb * _GIB / world()[1]),
        )
        self.device = next(target.parameters()).device
        self.drafter = fresh_drafter(
            checked,
            parts,
            self.vocabulary.draft_to_target,
            options.init,
            options.seed,
        ).to(self.device)
        to_draft = self.vocabulary.target_to_draft
        self.to_draft = None if to_draft is None else to_draft.to(self.device)
        if self.drafter.markov_head is not None:
            # A step touches few of its rows.
            self.drafter.markov_head.markov_w1.sparse = True
        self.total_steps = data.total_steps
        self.optimizers = Optimizers(self.drafter, options, self.total_steps)
        self.progress = state.Progress()
        self.scale = self._restore()
        dtype = next(target.parameters()).dtype
        self.model = SequenceLoss(self.drafter, options, self.scale, dtype)
        self.validator = self._validator()

    def _shape(
        self, target: Mapping[str, Any], special_ids: list[int]
    ) -> tuple[DraftVocabulary, dict[str, Any]]:
        """The vocabulary and ``config.json``, of the drafter to go on from if any."""
        counts = self.data.counts(responses_only=True)
        if self.start is not None:
            vocabulary = known_vocabulary(self.start.draft_to_target, counts)
            return vocabulary, {**self.start.config, "dtype": "bfloat16"}
        vocabulary = draft_vocabulary(
            counts, self.options.draft_tokens(int(target["vocab_size"]))
        )
        used = self.data.counts(responses_only=False)
        mask = choose_mask_token(used, special_ids)
        return vocabulary, drafter_config(target, self.options, mask)

    # ---- running ----

    def run(self, watch: Callable[[Report], None]) -> Outcome:
        """Train to the end, an early stop, or until the loss is not a number.

        Args:
            watch: called after every step and validation.
        """
        log = Log(self.out, self.progress.step) if self._leads else None
        every = self.options.evaluate_every or max(1, self.total_steps // 20)
        while self.progress.step < self.total_steps:
            began = time.monotonic()
            sequences = self.data.step(self.progress.step)
            sums, norm = self._step(sequences)
            if not math.isfinite(norm):
                return self._outcome("diverged")
            self._advance(began, sequences)
            step = self.progress.step
            self._tell(
                log, step_line(step, sums, norm, self.optimizers.factor(step - 1))
            )
            watch(Report(self.progress, self.total_steps, sums=sums))
            last = step == self.total_steps
            if step % every == 0 or last:
                self._validate(log, watch)
                if self._exhausted:
                    self.checkpoint()
                    return self._outcome("early stop")
            if step % self.options.checkpoint_every == 0 or last:
                self.checkpoint()
        return self._outcome("finished")

    def _step(self, sequences: list[Sequence]) -> tuple[StepSums, float]:
        step, size = self.progress.step, self.options.block_size
        if step < self.options.short_share * self.total_steps:
            size = min(size, self.options.short_block)
        rows = [num_rows(s.anchors, len(s.tokens), size) for s in sequences]
        weight = total_weight(rows, self.options.block_size)
        rank, ranks = world()
        # Dealt out by length, so that no process waits long for another.
        dealt = sorted(sequences, key=lambda s: len(s.tokens))[rank::ranks]
        ce_weight = self._ce_weight()
        self.optimizers.zero_grad()
        sums = []
        with self.model.precision():
            for features, blocks in self._blocks(dealt, size):
                done = self.model.backward(features, blocks, ce_weight, weight)
                sums.append(done)
        norm = self.optimizers.step(step)
        total = sums[0]
        for more in sums[1:]:
            total = total + more
        return total, norm

    def _blocks(
        self, sequences: list[Sequence], size: int
    ) -> Iterator[tuple[Tensor, Blocks]]:
        """Hidden states and blocks, a sequence at a time or, on a GPU, many."""
        each = 1 if self.device.type == "cpu" else _TOGETHER
        for start in range(0, len(sequences), each):
            some = sequences[start : start + each]
            texts = [(s.key, s.tokens, s.prompt_len) for s in some]
            features = self.source.get(texts)
            if each > 1:
                yield pack_sequences(some, features, size, self.to_draft)
                continue
            (one,), (known,) = some, features
            yield (
                known.hidden,
                build_blocks(one.tokens, known, one.anchors, size, self.to_draft),
            )

    def _ce_weight(self) -> float:
        """α of this step: from `ce_start` down to `ce_weight` at half the run."""
        left = max(0.0, 1.0 - 2.0 * self.progress.step / self.total_steps)
        start, end = self.options.ce_start, self.options.ce_weight
        return end + (start - end) * left

    def _advance(self, began: float, sequences: list[Sequence]) -> None:
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            seconds=self.progress.seconds + time.monotonic() - began,
            blocks=self.progress.blocks + sum(len(s.anchors) for s in sequences),
        )

    def _validate(self, log: Log | None, watch: Callable[[Report], None]) -> None:
        result = self.validator.run()
        better = result.accepted_length > self.progress.best
        self.progress = replace(
            self.progress,
            best=max(self.progress.best, result.accepted_length),
            since_best=0 if better else self.progress.since_best + 1,
        )
        if better and self._leads:
            self._export(result)
        self._tell(log, validation_line(self.progress.step, result))
        if log is not None:
            log.draw()
        watch(Report(self.progress, self.total_steps, validation=result))

    @property
    def _exhausted(self) -> bool:
        return 0 < self.options.patience <= self.progress.since_best

    @property
    def _leads(self) -> bool:
        return world()[0] == 0

    def _tell(self, log: Log | None, line: dict[str, Any]) -> None:
        if log is not None:
            log.add(line, self.progress.seconds, self.progress.blocks)

    def _outcome(self, reason: str) -> Outcome:
        return Outcome(reason, self.progress, self.vocabulary.coverage)

    # ---- keeping ----

    def checkpoint(self) -> None:
        """Write what a killed run goes on from."""
        if not self._leads:
            return
        tensors = {_SCALE: self.scale}
        for name, parameter in self.drafter.named_parameters():
            if parameter.requires_grad:
                tensors[_WEIGHTS + name] = parameter.detach()
        for name, value in self.optimizers.state().items():
            tensors[_MOMENTA + name] = value
        state.save(self.out, self.progress, self._settings, tensors)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with its first start."""
        return {**self.options.as_dict(), **self.origin}

    def _restore(self) -> Tensor:
        """Weights and momenta of the run in the folder, if any; the channel scale."""
        found = state.load(self.out, self._settings)
        if found is None:
            keys = self.data.training[:_SCALE_SEQUENCES].tolist()
            texts = [self.data.text(key) for key in keys]
            scale = channel_scale([self.source.compute(*text) for text in texts])
            if self.start is not None:
                self.start.fill(self.drafter, scale)
            return scale
        self.progress, tensors = found
        weights = dict(self.drafter.named_parameters())
        momenta = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(_WEIGHTS):
                    weights[name.removeprefix(_WEIGHTS)].copy_(tensor)
                elif name.startswith(_MOMENTA):
                    momenta[name.removeprefix(_MOMENTA)] = tensor
        self.optimizers.load(momenta)
        return tensors[_SCALE].to(self.device)

    def _validator(self) -> Validator:
        texts = []
        for key in self.data.validation.tolist():
            tokens, prompt_len = self.data.text(key)
            texts.append((tokens, prompt_len, self.source.compute(tokens, prompt_len)))
        return Validator(self.model, texts, self.to_draft)

    def _export(self, result: Validation) -> None:
        tensors = checkpoint_state(self.drafter, self.scale, self.vocabulary.offsets)
        about = {
            **self.origin,
            "options": self.options.as_dict(),
            "step": self.progress.step,
            "total_steps": self.total_steps,
            "blocks": self.progress.blocks,
            "seconds": round(self.progress.seconds, 1),
            "response_tokens": self.data.num_response_tokens,
            "draft_vocabulary_coverage": self.vocabulary.coverage,
            "validation": validation_line(self.progress.step, result),
            "provenance": provenance.collect(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        export(self.out, self.config, tensors, about)
