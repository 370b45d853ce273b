"""Other names under which settings are known, and the names they have here."""

from __future__ import annotations

from types import MappingProxyType

RENAMES = MappingProxyType(
    {
        "checkpointing_limit": "checkpoints_total_limit",
        "checkpointing_steps": "checkpoint_step_interval",
        "dataloader_config": "data_backend_config",
        "dataset_backend_config": "data_backend_config",
        "hub_model_name": "hub_model_id",
        "lr_schedule": "lr_scheduler",
        "lora_checkpoint": "init_lora",
        "lora_target_modules": "peft_lora_target_modules",
        "max_num_steps": "max_train_steps",
        "minimum_resolution": "minimum_image_size",
        "model_name": "pretrained_model_name_or_path",
        "num_epochs": "num_train_epochs",
        "push_checkpoints": "push_checkpoints_to_hub",
        "resume_checkpoint": "resume_from_checkpoint",
        "save_total_limit": "checkpoints_total_limit",
        "training_dynamo_backend": "dynamo_backend",
        "training_num_machines": "num_machines",
        "training_num_processes": "num_processes",
        "training_seed": "seed",
        "use_gradient_checkpointing": "gradient_checkpointing",
        "validation_steps": "validation_step_interval",
    }
)
"""Old name → setting, in config.json and its kin."""

DATASET_RENAMES = MappingProxyType(
    {
        "dataset_base_path": "instance_data_dir",
        "disable": "disabled",
        "instance_data_root": "instance_data_dir",
        "is_regularization_data": "is_regularisation_data",
        "text_embed_cache": "text_embeds",
    }
)
"""Old name → key, in the entries of the datasets file."""
