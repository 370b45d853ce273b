"""LoRA: attached, exported, read back by the stock loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.adapters.export import adapter_metadata
from simpletuner.adapters.lora import LoRA, attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.adapters.start import factors
from simpletuner.adapters.weights import Weights
from simpletuner.core.errors import ConfigError, ModelError, TrainingError
from simpletuner.core.tensors import header
from simpletuner.core.types import Place
from tests.unit.models.test_sdxl import CPU, open_tiny

SETTINGS: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 10.0}


def lora_on(folder: Path, place: Place = CPU, **settings: Any) -> LoRA:
    family = open_tiny(folder)
    torch.manual_seed(0)
    return attach(family.open_denoiser(place), family, AdapterSettings(**{**SETTINGS, **settings}))


def trained(lora: LoRA) -> LoRA:
    for parameter in lora.parameters().values():
        nn.init.normal_(parameter, std=0.1)
    return lora


def exported(lora: LoRA, folder: Path) -> Path:
    (path,) = lora.export(folder, {"base_model": "tiny"})
    return path


def forward(denoiser: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    answer: torch.Tensor = denoiser(
        latents,
        torch.tensor([10.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 77, 64, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(2, 32, generator=generator),
            "time_ids": torch.full((2, 6), 64.0),
        },
    ).sample
    return answer.detach()


def test_only_the_adapters_train_and_they_are_fp32_over_a_bf16_base(tiny_sdxl: Path) -> None:
    lora = lora_on(tiny_sdxl, Place(CPU.device, torch.bfloat16))
    training = {n for n, p in lora.denoiser.named_parameters() if p.requires_grad}
    assert len(training) == len(lora.parameters()) == 2 * len(lora.layers()) == 128
    assert {p.dtype for p in lora.parameters().values()} == {torch.float32}
    assert lora.denoiser.conv_in.weight.dtype == torch.bfloat16


def test_a_fresh_adapter_changes_nothing_and_disabled_gives_the_base(tiny_sdxl: Path) -> None:
    base = forward(open_tiny(tiny_sdxl).open_denoiser(CPU))
    lora = lora_on(tiny_sdxl)
    assert torch.equal(forward(lora.denoiser), base)
    trained(lora)
    assert not torch.allclose(forward(lora.denoiser), base, atol=1e-3)
    with lora.disabled():
        assert torch.equal(forward(lora.denoiser), base)
    assert not torch.allclose(forward(lora.denoiser), base, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_read_back_by_the_stock_loader(
    tiny_sdxl: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    lora = trained(lora_on(tiny_sdxl, Place(CPU.device, dtype)))
    before = forward(lora.denoiser.float())
    names = set(lora.denoiser.state_dict())
    verified = lora.verify(exported(lora, tmp_path))
    assert str(verified) == "verified: 64 of 64 modules"
    assert verified.largest_error <= 1e-6
    assert set(lora.denoiser.state_dict()) == names
    assert torch.equal(forward(lora.denoiser), before)


def test_verification_sees_a_changed_tensor_a_missing_module_and_a_lost_alpha(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    lora = trained(lora_on(tiny_sdxl))
    path = exported(lora, tmp_path)
    tensors, facts = load_file(path), header(path)
    name = next(iter(sorted(tensors)))
    module = name.rsplit(".lora_", 1)[0]

    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata=facts)
    with pytest.raises(TrainingError, match="1 modules differ"):
        lora.verify(path)
    less = {k: v for k, v in tensors.items() if not k.startswith(module + ".")}
    save_file(less, path, metadata=facts)
    with pytest.raises(TrainingError, match="reads back another model"):
        lora.verify(path)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="64 modules differ"):
        lora.verify(path)


def test_the_header_has_rank_alpha_and_facts_but_no_paths(tiny_sdxl: Path, tmp_path: Path) -> None:
    facts = header(exported(trained(lora_on(tiny_sdxl)), tmp_path))
    adapter = json.loads(facts["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 10.0)
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "10")
    assert facts["base_model"] == "tiny"
    assert str(tiny_sdxl.parent) not in json.dumps(facts)
    assert str(tmp_path) not in json.dumps(facts)


_FRESH = """
import sys
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from tests.unit.adapters.test_lora import forward
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2])
save_file({"answer": forward(pipe.unet)}, sys.argv[3])
"""


@pytest.mark.slow
def test_a_fresh_process_with_the_stock_pipeline_computes_the_same(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    lora = trained(lora_on(tiny_sdxl))
    exported(lora, tmp_path)
    answer = tmp_path / "answer.safetensors"
    subprocess.run(
        [sys.executable, "-c", _FRESH, str(tiny_sdxl), str(tmp_path), str(answer)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    lora.denoiser.eval()
    assert torch.equal(load_file(answer)["answer"], forward(lora.denoiser))


def test_targets_can_be_named_and_a_name_that_matches_nothing_is_refused(tiny_sdxl: Path) -> None:
    few = lora_on(tiny_sdxl, peft_lora_target_modules=["to_q"])
    assert {name.rsplit(".", 1)[1] for name in few.layers()} == {"to_q"}
    with pytest.raises(ConfigError, match="no module of the model is called 'to_qq'"):
        lora_on(tiny_sdxl, peft_lora_target_modules=["to_q", "to_qq"])


@pytest.mark.parametrize(
    ("target", "kind"),
    [("norm3", "LayerNorm"), ("conv_norm_out", "GroupNorm"), ("attn1", "Attention")],
)
def test_a_target_without_a_weight_matrix_is_refused_with_what_it_is(
    tiny_sdxl: Path, target: str, kind: str
) -> None:
    with pytest.raises(ConfigError, match=f"{target!r} is a {kind}, which has no weight") as error:
        lora_on(tiny_sdxl, peft_lora_target_modules=["to_q", target])
    assert error.value.fix == (
        "name linear layers or convolutions inside it, for example to_q or to_out.0"
    )


def test_a_convolution_can_be_a_target(tiny_sdxl: Path) -> None:
    few = lora_on(tiny_sdxl, peft_lora_target_modules=["conv_in"])
    assert list(few.layers()) == ["conv_in"]


def test_gaussian_initialisation_differs_from_the_default(tiny_sdxl: Path) -> None:
    plain, gaussian = lora_on(tiny_sdxl), lora_on(tiny_sdxl, lora_init_type="gaussian")
    name = next(iter(plain.parameters()))
    assert not torch.equal(plain.parameters()[name], gaussian.parameters()[name])


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["conv1", "to_out.0"]])
def test_an_adapter_that_starts_from_the_base_is_the_base_at_first_and_a_plain_lora_at_last(
    tiny_sdxl: Path, tmp_path: Path, kind: str, more: dict[str, Any], targets: list[str]
) -> None:
    """The file loads on the checkpoint as it is, in the stock class, and answers the same."""
    base = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    before = forward(base)
    lora = lora_on(tiny_sdxl, lora_init_type=kind, peft_lora_target_modules=targets, **more)
    torch.testing.assert_close(forward(lora.denoiser), before, atol=1e-5, rtol=1e-5)
    weights = {n: p for n, p in lora.denoiser.named_parameters() if p.requires_grad}
    assert {id(p) for p in weights.values()} == {id(p) for p in lora.parameters().values()}
    for parameter in lora.parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    after = forward(lora.denoiser)
    assert (after - before).abs().max() > 1e-3
    with lora.disabled():
        assert torch.equal(forward(lora.denoiser), before)

    path = exported(lora, tmp_path)
    assert str(lora.verify(path)).startswith("verified")
    torch.testing.assert_close(forward(lora.denoiser), after, atol=0, rtol=0)
    assert all(p.requires_grad for p in lora.parameters().values())
    assert {t.shape[0] for n, t in load_file(path).items() if "lora_A" in n} == {8}
    base.load_lora_adapter(
        load_file(path), prefix="unet", metadata=adapter_metadata(path), adapter_name="theirs"
    )
    torch.testing.assert_close(forward(base), after, atol=1e-5, rtol=1e-5)


def test_pissa_holds_the_largest_singular_values_and_olora_an_orthonormal_part() -> None:
    weight = torch.randn(24, 3, 2, 5, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    a, b = factors(weight, 4, "pissa")
    best = (u[:, :4] * s[:4]) @ v[:4]
    torch.testing.assert_close((b @ a).double(), best, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = factors(weight, 4, "olora")
    torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)
    q, r = torch.linalg.qr(weight.flatten(1))
    torch.testing.assert_close(b @ a, q[:, :4] @ r[:4])
    a, b = factors(torch.ones(3, 2), 4, "pissa")  # less than the rank
    torch.testing.assert_close(b @ a, torch.ones(3, 2), atol=1e-6, rtol=0)


def test_init_lora_starts_from_the_file(tiny_sdxl: Path, tmp_path: Path) -> None:
    lora = trained(lora_on(tiny_sdxl))
    path = exported(lora, tmp_path)
    again = lora_on(tiny_sdxl, init_lora=str(path))
    assert all(torch.equal(p, lora.parameters()[n]) for n, p in again.parameters().items())


def test_init_lora_of_another_rank_or_alpha_or_kind_is_refused(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    path = str(exported(trained(lora_on(tiny_sdxl)), tmp_path))
    with pytest.raises(ConfigError, match="has another rank"):
        lora_on(tiny_sdxl, init_lora=path, lora_rank=8)
    with pytest.raises(ConfigError, match=r"its alpha / rank is 2\.5, yours is 1"):
        lora_on(tiny_sdxl, init_lora=path, lora_alpha=4.0)
    with pytest.raises(ConfigError, match="modules differ"):
        lora_on(tiny_sdxl, init_lora=path, peft_lora_target_modules=["to_q"])
    with pytest.raises(ConfigError, match="does not exist"):
        lora_on(tiny_sdxl, init_lora=str(tmp_path / "no.safetensors"))


def test_init_lora_takes_a_runs_folder(tiny_sdxl: Path, tmp_path: Path) -> None:
    lora = trained(lora_on(tiny_sdxl))
    exported(lora, tmp_path)
    again = lora_on(tiny_sdxl, init_lora=str(tmp_path))
    assert all(torch.equal(p, lora.parameters()[n]) for n, p in again.parameters().items())


def test_init_lora_refuses_what_it_cannot_take_whole(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = exported(trained(lora_on(tiny_sdxl)), tmp_path)
    tensors, facts = load_file(path), header(path)

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            lora_on(tiny_sdxl, init_lora=str(path))

    save_file({**tensors, "text_encoder.q.lora_A.weight": torch.zeros(1)}, path, metadata=facts)
    refused(r"not a LoRA of the unet .* it holds text_encoder\.q")
    save_file({**tensors, "unet.a.to_q.alpha": torch.ones(())}, path, metadata=facts)
    refused(r"it holds unet\.a\.to_q")
    path.write_bytes(path.read_bytes()[:-100])
    refused("cannot be read")


def test_init_lora_reads_other_tools_layouts(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Flat names as kohya's scripts write them, of diffusers' own modules."""
    lora = trained(lora_on(tiny_sdxl))
    flat = {}
    for name, layer in lora.layers().items():
        begin = f"lora_unet_{name.replace('.', '_')}"
        flat[f"{begin}.lora_down.weight"] = layer.lora_A["default"].weight.detach().clone()
        flat[f"{begin}.lora_up.weight"] = layer.lora_B["default"].weight.detach().clone()
        flat[f"{begin}.alpha"] = torch.tensor(float(layer.scaling["default"] * layer.r["default"]))
    save_file(flat, tmp_path / "kohya.safetensors")
    again = lora_on(tiny_sdxl, init_lora=str(tmp_path / "kohya.safetensors"))
    assert all(torch.equal(p, lora.parameters()[n]) for n, p in again.parameters().items())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}])
def test_its_kinds_learn_export_and_start_again(
    tiny_sdxl: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    lora = trained(lora_on(tiny_sdxl, **settings))
    file = exported(lora, tmp_path)
    assert (
        str(lora.verify(file)) == f"verified: {len(lora.layers())} of {len(lora.layers())} modules"
    )
    scale = next(iter(lora.layers().values())).scaling["default"]
    adapter = json.loads(header(file)["lora_adapter_metadata"])
    assert adapter["unet.lora_alpha"] / adapter["unet.r"] == pytest.approx(scale)

    again = lora_on(tiny_sdxl, init_lora=str(file), **settings)
    assert all(torch.equal(p, lora.parameters()[n]) for n, p in again.parameters().items())
    with pytest.raises(ConfigError, match=r"alpha / rank|DoRA"):
        lora_on(tiny_sdxl, init_lora=str(file))


def test_rslora_scales_by_the_root_of_the_rank(tiny_sdxl: Path) -> None:
    for rank in (4, 16):
        lora = lora_on(tiny_sdxl, use_rslora=True, lora_rank=rank, lora_alpha=8.0)
        scales = {layer.scaling["default"] for layer in lora.layers().values()}
        assert scales == {8.0 / rank**0.5}


def test_dora_keeps_the_direction_s_length_in_its_own_vector(tiny_sdxl: Path) -> None:
    """Closed form: the rows of the changed weight have the trained lengths."""
    lora = trained(lora_on(tiny_sdxl, use_dora=True))
    name, layer = next(iter(lora.layers().items()))
    weight = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    magnitude = lora.parameters()[f"{name}.lora_magnitude_vector"]
    wanted = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = torch.randn(3, weight.shape[1])
    bias = layer.base_layer.bias
    found = layer(x) - (0 if bias is None else bias)
    assert torch.allclose(found, x @ wanted.T, atol=1e-5)


def test_eval_weights_leave_every_module_in_the_mode_it_was_in(tiny_sdxl: Path) -> None:
    lora = lora_on(tiny_sdxl, lora_dropout=0.1)
    lora.denoiser.mid_block.eval()
    modes = [module.training for module in lora.denoiser.modules()]
    with Weights(lora, torch.optim.SGD(lora.parameters().values(), lr=1)).at("eval"):
        assert not any(module.training for module in lora.denoiser.modules())
    assert [module.training for module in lora.denoiser.modules()] == modes
