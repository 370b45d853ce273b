"""Contradictions in how a model is made to fit its device."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import Problem
from simpletuner.precision.attention import ATTENTION, attends_in
from simpletuner.precision.compiled import compiles_in

_OFFLOAD, _SWAP = "enable_group_offload", "musubi_blocks_to_swap"

_MOVED = ("no_change", "int8-quanto", "int8-torchao")
"""The formats whose weights are moved as they are."""


def recomputed_from_elsewhere(run: Proposal) -> Iterator[Problem]:
    """Where the inputs of recomputed blocks are kept is asked where there are such blocks."""
    key = "gradient_checkpointing_backend"
    if run.asks(key) and not run.values["gradient_checkpointing"]:
        yield run.problem(
            key, "changes nothing without gradient_checkpointing; set that, or remove this"
        )


def one_way_to_offload(run: Proposal) -> Iterator[Problem]:
    """Group offload and block swap are the same thing, of all blocks and of some."""
    if run.values[_OFFLOAD] and run.values[_SWAP]:
        yield run.problem(
            _SWAP, f"does not go with {_OFFLOAD}, which moves every block; remove one of the two"
        )
    for key in ("group_offload_type", "group_offload_to_disk_path"):
        if run.asks(key) and not run.values[_OFFLOAD]:
            yield run.problem(key, f"changes nothing without {_OFFLOAD}; set that, or remove this")


def offload_fits(run: Proposal) -> Iterator[Problem]:
    """What is offloaded is frozen, whole, and recomputed."""
    values = run.values
    key = _OFFLOAD if values[_OFFLOAD] else _SWAP
    if not values[key]:
        return
    if values["model_type"] == "full" and not values["controlnet"]:
        yield run.problem(
            key,
            "moves frozen weights, and model_type full trains them all; remove it, or set"
            " model_type lora",
        )
    if values["model_type"] == "lora" and values["lora_type"] == "lycoris":
        yield run.problem(
            key, "is not here for lora_type lycoris; remove it, or set lora_type standard"
        )
    name = values["base_model_precision"]
    if name not in _MOVED:
        yield run.problem(
            key, f"does not move weights in {name}; take {' or '.join(_MOVED[1:])}, or remove it"
        )
    elif name != "no_change" and run.asks("group_offload_to_disk_path"):
        yield run.problem(
            "group_offload_to_disk_path",
            f"writes no weights in {name}; remove it, or base_model_precision",
        )
    if not values["gradient_checkpointing"]:
        yield run.problem(
            key,
            "saves nothing while every block's weights are kept for its gradients; set"
            " gradient_checkpointing true",
        )
    elif (values["gradient_checkpointing_interval"] or 1) > 1:
        yield run.problem(
            "gradient_checkpointing_interval",
            f"keeps the weights of the blocks between on the device, beside {key}; remove it",
        )


def compiled_as_asked(run: Proposal) -> Iterator[Problem]:
    """Blocks that are compiled are whole, stay where they are, and there is what compiles them."""
    values, key = run.values, "dynamo_backend"
    backend = values[key]
    if run.asks("dynamo_mode") and backend != "inductor":
        yield run.problem(
            "dynamo_mode", f"is of {key} inductor, which is {backend}; set that, or remove this"
        )
    if backend == "no":
        return
    if why := compiles_in(backend, run.device):
        yield run.problem(key, why)
    for other in (_OFFLOAD, _SWAP):
        if values[other]:
            yield run.problem(key, f"is not here for weights that wait; remove it, or {other}")
    if values["unet_attention_slice"]:
        yield run.problem(
            "unet_attention_slice", f"is not here beside {key}; remove one of the two"
        )
    name = values["base_model_precision"]
    if name != "no_change":
        yield run.problem(key, f"is not here for weights in {name}; remove one of the two")
    if values["model_type"] == "lora" and values["lora_type"] == "lycoris":
        yield run.problem(
            key, "is not here for lora_type lycoris; remove it, or set lora_type standard"
        )


def attention_runs_here(run: Proposal) -> Iterator[Problem]:
    """The kernel that computes attention is there, and fits the machine."""
    key, chosen = "attention_mechanism", run.values["attention_mechanism"]
    if chosen not in ATTENTION:
        return
    if why := attends_in(chosen, run.device):
        yield run.problem(key, why)
    if chosen != "diffusers" and run.values["dynamo_backend"] != "no":
        yield run.problem(key, "is not here beside dynamo_backend; remove one of the two")


MEMORY_CHECKS: tuple[Check, ...] = (
    recomputed_from_elsewhere,
    one_way_to_offload,
    offload_fits,
    compiled_as_asked,
    attention_runs_here,
)
