"""The two hot operations, each with interchangeable backends behind one signature.

* `rejection_sample`: target logits and drafts to emitted tokens (paper section 2.1).
* `draft_sequential`: base logits to drafts through the sequential head (section 3.1).

The `reference` backend is plain torch and is the specification; `native` is the C++
extension (CPU), `triton` runs on GPUs. Every result names the backend that made it.
"""

from vllm_dspark.ops.extension_native import NativeStatus, native_status
from vllm_dspark.ops.rejection import RejectionResult, rejection_sample
from vllm_dspark.ops.sequential import (
    SequentialDraft,
    SequentialHead,
    draft_sequential,
)

__all__ = [
    "NativeStatus",
    "RejectionResult",
    "SequentialDraft",
    "SequentialHead",
    "draft_sequential",
    "native_status",
    "rejection_sample",
]
