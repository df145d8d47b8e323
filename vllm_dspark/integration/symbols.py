"""Every vLLM symbol that the plugin touches on the V1 runner, for `compat`.

The table is the one place to look when vLLM moves. A test holds it against the
imports of this package, so that no symbol is touched without standing here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """One thing of vLLM's.

    Args:
        path: ``module:qualified.name`` (or just the module).
        params: parameters that must be there, in this order after ``self``; None
            when only existence matters.
        why: what we do with it.
    """

    path: str
    params: tuple[str, ...] | None
    why: str


def symbol_of(path: str, params: str | None, why: str) -> Symbol:
    """A row of a table; the parameters in one string."""
    return Symbol(path, None if params is None else tuple(params.split()), why)


_s = symbol_of  # short, for the table

_CONFIG = "vllm.config:"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_DFLASH = "vllm.model_executor.models.qwen3_dflash:"
_PROC = "vllm.v1.sample.logits_processor.builtin:"
_BUDGET = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_STATS = "vllm.v1.metrics.stats:"
_LOGGER = "vllm.v1.metrics.loggers:PrometheusStatLogger"
_PROPOSER = "vllm.v1.spec_decode.dflash:DFlashProposer"

SYMBOLS: tuple[Symbol, ...] = (
    # configuration (patches.py, config.py)
    _s(
        _CONFIG + "VllmConfig._get_v1_model_runner_unsupported_features",
        "",
        "patched: lets dspark through on V1",
    ),
    _s(_CONFIG + "VllmConfig", None, "read"),
    _s(_CONFIG + "SpeculativeConfig.__post_init__", "", "patched: reads the drafter"),
    _s(_CONFIG + "get_layers_from_vllm_config", "vllm_config layer_type", "called"),
    _s(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "speculative_config",
        "patched: min-p and logit bias work with dspark",
    ),
    _s("vllm.exceptions:VLLMValidationError", "message parameter value", "raised"),
    _s("vllm.model_executor.models.interfaces:supports_eagle3", "model", "called"),
    _s("vllm.utils.torch_utils:set_default_torch_dtype", "dtype", "called"),
    _s("vllm.utils.torch_utils:PIN_MEMORY", None, "read"),
    _s("vllm.logger:init_logger", "name", "called"),
    # platform_report below
    _s("vllm.envs", None, "VLLM_USE_V2_MODEL_RUNNER is read"),
    _s("vllm.platforms:current_platform", None, "read"),
    _s("vllm.triton_utils:HAS_TRITON", None, "read"),
    # workers and runner (worker.py, runner.py)
    _s("vllm.v1.worker.cpu_worker", None, "its CPUModelRunner is swapped at start"),
    _s("vllm.v1.worker.cpu_worker:CPUModelRunner", None, "swapped at start"),
    _s("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "", "subclassed"),
    _s(
        "vllm.v1.worker.cpu_worker:CPUWorker.execute_model",
        "scheduler_output",
        "overridden: one message a step",
    ),
    _s(
        "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens",
        "grammar_output",
        "overridden: the drafts leave with the output",
    ),
    _s(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids",
        "",
        "overridden: nothing is left to ask for",
    ),
    _s("vllm.v1.executor.multiproc_executor:MultiprocExecutor", None, "subclassed"),
    _s("vllm.v1.worker.gpu_worker", None, "see gpu_worker:Worker"),
    _s("vllm.v1.worker.gpu_worker:Worker.init_device", "", "subclassed"),
    _s("vllm.v1.worker.gpu_model_runner", None, "its runner is swapped at start"),
    _s("vllm.v1.worker.cpu_model_runner:CPUModelRunner", None, "subclassed"),
    _s(_RUNNER + ".__init__", "vllm_config device", "overridden"),
    _s(_RUNNER + "._get_eagle3_aux_layers_from_config", "", "overridden"),
    _s(_RUNNER + "._input_fits_in_drafter", "common_attn_metadata", "overridden"),
    _s(_RUNNER + "._sample", "logits spec_decode_metadata", "overridden"),
    _s(_RUNNER + "._update_states", "scheduler_output", "overridden: trace"),
    _s(_RUNNER + ".shutdown", "", "overridden: trace"),
    _s("vllm.distributed.parallel_state:get_tensor_model_parallel_rank", "", "called"),
    _s(_RUNNER + "._get_positions", None, "called"),
    _s(
        _RUNNER + ".propose_draft_token_ids",
        "scheduler_output sampled_token_ids sampling_metadata hidden_states "
        "sample_hidden_states aux_hidden_states spec_decode_metadata "
        "common_attn_metadata slot_mappings",
        "overridden",
    ),
    _s(
        _RUNNER + "._copy_draft_token_ids_to_cpu",
        "scheduler_output zeros_only",
        "overridden",
    ),
    _s(_RUNNER + ".take_draft_token_ids", "", "overridden"),
    # scheduler
    _s(_SCHEDULER, None, "subclassed"),
    _s(
        "vllm.v1.core.sched.scheduler:build_dynamic_sd_schedule_lookup",
        None,
        "stands for the scheduler's dynamic_sd_lookup, which is set: no padding",
    ),
    _s(
        _SCHEDULER + ".update_draft_token_ids",
        "draft_token_ids",
        "overridden: confidences arrive here",
    ),
    _s(
        _SCHEDULER + ".get_grammar_bitmask",
        "scheduler_output",
        "overridden: sampled drafts outside of the grammar are in the step",
    ),
    _s(
        "vllm.v1.structured_output:StructuredOutputManager.validate_tokens",
        "request spec_tokens",
        "called: which of the step's drafts those are",
    ),
    _s(
        _SCHEDULER + ".update_from_output",
        "scheduler_output model_runner_output",
        "overridden: drafts arrive with the output",
    ),
    _s(
        _SCHEDULER + ".schedule",
        "throttle_prefills",
        "overridden: drafts are trimmed first",
    ),
    _s(
        _SCHEDULER + "._update_after_schedule",
        "scheduler_output",
        "overridden: how many positions the step drafts",
    ),
    _s(
        _SCHEDULER + "._free_request",
        "request",
        "overridden: the controller forgets a request",
    ),
    _s(_SCHEDULER + ".shutdown", "", "overridden: cost table and log are kept"),
    _s("vllm.v1.request:Request", None, "read"),
    # metrics (stats.py, patches.py)
    _s(_SCHEDULER + ".make_stats", None, "overridden: with news of the controller"),
    _s(_SCHEDULER + ".add_request", "request", "overridden: a request's own numbers"),
    _s(_STATS + "SchedulerStats", None, "gets a field"),
    _s(_STATS + "RequestSpecDecodeMetrics", None, "gets a field"),
    _s(_STATS + "RequestSpecDecodeMetrics.new", "num_spec_tokens", "called"),
    _s(_STATS + "RequestSpecDecodeMetrics.to_dict", "", "patched: tells the field"),
    _s(
        _LOGGER + ".__init__",
        "vllm_config engine_indexes",
        "patched: registers our metrics; its labels and metric classes are read",
    ),
    _s(
        _LOGGER + ".record",
        "scheduler_stats iteration_stats mm_cache_stats engine_idx",
        "patched: observes our metrics",
    ),
    # what steps cost (costs.py, profiling.py)
    _s(
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
        "",
        "overridden: step costs are measured",
    ),
    _s(
        _RUNNER + "._dummy_run",
        "num_tokens cudagraph_runtime_mode force_attention",
        "called: steps of a wanted size",
    ),
    _s(
        _PROPOSER + ".dummy_run",
        "num_tokens",
        "overridden: silent while target steps are timed",
    ),
    _s("vllm.distributed.parallel_state:get_tp_group", "", "called"),
    _s("vllm.v1.core.sched.output:SchedulerOutput", None, "read"),
    _s("vllm.v1.engine:EngineCoreOutputs", None, "named"),
    _s("vllm.v1.outputs:ModelRunnerOutput", None, "carries our report"),
    _s("vllm.v1.outputs:DraftTokenIds", "req_ids draft_token_ids", "subclassed"),
    # drafter (proposer.py, model.py)
    _s(_PROPOSER + ".__init__", "vllm_config device runner", "subclassed"),
    _s(
        _PROPOSER + ".initialize_attn_backend",
        "kv_cache_config kernel_block_sizes",
        "overridden: what waits to become context K/V is laid out by blocks",
    ),
    _s(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        None,
        "read: a request's blocks, for features that nobody will read",
    ),
    _s(_PROPOSER + ".load_model", "target_model", "overridden"),
    _s(_PROPOSER + "._create_draft_vllm_config", "", "called"),
    _s(
        _PROPOSER + ".build_per_group_and_layer_attn_metadata",
        "cad draft_index",
        "called",
    ),
    _s(_PROPOSER + "._determine_batch_execution_and_padding", "num_tokens", "called"),
    _s(_PROPOSER + "._get_slot_mapping", "num_tokens slot_mapping", "called"),
    _s("vllm.v1.attention.backend:CommonAttentionMetadata", None, "built"),
    _s(
        "vllm.forward_context:set_forward_context",
        "attn_metadata vllm_config num_tokens",
        "called",
    ),
    _s("vllm.compilation.backends:set_model_tag", "tag", "called"),
    _s(
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
        None,
        "finds the drafter's layers",
    ),
    _s(
        "vllm.model_executor.model_loader.utils:initialize_model",
        "vllm_config prefix model_class model_config",
        "called",
    ),
    _s(
        "vllm.model_executor.model_loader.utils:process_weights_after_loading",
        "model model_config target_device",
        "called",
    ),
    _s(_DFLASH + "DFlashQwen3Model._normalize_context_k", "all_k", "overridden"),
    _s(_DFLASH + "DFlashQwen3Model._build_fused_kv_buffers", "", "called"),
    _s(
        _DFLASH + "DFlashQwen3Model._project_context_kv",
        "context_states num_ctx num_layers num_kv_heads head_dim",
        "overridden",
    ),
    _s("vllm.model_executor.layers.linear:ReplicatedLinear", None, "built"),
    _s(
        _DFLASH + "DFlashQwen3Model.precompute_and_store_context_kv",
        "context_states context_positions context_slot_mapping",
        "called",
    ),
    _s(_DFLASH + "DFlashQwen3ForCausalLM", None, "subclassed"),
    _s("vllm.model_executor.models.utils:maybe_prefix", "prefix name", "called"),
    _s(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor",
        None,
        "draft logits",
    ),
    _s(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
        None,
        "draft LM head",
    ),
    _s(
        "vllm.distributed.communication_op:tensor_model_parallel_all_reduce",
        "input_",
        "called",
    ),
    _s("vllm._custom_ops:rms_norm", "out input weight epsilon", "called"),
    # verification (sampler.py, rows.py)
    _s("vllm.v1.sample.rejection_sampler:RejectionSampler", None, "subclassed"),
    _s("vllm.v1.sample.rejection_sampler:PLACEHOLDER_TOKEN_ID", None, "read"),
    _s("vllm.v1.sample.sampler:Sampler.compute_logprobs", "logits", "called"),
    _s(
        "vllm.v1.sample.sampler:Sampler.gather_logprobs",
        "logprobs num_logprobs token_ids",
        "called",
    ),
    _s(
        "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs",
        "logprobs logprob_token_ids sampled",
        "called",
    ),
    _s("vllm.v1.sample.metadata:SamplingMetadata", None, "read"),
    _s("vllm.v1.spec_decode.metadata:SpecDecodeMetadata", None, "read"),
    _s(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata.make_dummy",
        "draft_token_ids device",
        "called",
    ),
    _s("vllm.v1.outputs:SamplerOutput", "sampled_token_ids logprobs_tensors", "built"),
    _s("vllm.v1.outputs:LogprobsTensors", None, "typed"),
    _s("vllm.v1.sample.ops.bad_words:apply_bad_words", None, "called"),
    _s(
        "vllm.v1.sample.ops.penalties:apply_all_penalties",
        "logits prompt_token_ids presence_penalties frequency_penalties "
        "repetition_penalties output_token_ids",
        "called",
    ),
    _s(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", "logits k p", "called"
    ),
    _s("vllm.v1.sample.logits_processor:LogitsProcessors", "logitsprocs", "built"),
    _s(
        _PROC + "MinTokensLogitsProcessor.apply_with_spec_decode",
        "logits num_draft_tokens",
        "called",
    ),
    _s(_PROC + "LogitBiasLogitsProcessor", None, "its biases are read"),
    _s(_PROC + "MinPLogitsProcessor", None, "its min_p_cpu_tensor is read"),
    # thinking budget (thinking.py)
    _s(_BUDGET + ".has_tracked_requests", "", "called"),
    _s(_BUDGET + ".update_state", "output_token_ids spec_token_ids", "called"),
    _s(
        _BUDGET + ".apply_to_logits",
        "logits predict_bonus_token spec_token_ids",
        "called",
    ),
)
