"""`rejection_sample` in C++ (csrc/rejection.cpp), for tensors on the CPU."""

from collections.abc import Callable

from torch import Tensor

from vllm_dspark.ops.extension_native import capsule, require, require_for
from vllm_dspark.ops.rejection import RejectionInputs, RejectionResult


def checked_run(logits: Tensor) -> Callable[[RejectionInputs], RejectionResult]:
    """`run`, or RuntimeError if the extension or the device does not allow it."""
    require_for(logits)
    return run


def run(inputs: RejectionInputs) -> RejectionResult:
    """One call into the extension, which releases the GIL."""
    token_ids, num_emitted = inputs.outputs()
    require().rejection_sample(
        capsule(inputs.target_logits),
        capsule(inputs.draft_token_ids),
        capsule(inputs.num_draft_tokens),
        capsule(inputs.draft_probs),
        capsule(inputs.draft_support),
        capsule(inputs.temperature),
        capsule(inputs.accept_uniforms),
        capsule(inputs.sample_uniforms),
        capsule(token_ids),
        capsule(num_emitted),
        inputs.method == "block",
    )
    return RejectionResult(token_ids, num_emitted, "native")
