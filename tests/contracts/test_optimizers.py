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
CASES = [
    *((name, torch.float32) for name in BUILT),
    *((name, torch.bfloat16) for name in BUILT if OPTIMIZERS[name].fact("bf16_weights")),
]
"""Weights are held in bf16 only where the optimizer is made for that; see `training.run`."""

SHAPES = {
    "up.weight": (8, 4),
    "down.weight": (4, 8),
    "wide.weight": (64, 128),  # large enough for moments of 8 bits
    "conv.weight": (4, 4, 3, 3),
    "bias": (8,),
}


def groups_of(
    dtype: torch.dtype, device: str = "cpu", lr_scale: float = 0.5
) -> tuple[ParamGroup, ...]:
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator).to(device, dtype)
        if len(shape) == 4:
            value = value.to(memory_format=torch.channels_last)
        named[name] = Parameter(value)
    bias = {"bias": named.pop("bias")}
    rest = ParamGroup("rest", bias, decay=False, lr_scale=lr_scale)
    return ParamGroup("matrices", named), rest


def own_groups(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[ParamGroup, ...]:
    """Those of `groups_of`; an optimizer that finds its rate has one for all of them."""
    return groups_of(dtype, device, 1.0 if OPTIMIZERS[name].fact("own_rate") else 0.5)


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


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = own_groups(name, dtype)
    unbroken = optimizer_of(name, whole)
    train(unbroken, whole, range(23))

    first = own_groups(name, dtype)
    before = optimizer_of(name, first)
    train(before, first, range(12))
    kept = {key: value.contiguous() for key, value in optimizer_tensors(before, first).items()}
    save_file(kept, tmp_path / "optimizer.safetensors")
    second = own_groups(name, dtype)
    with torch.no_grad():
        for key, parameter in named(second).items():
            parameter.copy_(named(first)[key])
    after = optimizer_of(name, second)
    load_optimizer_tensors(after, second, load_file(tmp_path / "optimizer.safetensors"))
    assert bits(named(second)) == bits(named(first))
    train(after, second, range(12, 23))

    assert bits(named(second)) == bits(named(whole))
    assert bits(optimizer_tensors(after, second)) == bits(optimizer_tensors(unbroken, whole))


@pytest.mark.parametrize("name", BUILT)
def test_what_it_remembers_is_a_copy_by_the_names_of_parameters(name: str) -> None:
    groups = own_groups(name, torch.float32)
    optimizer = optimizer_of(name, groups)
    train(optimizer, groups, range(2))

    tensors = optimizer_tensors(optimizer, groups)

    named_in = {key.split(":")[1] for key in tensors if not key.startswith("group:")}
    assert named_in == (set(SHAPES) if OPTIMIZERS[name].fact("state_bytes") else set())
    kept = {key: value.clone() for key, value in tensors.items()}
    train(optimizer, groups, range(2, 3))
    assert bits(tensors) == bits(kept)


@pytest.mark.parametrize("name", BUILT)
def test_it_remembers_so_many_bytes_for_each_weight(name: str) -> None:
    weight = Parameter(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    groups = (ParamGroup("all", {"weight": weight}),)
    optimizer = optimizer_of(name, groups)
    weight.grad = torch.ones_like(weight)
    optimizer.step()

    tensors = optimizer_tensors(optimizer, groups).values()

    found = sum(t.numel() * t.element_size() for t in tensors) / weight.numel()
    assert found == pytest.approx(OPTIMIZERS[name].fact("state_bytes"), rel=0.01, abs=0.01)


@pytest.mark.parametrize("name", BUILT)
def test_the_state_of_a_run_that_has_not_begun_loads(name: str) -> None:
    groups, others = (own_groups(name, torch.float32) for _ in range(2))
    optimizer, other = optimizer_of(name, groups), optimizer_of(name, others)

    load_optimizer_tensors(other, others, optimizer_tensors(optimizer, groups))
    train(optimizer, groups, range(2))
    train(other, others, range(2))

    assert bits(named(groups)) == bits(named(others))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_it_finds_the_bottom_of_a_bowl(name: str, dtype: torch.dtype) -> None:
    groups = own_groups(name, dtype)
    optimizer = optimizer_of(name, groups, adam_weight_decay=0.0)
    top = {"prodigy": 1.0, "muon": 0.3, "soap": 0.3}.get(name, 0.05)
    still = OPTIMIZERS[name].fact("no_schedule")

    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = top if still else top * (1 - step / 300)
        for parameter in named(groups).values():
            parameter.grad = parameter.detach() - 0.5
        optimizer.step()

    if still:
        optimizer.eval()  # type: ignore[attr-defined]
    for parameter in named(groups).values():
        assert float((parameter.detach().float() - 0.5).abs().mean()) < 0.05


ON_META = [name for name in BUILT if not OPTIMIZERS[name].fact("syncs")]
ON_META.remove("optimi-stableadamw")
"""StableAdamW goes another way there than on a GPU, where it is watched."""


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[0] in ON_META])
def test_a_step_runs_on_the_meta_device(name: str, dtype: torch.dtype) -> None:
    groups = own_groups(name, dtype, "meta")
    optimizer = optimizer_of(name, groups)

    for _ in range(2):
        for parameter in named(groups).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    tensors = optimizer_tensors(optimizer, groups)
    assert {t.device.type for t in tensors.values() if t.ndim} <= {"meta"}


@pytest.mark.parametrize("name", BUILT)
def test_weight_decay_shrinks_matrices_and_leaves_what_is_excluded(name: str) -> None:
    ends = {}
    for decay in (0.0, 0.5):
        groups = own_groups(name, torch.float32)
        more = {"optimizer_config": {"d0": 1.0}} if OPTIMIZERS[name].fact("own_rate") else {}
        optimizer = optimizer_of(name, groups, adam_weight_decay=decay, **more)
        train(optimizer, groups, range(12))
        ends[decay] = {key: p.detach().clone() for key, p in named(groups).items()}

    for key in ("up.weight", "wide.weight", "conv.weight"):
        assert ends[0.5][key].norm() < ends[0.0][key].norm()
    if not OPTIMIZERS[name].fact("own_rate"):  # its rate is one for all and follows all of them
        assert torch.equal(ends[0.5]["bias"], ends[0.0]["bias"])


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_group_says_its_share_of_the_rate(name: str) -> None:
    optimizer = optimizer_of(name, groups_of(torch.float32))

    found = [(g["lr_scale"], float(g["lr"]), g["names"]) for g in optimizer.param_groups]

    shares = {n: (scale, rate) for scale, rate, names in found for n in names}
    assert shares == {n: (0.5, 5e-3) if n == "bias" else (1.0, 1e-2) for n in SHAPES}


@pytest.mark.parametrize("name", BUILT)
def test_without_settings_it_has_the_numbers_of_its_row(name: str) -> None:
    group = optimizer_of(name, groups_of(torch.float32)).param_groups[0]

    assert numbers(group, name) == facts(name)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("way", ["settings", "optimizer_config"])
def test_what_the_user_sets_arrives(name: str, way: str) -> None:
    count = len(OPTIMIZERS[name].fact("betas") or ())
    own = {"betas": (0.8, 0.95, 0.97)[:count], "weight_decay": 0.3, "eps": 1e-5}
    own = {key: value for key, value in own.items() if OPTIMIZERS[name].fact(key) is not None}
    flat: dict[str, Any] = {"adam_weight_decay": 0.3}
    if count == 2:
        flat |= {"optimizer_beta1": 0.8, "optimizer_beta2": 0.95}
    elif way == "settings":
        own.pop("betas", None)
    flat |= {"adam_epsilon": 1e-5} if "eps" in own else {}
    more: dict[str, Any] = flat if way == "settings" else {"optimizer_config": own}

    group = optimizer_of(name, groups_of(torch.float32), **more).param_groups[0]

    assert {key: value for key, value in numbers(group, name).items() if key in own} == own


def test_three_betas_are_not_two() -> None:
    with pytest.raises(ConfigError, match="came has 3 betas; write them in optimizer_config"):
        optimizer_of("came", (), optimizer_beta1=0.9, optimizer_beta2=0.99)


OPTIONS: dict[str, dict[str, Any]] = {
    "torch-sgd": {"momentum": 0.9, "nesterov": True},
    "torch-adafactor": {"beta2_decay": -0.5, "d": 2.0},
    "muon": {"momentum": 0.8, "nesterov": False, "ns_steps": 3},
    "bnb-adamw8bit": {"min_8bit_size": 1},
    "bnb-lion8bit": {"min_8bit_size": 1},
    "bnb-ademamix": {"alpha": 2.0},
    "prodigy": {"d0": 1e-3, "use_bias_correction": True, "slice_p": 3},
    "adamw_schedulefree": {"r": 1.0, "weight_lr_power": 1.0},
    "soap": {"precondition_frequency": 2, "max_precondition_dim": 8},
    "came": {"clip_threshold": 0.1},
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in OPTIONS.items() for option in options]
)
def test_every_option_of_its_own_changes_what_it_does(name: str, option: str) -> None:
    ends = []
    base = {"momentum": 0.9} if option == "nesterov" and name == "torch-sgd" else {}
    for config in (base, {**base, option: OPTIONS[name][option]}):
        groups = own_groups(name, torch.float32)
        optimizer = optimizer_of(name, groups, optimizer_config=config)
        train(optimizer, groups, range(12))
        ends.append({**bits(named(groups)), **bits(optimizer_tensors(optimizer, groups))})
    assert ends[0] != ends[1]


def rates_of_prodigy(steps: int, **more: Any) -> list[float]:
    """What it finds in so many steps along one gradient."""
    groups = own_groups("prodigy", torch.float32)
    optimizer, found = optimizer_of("prodigy", groups, **more), []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        for parameter in named(groups).values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append(optimizer.param_groups[0]["d"])
    return found


@pytest.mark.parametrize("option", [{"safeguard_warmup": True}, {"d_coef": 2.0}])
def test_what_steers_the_search_of_prodigy_changes_what_it_finds(option: dict[str, Any]) -> None:
    assert rates_of_prodigy(30, optimizer_config=option) != rates_of_prodigy(30)


def test_prodigy_keeps_its_rate_after_prodigy_steps() -> None:
    whole, ended = rates_of_prodigy(60), rates_of_prodigy(60, prodigy_steps=20)
    assert ended[:20] == whole[:20]
    assert ended[20:] == [ended[19]] * 40
    assert whole[59] > whole[19]


def facts(name: str) -> dict[str, Any]:
    return {key: OPTIMIZERS[name].fact(key) for key in taken(name)}


def numbers(group: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a parameter group; torch-optimi keeps its betas apart."""
    betas = group.get("betas")
    if betas is None:
        betas = tuple(group[f"beta{n}"] for n in (1, 2, 3) if group.get(f"beta{n}") is not None)
    return {key: {**group, "betas": betas}[key] for key in taken(name)}


def taken(name: str) -> list[str]:
    return [k for k in ("betas", "weight_decay", "eps") if OPTIMIZERS[name].fact(k) is not None]


def test_the_options_of_torch_optimi_arrive() -> None:
    config = {"kahan_sum": False, "decouple_lr": True, "weight_decay": 1e-5}

    for name in ("optimi-adamw", "optimi-lion", "optimi-stableadamw", "optimi-adan"):
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


PACKAGES = {
    "optimi-adamw": "optimi",
    "bnb-lion8bit": "bitsandbytes.optim",
    "soap": "pytorch_optimizer",
}
PACKAGES |= {
    "came": "pytorch_optimizer",
    "prodigy": "prodigyopt",
    "adamw_schedulefree": "schedulefree",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named_with_its_install_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)

    with pytest.raises(ExtraMissing, match=f"optimizer {name} needs") as raised:
        optimizer_of(name, groups_of(torch.float32))

    assert raised.value.fix == f"pip install 'simpletuner[{OPTIMIZERS[name].needs}]'"


def test_an_optimizer_that_is_not_built_says_so() -> None:
    assert OPTIMIZERS["torch-asgd"].pending
    with pytest.raises(ConfigError, match="torch-asgd is not built yet"):
        optimizer_of("torch-asgd", groups_of(torch.float32))


SOME = ("adamw_bf16", "optimi-lion", "bnb-adamw8bit", "prodigy", "soap", "muon")


@pytest.mark.parametrize(("before", "now"), list(permutations(SOME, 2)))
def test_the_memory_of_another_optimizer_is_refused(before: str, now: str) -> None:
    groups, others = (groups_of(torch.float32, lr_scale=1.0) for _ in range(2))
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


def test_options_of_now_hold_after_a_resume_of_soap() -> None:
    groups, others = (groups_of(torch.float32) for _ in range(2))
    before = optimizer_of("soap", groups, optimizer_config={"precondition_frequency": 100})
    train(before, groups, range(3))
    config = {"precondition_frequency": 4, "betas": [0.9, 0.8]}
    after = optimizer_of("soap", others, optimizer_config=config)
    load_optimizer_tensors(after, others, optimizer_tensors(before, groups))
    train(after, others, range(3, 4))

    state = after.state[named(others)["wide.weight"]]
    assert (state["precondition_frequency"], state["shampoo_beta"]) == (4, 0.8)
