"""The specification of `rejection_sample`, in plain torch.

With z = logits * float32(1/T) and w = exp(z - max z) in float32 (weights below e^-87
are zero), p = w * float32(1 / sum w); sums are float64. An inverse-CDF draw with
uniform u is the first index of positive weight whose cumulative weight exceeds
u * total.
"""

import torch
from torch import Tensor

from vllm_dspark.ops.arguments import GREEDY_TEMPERATURE
from vllm_dspark.ops.rejection import RejectionInputs, RejectionResult

# A residual with less mass is the rounding noise of p - q: draw from p. It happens with
# at most this probability, which bounds the bias.
RESIDUAL_FLOOR = 1e-6
CUTOFF = -87.0


def softmax_weights(logits: Tensor, inv_temperature: Tensor | float) -> Tensor | None:
    """Unnormalised softmax weights of one row ``[V]``.

    None if the row is no distribution: its maximum is not finite.
    """
    z = logits.float() * inv_temperature
    top = z.max()
    if not bool(torch.isfinite(top)):
        return None
    shifted = z - top
    return torch.where(shifted >= CUTOFF, shifted.exp(), 0.0)


def inverse_cdf(weights: Tensor, u: Tensor | float) -> int:
    """First index of positive weight whose cumulative weight exceeds ``u * total``."""
    cumulative = weights.double().cumsum(0)
    hit = (cumulative > u * cumulative[-1]) & (weights > 0)
    if bool(hit.any()):
        return int(hit.to(torch.uint8).argmax())
    return int((weights > 0).nonzero()[-1])  # u * total was rounded up to the total


def run(inputs: RejectionInputs) -> RejectionResult:
    """Request by request, position by position, as the paper states it."""
    token_ids, num_emitted = inputs.outputs()
    token_ids.fill_(-1)
    first = 0
    for r, length in enumerate(inputs.num_draft_tokens.tolist()):
        tokens = _request(inputs, r, first, length)
        token_ids[r, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        num_emitted[r] = len(tokens)
        first += length
    return RejectionResult(token_ids, num_emitted, "reference")


def _request(inputs: RejectionInputs, r: int, first: int, length: int) -> list[int]:
    temperature = None if inputs.temperature is None else inputs.temperature[r]
    greedy = temperature is None or not bool(temperature >= GREEDY_TEMPERATURE)
    tokens: list[int] = []
    for k in range(length + 1):
        logits = inputs.target_logits[first + r + k]
        draft = int(inputs.draft_token_ids[first + k]) if k < length else None
        weights = None
        if temperature is not None and not greedy:
            weights = softmax_weights(logits, 1.0 / temperature)
        if weights is None:  # greedy, or a row that is no distribution
            token = int(logits.argmax())
            tokens.append(token)
            if token != draft:
                break
            continue
        assert inputs.sample_uniforms is not None
        u = inputs.sample_uniforms[r]
        if draft is None:
            tokens.append(inverse_cdf(weights, u))
            break
        accepted, residual = _test_draft(inputs, first + k, draft, weights)
        if not accepted:
            tokens.append(inverse_cdf(residual, u))
            break
        tokens.append(draft)
    return tokens


def _test_draft(
    inputs: RejectionInputs, i: int, draft: int, weights: Tensor
) -> tuple[bool, Tensor]:
    """Whether draft row i is accepted, and what to draw from if it is not."""
    p = weights * (1.0 / weights.double().sum()).float()
    valid = 0 <= draft < p.shape[0]
    assert inputs.accept_uniforms is not None
    if inputs.draft_probs is None:
        accepted = valid and bool(inputs.accept_uniforms[i] < p[draft].double())
        rest = weights.clone()
        if valid:
            rest[draft] = 0.0
        return accepted, rest if bool((rest > 0).any()) else weights
    q = dense_draft(inputs, i, p.shape[0])
    accepted = False
    if valid and bool(q[draft] > 0):
        scaled = inputs.accept_uniforms[i] * q[draft].double()
        accepted = bool(scaled < p[draft].double())
    rest = (p - q).clamp(min=0.0)
    enough = float(rest.double().sum()) > RESIDUAL_FLOOR
    return accepted, rest if enough else weights


def dense_draft(inputs: RejectionInputs, i: int, vocab: int) -> Tensor:
    """Draft distribution of row i over the whole vocabulary, ``[V]``."""
    assert inputs.draft_probs is not None
    q = inputs.draft_probs[i]
    if inputs.draft_support is None:
        return q
    support = inputs.draft_support[i if inputs.draft_support.shape[0] > 1 else 0]
    known = (support >= 0) & (support < vocab)
    dense = torch.zeros(vocab, dtype=torch.float32, device=q.device)
    return dense.index_add_(0, support[known].long(), q[known])
