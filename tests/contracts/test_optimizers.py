"""What every built optimizer promises: it learns, resumes exactly, and takes its settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from simpletuner.core.errors import ConfigError, ExtraMissing, TrainingError
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import ParamGroup
from simpletuner.optim.build import build_optimizer, load_optimizer_tensors, optimizer_tensors
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.settings import OptimizerSettings

BUILT = [name for name, row in OPTIMIZERS.items() if not row.pending]
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {"up.weight": (8, 4), "down.weight": (4, 8), "conv.weight": (4, 4, 3, 3), "bias": (8,)}


def groups_of(dtype: torch.dtype, device: str = "cpu") -> tuple[ParamGroup, ...]:
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator).to(device, dtype)
        if len(shape) == 4:
            value = value.to(memory_format=torch.channels_last)
        named[name] = Parameter(value)
    bias = {"bias": named.pop("bias")}
    return ParamGroup("matrices", named), ParamGroup("rest", bias, decay=False, lr_scale=0.5)


def settings_of(name: str, **more: Any) -> OptimizerSettings:
    return OptimizerSettings(optimizer=name, **{"learning_rate": 1e-2, **more})


def optimizer_of(name: str, groups: tuple[ParamGroup, ...], **more: Any) -> torch.optim.Optimizer:
    return build_optimizer(settings_of(name, **more), groups, Seeds(42))


def named(groups: tuple[ParamGroup, ...]) -> dict[str, Parameter]:
    return {name: p for group in groups for name, p in group.parameters.items()}


def train(optimizer: torch.optim.Optimizer, groups: tuple[ParamGroup, ...], steps: range) -> None:
    """Steps whose rates and gradients depend on the step alone, as the trainer sets them."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step) * group["lr_scale"]
        for place, parameter in enumerate(named(groups).values()):
            generator = torch.Generator().manual_seed(100 * step + place)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        if tensor.ndim
        else (tensor.dtype, repr(tensor.item()).encode())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILT)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = groups_of(dtype)
    unbroken = optimizer_of(name, whole)
    train(unbroken, whole, range(9))

    first = groups_of(dtype)
    before = optimizer_of(name, first)
    train(before, first, range(4))
    kept = {key: value.contiguous() for key, value in optimizer_tensors(before, first).items()}
    save_file(kept, tmp_path / "optimizer.safetensors")
    second = groups_of(dtype)
    with torch.no_grad():
        for key, parameter in named(second).items():
            parameter.copy_(named(first)[key])
    after = optimizer_of(name, second)
    load_optimizer_tensors(after, second, load_file(tmp_path / "optimizer.safetensors"))
    assert bits(named(second)) == bits(named(first))
    train(after, second, range(4, 9))

    assert bits(named(second)) == bits(named(whole))
    assert bits(optimizer_tensors(after, second)) == bits(optimizer_tensors(unbroken, whole))


@pytest.mark.parametrize("name", BUILT)
def test_what_it_remembers_is_there_for_every_parameter_by_name(name: str) -> None:
    groups = groups_of(torch.float32)
    optimizer = optimizer_of(name, groups)
    train(optimizer, groups, range(2))

    tensors = optimizer_tensors(optimizer, groups)

    for parameter in SHAPES:
        assert tensors[f"exp_avg:{parameter}"].shape == SHAPES[parameter]
    kept = tensors["exp_avg:bias"].clone()
    train(optimizer, groups, range(2, 3))
    assert torch.equal(tensors["exp_avg:bias"], kept)


@pytest.mark.parametrize("name", BUILT)
def test_the_state_of_a_run_that_has_not_begun_loads(name: str) -> None:
    groups, others = groups_of(torch.float32), groups_of(torch.float32)
    optimizer, other = optimizer_of(name, groups), optimizer_of(name, others)

    load_optimizer_tensors(other, others, optimizer_tensors(optimizer, groups))
    train(optimizer, groups, range(2))
    train(other, others, range(2))

    assert bits(named(groups)) == bits(named(others))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILT)
def test_it_finds_the_bottom_of_a_bowl(name: str, dtype: torch.dtype) -> None:
    groups = groups_of(dtype)
    optimizer = optimizer_of(name, groups, adam_weight_decay=0.0)

    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 300)
        for parameter in named(groups).values():
            parameter.grad = parameter.detach() - 0.5
        optimizer.step()

    for parameter in named(groups).values():
        assert float((parameter.detach().float() - 0.5).abs().mean()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILT)
def test_a_step_runs_on_the_meta_device(name: str, dtype: torch.dtype) -> None:
    groups = groups_of(dtype, "meta")
    optimizer = optimizer_of(name, groups)

    for _ in range(2):
        for parameter in named(groups).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    tensors = optimizer_tensors(optimizer, groups)
    assert {t.device.type for t in tensors.values() if t.ndim} == {"meta"}


@pytest.mark.parametrize("name", BUILT)
def test_weight_decay_shrinks_matrices_and_leaves_what_is_excluded(name: str) -> None:
    groups = groups_of(torch.float32)
    start = {key: p.detach().clone() for key, p in named(groups).items()}
    optimizer = optimizer_of(name, groups, adam_weight_decay=0.1)

    for parameter in named(groups).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    now = named(groups)
    torch.testing.assert_close(now["up.weight"].detach(), start["up.weight"] * (1 - 1e-2 * 0.1))
    assert torch.equal(now["bias"], start["bias"])


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_group_says_its_share_of_the_rate(name: str) -> None:
    optimizer = optimizer_of(name, groups_of(torch.float32))

    found = [(g["name"], g["lr_scale"], g["lr"]) for g in optimizer.param_groups]

    assert found == [("matrices", 1.0, 1e-2), ("rest", 0.5, 5e-3)]


@pytest.mark.parametrize("name", BUILT)
def test_without_settings_it_has_the_numbers_of_its_row(name: str) -> None:
    group = optimizer_of(name, groups_of(torch.float32)).param_groups[0]

    assert numbers(group, name) == facts(name)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("way", ["settings", "optimizer_config"])
def test_what_the_user_sets_arrives(name: str, way: str) -> None:
    own = {"betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-5}
    if OPTIMIZERS[name].fact("eps") is None:
        del own["eps"]
    flat = {"optimizer_beta1": 0.8, "optimizer_beta2": 0.95, "adam_weight_decay": 0.3}
    flat |= {"adam_epsilon": 1e-5} if "eps" in own else {}
    more: dict[str, Any] = flat if way == "settings" else {"optimizer_config": own}

    group = optimizer_of(name, groups_of(torch.float32), **more).param_groups[0]

    assert numbers(group, name) == own


def facts(name: str) -> dict[str, Any]:
    return {key: OPTIMIZERS[name].fact(key) for key in taken(name)}


def numbers(group: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a parameter group; torch-optimi keeps its two betas apart."""
    betas = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    return {key: {**group, "betas": betas}[key] for key in taken(name)}


def taken(name: str) -> list[str]:
    return [k for k in ("betas", "weight_decay", "eps") if OPTIMIZERS[name].fact(k) is not None]


def test_the_options_of_torch_optimi_arrive() -> None:
    config = {"kahan_sum": False, "decouple_lr": True, "weight_decay": 1e-5}

    for name in ("optimi-adamw", "optimi-lion"):
        optimizer = optimizer_of(name, groups_of(torch.bfloat16), optimizer_config=config)
        group = optimizer.param_groups[0]

        assert (group["kahan_sum"], group["decouple_lr"]) == (False, True)


def test_an_option_that_the_optimizer_lacks_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="no option 'weight_decy'; did you mean weight_decay"):
        optimizer_of("torch-adamw", (), optimizer_config={"weight_decy": 0.1})
    with pytest.raises(ConfigError, match=r"betas: .*less than 1"):
        optimizer_of("torch-adamw", (), optimizer_config={"betas": [0.9, 1.5]})


def test_a_number_said_twice_must_be_the_same() -> None:
    groups = groups_of(torch.float32)
    twice = {"adam_weight_decay": 0.1, "optimizer_config": {"weight_decay": 0.1}}
    assert optimizer_of("adamw_bf16", groups, **twice).param_groups[0]["weight_decay"] == 0.1

    with pytest.raises(ConfigError, match=r"adam_weight_decay +is 0.2 here and 0.1 in"):
        optimizer_of("adamw_bf16", groups, **{**twice, "adam_weight_decay": 0.2})


def test_lion_has_no_epsilon_and_says_so() -> None:
    with pytest.raises(ConfigError, match="optimi-lion has no eps; remove it"):
        optimizer_of("optimi-lion", (), adam_epsilon=1e-8)


@pytest.mark.parametrize("name", ["optimi-adamw", "optimi-lion"])
def test_a_package_that_is_missing_is_named_with_its_install_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimi", None)

    with pytest.raises(ExtraMissing, match=f"optimizer {name} needs") as raised:
        optimizer_of(name, groups_of(torch.float32))

    assert raised.value.fix == "pip install 'simpletuner[train]'"


def test_an_optimizer_that_is_not_built_says_so() -> None:
    assert OPTIMIZERS["prodigy"].pending
    with pytest.raises(ConfigError, match="prodigy is not built yet"):
        optimizer_of("prodigy", groups_of(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "now"), list(permutations(BUILT, 2)))
def test_the_memory_of_another_optimizer_is_refused(
    before: str, now: str, dtype: torch.dtype
) -> None:
    groups, others = groups_of(dtype), groups_of(dtype)
    left, taken_up = optimizer_of(before, groups), optimizer_of(now, others)
    train(left, groups, range(1))

    with pytest.raises(TrainingError, match=r"in the checkpoint (lacks|remembers) ") as error:
        load_optimizer_tensors(taken_up, others, optimizer_tensors(left, groups))

    assert error.value.fix is not None
    assert error.value.fix.startswith("set optimizer, optimizer_config and the trained layers back")


def test_memory_of_another_dtype_is_refused_by_both_dtypes() -> None:
    groups, others = groups_of(torch.float32), groups_of(torch.float32)
    ours, torchs = optimizer_of("adamw_bf16", groups), optimizer_of("torch-adamw", others)
    train(ours, groups, range(1))

    with pytest.raises(TrainingError, match=r"remembers step:\S+ in int64, now float32"):
        load_optimizer_tensors(torchs, others, optimizer_tensors(ours, groups))


def test_the_memory_of_layers_that_do_not_train_now_is_refused_by_name() -> None:
    groups = groups_of(torch.float32)
    optimizer = optimizer_of("adamw_bf16", groups)
    train(optimizer, groups, range(1))
    tensors = optimizer_tensors(optimizer, groups)
    fewer = groups[1:]

    with pytest.raises(TrainingError, match=r"remembers conv.weight, which does not train now"):
        load_optimizer_tensors(optimizer_of("adamw_bf16", fewer), fewer, tensors)


def test_the_memory_of_another_rank_is_refused_by_shape() -> None:
    groups = groups_of(torch.float32)
    optimizer = optimizer_of("adamw_bf16", groups)
    train(optimizer, groups, range(1))
    tensors = optimizer_tensors(optimizer, groups)
    tensors["exp_avg:bias"] = torch.zeros(9)

    with pytest.raises(TrainingError, match=r"exp_avg:bias of shape \(9,\), now \(8,\)"):
        load_optimizer_tensors(optimizer, groups, tensors)
