"""Every symbol of vLLM's V2 runner that the adapter touches, for `compat`.

Apart from the V1 table: a vLLM in which one of these has moved still serves DSpark,
its own, and our V1 runner does not need them.
"""

_RUNNER = "vllm.v1.worker.gpu.model_runner:"
_SPEC = "vllm.v1.worker.gpu.spec_decode."
_SPECULATOR = _SPEC + "dspark.speculator:DSparkSpeculator."
_REJECTION = _SPEC + "rejection_sampler:RejectionSampler."
_ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler."
_VERIFICATION = _SPEC + "adaptive_verification:AdaptiveVerificationManager."
_SAMPLE = "vllm.v1.worker.gpu.sample."
_DRAFTER = "vllm.model_executor.models.qwen3_dspark:Qwen3DSparkForCausalLM"

# Path, parameters (None: existence matters), why; see `compat.Symbol`.
SYMBOLS_V2: tuple[tuple[str, str | None, str], ...] = (
    (
        "vllm.config:VllmConfig._validate_v2_model_runner",
        "",
        "patched: notices a configuration with DSpark on V2",
    ),
    # worker.py
    ("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "", "subclassed"),
    ("vllm.v1.worker.gpu_worker:Worker.init_device", "", "subclassed"),
    (
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "load_dummy_weights",
        "overridden: the rejection sampler is replaced",
    ),
    (
        _RUNNER + "GPUModelRunner.load_model",
        "load_dummy_weights",
        "makes the rejection sampler",
    ),
    # the workers' reports (worker.py, meter.py)
    (
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
        "scheduler_output",
        "overridden: the step's budget is handed on",
    ),
    (
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        "grammar_output",
        "overridden: a report leaves with the output",
    ),
    (
        "vllm.v1.worker.gpu_worker:Worker.take_draft_token_ids",
        "",
        "overridden: with confidences",
    ),
    (
        "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs",
        "req_ids idx_mapping num_scheduled_tokens",
        "wrapped: adapters of verified rows (lora.py)",
    ),
    ("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", "", "wrapped: the report"),
    ("vllm.v1.worker.gpu.async_utils:async_copy_to_np", "x", "called"),
    ("vllm.v1.worker.gpu.async_utils:stream", "to_stream from_stream", "called"),
    ("vllm.utils.torch_utils:async_tensor_h2d", "data device dtype out", "called"),
    # the schedulers (scheduler.py, budgeting.py)
    ("vllm.v1.core.sched.async_scheduler:AsyncScheduler", None, "subclassed"),
    (
        _ASYNC + "_update_after_schedule",
        "scheduler_output",
        "overridden: how many positions the step drafts",
    ),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
        "spec_decoding_stats num_draft_tokens num_accepted_tokens "
        "num_invalid_spec_tokens request_id",
        "overridden: counts what was verified",
    ),
    ("vllm.v1.core.sched.output:SchedulerOutput", None, "read"),
    (
        "vllm.v1.core.sched.output:GrammarOutput",
        "structured_output_request_ids grammar_bitmask num_acceptable_drafts",
        "changed: the first draft outside of a grammar is verified, too (grammar.py)",
    ),
    (
        "vllm.v1.worker.gpu.structured_outputs:grammar_invalid_drafts",
        "input_batch grammar_req_ids num_acceptable_drafts",
        "kept: reads what grammar.py has changed",
    ),
    ("vllm.v1.outputs:DraftTokenIds", "req_ids draft_token_ids", "read"),
    ("vllm.v1.outputs:ModelRunnerOutput", None, "carries our report"),
    ("vllm.v1.request:Request", None, "read"),
    # what steps cost (profiling.py)
    (
        _RUNNER + "GPUModelRunner._dummy_run",
        "num_tokens context_len",
        "called: steps of a wanted size",
    ),
    # trimming on the device (verification.py)
    (
        _VERIFICATION + "__init__",
        "req_states query_start_loc num_bonus_tokens max_total_logits",
        "subclassed; its buffers are used",
    ),
    (_VERIFICATION + "add_request", "req_idx", "overridden"),
    (_VERIFICATION + "batches_to_profile", "capture_sizes", "overridden: none"),
    (_VERIFICATION + "set_initial_cost_curves", "samples", "overridden"),
    (
        _VERIFICATION + "record_confidences",
        "confidence_probs input_batch",
        "overridden: our meter copies them",
    ),
    (
        _VERIFICATION + "get_num_tokens",
        "num_tokens_per_req draft_tokens",
        "overridden: the scheduler's budget",
    ),
    (
        _VERIFICATION + "compact_batch",
        "num_draft_tokens_per_req num_scheduled_tokens cu_num_logits_np",
        "kept: reads what get_num_tokens leaves",
    ),
    (
        _VERIFICATION + "reallocate_drafts",
        "req_ids idx_mapping",
        "overridden: calibrated survivals, goals",
    ),
    # what is put in place (hooks.py)
    (
        _RUNNER + "maybe_create_adaptive_verification_manager",
        "enable_adaptive_verification req_states query_start_loc num_bonus_tokens "
        "max_total_logits vllm_config",
        "swapped",
    ),
    ("vllm.v1.worker.gpu.model_runner", None, "its function is swapped"),
    (_RUNNER + "init_speculator", "vllm_config device req_states", "swapped"),
    # speculator.py
    (_SPECULATOR + "__init__", "vllm_config device", "subclassed"),
    (
        _SPECULATOR + "load_draft_model",
        "target_model target_attn_layer_names",
        "overridden: what the drafter leaves out is the target's",
    ),
    (
        _SPECULATOR + "_sample_sequential",
        "num_reqs head_hidden",
        "overridden: gated and rnn heads",
    ),
    (
        _SPECULATOR + "propose",
        "input_batch attn_metadata slot_mappings",
        "overridden: draft lengths, the meter, calibrated confidences",
    ),
    (
        _SPECULATOR + "_build_uniform_attn_metadata",
        "batch_desc num_reqs num_query_per_req",
        "overridden: not for a bypass",
    ),
    (
        _SPECULATOR + "_generate_draft",
        "num_reqs num_tokens_padded attn_metadata slot_mappings num_tokens_across_dp",
        "overridden: left out in a bypass",
    ),
    (_SPECULATOR + "_sample_logits", "logits idx_map sample_pos step", "called"),
    # sampler.py, rejection_triton.py
    (_REJECTION + "__init__", "sampler spec_config device", "subclassed"),
    (
        _REJECTION + "_verify",
        "logits draft_logits draft_sampled pos cu_num_logits idx_mapping "
        "idx_mapping_np expanded_idx_mapping expanded_local_pos "
        "seq_lens_upper_bound_np verify_draft_sampled",
        "overridden: our kernel",
    ),
    (
        _SAMPLE + "sampler:Sampler.apply_sampling_params",
        "logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids "
        "expanded_local_pos seq_lens_upper_bound_np",
        "called",
    ),
    # Device functions; spec_step_seed is there from 0.33 on.
    (_SAMPLE + "gumbel", None, "its seeds of block verification"),
    (
        _SAMPLE + "gumbel:gumbel_noised_argmax",
        "logits keys mask seed pos temp IS_DRAFTING USE_FP64 APPLY_TEMPERATURE",
        "called in a kernel: vLLM's noise",
    ),
    (_SAMPLE + "gumbel:tl_rand32", "seed offset includes_zero", "called in a kernel"),
    # model.py
    (_DRAFTER + ".__init__", "vllm_config prefix", "subclassed"),
    (_DRAFTER + ".load_weights", "weights", "overridden"),
    (_DRAFTER + ".markov_bias", "markov_embed", "called"),
    (
        _DRAFTER + ".apply_markov_bias_gathered",
        "markov_embed logits values index",
        "called",
    ),
    (_DRAFTER + ".compute_confidence", "head_hidden markov_embed", "called"),
    ("vllm.model_executor.models:ModelRegistry", None, "our drafter class"),
)
