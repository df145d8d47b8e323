"""Every symbol of vLLM's V2 runner that the adapter touches, for `compat`.

Apart from the V1 table: a vLLM in which one of these has moved still serves DSpark,
its own, and our V1 runner does not need them.
"""

_RUNNER = "vllm.v1.worker.gpu.model_runner:"
_SPEC = "vllm.v1.worker.gpu.spec_decode."
_SPECULATOR = _SPEC + "dspark.speculator:DSparkSpeculator."
_REJECTION = _SPEC + "rejection_sampler:RejectionSampler."
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
    # what is put in place (hooks.py)
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
        "overridden: confidences are calibrated",
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
