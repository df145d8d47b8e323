"""What the stages of a decoding round hand to each other, and the glossary.

The one table of symbols; section numbers are those of the DSpark paper.

========  ==================  =====================================================
symbol    name in the code    meaning
========  ==================  =====================================================
γ         block_size          draft positions per block: the anchor and γ-1 masks
                              are the γ inputs and give γ draft logits (3.1)
x_0       anchor              the last token the target produced (the bonus token)
p         anchor_position     its position; the target has processed positions < p
h_k       hidden              backbone output of input k-1, predicts x_k (k = 1..γ)
U_k       base_logits         logits of h_k through the LM head, before the head's
                              bias B_k (3.1)
c_k       confidence          P(x_k accepted given x_1..x_{k-1} were), in (0, 1)
                              (3.2.1)
z_k       certainty           log-odds of the likeliest draft token's probability at
                              temperature 1 (ours; calibration may use it)
a_k       survival            the product of c_1..c_k
ℓ         num_drafts,         drafts of a request sent to verification, 0..γ; where
          verify_lens         it is decided, num_drafts is how many there are to choose
τ         accepted_length     tokens emitted per round, the bonus token included
R         num_reqs            requests of a batch
B         batch_tokens        tokens of the target's step: anchors, drafts, prefill
Θ         throughput          tokens per second, R·τ over the seconds of the round
V, Vd     vocab_size,         target vocabulary; the drafter's own, possibly a
          draft_vocab_size    subset, whose row i is target token d2t[i]
S         support             entries of a truncated draft distribution (top-k)
========  ==================  =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """What the proposer hands to verification for a batch of requests.

    Args:
        token_ids: ``[R, K]`` int64, drafts as ids of the target's vocabulary.
        draft_probs: ``[R, K, S]`` float32, the distribution each draft was drawn
            from; None when drafts are greedy, i.e. the distribution is one-hot.
        draft_support: ``[R, K, S]``, or ``[1, 1, S]`` for all alike, int32: target
            ids of the entries of ``draft_probs``; None when entry i is token i.
        confidence: ``[R, K]`` float32, c_k (3.2.1); None without confidence head.
        finite: ``[R]`` bool, False where draft logits or confidences held NaN or
            inf: such a request must not be verified with these drafts.
        certainty: ``[R, K]`` float32, z_k; None without a confidence head, or where
            the backend does not compute it.
    """

    token_ids: Tensor
    draft_probs: Tensor | None
    draft_support: Tensor | None
    confidence: Tensor | None
    finite: Tensor
    certainty: Tensor | None = None


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Tokens that come out of one verification (2.1).

    Args:
        token_ids: ``[R, L+1]`` int64, the accepted drafts and then one corrected or
            bonus token, padded with -1; L is the longest draft of the batch.
        num_emitted: ``[R]`` int64, tokens before the padding, at least 1.
    """

    token_ids: Tensor
    num_emitted: Tensor


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decoding round of one request, as plain numbers.

    Args:
        anchor_position: position p of the anchor.
        anchor_id: the anchor x_0.
        draft_ids: the drafts sent to verification (ℓ of them).
        num_accepted: how many of them were accepted; τ of the round is one more.
        confidence: c_1..c_ℓ, empty without confidence head.
        certainty: z_1..z_ℓ, empty where it is not known.
    """

    anchor_position: int
    anchor_id: int
    draft_ids: tuple[int, ...]
    num_accepted: int
    confidence: tuple[float, ...]
    certainty: tuple[float, ...] = ()
