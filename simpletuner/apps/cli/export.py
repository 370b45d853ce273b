"""``simpletuner export``: what a run or a checkpoint holds, in another tool's layout."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.apps.cli.convert_lora import add_options, convert, family_name
from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.files import PARTIAL, publish_folder, read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from simpletuner.models.family import Family

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_EPILOG = """\
examples:
  simpletuner export output/checkpoint-500 --to comfyui
  simpletuner export output --to comfyui --dtype fp16       (of a run with model_type full)

An adapter is converted as by convert-lora. Of a run with model_type full, with the parts of its
base model that did not train:
  diffusers       a folder for DiffusionPipeline.from_pretrained(…)
  comfyui, kohya  one .safetensors file, as ComfyUI, A1111, Forge and kohya's scripts take it, and
                  as pretrained_model_name_or_path does; with --parts denoiser, for ComfyUI's
                  folder diffusion_models
"""


def run(arguments: Sequence[str]) -> int:
    """Convert what the folder that `arguments` name holds."""
    from simpletuner.adapters.export import lora_file

    parser = argparse.ArgumentParser(
        prog="simpletuner export",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "a run's output folder, or one of its checkpoints"
    parser.add_argument("source", metavar="FOLDER", help=what)
    add_options(parser)
    full = parser.add_argument_group("of a run with model_type full")
    full.add_argument("--parts", choices=("all", "denoiser"), default="all", help="what to write")
    full.add_argument("--dtype", choices=tuple(_DTYPES), help="without it, that of the run")
    full.add_argument(
        "--base", metavar="MODEL", help="where the base model is; without it, where the run had it"
    )
    asked = parser.parse_args(arguments)
    folder = Path(asked.source).expanduser()
    weights = next(
        (folder / part for part in ("unet", "transformer") if _is_part(folder / part)), None
    )
    if weights is None:
        return convert(lora_file(asked.source), asked.to, asked.output, asked.model_family)
    return _export_full(weights, asked)


def _is_part(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _export_full(weights: Path, asked: argparse.Namespace) -> int:
    from torch import nn

    from simpletuner.core.tensors import header
    from simpletuner.models.single_file import write_single_file

    facts = {k: v for k, v in header(_file(weights)).items() if k != "format"}
    family = _family(weights, asked, facts)
    if weights.name != family.denoiser:
        raise ConfigError(
            f"{weights} is not the {family.denoiser} of {family.title}",
            fix="set --model_family to the family it was trained as",
        )
    denoiser, dtype = _denoiser(weights, asked.dtype)
    place = weights.parent
    if asked.to == "diffusers":
        target = Path(asked.output or place / "pipeline")
        _write_pipeline(target, family, denoiser, dtype, only=asked.parts == "denoiser")
        print(target)
        return 0
    modules: dict[str, nn.Module] = {family.denoiser: denoiser}
    if asked.parts == "all":
        others = _others(family, dtype)
        modules |= {name: part for name, part in others.items() if isinstance(part, nn.Module)}
    name = "model" if asked.parts == "all" else family.denoiser
    target = Path(asked.output or place / f"{name}.{asked.to}.safetensors")
    count = write_single_file(target, family, modules, dtype, facts)
    print(f"{target}\nverified: {count} tensors")
    return 0


def _file(weights: Path) -> Path:
    found = sorted(weights.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{weights} holds no .safetensors file", fix="name another folder")
    return found[0]


def _denoiser(weights: Path, named: str | None) -> tuple[nn.Module, torch.dtype]:
    """The trained denoiser, in the dtype that is asked for or the one it is held in."""
    import diffusers
    import torch

    from simpletuner.core.tensors import dtype_of

    dtype: torch.dtype = getattr(torch, _DTYPES[named]) if named else dtype_of(_file(weights))
    cls = getattr(diffusers, read_json(weights / "config.json")["_class_name"])
    return cls.from_pretrained(weights, dtype=dtype, local_files_only=True), dtype


def _family(weights: Path, asked: argparse.Namespace, facts: Mapping[str, str]) -> Family:
    """The family of the run with its base model, which resolved_config.json names."""
    from simpletuner.models.loading import open_family
    from simpletuner.models.settings import ModelSettings

    told: dict[str, Any] = {}
    for folder in (weights.parent, weights.parent.parent):
        if (folder / "resolved_config.json").is_file():
            told = read_json(folder / "resolved_config.json")["settings"]
            break
    settings = {k: told[k] for k in ModelSettings.model_fields if told.get(k) is not None}
    if asked.base:
        settings["pretrained_model_name_or_path"] = asked.base
        settings = {k: v for k, v in settings.items() if k not in ("revision", "model_flavour")}
    if not told or asked.model_family:
        settings["model_family"] = family_name(asked.model_family, facts, weights)
    if "pretrained_model_name_or_path" not in settings:
        raise ConfigError(
            f"{weights.parent} does not say which model was trained: it has no"
            " resolved_config.json",
            fix="name the base model with --base",
        )
    return open_family(ModelSettings(**settings))


def _others(family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The parts that did not train, tokenizers too, on the CPU."""
    import torch

    from simpletuner.core.types import Place

    place = Place(torch.device("cpu"), dtype)
    components = family.open_text(place).components
    found = {name: part for name, part in components.items() if part is not None}
    return {**found, "vae": family.open_vae(place.device, dtype)}


def _write_pipeline(
    target: Path, family: Family, denoiser: nn.Module, dtype: torch.dtype, *, only: bool
) -> None:
    """A folder in diffusers' layout, whole or not at all."""
    import diffusers

    partial = target.with_name(f"{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    if only:
        denoiser.save_pretrained(partial)  # type: ignore[operator]
    else:
        own = {family.denoiser: denoiser, "scheduler": family.scheduler()}
        parts = _others(family, dtype) | own
        cls = getattr(diffusers, family.checkpoint.index["_class_name"])
        cls(**{**family.pipeline_options, **_absent(family, parts), **parts}).save_pretrained(
            partial
        )
    publish_folder(partial, target)


def _absent(family: Family, parts: Mapping[str, Any]) -> dict[str, None]:
    """The text encoders that this checkpoint does not have."""
    return dict.fromkeys(part for part in family.text_parts if part not in parts)
