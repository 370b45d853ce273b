"""Settings that SimpleTuner has and this trainer has not: for each, what to do instead.

A sentence here is no promise; a setting that gets built moves from here to its section.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from simpletuner.config.root import Config
from simpletuner.data.settings import DatasetSettings

_GROUPS = (
    (
        "belongs to a training method that this trainer does not have; remove it",
        """
        crepa_adjacent_distance=1 crepa_adjacent_tau=1.0 crepa_block_index=8 crepa_cutoff_step=0
        crepa_decay_steps=0 crepa_drop_vae_encoder=false crepa_enabled=false
        crepa_encoder=dinov2_vitg14 crepa_encoder_frames_batch_size=-1
        crepa_encoder_image_size=518 crepa_feature_source=encoder crepa_lambda=0.5
        crepa_lambda_end=0.0 crepa_normalize_by_frames=true crepa_normalize_neighbour_sum=false
        crepa_power=1.0 crepa_scheduler=constant crepa_self_flow=false
        crepa_self_flow_mask_ratio=0.1 crepa_similarity_ema_decay=0.99
        crepa_similarity_threshold crepa_spatial_align=true crepa_teacher_block_index
        crepa_threshold_mode=permanent crepa_use_backbone_features=false crepa_use_tae=false
        crepa_warmup_steps=0 diffusion_blocks_config distillation_config distillation_method
        internal_guidance_block_index internal_guidance_enabled=false
        internal_guidance_loss_weight=0.5 irepa_enabled=false irepa_projector_kernel_size=3
        irepa_spatial_norm_alpha=0.6 layersync_enabled=false layersync_lambda=0.2
        layersync_student_block layersync_teacher_block mixflow_enabled=false mixflow_gamma=0.8
        nextlat_block_index=-1 nextlat_enabled=false nextlat_kl_weight=0.0
        nextlat_state_loss=smooth_l1 nextlat_weight=0.0 scheduled_sampling_reflexflow
        scheduled_sampling_reflexflow_alpha=1.0 scheduled_sampling_reflexflow_beta1=10.0
        scheduled_sampling_reflexflow_beta2=1.0 tread_config twinflow_enabled=false
        twinflow_target_step_count=1 urepa_cutoff_step=0 urepa_decay_steps=0 urepa_enabled=false
        urepa_encoder_image_size=518 urepa_lambda=0.5 urepa_lambda_end=0.0
        urepa_manifold_weight=3.0 urepa_model=dinov2_vitg14 urepa_power=1.0
        urepa_scheduler=constant urepa_similarity_ema_decay=0.99 urepa_similarity_threshold
        urepa_threshold_mode=permanent urepa_use_tae=false urepa_warmup_steps=0
        validation_internal_guidance_scale=1.0 xm_block_size=0 xm_candidate_count=1
        xm_enabled=false xm_selection_scope=sample xm_training_target=noise
        conditioning_multidataset_sampling=random control=false controlnet_custom_config
        max_grounding_entities=0 pretrained_grounding_model_name_or_path
        """,
    ),
    (
        "is not needed: every timestep is trained, and a sampler begins at the last one where it"
        " has to; remove it",
        "training_scheduler_timestep_spacing=trailing",
    ),
    (
        "is not here; snr_gamma weights samples by their noise",
        "snr_weight=1.0",
    ),
    (
        "belongs to a model family that this trainer does not have; remove it",
        """
        custom_text_encoder_intermediary_layers hidream_load_balancing_loss_weight
        hidream_use_load_balancing_loss=false pretrained_gemma_model_name_or_path
        qwen_text_encoder_model_name_or_path sana_complex_human_instruction
        text_encoder_4_precision=no_change
        """,
    ),
    (
        "is not here: validation renders with the model that is trained; remove it",
        """
        pixart_validation_pipeline_mode=trained-stage pixart_validation_stage1_model
        pixart_validation_stage2_model sdxl_validation_pipeline_mode=trained-stage
        sdxl_validation_stage1_model sdxl_validation_stage2_model validation_adapter_config
        validation_adapter_mode=adapter_only validation_adapter_name validation_adapter_path
        validation_adapter_strength=1.0 validation_input validation_stitch_input_location=left
        validation_using_datasets
        """,
    ),
    (
        "is not here: validation renders with the stock pipeline; remove it",
        """
        validation_external_background=false validation_external_script
        validation_method=simpletuner-local
        """,
    ),
    (
        "is not here; use validate_after_step",
        "validate_after_epoch",
    ),
    (
        "is not here: noise is drawn on the CPU, the same on every device; remove it",
        "validation_seed_source=cpu",
    ),
    (
        "is not here; for less memory use gradient_checkpointing or enable_group_offload",
        """
        gradient_checkpointing_offload_attention=false
        gradient_checkpointing_offload_pin_memory_max_buckets=12
        gradient_checkpointing_offload_prefetch=false gradient_checkpointing_segment_stride
        group_offload_text_encoder=false group_offload_vae=false
        musubi_block_swap_device=cpu offload_during_save=false ramtorch=false
        ramtorch_controlnet=false ramtorch_disable_extensions=true
        ramtorch_disable_sync_hooks=false ramtorch_target_modules ramtorch_text_encoder=false
        ramtorch_text_encoder_percent=100 ramtorch_transformer_percent=100 ramtorch_vae=false
        """,
    ),
    (
        "is not here: a model must fit one device; use base_model_precision or a smaller rank",
        """
        context_parallel_comm_strategy=allgather context_parallel_size=1 deepspeed_config
        find_unused_parameters fsdp_activation_checkpointing=false
        fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP fsdp_cpu_offload=false
        fsdp_cpu_ram_efficient_loading=false fsdp_enable=false fsdp_limit_all_gathers=true
        fsdp_reshard_after_forward=true fsdp_state_dict_type=SHARDED_STATE_DICT
        fsdp_transformer_layer_cls_to_wrap fsdp_version=2 offload_param_path same_network=true
        """,
    ),
    (
        "is not here; base_model_precision names the quantisers there are",
        """
        quantization_config quantize_activations=false sdnq_compile_mode=auto
        sdnq_dequantize_fp32 sdnq_group_size sdnq_hadamard_group_size sdnq_modules_dtype_dict
        sdnq_modules_quant_config sdnq_modules_to_not_convert sdnq_modules_to_not_use_matmul
        sdnq_quantized_matmul_dtype=auto sdnq_svd_rank sdnq_svd_steps sdnq_use_hadamard
        sdnq_use_quantized_matmul sdnq_use_static_quantization sdnq_use_stochastic_rounding
        sdnq_use_svd sdnq_weights_dtype
        """,
    ),
    (
        "is not here; attention_mechanism names the kernels there are",
        """
        allow_xformers=false enable_xformers_memory_efficient_attention=false
        fuse_qkv_projections=false fused_qkv_projections=false sla_config use_xformers=false
        """,
    ),
    (
        "is not here: dynamo_backend and dynamo_mode set how blocks are compiled, one by one",
        "dynamo_dynamic=false dynamo_fullgraph=false dynamo_use_regional_compilation=true",
    ),
    (
        "is not here; disable_tf32 turns TF32 off",
        "allow_tf32",
    ),
    (
        "is not here: gradients are kept on the device until the update; remove it",
        """
        fuse_optimizer=false optimizer_cpu_offload_method optimizer_offload_gradients=false
        optimizer_release_gradients=false
        """,
    ),
    (
        "is not needed: gradients are always freed; remove it",
        "set_grads_to_none=false",
    ),
    (
        "is not here; multiply learning_rate yourself",
        "lr_scale=false lr_scale_sqrt=false",
    ),
    (
        "only ever reached DeepSpeed; set optimizer_beta1 and optimizer_beta2",
        "adam_beta1=0.9 adam_beta2=0.999",
    ),
    (
        "is not here: what trains is chosen by model_type, peft_lora_target_modules and"
        " trainable_models",
        """
        freeze_encoder_after=17 freeze_encoder_before=12 freeze_encoder_strategy=after
        peft_lora_mode=standard save_text_encoder=false
        singlora_ramp_up_steps=0 slider_lora_target=false
        """,
    ),
    (
        "is not needed: files are written by the names that their loaders want; remove it",
        "remove_prefix_in_ckpt",
    ),
    (
        "is not needed: preset_lora_path goes into the denoiser; remove it",
        "preset_lora_model",
    ),
    (
        "is not here; write layer_freeze_strategy bitfit",
        "use_bitfit=false",
    ),
    (
        "is not here; init_lora goes on from a file, resume_from_checkpoint from a checkpoint",
        "init_lokr_norm init_lora_ema init_lora_step",
    ),
    (
        "is not here: validation renders without the helper adapter; remove it",
        "assistant_lora_inference_strength=0.0",
    ),
    (
        "is not needed; remove it",
        "ema_foreach_disable=false",
    ),
    (
        "is not here: sort the pictures before training; remove it",
        """
        delete_nsfw_images=false enable_nsfw_check=false nsfw_check_backend_types=all
        nsfw_check_min_votes=2 nsfw_check_models nsfw_check_sample_types=image,conditioning
        """,
    ),
    (
        "is not here: files of a dataset are never changed; what cannot be used is named",
        "delete_problematic_images=false delete_unwanted_images=false ignore_missing_files=false",
    ),
    (
        "is not needed: what is cached is found by its content; remove it",
        """
        aspect_bucket_disable_rebuild=false cache_file_suffix hash_filenames=true
        metadata_update_interval=3600 preserve_data_backend_cache=false
        text_embed_full_cache=false vae_cache_clear_each_epoch=false
        vae_cache_scan_behaviour=recreate
        """,
    ),
    (
        "is not needed: the work is spread over the processor by itself; remove it",
        """
        aspect_bucket_worker_count=12 enable_multiprocessing=false
        image_processing_batch_size=32 read_batch_size=25
        """,
    ),
    (
        "is not here: what was found in a dataset is told when the run starts; remove it",
        "debug_aspect_buckets=false print_sampler_statistics=false",
    ),
    (
        "is not here; compress_disk_cache holds for all datasets",
        "compress_cache",
    ),
    (
        "is not here; write vae_cache_ondemand, the other way round",
        "vae_cache_preprocess=true",
    ),
    (
        "is not here; write strict_epoch_limit, the other way round",
        "ignore_final_epochs",
    ),
    (
        "is not here; on_data_change says what a resumed run does with changed data",
        "override_dataset_config=false",
    ),
    (
        "is not needed: a checkpoint is always written whole and then renamed; remove it",
        "checkpointing_use_tempdir=false",
    ),
    (
        "is not here: a damaged checkpoint is passed over and stays; remove it",
        "delete_invalid_checkpoints=false",
    ),
    (
        "is not here; disk_low_action can stop or wait",
        "disk_low_script",
    ),
    (
        "is not needed: random draws do not depend on the device; remove it",
        "seed_for_each_device=true",
    ),
    (
        "is not here: no check is turned off as a whole; change what the message names",
        "i_know_what_i_am_doing=false",
    ),
    (
        "is not here: no code of a model's repository is run; name a model that diffusers loads",
        "trust_remote_code=false",
    ),
    (
        "is not here: downloads stay for the next run; remove them with hf cache",
        "delete_model_after_load=false",
    ),
    (
        "is not here; report_to names the trackers there are",
        "custom_tracker",
    ),
    (
        "is not here; push_to_hub uploads to the Hugging Face hub",
        "post_upload_script publishing_config",
    ),
    (
        "belongs to video or audio, which this trainer does not train on; remove it",
        """
        audio framerate s2v_datasets vae_enable_patch_conv=false vae_enable_temporal_roll=false
        video
        """,
    ),
    (
        "never did anything; remove it",
        """
        aspect_ratio_bucketing debug_dataset_loader=false disable_validation=false
        enable_watermark=false fully_unload_text_encoder=false print_filenames=false
        sdxl_refiner_uses_full_range=false text_encoder_limit=100
        """,
    ),
    (
        "is not here; use minimum_aspect_ratio and maximum_aspect_ratio of a dataset",
        "aspect_ratio_bucket_max aspect_ratio_bucket_min",
    ),
    (
        "is written by SimpleTuner's web page for itself; remove it",
        "__active_tab__ __disabled_fields__ ez_model_type",
    ),
    (
        "is not here; CUDA_VISIBLE_DEVICES chooses the devices",
        "accelerate_visible_devices",
    ),
    (
        "is a secret: export it in the shell as an environment variable, and remove it here",
        "aws_access_key_id aws_secret_access_key aws_session_token hf_token",
    ),
    (
        "is not needed: ema_device cpu keeps the average there; remove it",
        "ema_cpu_only=false ema_foreach_disable=false",
    ),
    (
        "is not here; use vae_cache_disable",
        "disable_vae_cache=false",
    ),
    (
        "is not here: repeats counts further passes, one less than this; write repeats",
        "num_repeats",
    ),
    (
        "is not here; max_workers says how many threads read a dataset",
        "dataset_num_workers",
    ),
    (
        "is not here; an entry with conditioning_data names the pictures that go with another's",
        "extra_inputs data_file_keys_control",
    ),
    (
        "is not here; write resolution, with resolution_type max_pixels for an area in px",
        "max_pixels height width",
    ),
    (
        "is not here: pictures are never mirrored, for not every face or text may be; add mirrored"
        " copies of those that may",
        "flip flip_x flip_y flip_aug flip_h flip_v random_flip horizontal_flip",
    ),
    (
        "is not here; repeats and probability say how often a dataset counts",
        "loss_multiplier loss_weight network_weight",
    ),
    (
        "is not here: a mask is white where something is learned, and grey counts in part; change"
        " the masks",
        "invert_mask mask_min_value mask_invert unmasked_weight",
    ),
    (
        "is not here: give the dataset its repeats; remove it",
        "disable_after_epoch_step slider_strength",
    ),
)
"""What to say, and the names it is said of, each with SimpleTuner's default where there is one."""

_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        name: default
        for _, names in _GROUPS
        for name, _, default in (word.partition("=") for word in names.split())
    }
)

_GLOBAL = frozenset(
    key
    for section in Config.model_fields.values()
    for key in section.annotation.model_fields  # type: ignore[union-attr]
)

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        **{
            word.partition("=")[0]: sentence
            for sentence, names in _GROUPS
            for word in names.split()
        },
        **{
            name: "belongs to a dataset: move it into its entry in multidatabackend.json"
            for name in DatasetSettings.model_fields
            if name not in _GLOBAL
        },
    }
)
"""Name → what to say after it: why it is not here, and what to do."""


def asks_nothing(name: str, value: object) -> bool:
    """True if an unsupported setting is off or stands at SimpleTuner's default.

    SimpleTuner's own tools write every setting into a file; what asks for nothing can be passed
    over.
    """
    default = _DEFAULTS.get(name, "")
    text = "" if value is None else str(value).lower()
    if text in ("", "false", "none"):
        return default.lower() != "true"
    return text == default.lower()
