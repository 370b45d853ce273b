from __future__ import annotations

import pytest

from tests.unit.config.workplace import Workplace


def test_a_flavour_is_one_of_the_family(place: Workplace) -> None:
    place.config(model_flavour="3.5-large")

    assert place.messages() == [
        "model_flavour: sdxl has no flavour '3.5-large'; it has base-1.0, refiner-1.0, base-0.9, "
        "refiner-0.9"
    ]


def test_a_flavour_and_a_path_are_a_choice(place: Workplace) -> None:
    place.config(model_flavour="base-1.0", pretrained_model_name_or_path="owner/name")

    assert place.messages() == [
        "model_flavour: base-1.0 and pretrained_model_name_or_path owner/name both name the base "
        "model; remove pretrained_model_name_or_path to train base-1.0, or model_flavour to train "
        "owner/name"
    ]


def test_a_prompt_library_that_is_not_there_comes_with_the_line_that_makes_it(
    place: Workplace,
) -> None:
    place.config(user_prompt_library="config/user_prompt_library.json")

    assert place.messages() == [
        "user_prompt_library: config/user_prompt_library.json does not exist; an example to start "
        "from: cp config/user_prompt_library.json.example config/user_prompt_library.json"
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_a_falling_schedule_ends_below_its_start(place: Workplace, schedule: str) -> None:
    place.config(lr_scheduler=schedule, learning_rate=1e-5, lr_end=1e-5)

    assert place.messages() == [
        f"lr_end: lr_scheduler {schedule} falls from learning_rate (1e-05) to lr_end (1e-05), so "
        "lr_end must be the smaller one"
    ]


def test_a_constant_schedule_has_no_end_to_fit(place: Workplace) -> None:
    place.config(lr_scheduler="constant", learning_rate=1e-8)

    assert place.messages() == []


def test_validation_pictures_have_a_size_that_can_be_rendered(place: Workplace) -> None:
    place.config(validation_resolution="16x1024,1024")

    assert place.messages() == [
        "validation_resolution: 16x1024 cannot be rendered; edges of 32 to 8192 px can"
    ]


def test_validation_pictures_fit_the_familys_grid(place: Workplace) -> None:
    place.config(model_family="sd3", validation_resolution="1032x1000")

    assert place.messages() == [
        "validation_resolution: sd3 renders multiples of 16 px, not 1032x1000; 1024x992 is near"
    ]


def test_a_setting_of_flow_matching_that_another_makes_useless_is_refused(
    place: Workplace,
) -> None:
    place.config(model_family="sd3", flow_schedule_shift=4, flow_schedule_auto_shift=True)
    (problem,) = place.problems()
    assert "flow_schedule_auto_shift takes the shift from the size" in problem.message
    place.config(model_family="sd3", flow_sigmoid_scale=2, flow_use_uniform_schedule=True)
    (problem,) = place.problems()
    assert "flow_use_uniform_schedule says which noise levels are drawn" in problem.message
    place.config(model_family="sd3", flow_schedule_shift=3, flow_schedule_auto_shift=True)
    assert place.messages() == []


def test_several_processes_are_refused_with_what_to_do_instead(place: Workplace) -> None:
    place.config(num_processes=3)

    (message,) = place.messages()

    assert "training in several processes is not built yet" in message
    assert "multiply gradient_accumulation_steps by 3" in message


def test_one_beta_alone_is_refused(place: Workplace) -> None:
    place.config('{"model_family": "sdxl",\n"optimizer_beta1": 0.9}')

    (problem,) = place.problems()

    assert (problem.key, problem.line) == ("optimizer_beta1", 2)
    assert "optimizer_beta1 and optimizer_beta2 come together" in problem.message


def test_options_of_the_optimizer_are_checked(place: Workplace) -> None:
    place.config(
        '{"model_family": "sdxl", "optimizer": "torch-adamw",\n"optimizer_config": {\n'
        '"weight_dekay": 0.1,\n"eps": -1}}'
    )

    assert [(p.line, p.key, p.message) for p in place.problems()] == [
        (
            3,
            "optimizer_config.weight_dekay",
            "torch-adamw has no such option; did you mean weight_decay?",
        ),
        (4, "optimizer_config.eps", "must be more than 0, got -1"),
    ]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hub_model_id": "hf_" + "a" * 34}, "hub_model_id"),
        ({"webhook_config": {"key": "sk-" + "a" * 30}}, "webhook_config"),
    ],
)
def test_what_looks_like_a_token_is_refused(
    place: Workplace, settings: dict[str, object], key: str
) -> None:
    place.config(**settings)

    assert place.messages() == [
        f"{key}: looks like an access token; secrets do not belong in settings: log in (`hf auth "
        "login`, `wandb login`), or export it in the shell as an environment variable"
    ]


def test_a_warmup_is_refused_where_the_schedule_has_none(place: Workplace) -> None:
    place.config(lr_scheduler="constant", lr_warmup_steps=100)

    assert place.messages() == [
        "lr_warmup_steps: lr_scheduler constant has no warm-up; set lr_scheduler to "
        "constant_with_warmup, or remove lr_warmup_steps"
    ]


def test_an_optimizer_is_not_given_numbers_it_does_not_have(place: Workplace) -> None:
    place.config(optimizer="optimi-lion", adam_epsilon=1e-8)

    assert place.messages() == ["adam_epsilon: optimi-lion has no eps; remove it"]


def test_optimizer_config_and_adam_weight_decay_do_not_disagree(place: Workplace) -> None:
    place.config(
        optimizer="torch-adamw", adam_weight_decay=0.1, optimizer_config={"weight_decay": 0.2}
    )

    assert place.messages() == [
        "adam_weight_decay: is 0.1 here and 0.2 in optimizer_config; remove one"
    ]


def test_a_single_files_flavour_says_whose_configs_it_has(place: Workplace) -> None:
    place.config(
        model_flavour="refiner-1.0", pretrained_model_name_or_path="models/refiner.safetensors"
    )

    assert place.messages() == []


def test_a_family_is_asked_to_predict_what_it_can(place: Workplace) -> None:
    place.config(model_family="sd3", prediction_type="epsilon")
    assert place.messages() == [
        "prediction_type: sd3 cannot predict epsilon, only flow_matching; remove it to take what "
        "the checkpoint says"
    ]
    place.config(prediction_type="flow_matching")
    assert place.messages() == [
        "prediction_type: sdxl cannot predict flow_matching, only epsilon or v_prediction or "
        "sample; remove it to take what the checkpoint says"
    ]


def test_a_model_that_predicts_the_noise_is_not_shown_nothing_but_noise(place: Workplace) -> None:
    place.config(rescale_betas_zero_snr=True, prediction_type="epsilon")
    assert place.messages() == [
        "rescale_betas_zero_snr: does not go with prediction_type epsilon: in nothing but noise the"
        " noise says nothing of the picture; set prediction_type v_prediction, or remove this"
    ]
    place.config(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert place.messages() == []
    place.config(model_family="flux", rescale_betas_zero_snr=True)
    assert place.messages() == [
        "rescale_betas_zero_snr: flux has no use for it, sd1x and sdxl have; remove it"
    ]


def test_what_another_family_reads_is_not_swallowed_unless_it_changes_nothing(
    place: Workplace,
) -> None:
    place.config(t5_padding="zero", sd3_clip_uncond_behaviour="empty_string")
    assert place.messages() == ["t5_padding: sdxl has no use for it, flux and sd3 have; remove it"]
    place.config(flux_attention_masked_training=True, flux_lora_target="context")
    assert place.messages() == [
        "flux_attention_masked_training: sdxl has no use for it, flux has; remove it",
        "flux_lora_target: sdxl has no use for it, flux has; remove it",
    ]
    place.config(model_family="sd3", t5_padding="zero", data_aesthetic_score=7)
    assert place.messages() == []


def test_a_guidance_that_is_never_told_is_found(place: Workplace) -> None:
    place.config(model_family="flux", flux_guidance_min=1, flux_guidance_max=3)
    assert place.messages() == [
        f"{key}: changes nothing without flux_guidance_mode random-range; set that, or remove this"
        for key in ("flux_guidance_min", "flux_guidance_max")
    ]
    random = {"model_family": "flux", "flux_guidance_mode": "random-range"}
    place.config(**random, flux_guidance_value=3.5)
    assert place.messages() == [
        "flux_guidance_value: changes nothing without flux_guidance_mode constant; set that, or "
        "remove this"
    ]
    place.config(**random, flux_guidance_min=4)
    assert place.messages() == [
        "flux_guidance_min: must be below flux_guidance_max; swap or correct them"
    ]
    place.config(**random, flux_guidance_min=1, flux_guidance_max=3)
    assert place.messages() == []


def test_the_modules_of_a_lora_are_named_once(place: Workplace) -> None:
    named = {"model_family": "flux", "peft_lora_target_modules": ["to_q"]}
    place.config(**named, flux_lora_target="context")
    assert place.messages() == [
        "flux_lora_target: peft_lora_target_modules names the modules, so this changes nothing; "
        "remove one of the two"
    ]
    place.config(**named)
    assert place.messages() == []


def test_prompts_of_sd3_have_at_most_154_tokens(place: Workplace) -> None:
    for length in (77, 154):
        place.config(model_family="sd3", tokenizer_max_length=length)
        assert place.messages() == []
    place.config(model_family="sd3", tokenizer_max_length=155)
    assert place.messages() == ["tokenizer_max_length: sd3 takes at most 154 tokens, got 155"]


def test_settings_of_flow_matching_are_not_swallowed_by_other_families(place: Workplace) -> None:
    place.config(flow_schedule_shift=1.0, flow_schedule_auto_shift=False)
    assert place.messages() == [
        "flow_schedule_shift: sdxl is not trained by flow matching, so it changes nothing; remove "
        "it"
    ]
    place.config(model_family="sd3", flow_schedule_shift=1.0)
    assert place.messages() == []


def test_noise_levels_are_drawn_by_one_law(place: Workplace) -> None:
    flow = {"model_family": "sd3"}
    place.config(**flow, flow_custom_timesteps="900,100", flow_schedule_shift=2)
    assert place.messages() == [
        "flow_schedule_shift: flow_custom_timesteps is not shifted, so this changes nothing; remove"
        " one of the two"
    ]
    place.config(**flow, flow_cubic_schedule_weights="[1, 2]", flow_use_beta_schedule=True)
    assert place.messages() == [
        "flow_use_beta_schedule: flow_cubic_schedule_weights says which noise levels are drawn, so"
        " this changes nothing; remove one of the two"
    ]
    place.config(**flow, flow_timesteps_mode="round-robin")
    assert place.messages() == [
        "flow_timesteps_mode: changes nothing without flow_custom_timesteps; set that, or remove"
        " this"
    ]
    place.config(**flow, flow_cubic_schedule_weights="1, 2, 0.5", flow_schedule_auto_shift=True)
    assert place.messages() == []
    place.config(model_family="flux", flux_fast_schedule=True)
    assert place.messages() == []
    place.config(**flow, refiner_training=True)
    assert place.messages() == [
        "refiner_training: sd3 is trained by flow matching, which has no use for it;"
        " flow_custom_timesteps names the timesteps to train"
    ]
    place.config(refiner_training_strength=0.5)
    assert place.messages() == [
        "refiner_training_strength: changes nothing without refiner_training true; set that, or"
        " remove this"
    ]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("use_dora", True, "trains the length of the weights as well, which are no longer these"),
        ("lora_dropout", 0.1, "would drop what is learned and not what it started from"),
        ("base_model_precision", "int8-torchao", "leaves no whole weights to begin from"),
    ],
)
def test_what_does_not_go_with_a_start_from_the_base_is_refused(
    place: Workplace, key: str, value: object, why: str
) -> None:
    place.config(lora_init_type="pissa", **{key: value})
    assert place.messages() == [f"{key}: {why}; remove it, or lora_init_type pissa"]


def test_layers_are_frozen_where_all_would_train(place: Workplace) -> None:
    place.config(layer_freeze_strategy="bitfit")
    assert place.messages() == [
        "layer_freeze_strategy: changes nothing without model_type full, or beside controlnet;"
        " remove it"
    ]
    place.config(model_type="full", layer_freeze_strategy="bitfit")
    assert place.messages() == []


def test_a_bridge_to_flow_matching_is_asked_for_whole(place: Workplace) -> None:
    place.config(diff2flow_enabled=True)
    assert place.messages() == [
        "diff2flow_enabled: changes nothing without diff2flow_loss true; set that, or remove this"
    ]
    place.config(diff2flow_loss=True)
    assert place.messages() == [
        "diff2flow_loss: changes nothing without diff2flow_enabled true; set that, or remove this"
    ]
    both = {"diff2flow_enabled": True, "diff2flow_loss": True}
    place.config(**both)
    assert place.messages() == []
    place.config(**both, snr_gamma=5)
    assert place.messages() == [
        "snr_gamma: diff2flow_loss weighs samples by their noise itself; remove one of the two"
    ]
    place.config(model_family="sd3", **both)
    assert place.messages() == [
        "diff2flow_enabled: sd3 is trained by flow matching, which has no use for it; remove it"
    ]


def test_a_rollout_is_asked_for_whole_and_in_one_way(place: Workplace) -> None:
    far, near = "scheduled_sampling_max_step_offset", "scheduled_sampling_probability"
    place.config(**{far: 5})
    assert place.messages() == [f"{far}: changes nothing: no sample is rolled out; set {near}"]
    place.config(**{near: 0.5, "scheduled_sampling_order": 1})
    assert place.messages() == [
        f"{near}: changes nothing without {far}; set that, or remove this",
        f"scheduled_sampling_order: changes nothing without {far} and a scheduled_sampling_sampler"
        " unipc or dpm; set that, or remove this",
    ]
    place.config(**{far: 5, near: 0.5, "scheduled_sampling_prob_end": 0.3})
    assert place.messages() == [
        "scheduled_sampling_prob_end: changes nothing without scheduled_sampling_ramp_steps; set"
        " that, or remove this"
    ]
    place.config(**{far: 5, near: 0.5, "scheduled_sampling_ramp_steps": 9})
    assert place.messages() == [
        f"{near}: with scheduled_sampling_ramp_steps the share goes from"
        " scheduled_sampling_prob_start to scheduled_sampling_prob_end, so this changes nothing;"
        " remove it"
    ]
    euler = {"scheduled_sampling_sampler": "euler", "scheduled_sampling_order": 1}
    place.config(**{far: 5, near: 0.5}, **euler)
    assert place.messages() == [
        f"scheduled_sampling_order: changes nothing without {far} and a scheduled_sampling_sampler"
        " unipc or dpm; set that, or remove this"
    ]
    place.config(**{far: 5, near: 0.5}, input_perturbation=0.1)
    assert place.messages() == [
        f"input_perturbation: {far} already shows the model errors, which are its own; remove one"
        " of the two"
    ]
    place.config(**{far: 5, near: 0.5})
    assert place.messages() == []


def test_samples_are_weighed_by_their_noise_in_one_way(place: Workplace) -> None:
    place.config(use_soft_min_snr=True, snr_gamma=5)
    assert place.messages() == [
        "snr_gamma: use_soft_min_snr takes its cap from soft_min_snr_sigma_data; remove one of the "
        "two"
    ]
    place.config(soft_min_snr_sigma_data=1.0)
    assert place.messages() == [
        "soft_min_snr_sigma_data: changes nothing without use_soft_min_snr true; set that, or "
        "remove this"
    ]
    place.config(model_family="sd3", use_soft_min_snr=True)
    assert place.messages() == [
        "use_soft_min_snr: sd3 is trained by flow matching, which has no use for it; "
        "flow_sigmoid_scale and flow_schedule_shift weigh noise levels"
    ]


def test_picture_edges_fit_the_familys_grid(place: Workplace) -> None:
    place.config(model_family="sd3", aspect_bucket_alignment=24)
    assert place.messages() == ["aspect_bucket_alignment: sd3 needs a multiple of 16 px, got 24"]
    place.config(aspect_bucket_alignment=24)
    assert place.messages() == []


def test_the_shape_of_a_schedule_is_asked_only_of_one_that_has_it(place: Workplace) -> None:
    place.config(lr_scheduler="linear", lr_power=2.0, lr_end=1e-6)
    assert place.messages() == ["lr_power: lr_scheduler linear has no use for it; remove it"]
    place.config(lr_scheduler="constant", lr_end=1e-6)
    assert place.messages() == ["lr_end: lr_scheduler constant has no use for it; remove it"]
    place.config(lr_scheduler="polynomial", lr_power=2.0, lr_end=1e-6)
    assert place.messages() == []


def test_an_adapter_to_go_on_from_is_looked_for(place: Workplace) -> None:
    place.config(init_lora="nowhere.safetensors")
    assert place.messages() == ["init_lora: nowhere.safetensors does not exist; correct the path"]


@pytest.mark.parametrize("name", ["validation", "unconditional", "Cat"])
def test_prompts_that_would_share_a_picture_are_named_with_their_line(
    place: Workplace, name: str
) -> None:
    place.write("prompts.json", f'{{"cat": "a cat", "{name}": "another"}}')
    place.config(
        '{"model_family": "sdxl", "validation_prompt": "x",\n"user_prompt_library": "prompts.json"}'
    )
    (problem,) = place.problems()
    assert (problem.key, problem.line) == ("user_prompt_library", 2)
    assert f"two prompts are called {name!r}, so their pictures would overwrite" in problem.message
    assert "user_prompt_library:" not in problem.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 3}', "'a' needs a text or"),
        ('{"a": {"prompt": ["b"]}}', "'a' needs a text or"),
        ('["a"]', "must hold one object of name: prompt"),
        ("{", "is not JSON"),
    ],
)
def test_a_prompt_library_is_read_unless_nothing_is_rendered(
    place: Workplace, text: str, words: str
) -> None:
    place.write("prompts.json", text)
    place.config(user_prompt_library="prompts.json")
    (message,) = place.messages()
    assert message.startswith("user_prompt_library: ")
    assert words in message
    place.config(user_prompt_library="prompts.json", validation_disable=True)
    assert place.messages() == []


def test_a_good_prompt_library_passes(place: Workplace) -> None:
    place.write("prompts.json", '{"cat": "a cat", "validation": {"prompt": "a dog"}}')
    place.config(user_prompt_library="prompts.json")  # there is no validation_prompt to collide
    assert place.messages() == []
