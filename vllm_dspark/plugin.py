"""Entry point of the group ``vllm.general_plugins``.

vLLM calls :func:`register` in every process it starts (API server, engine core,
workers), before it builds its configuration. It is idempotent and cheap, and what
it installs is inert unless the speculative method is ``dspark``. On the V1 model
runner DSpark is ours; on the V2 runner it is vLLM's own, extended.
"""

from __future__ import annotations


def register() -> None:
    """Install the plugin's hooks into this process (once)."""
    from vllm_dspark.integration import patches

    patches.install()
