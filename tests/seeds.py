"""The settings that SimpleTuner's quickstarts for SDXL and SD3 print, as they print them."""

from __future__ import annotations

SDXL_CONFIG = """\
{
  "model_type": "lora",
  "model_family": "sdxl",
  "model_flavour": "base-1.0",
  "output_dir": "/home/user/output/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.4,
  "use_gradient_checkpointing": true,
  "learning_rate": 1e-4
}
"""

SDXL_QUANTISED = """\
{
  "base_model_precision": "int8-quanto",
  "text_encoder_1_precision": "no_change",
  "text_encoder_2_precision": "no_change",
  "optimizer": "optimi-lion"
}
"""

SDXL_DATASETS = """\
[
  {
    "id": "pseudo-camera-10k-sdxl",
    "type": "local",
    "crop": true,
    "crop_aspect": "square",
    "crop_style": "random",
    "resolution": 1.0,
    "minimum_image_size": 0.25,
    "maximum_image_size": 1.0,
    "target_downsample_size": 1.0,
    "resolution_type": "area",
    "cache_dir_vae": "cache/vae/sdxl/pseudo-camera-10k",
    "instance_data_dir": "/home/user/simpletuner/datasets/pseudo-camera-10k",
    "disabled": false,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery"
  },
  {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "cache/text/sdxl/pseudo-camera-10k",
    "disabled": false,
    "write_batch_size": 128
  }
]
"""

PREVIEWS = """\
{
  "validation_preview": true,
  "validation_preview_steps": 1
}
"""

SD3_CONFIG = """\
{
  "model_type": "lora",
  "model_family": "sd3",
  "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large",
  "output_dir": "/home/user/outputs/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.0,
  "validation_prompt": "your main test prompt here",
  "user_prompt_library": "config/user_prompt_library.json"
}
"""

SD3_QUANTISED = """\
{
  "base_model_precision": "int8-quanto",
  "text_encoder_1_precision": "no_change",
  "text_encoder_2_precision": "no_change",
  "text_encoder_3_precision": "no_change",
  "optimizer": "adamw_bf16"
}
"""

SD3_SHELL = """\

# 選択肢: int8-quanto, int4-quanto, int2-quanto, fp8-quanto
# int8-quantoは単一サブジェクトのdreambooth LoRAでテストされました。
# fp8-quantoはAppleシステムでは動作しません。intレベルを使用する必要があります。
# int2-quantoはかなり極端で、rank-1 LoRA全体を約13.9GB VRAMに収めます。
# 設定を大きく攻める場合は、安定性に注意してください。
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto"

# テキストエンコーダーをフル精度のままにして、テキスト埋め込みを完璧にしたいかもしれません。
# トレーニング前にテキストエンコーダーをアンロードするので、トレーニング時間中は問題ありません - 事前キャッシング中のみです。
# 必要に応じて、int4またはint8モードで量子化して実行することもできます。
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --text_encoder_1_precision=no_change --text_encoder_2_precision=no_change"

# モデルを量子化する場合、--base_model_default_dtypeはデフォルトでbf16に設定されます。このセットアップにはadamw_bf16が必要ですが、最もメモリを節約します。
# adamw_bf16はbf16トレーニングのみをサポートしますが、他のオプティマイザはbf16またはfp32トレーニング精度の両方をサポートします。
export OPTIMIZER="adamw_bf16"
"""  # noqa: E501

SD3_DATASETS = """\
[
  {
    "id": "pseudo-camera-10k-sd3",
    "type": "local",
    "crop": true,
    "crop_aspect": "square",
    "crop_style": "center",
    "resolution": 1024,
    "minimum_image_size": 0,
    "maximum_image_size": 1024,
    "target_downsample_size": 1024,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "/home/user/simpletuner/output/cache/vae/sd3/pseudo-camera-10k",
    "instance_data_dir": "/home/user/simpletuner/datasets/pseudo-camera-10k",
    "disabled": false,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery"
  },
  {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "cache/text/sd3/pseudo-camera-10k",
    "disabled": false,
    "write_batch_size": 128
  }
]
"""

SKIP_LAYER_GUIDANCE = """\
{
  "--validation_guidance_skip_layers": [7, 8, 9],
  "--validation_guidance_skip_layers_start": 0.01,
  "--validation_guidance_skip_layers_stop": 0.2,
  "--validation_guidance_skip_scale": 2.8,
  "--validation_guidance": 4.0,
  "--flow_use_uniform_schedule": true,
  "--flow_schedule_auto_shift": true
}
"""

SD3_STABLE_VALUES = (
    "optimizer=adamw_bf16",
    "flow_schedule_shift=1",
    "learning_rate=1e-4",
    "max_grad_norm=0.1",
    "base_model_precision=int8-quanto",
    "validation_guidance_skip_layers=[7,8,9]",
)
