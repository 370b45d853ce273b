"""LyCORIS adapters: trained, resumed bit for bit, and read back by the library's own loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from tests.runs import Run

Captured = pytest.CaptureFixture[str]
LOKR: dict[str, Any] = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
KINDS: dict[str, dict[str, Any]] = {
    "lokr": LOKR,
    "lokr of two factors": {**LOKR, "linear_dim": 2, "linear_alpha": 3, "decompose_both": True},
    "lokr with dora": {**LOKR, "dora_wd": True},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2},
    "lora": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "use_scalar": True},
    "glora": {"algo": "glora", "linear_dim": 4, "linear_alpha": 2},
    "full": {"algo": "full"},
    "oft": {"algo": "diag-oft", "linear_dim": 4},
    "boft": {"algo": "boft", "linear_dim": 4},
    "convolutions and norms": {
        **LOKR,
        "train_norm": True,
        "apply_preset": {"target_module": ["ResnetBlock2D"]},
    },
    "a map by class": {
        "algo": "lora",
        "linear_dim": 4,
        "apply_preset": {
            "target_module": ["Attention"],
            "module_algo_map": {"FeedForward": {"algo": "lokr", "factor": 2, "linear_dim": 10000}},
        },
    },
}


def lycoris(root: Path, model: Path, config: dict[str, Any], **settings: Any) -> Run:
    run = Run(root, model)
    run.settings |= {"lora_type": "lycoris", "lycoris_config": config, "validation_disable": True}
    run.settings |= {"lr_scheduler": "constant", **settings}
    return run


@torch.no_grad()
def answer(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    told = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("text_embeds", (1, 32)), ("time_ids", (1, 6)))
    }
    return unet(
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 77, 64, generator=generator),
        added_cond_kwargs=told,
    ).sample


@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_learns_and_is_read_back(
    tmp_path: Path, tiny_sdxl: Path, kind: str
) -> None:
    from lycoris import create_lycoris_from_weights

    run = lycoris(tmp_path, tiny_sdxl, KINDS[kind])
    assert run.train() == 0
    assert run.events()[-1]["verified"].startswith("verified: ")
    file = run.out / "pytorch_lora_weights.safetensors"
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    before = answer(unet)
    adapter, _ = create_lycoris_from_weights(1.0, str(file), unet)
    adapter.apply_to()
    assert not torch.allclose(answer(unet), before, atol=1e-5)
    with safe_open(file, "pt") as handle:
        told = json.loads(handle.metadata()["lycoris_config"])
    assert told == json.loads((run.out / "lycoris_config.json").read_text())
    assert told["algo"] == KINDS[kind]["algo"]


def test_a_factor_has_the_meaning_that_other_programs_read(tmp_path: Path, tiny_sdxl: Path) -> None:
    """The change is kron(w1, w2) · alpha / dim, for whole matrices just kron(w1, w2)."""
    from simpletuner.adapters.method import attach
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.core.types import Place
    from simpletuner.models.loading import open_family
    from simpletuner.models.settings import ModelSettings

    chosen = ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(tiny_sdxl))
    family = open_family(chosen)
    denoiser = family.open_denoiser(Place(torch.device("cpu"), torch.float32))
    settings = AdapterSettings(lora_type="lycoris", lycoris_config=LOKR)
    trainable = attach(denoiser, family, settings)
    with torch.no_grad():
        for parameter in trainable.parameters().values():
            parameter.normal_(0, 0.1)
    live = answer(denoiser)
    with trainable.disabled():
        base = answer(denoiser)
        with trainable.disabled():
            assert torch.equal(answer(denoiser), base)
        assert torch.equal(answer(denoiser), base)
    assert torch.equal(answer(denoiser), live)
    (path, _) = trainable.export(tmp_path, {})
    state = load_file(path)
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    assert torch.equal(answer(unet), base)
    names = {f"lycoris_{n.replace('.', '_')}": m for n, m in unet.named_modules()}
    with torch.no_grad():
        for key in [key for key in state if key.endswith(".lokr_w1")]:
            name = key.removesuffix(".lokr_w1")
            names[name].weight += torch.kron(state[key], state[f"{name}.lokr_w2"])
    torch.testing.assert_close(answer(unet), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lokr", "full", "oft"])
@pytest.mark.parametrize("more", [{}, {"use_ema": True}, {"mixed_precision": "bf16"}])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, tiny_sdxl: Path, kind: str, more: dict[str, Any]
) -> None:
    config = {**KINDS[kind], "rank_dropout": 0.1}
    straight, broken = (lycoris(tmp_path / name, tiny_sdxl, config, **more) for name in "ab")
    assert straight.train() == 0
    assert broken.train(max_train_steps=2) == 0
    assert broken.train() == 0
    for name in ("trainable", "optimizer", "pytorch_lora_weights"):
        one, other = (
            load_file(run.out / f"checkpoint-4/{name}.safetensors") for run in (straight, broken)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert {t.dtype for t in load_file(broken.out / "checkpoint-4/trainable.safetensors").values()}
    assert not (broken.out / "unet").exists()


def test_a_run_goes_on_from_a_file_and_refuses_one_that_does_not_fit(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    for kind in ("lokr", "full"):
        first = lycoris(tmp_path / kind, tiny_sdxl, KINDS[kind])
        assert first.train() == 0
        start = str(first.out / "pytorch_lora_weights.safetensors")
        settings = {"init_lora": start, "learning_rate": 1e-9, "max_train_steps": 1}
        then = lycoris(tmp_path / f"{kind} again", tiny_sdxl, KINDS[kind], **settings)
        assert then.train() == 0
        one, other = (
            load_file(run.out / "pytorch_lora_weights.safetensors") for run in (first, then)
        )
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    other = lycoris(tmp_path / "other", tiny_sdxl, KINDS["loha"], init_lora=start)
    assert other.train() == 2
    assert "does not fit" in capsys.readouterr().err


def test_the_config_may_lie_beside_the_settings(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = lycoris(tmp_path, tiny_sdxl, LOKR)
    del run.settings["lycoris_config"]
    assert run.train() == 2
    assert "is needed by lora_type lycoris" in capsys.readouterr().err
    (run.root / "lycoris_config.json").write_text(json.dumps({**LOKR, "algo": "lokrr"}))
    assert run.train() == 2
    said = capsys.readouterr().err
    assert "lycoris_config.json" in said
    assert "'lokrr' is none of lora, locon, loha, lokr" in said
    (run.root / "lycoris_config.json").write_text(json.dumps(LOKR))
    assert run.train(max_train_steps=1) == 0
    assert "method: LyCORIS lokr, dim 10000, alpha 1, 64 modules" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lycoris_config": {**LOKR, "factr": 4}}, "has no such option; did you mean factor?"),
        ({"lycoris_config": {**LOKR, "multiplier": 0.5}}, "change linear_alpha instead"),
        ({"lycoris_config": {"algo": "oft"}}, "is called diag-oft"),
        (
            {"lycoris_config": {**LOKR, "apply_preset": {"target_module": ["Attentions"]}}},
            "no module of the model is a Attentions; did you mean Attention?",
        ),
        ({"use_dora": True}, "is of a plain LoRA"),
        ({"lora_type": "standard"}, "changes nothing without lora_type lycoris"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured, change: dict[str, Any], said: str
) -> None:
    run = lycoris(tmp_path, tiny_sdxl, LOKR, **change)
    assert run.train() == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_adapters_train_over_an_int8_base(tmp_path: Path, tiny_sdxl: Path, kind: str) -> None:
    settings = {"base_model_precision": "int8-quanto", "validation_disable": False}
    run = lycoris(tmp_path, tiny_sdxl, KINDS[kind], **settings)
    assert run.train() == 0
    assert run.events()[-1]["verified"].startswith("verified: ")
