"""The whole drafter: embeddings, backbone, LM head, sequential and confidence heads.

Parameter names are those of DeepSpec's checkpoints, so that `state_dict` and a
checkpoint differ only in what is shared with the target (embeddings, LM head).
"""

from __future__ import annotations

from torch import Tensor, nn

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.backbone import Backbone, ContextKV
from vllm_dspark.model.confidence import ConfidenceHead
from vllm_dspark.model.sequential_head import build_sequential_head, zero_embedding
from vllm_dspark.ops.sequential import SequentialHead


class Drafter(Backbone):
    """A DSpark drafter (paper, section 3.1).

    ``draft_to_target`` is ``[Vd]`` int64, the target's id of every draft id, or None
    when both vocabularies are the same. It is an absolute id, not the offset that the
    checkpoint's ``d2t`` holds.
    """

    draft_to_target: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.embed_tokens = zero_embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(
            config.hidden_size, config.draft_vocab_size, bias=False
        )
        self.markov_head = build_sequential_head(config)
        enabled = config.enable_confidence_head
        self.confidence_head = ConfidenceHead(config) if enabled else None
        # Not in the state dict: the checkpoint keeps the offsets under another name.
        self.register_buffer("draft_to_target", None, persistent=False)

    def forward_block(
        self,
        anchor_ids: Tensor,
        anchor_positions: Tensor,
        ctx: ContextKV,
        num_drafts: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the parallel stage for one block per request.

        The anchor sits at its own position and K-1 masks follow; hidden state k
        (from 1) belongs to input k-1 and predicts the k-th token after the anchor.

        Args:
            anchor_ids: ``[R]`` target ids.
            anchor_positions: ``[R]`` int64.
            ctx: context of the target's positions before the anchors.
            num_drafts: K, the block size if None.

        Returns:
            hidden ``[R, K, d]`` and base logits ``[R, K, Vd]``.
        """
        size = self.config.block_size if num_drafts is None else num_drafts
        ids = anchor_ids.new_full((len(anchor_ids), size), self.config.mask_token_id)
        ids[:, 0] = anchor_ids
        hidden = self.run_block(self.embed_tokens(ids), anchor_positions, ctx)
        return hidden, self.lm_head(hidden)

    def teacher_forced(
        self, hidden: Tensor, base_logits: Tensor, prev_ids: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Final logits and confidence logits when the previous tokens are given.

        Args:
            hidden: ``[R, K, d]``; ``base_logits``: ``[R, K, Vd]``.
            prev_ids: ``[R, K]`` target ids x_0..x_{K-1}.

        Returns:
            logits ``[R, K, Vd]`` and confidence logits ``[R, K]`` (or None).
        """
        head = self.markov_head
        logits = base_logits if head is None else base_logits + head(prev_ids, hidden)
        if self.confidence_head is None:
            return logits, None
        prev = None
        if head is not None and self.config.confidence_head_with_markov:
            prev = head.embed(prev_ids)
        return logits, self.confidence_head(hidden, prev)

    def sequential_head_weights(self) -> SequentialHead:
        """The weights that sampling a block left to right needs, for the ops."""
        markov, conf = self.markov_head, self.confidence_head
        mapping = self.draft_to_target
        joint = getattr(markov, "gate_proj", getattr(markov, "joint_proj", None))
        return SequentialHead(
            head_type=self.config.markov_head_type,
            markov_w1=None if markov is None else markov.markov_w1.weight.detach(),
            markov_w2=None if markov is None else markov.markov_w2.weight.detach(),
            joint_weight=None if joint is None else joint.weight.detach(),
            joint_bias=None if joint is None else joint.bias.detach(),
            confidence_weight=(
                None if conf is None else conf.proj.weight.detach()[0].float()
            ),
            confidence_bias=None if conf is None else conf.proj.bias.detach().float(),
            draft_to_target=None if mapping is None else mapping.int(),
        )
