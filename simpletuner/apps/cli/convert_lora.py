"""``simpletuner convert-lora`` and ``simpletuner export``: a LoRA in another tool's layout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpletuner.core.errors import ConfigError, ModelError, did_you_mean
from simpletuner.models.families import FAMILIES

_LAYOUTS = ("diffusers", "kohya", "comfyui")
_EPILOG = """\
layouts:
  diffusers  what train writes: pipe.load_lora_weights(…)
  comfyui    the names of the model's original release, each with its alpha, as ComfyUI takes them
  kohya      the same names made flat, as kohya's scripts, A1111 and Forge take them

A LoRA of the denoiser in any of the three is read; its change of each weight stays the same.
"""
_EXAMPLES = {
    "convert-lora": "simpletuner convert-lora my_lora.safetensors --to comfyui --model_family sd3",
    "export": "simpletuner export output/checkpoint-500 --to comfyui",
}


def run(arguments: Sequence[str]) -> int:
    """Convert the file that `arguments` name."""
    parser = _parser("convert-lora", "LORA", "the .safetensors file")
    return _convert(parser.parse_args(arguments))


def run_export(arguments: Sequence[str]) -> int:
    """Convert the LoRA of a run or a checkpoint."""
    parser = _parser("export", "FOLDER", "a run's output folder, or one of its checkpoints")
    return _convert(parser.parse_args(arguments))


def _parser(command: str, name: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"simpletuner {command}",
        epilog=f"example:\n  {_EXAMPLES[command]}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar=name, help=what)
    parser.add_argument("--to", required=True, choices=_LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--output", metavar="FILE", help="where to; without it, beside, with the layout in its name"
    )
    parser.add_argument(
        "--model_family", metavar="NAME", help="without it, what the file itself says"
    )
    return parser


def _convert(asked: argparse.Namespace) -> int:
    import torch

    from simpletuner.adapters.export import lora_file
    from simpletuner.adapters.formats import read_changes, write_changes
    from simpletuner.core.tensors import header

    source = lora_file(asked.source)
    if not source.is_file():
        raise ConfigError(f"{source} does not exist", fix="correct the path")
    target = Path(asked.output or source.with_name(f"{source.stem}.{asked.to}.safetensors"))
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the file itself", fix="name another --output")
    facts = {
        key: value
        for key, value in header(source).items()
        if key not in ("format", "lora_adapter_metadata") and not key.startswith("ss_network_")
    }
    family = FAMILIES[_family_name(asked.model_family, facts, source)].load()
    changes = read_changes(source, family)  # type: ignore[arg-type]
    write_changes(target, changes, asked.to, family, facts)  # type: ignore[arg-type]
    same = sum(
        torch.allclose(kept.delta(), changes[name].delta(), rtol=1e-4, atol=1e-6)
        for name, kept in read_changes(target, family).items()  # type: ignore[arg-type]
    )
    if same < len(changes):
        raise ModelError(
            f"{target} was written, but {len(changes) - same} of {len(changes)} modules read back"
            " another change",
            fix="keep the file you have, and report this",
        )
    print(f"{target}\nverified: {same} of {len(changes)} modules")
    return 0


def _family_name(named: str | None, facts: Mapping[str, str], source: Path) -> str:
    """The family the user names, else the one that the file's header does."""
    if named is not None:
        if named not in FAMILIES:
            raise ConfigError(f"no family is called {named!r}{did_you_mean(named, FAMILIES)}")
        return named
    architecture = facts.get("modelspec.architecture", "").partition("/")[0]
    for name, row in FAMILIES.items():
        if architecture and row.fact("architecture") == architecture:
            return name
    raise ConfigError(
        f"{source.name} does not say which model it was made for",
        fix=f"add --model_family, one of {', '.join(FAMILIES)}",
    )
