"""The specification of `draft_sequential`, in plain torch.

Products are float32 whatever the weights are. With bfloat16 weights the vector that W2
multiplies is rounded to bfloat16 first, as the checkpoint's own layers do.
Probabilities and draws are those of `rejection_reference`.
"""

import torch
from torch import Tensor

from vllm_dspark.ops.arguments import GREEDY_TEMPERATURE
from vllm_dspark.ops.rejection_reference import inverse_cdf, softmax_weights
from vllm_dspark.ops.sequential import (
    SequentialDraft,
    SequentialHead,
    SequentialInputs,
)

# Weight of all other tokens against the likeliest, below which float32 sums say little.
_LEAST_OTHERS = 1e-4


def latent(
    head: SequentialHead, hidden: Tensor, markov: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What W2 multiplies, and the next recurrent state (paper 3.1).

    Args:
        head: the weights; its type is not none.
        hidden: Shape ``[R, d]`` float32.
        markov: Shape ``[R, r]`` float32, W1 of the previous tokens.
        state: Shape ``[R, r]`` float32; only the rnn head uses it.

    Returns:
        Two tensors of shape ``[R, r]`` float32.
    """
    assert head.markov_w2 is not None
    value = markov
    if head.head_type != "vanilla":
        assert head.joint_weight is not None and head.joint_bias is not None
        weight, bias = head.joint_weight.float(), head.joint_bias.float()
        if head.head_type == "gated":
            joint = torch.cat([hidden, markov], dim=-1) @ weight.T + bias
            value = joint.sigmoid() * markov
        else:
            joint = torch.cat([state, markov, hidden], dim=-1) @ weight.T + bias
            gate, candidate, output = joint.chunk(3, dim=-1)
            gate = gate.sigmoid()
            state = gate * state + (1.0 - gate) * candidate.tanh()
            value = output.tanh()
    return value.to(head.markov_w2.dtype).float(), state


def confidence(head: SequentialHead, hidden: Tensor, markov: Tensor | None) -> Tensor:
    """c_k of all requests, ``[R]`` (paper 3.2.1); depends on x_{k-1}, never on x_k."""
    assert head.confidence_weight is not None
    features = hidden
    if head.confidence_weight.shape[0] != hidden.shape[1]:
        assert markov is not None
        features = torch.cat([hidden, markov], dim=-1)
    logit = features @ head.confidence_weight
    if head.confidence_bias is not None:
        logit = logit + head.confidence_bias
    return logit.sigmoid()


def certainty(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest of ``[R, S]`` logits at temperature 1, ``[R]``."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    others = weights.sum(-1, dtype=torch.float64) - 1.0
    return -others.clamp_min(_LEAST_OTHERS).log().float()


def candidates(base: Tensor, topk: int) -> Tensor:
    """Ascending draft ids of the largest of each row, ``[R, K, topk]`` int64."""
    # A stable sort, for torch.topk does not promise the lowest index among equals.
    order = base.float().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :topk].sort(dim=-1).values


def run(inputs: SequentialInputs) -> SequentialDraft:
    """Position by position over the whole batch, then request by request the draw."""
    base, head, topk = inputs.base_logits, inputs.head, inputs.topk
    r, k, vocab = base.shape
    device, f32 = base.device, torch.float32
    width = topk or vocab
    tokens = torch.empty((r, k), dtype=torch.int64, device=device)
    probs = torch.zeros((r, k, width), dtype=f32, device=device)
    ids = torch.arange(vocab, device=device).expand(r, k, vocab)
    confidences, certainties = torch.empty((2, r, k), dtype=f32, device=device)
    finite = torch.ones(r, dtype=torch.bool, device=device)
    state = torch.zeros((r, head.rank), dtype=f32, device=device)
    previous = inputs.anchor_ids.long()
    if topk is not None:
        ids = candidates(base, topk)
    for j in range(k):
        hidden = inputs.hidden[:, j].float()
        markov = None if head.markov_w1 is None else head.markov_w1[previous].float()
        logits = base[:, j].float()
        if head.head_type != "none":
            assert markov is not None and head.markov_w2 is not None
            value, state = latent(head, hidden, markov, state)
            logits = logits + value @ head.markov_w2.float().T
        logits = logits.gather(1, ids[:, j])
        finite &= logits.amax(-1).isfinite()  # NaN, if any, is the maximum
        if head.confidence_weight is not None:
            confidences[:, j] = confidence(head, hidden, markov)
            finite &= confidences[:, j].isfinite()
            certainties[:, j] = certainty(logits)
        picks = [_choose(inputs, i, j, logits[i], probs[i, j]) for i in range(r)]
        chosen = torch.tensor(picks, dtype=torch.int64, device=device)
        tokens[:, j] = ids[:, j].gather(1, chosen[:, None])[:, 0]
        if head.draft_to_target is not None:
            tokens[:, j] = head.draft_to_target[tokens[:, j]].long()
        previous = tokens[:, j]
    return SequentialDraft(
        tokens,
        probs if inputs.return_probs else None,
        support(head, ids) if topk is not None else whole_support(head),
        None if head.confidence_weight is None else confidences,
        finite,
        "reference",
        None if head.confidence_weight is None else certainties,
    )


def _choose(inputs: SequentialInputs, i: int, j: int, row: Tensor, out: Tensor) -> int:
    """Column drawn from one row of logits; fills the row of probabilities `out`."""
    temperature = None if inputs.temperature is None else inputs.temperature[i]
    weights = None
    if temperature is not None and bool(temperature >= GREEDY_TEMPERATURE):
        weights = softmax_weights(row, 1.0 / temperature)
    if weights is None:
        pick = int(row.argmax())
        out[pick] = 1.0
        return pick
    out.copy_(weights * (1.0 / weights.double().sum()).float())
    assert inputs.uniforms is not None
    return inverse_cdf(weights, inputs.uniforms[i, j])


def support(head: SequentialHead, ids: Tensor) -> Tensor:
    """Target ids of draft ids ``[R, K, S]``, int32."""
    if head.draft_to_target is not None:
        return head.draft_to_target[ids]
    return ids.to(torch.int32)


def whole_support(head: SequentialHead) -> Tensor | None:
    """Target ids of the whole draft vocabulary, ``[1, 1, Vd]``, or None: identity."""
    if head.draft_to_target is None:
        return None
    return head.draft_to_target.view(1, 1, -1)
