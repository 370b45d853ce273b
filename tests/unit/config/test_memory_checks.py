from __future__ import annotations

from typing import Any

import pytest

from tests.unit.config.workplace import Workplace

OFFLOAD: dict[str, Any] = {"enable_group_offload": True}


COMPILED = {"dynamo_backend": "aot_eager"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"gradient_checkpointing_backend": "unsloth", "gradient_checkpointing": False},
            "gradient_checkpointing_backend: changes nothing without gradient_checkpointing; set"
            " that, or remove this",
        ),
        (
            {**OFFLOAD, "musubi_blocks_to_swap": 3},
            "musubi_blocks_to_swap: does not go with enable_group_offload, which moves every"
            " block; remove one of the two",
        ),
        (
            {"group_offload_type": "leaf_level"},
            "group_offload_type: changes nothing without enable_group_offload; set that, or remove"
            " this",
        ),
        (
            {"group_offload_to_disk_path": "fast", "musubi_blocks_to_swap": 1},
            "group_offload_to_disk_path: changes nothing without enable_group_offload; set that,"
            " or remove this",
        ),
        (
            {**OFFLOAD, "model_type": "full"},
            "enable_group_offload: moves frozen weights, and model_type full trains them all;"
            " remove it, or set model_type lora",
        ),
        (
            {
                "musubi_blocks_to_swap": 1,
                "lora_type": "lycoris",
                "lycoris_config": {"algo": "lokr"},
            },
            "musubi_blocks_to_swap: is not here for lora_type lycoris; remove it, or set lora_type"
            " standard",
        ),
        (
            {**OFFLOAD, "base_model_precision": "int4-quanto"},
            "enable_group_offload: does not move weights in int4-quanto; take int8-quanto or"
            " int8-torchao, or remove it",
        ),
        (
            {
                **OFFLOAD,
                "base_model_precision": "int8-torchao",
                "group_offload_to_disk_path": "fast",
            },
            "group_offload_to_disk_path: writes no weights in int8-torchao; remove it, or"
            " base_model_precision",
        ),
        (
            {**OFFLOAD, "gradient_checkpointing": False},
            "enable_group_offload: saves nothing while every block's weights are kept for its"
            " gradients; set gradient_checkpointing true",
        ),
        (
            {**OFFLOAD, "gradient_checkpointing_interval": 2},
            "gradient_checkpointing_interval: keeps the weights of the blocks between on the"
            " device, beside enable_group_offload; remove it",
        ),
        (
            {**COMPILED, "dynamo_mode": "max-autotune-no-cudagraphs"},
            "dynamo_mode: is of dynamo_backend inductor, which is aot_eager; set that, or remove"
            " this",
        ),
        (
            {**COMPILED, **OFFLOAD},
            "dynamo_backend: is not here for weights that wait; remove it, or enable_group_offload",
        ),
        (
            {**COMPILED, "base_model_precision": "int8-torchao"},
            "dynamo_backend: is not here for weights in int8-torchao; remove one of the two",
        ),
        (
            {**COMPILED, "lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}},
            "dynamo_backend: is not here for lora_type lycoris; remove it, or set lora_type"
            " standard",
        ),
        (
            {**COMPILED, "unet_attention_slice": True},
            "unet_attention_slice: is not here beside dynamo_backend; remove one of the two",
        ),
        (
            {"unet_attention_slice": True, "model_family": "sd3"},
            "unet_attention_slice: sd3 has no use for it, sd1x and sdxl have; remove it",
        ),
        (
            {"attention_mechanism": "sageattention"},
            "attention_mechanism: sageattention runs on cuda alone, and this is cpu; remove it",
        ),
        (
            {"sageattention_usage": "training"},
            'sageattention_usage: must be one of inference, got "training"',
        ),
        (
            {"attention_mechanism": "xformers", **COMPILED},
            "attention_mechanism: is not here beside dynamo_backend; remove one of the two",
        ),
        ({"unet_attention_slice": True, **OFFLOAD}, None),
        ({**COMPILED, "use_dora": True}, None),
        ({**OFFLOAD, "gradient_checkpointing_interval": 1}, None),
        ({**OFFLOAD, "use_dora": True, "base_model_precision": "int8-torchao"}, None),
        ({"musubi_blocks_to_swap": 2, "model_type": "full", "controlnet": True}, None),
        ({**OFFLOAD, "gradient_checkpointing_backend": "unsloth"}, None),
    ],
)
def test_what_waits_elsewhere_can_be_moved_and_is_asked_for_once(
    place: Workplace, settings: dict[str, Any], said: str | None
) -> None:
    place.config(**settings)
    found = place.messages(ACCELERATE_USE_CPU="true")
    assert [m for m in found if not m.startswith("id: ")] == ([said] if said else [])
