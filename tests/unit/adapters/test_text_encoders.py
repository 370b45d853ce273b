"""LoRA on text encoders: what gets it, what it is called elsewhere, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from simpletuner.adapters.export import LORA_FILE
from simpletuner.adapters.formats import Change, read_changes, write_changes
from simpletuner.adapters.lora import LoRA, attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.core.errors import TrainingError
from simpletuner.core.tensors import header
from simpletuner.core.types import Batch
from simpletuner.models.checkpoint import Checkpoint
from simpletuner.models.encoders import TextEncoders, TrainedEncoder
from simpletuner.models.families import FAMILIES
from simpletuner.models.families.sdxl import SDXL
from simpletuner.precision.fit import fit
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.training.estimate import Live, peak_of
from simpletuner.training.guards import LearningGuard
from tests.tiny.single_file import build_sdxl_of_two_widths, configs_of, write_single_file
from tests.unit.adapters.test_keys import expanded
from tests.unit.models.test_sdxl import CPU, open_tiny
from tests.unit.training.builds import build_stepper, make_batch, window_of

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/comfyui_keys.json").read_text())["text"]
CAPTIONS = ["a photo of a cat", ""]


def lora_on(folder: Path, **settings: Any) -> LoRA:
    family = open_tiny(folder)
    torch.manual_seed(0)
    chosen = AdapterSettings(**{"lora_rank": 4, "lora_alpha": 10.0, **settings})
    encoders = TextEncoders.opened(family, CPU)
    return attach(family.open_denoiser(CPU), family, chosen, encoders)


def trained(lora: LoRA) -> LoRA:
    for parameter in lora.parameters().values():
        nn.init.normal_(parameter, std=0.1)
    return lora


def embeds(lora: LoRA) -> dict[str, torch.Tensor]:
    assert lora.encoders is not None
    return dict(lora.encoders.shown(CAPTIONS))  # type: ignore[arg-type]


def captioned(batch: Batch) -> Batch:
    samples = (replace(s, caption=c) for s, c in zip(batch.samples, CAPTIONS, strict=True))
    return replace(batch, samples=tuple(samples), embeds={})


# --- what trains ----------------------------------------------------------------------------------


def test_only_adapters_train_and_the_layer_that_nothing_is_taken_from_has_none(
    tiny_sdxl: Path,
) -> None:
    lora = lora_on(tiny_sdxl)
    own = {id(p) for p in lora.parameters().values()}
    training = [p for module in lora.modules for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in training} == own
    layers = {name.partition(".self_attn")[0] for name in lora.layers() if "text" in name}
    assert layers == {
        *(f"text_encoder.text_model.encoder.layers.{n}" for n in (0, 1)),
        *(f"text_encoder_2.text_model.encoder.layers.{n}" for n in (0, 1, 2)),
    }
    unet, text = lora.groups()
    assert not unet.text
    assert text.text
    assert {**unet.parameters, **text.parameters}.keys() == lora.parameters().keys()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_init_type": "pissa"}])
def test_a_fresh_adapter_changes_nothing_and_disabled_gives_the_base(
    tiny_sdxl: Path, settings: dict[str, Any]
) -> None:
    base = dict(TextEncoders.opened(open_tiny(tiny_sdxl), CPU).shown(CAPTIONS))
    lora = lora_on(tiny_sdxl, **settings)
    for name, value in embeds(lora).items():
        torch.testing.assert_close(value, base[name], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in lora.parameters().values():
            parameter += 0.05 * torch.randn_like(parameter)
    for name, value in embeds(lora).items():
        assert (value - base[name]).abs().max() > 1e-3
    with lora.disabled(), lora.disabled():
        assert all(torch.equal(value, base[name]) for name, value in embeds(lora).items())
    assert all(not torch.equal(value, base[name]) for name, value in embeds(lora).items())


def test_regularisation_is_towards_the_untouched_encoders(tiny_sdxl: Path) -> None:
    """Its target, and so the loss of a step, is what base and captions give without adapters."""
    stepper = build_stepper(tiny_sdxl, adapter={"train_text_encoder": True})
    ((planned, batch),) = window_of(captioned(make_batch(1, 2, regularises=True)))
    assert float(stepper.micro_loss(0, 0, planned, batch)) == 0
    lora: Any = stepper.weights.trainable
    for part in lora.parts[1:]:
        for parameter in part.parameters().values():
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        loss = stepper.micro_loss(0, 0, planned, batch)
        drawn = stepper.draw(0, 0, planned, batch)[1]
        changed = lora.predict(stepper.family, drawn, batch)
        plain = TextEncoders.opened(stepper.family, CPU).shown(CAPTIONS)
        base = stepper.family.predict(lora.denoiser, drawn, replace(batch, embeds=plain))
    assert float(loss) == pytest.approx(float((changed - base).square().mean()), rel=1e-4)
    assert float(loss) > 0


@pytest.mark.parametrize("interval", [None, 2])
def test_recomputed_activations_give_the_same_gradients_in_less_memory(
    tiny_sdxl: Path, interval: int | None
) -> None:
    gradients, kept = [], []
    for checkpoints in (False, True):
        lora = trained(lora_on(tiny_sdxl))
        chosen = {"gradient_checkpointing_interval": interval} if checkpoints and interval else {}
        fit(
            lora.modules,
            PrecisionSettings(gradient_checkpointing=checkpoints, **chosen),
            CPU.device,
        )
        assert lora.encoders is not None
        with Live() as live:
            found: Any = lora.encoders.embeds(CAPTIONS)
            loss = sum(value.square().mean() for value in found.values())
            kept.append(live.now)
        loss.backward()
        text = lora.groups()[1].parameters
        gradients.append({name: p.grad for name, p in text.items()})
    for name, value in gradients[0].items():
        assert value is not None
        assert value.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], value, atol=1e-7, rtol=1e-6)
    assert kept[1] < kept[0]


# --- the guard and the rate -----------------------------------------------------------------------


WASTEFUL = {**SDXL.trained_text, "text_encoder": TrainedEncoder("lora_te1", "clip_l")}
"""An adapter on every layer of the first text encoder."""


def test_a_tensor_of_an_encoder_that_cannot_learn_is_named(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SDXL, "trained_text", WASTEFUL)
    stepper = build_stepper(tiny_sdxl, adapter={"train_text_encoder": True})
    guard = LearningGuard(stepper.weights)
    window = window_of(captioned(make_batch(1, 2)))
    for step in range(2):
        guard.watch(stepper.step(step, window).loss)
    last = stepper.step(2, window).loss
    with pytest.raises(TrainingError, match="8 of 176 trainable tensors got no gradient") as error:
        guard.watch(last)
    assert "text_encoder.text_model.encoder.layers.2.self_attn" in error.value.message


def test_a_schedule_moves_both_rates_by_one_factor_and_the_guard_knows_the_smaller(
    tiny_sdxl: Path,
) -> None:
    stepper = build_stepper(
        tiny_sdxl,
        adapter={"train_text_encoder": True},
        learning_rate=1e-3,
        text_encoder_lr=1e-10,
        lr_scheduler="polynomial",
        optimizer="torch-adamw",
    )
    guard = LearningGuard(stepper.weights)
    window, rates = window_of(captioned(make_batch(1, 2))), []
    for step in range(4):
        guard.watch(stepper.step(step, window).loss)
        rates.append([group["lr"] for group in stepper.weights.optimizer.param_groups])
    assert len({unet for unet, _ in rates}) == 4
    for unet, text in rates:
        assert text / unet == pytest.approx(1e-7, rel=1e-9)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_init_type": "olora"}])
def test_verification_reads_the_encoders_too_and_leaves_them_as_they_were(
    tiny_sdxl: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    lora = lora_on(tiny_sdxl, **settings)
    with torch.no_grad():
        for parameter in lora.parameters().values():
            parameter += 0.05 * torch.randn_like(parameter)
    before, state = embeds(lora), [set(module.state_dict()) for module in lora.modules]
    (path,) = lora.export(tmp_path, {})
    assert str(lora.verify(path)) == "verified: 84 of 84 modules"
    assert [set(module.state_dict()) for module in lora.modules] == state
    assert all(torch.equal(value, before[name]) for name, value in embeds(lora).items())
    assert all(p.requires_grad for p in lora.parameters().values())
    assert all(module.training for module in lora.modules)

    tensors, facts = load_file(path), header(path)
    name = next(key for key in sorted(tensors) if key.startswith("text_encoder_2"))
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata=facts)
    with pytest.raises(TrainingError, match="1 modules differ, for example text_encoder_2"):
        lora.verify(path)
    less = {key: t for key, t in tensors.items() if not key.startswith("text_encoder.")}
    save_file(less, path, metadata=facts)
    with pytest.raises(TrainingError, match=r"example text_encoder\.text_model"):
        lora.verify(path)


ATTENTION = tuple((f"self_attn.{letter}_proj", 32, 32) for letter in ("q", "k", "v", "out"))


@pytest.mark.parametrize("layers", [ATTENTION, (*ATTENTION, ("mlp.fc1", 32, 64))])
def test_kohya_s_names_are_those_that_diffusers_reads(
    tiny_sdxl: Path, tiny_sd1x: Path, layers: tuple[tuple[str, int, int], ...], tmp_path: Path
) -> None:
    for folder, name, kind in (
        (tiny_sdxl, "sdxl", StableDiffusionXLPipeline),
        (tiny_sd1x, "sd1x", StableDiffusionPipeline),
    ):
        family: Any = FAMILIES[name].load()
        pipes = [kind.from_pretrained(folder) for _ in range(2)]
        torch.manual_seed(0)
        text = {
            f"{part}.text_model.encoder.layers.1.{layer}": Change(
                0.3 * torch.randn(4, inputs), 0.3 * torch.randn(outputs, 4), 6.0
            )
            for part in family.trained_text
            for layer, inputs, outputs in layers
        }
        for layout, pipe in zip(("diffusers", "kohya"), pipes, strict=True):
            path = tmp_path / f"{name}.{layout}.safetensors"
            write_changes(path, text, layout, family, {})
            pipe.load_lora_weights(path.parent, weight_name=path.name)
        plain = kind.from_pretrained(folder)
        first, second, base = (
            pipe.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=False)[0]
            if name == "sd1x"
            else pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)[0]
            for pipe in (*pipes, plain)
        )
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
        assert (first - base).abs().max() > 1e-3


REAL = {
    "clip_l": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "clip_g": {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120},
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_adapters_have_the_names_that_comfyui_takes(name: str, tmp_path: Path) -> None:
    family: Any = FAMILIES[name].load()
    changes = {}
    for part, encoder in family.trained_text.items():
        for cls in (CLIPTextModel, CLIPTextModelWithProjection):
            with torch.device("meta"):
                model = cls(CLIPTextConfig(**REAL[encoder.comfyui], num_attention_heads=4))
            for target in encoder.targets(model):
                assert isinstance(model.get_submodule(target), nn.Linear)
                ours = f"{part}.text_model.{target.removeprefix('text_model.')}"
                changes[ours] = Change(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    file = tmp_path / "comfyui.safetensors"
    write_changes(file, changes, "comfyui", family, {})
    named = {key.removesuffix(".alpha") for key in load_file(file) if key.endswith(".alpha")}
    assert named == {key for pattern in GOLDEN[name] for key in expanded(pattern)}
    assert read_changes(file, family).keys() == changes.keys()
    assert not file.with_name(LORA_FILE).exists()


# --- what it takes --------------------------------------------------------------------------------


def test_a_blueprint_takes_in_a_step_what_the_encoders_really_take(tiny_sdxl: Path) -> None:
    peaks = []
    for real in (True, False):
        family = open_tiny(tiny_sdxl)
        kind = TextEncoders.opened if real else TextEncoders.blueprint
        place = CPU if real else replace(CPU, device=torch.device("meta"))
        lora = attach(
            family.open_denoiser(CPU), family, AdapterSettings(lora_rank=4), kind(family, place)
        )
        assert lora.encoders is not None
        encoders = lora.encoders

        def loss(encoders: TextEncoders = encoders) -> torch.Tensor:
            found: Any = encoders.embeds(["a cat"] * 4)
            total: torch.Tensor = sum(value.square().mean() for value in found.values())  # type: ignore[assignment]
            return total

        if real:
            with Live() as live:
                loss().backward()  # type: ignore[no-untyped-call]
                peaks.append(live.peak)
        else:
            peaks.append(peak_of(loss))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.15)


def test_encoders_in_one_file_take_them_as_those_of_a_folder(tmp_path: Path) -> None:
    folder = build_sdxl_of_two_widths(tmp_path / "folder")
    file = write_single_file(folder, tmp_path / "model.safetensors")
    configs = configs_of(folder, tmp_path / "configs")
    loras = []
    for checkpoint in (Checkpoint("folder", folder), Checkpoint("file", configs, file=file)):
        family = SDXL(checkpoint)
        torch.manual_seed(0)
        encoders = TextEncoders.opened(family, CPU)
        chosen = AdapterSettings(lora_rank=4)
        loras.append(trained(attach(family.open_denoiser(CPU), family, chosen, encoders)))
        shapes = [
            {name: tuple(p.shape) for name, p in module.named_parameters()}
            for module in TextEncoders.blueprint(family, CPU).modules.values()
        ]
        bare = TextEncoders.opened(family, CPU).modules.values()
        assert shapes == [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in bare]
    first, second = (lora.parameters() for lora in loras)
    assert first.keys() == second.keys()
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    theirs = embeds(loras[1])
    for name, value in embeds(loras[0]).items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5)
    (path,) = loras[1].export(tmp_path, {})
    assert str(loras[1].verify(path)).startswith("verified")
