"""Optimisers, learning rate and gradients that several processes share.

Matrices of the backbone go to Muon, which needs fewer steps for them than Adam; norms,
the head's tables and the confidence head to Adam.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vllm_dspark.model.drafter import Drafter
from vllm_dspark.train.options import TrainOptions


class Optimizers:
    """Muon and Adam over a drafter's trainable weights.

    Args:
        drafter: its frozen parameters are left out.
        options: learning rates.
        total_steps: of the whole run.
    """

    def __init__(
        self, drafter: Drafter, options: TrainOptions, total_steps: int
    ) -> None:
        self.options, self.total_steps = options, total_steps
        named = [(n, p) for n, p in drafter.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for n, p in named if _is_matrix(n, p)]
        others = [p for n, p in named if not _is_matrix(n, p)]
        self.muon = torch.optim.Muon(
            matrices,
            lr=options.matrix_lr,
            weight_decay=options.weight_decay,
            momentum=0.95,
        )
        self.adam = torch.optim.AdamW(
            others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0
        )

    def factor(self, step: int) -> float:
        """Share of the peak learning rate: linear up, then a half cosine to zero."""
        warm = max(1, round(self.options.warmup * self.total_steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.total_steps - warm)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, step: int) -> float:
        """Average gradients over processes, clip, update; returns the gradient's norm.

        A norm that is not finite changes nothing.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        sum_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.options.clip))
        if not math.isfinite(norm):
            return norm
        factor = self.factor(step)
        for optimizer, peak in (
            (self.muon, self.options.matrix_lr),
            (self.adam, self.options.lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()  # type: ignore[no-untyped-call]
        return norm

    def state(self) -> dict[str, Tensor]:
        """Momenta by name, for a checkpoint."""
        found = {}
        for name, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    tensor = torch.as_tensor(value)
                    found[f"{name}.{index}.{key}"] = tensor.contiguous()
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, optimizer in (("muon", self.muon), ("adam", self.adam)):
            whole = optimizer.state_dict()
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                owner, index, field = key.split(".")
                if owner == name:
                    entries.setdefault(int(index), {})[field] = value
            whole["state"] = entries
            optimizer.load_state_dict(whole)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    in_backbone = name.startswith(("layers.", "fc."))
    return in_backbone and parameter.ndim == 2


def world() -> tuple[int, int]:
    """Rank of this process and how many there are (torchrun), 0 and 1 alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up gradients over processes; each has divided by the weight of the step."""
    if world()[1] == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
