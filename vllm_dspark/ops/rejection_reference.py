"""The specification of `rejection_sample`, in plain torch.

With z = logits * float32(1/T) and w = exp(z - max z) in float32 (weights below e^-87
are zero), p = w * float32(1 / sum w); sums are float64. An inverse-CDF draw with
uniform u is the first index of positive weight whose cumulative weight exceeds
u * total.

Block verification (Sun et al., 2024, arXiv 2403.10444) accepts the longest prefix of
which its test says so, not the one before the first rejection. With r_0 = 1 and
r_i = min(r_(i-1) * p(x_i) / q(x_i), 1), m_i = sum of max(0, r_i * p - q) in the row
after i drafts, and h_i = m_i / (m_i + 1 - r_i), for all drafts of a request h = r: i
drafts may be accepted if u_i < h_i. Then comes a draw from max(0, r_i * p - q), or from
p after all drafts. r_i * p is w * (float32(r_i) * float32(1 / sum w)).
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
    one_request = _request if inputs.method == "standard" else _block
    for r, length in enumerate(inputs.num_draft_tokens.tolist()):
        tokens = one_request(inputs, r, first, length)
        token_ids[r, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        num_emitted[r] = len(tokens)
        first += length
    return RejectionResult(token_ids, num_emitted, "reference")


def _temperature(inputs: RejectionInputs, r: int) -> Tensor | None:
    """Temperature of request r, None if it is greedy."""
    if inputs.temperature is None:
        return None
    temperature = inputs.temperature[r]
    return temperature if bool(temperature >= GREEDY_TEMPERATURE) else None


def _request(inputs: RejectionInputs, r: int, first: int, length: int) -> list[int]:
    temperature = _temperature(inputs, r)
    tokens: list[int] = []
    for k in range(length + 1):
        logits = inputs.target_logits[first + r + k]
        draft = int(inputs.draft_token_ids[first + k]) if k < length else None
        weights = None
        if temperature is not None:
            weights = softmax_weights(logits, 1.0 / temperature)
        if weights is None:  # greedy, or a row that is no distribution
            token = int(logits.argmax())
            tokens.append(token)
            if token != draft:
                break
            continue
        assert inputs.accept_uniforms is not None and inputs.sample_uniforms is not None
        if draft is not None:
            p, q = _pair(inputs, first + k, draft, weights)
            if q > 0 and float(inputs.accept_uniforms[first + k]) * q < p:
                tokens.append(draft)
                continue
            weights = _residual(inputs, first + k, draft, weights, 1.0)
        tokens.append(inverse_cdf(weights, inputs.sample_uniforms[r]))
        break
    return tokens


def _block(inputs: RejectionInputs, r: int, first: int, length: int) -> list[int]:
    """Block verification; a row that is no distribution ends the block."""
    temperature = _temperature(inputs, r)
    if temperature is None:
        return _request(inputs, r, first, length)
    assert inputs.accept_uniforms is not None and inputs.sample_uniforms is not None
    drafts: list[int] = inputs.draft_token_ids[first : first + length].tolist()
    ratio = accepted_ratio = 1.0
    accepted, end = 0, length
    for k, draft in enumerate(drafts):
        row = inputs.target_logits[first + r + k]
        weights = softmax_weights(row, 1.0 / temperature)
        if weights is None:
            end = k
            break
        p, q = _pair(inputs, first + k, draft, weights)
        if k > 0:
            mass = _residual_mass(inputs, first + k, p, weights, ratio)
            rest = mass + 1.0 - ratio
            threshold = mass / rest if rest > 0 else 1.0
            if float(inputs.accept_uniforms[first + k - 1]) < threshold:
                accepted, accepted_ratio = k, ratio
        ratio = min(ratio * (p / q), 1.0) if q > 0 else 0.0
        if ratio == 0.0:  # nothing longer can be accepted: no further row is read
            break
    if end > 0 and float(inputs.accept_uniforms[first + end - 1]) < ratio:
        accepted = end
    row = inputs.target_logits[first + r + accepted]
    weights = softmax_weights(row, 1.0 / temperature)
    if weights is None:
        return [*drafts[:accepted], int(row.argmax())]
    if accepted < end:
        i, draft = first + accepted, drafts[accepted]
        weights = _residual(inputs, i, draft, weights, accepted_ratio)
    return [*drafts[:accepted], inverse_cdf(weights, inputs.sample_uniforms[r])]


def _scale(weights: Tensor, ratio: float = 1.0) -> Tensor:
    """What makes weights ``ratio`` times a distribution; float32."""
    return torch.tensor(ratio).float() * (1.0 / weights.double().sum()).float()


def _pair(
    inputs: RejectionInputs, i: int, draft: int, weights: Tensor
) -> tuple[float, float]:
    """p and q of the draft of row i; 0 and 0 if it is no token."""
    if not 0 <= draft < weights.shape[0]:
        return 0.0, 0.0
    p = float(weights[draft] * _scale(weights))
    if inputs.draft_probs is None:
        return p, 1.0
    return p, float(dense_draft(inputs, i, weights.shape[0])[draft])


def _remaining(
    inputs: RejectionInputs, i: int, weights: Tensor, ratio: float
) -> Tensor:
    q = dense_draft(inputs, i, weights.shape[0])
    return (weights * _scale(weights, ratio) - q).clamp(min=0.0)


def _residual_mass(
    inputs: RejectionInputs, i: int, p: float, weights: Tensor, ratio: float
) -> float:
    """Sum of max(0, ratio * p - q) over row i; `p` is that of its draft."""
    if inputs.draft_probs is None:
        return ratio * (1.0 - p)
    return float(_remaining(inputs, i, weights, ratio).double().sum())


def _residual(
    inputs: RejectionInputs, i: int, draft: int, weights: Tensor, ratio: float
) -> Tensor:
    """What to draw from once the draft of row i is rejected."""
    if inputs.draft_probs is None:
        rest = weights.clone()
        if 0 <= draft < weights.shape[0]:
            rest[draft] = 0.0
        return rest if bool((rest > 0).any()) else weights
    rest = _remaining(inputs, i, weights, ratio)
    return rest if float(rest.double().sum()) > RESIDUAL_FLOOR else weights


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
