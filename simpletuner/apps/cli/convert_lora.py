"""``simpletuner convert-lora``: an adapter in another tool's layout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.core.errors import ConfigError, ModelError, did_you_mean
from simpletuner.models.families import FAMILIES

if TYPE_CHECKING:
    from simpletuner.models.family import Family

LAYOUTS = ("diffusers", "kohya", "comfyui")
_EPILOG = """\
example:
  simpletuner convert-lora my_lora.safetensors --to comfyui --model_family sd3

layouts:
  diffusers  what train writes: pipe.load_lora_weights(…), or the library of LyCORIS
  comfyui    the names of the model's original release, each with its alpha, as ComfyUI takes them
  kohya      the same names made flat, as kohya's scripts, A1111 and Forge take them

A LoRA, DoRA or LyCORIS of the denoiser in any of the three is read; its change of each weight stays
the same.
"""


def run(arguments: Sequence[str]) -> int:
    """Convert the file that `arguments` name."""
    from simpletuner.adapters.export import lora_file

    parser = argparse.ArgumentParser(
        prog="simpletuner convert-lora",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="LORA", help="the .safetensors file")
    add_options(parser)
    asked = parser.parse_args(arguments)
    return convert(lora_file(asked.source), asked.to, asked.output, asked.model_family)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both commands that convert are told."""
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--output", metavar="FILE", help="where to; without it, beside, with the layout in its name"
    )
    parser.add_argument(
        "--model_family", metavar="NAME", help="without it, what the file itself says"
    )


def convert(source: Path, layout: str, output: str | None, family: str | None) -> int:
    """Write the adapter in `source` in another layout, and compare what reads back."""
    from safetensors import SafetensorError

    from simpletuner.adapters.export import BESIDE
    from simpletuner.adapters.lycoris_names import is_lycoris
    from simpletuner.core.tensors import header, names_in

    if not source.is_file():
        raise ConfigError(f"{source} does not exist", fix="correct the path")
    target = Path(output or source.with_name(f"{source.stem}.{layout}.safetensors"))
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the file itself", fix="name another --output")
    try:
        told, names = header(source), names_in(source)
    except SafetensorError as error:
        raise ModelError(
            f"{source.name} cannot be read: {error}", fix="copy or download it again"
        ) from error
    if beside := told.get(BESIDE):
        raise ConfigError(
            f"{source.name} is half of what was trained: the rest is in {beside}, as a whole and"
            " not as a change",
            fix="start the run again with lora_format comfyui: also when it is finished it writes a"
            " file with both",
        )
    facts = {
        key: value
        for key, value in told.items()
        if key not in ("format", "lora_adapter_metadata") and not key.startswith("ss_network_")
    }
    cls: type[Family] = FAMILIES[family_name(family, facts, source)].load()  # type: ignore[assignment]
    write = _lycoris if is_lycoris(names) else _lora
    same, wanted = write(source, target, layout, cls, facts)
    if same < wanted:
        raise ModelError(
            f"{target} was written, but {wanted - same} of {wanted} modules read back another"
            " change",
            fix="keep the file you have, and report this",
        )
    print(f"{target}\nverified: {same} of {wanted} modules")
    return 0


def _lora(
    source: Path, target: Path, layout: str, family: type[Family], facts: Mapping[str, str]
) -> tuple[int, int]:
    """How many modules read back the same change, and how many there are."""
    import torch

    from simpletuner.adapters.formats import read_changes, write_changes

    changes = read_changes(source, family)
    write_changes(target, changes, layout, family, facts)
    same = sum(
        torch.allclose(kept.delta(), changes[name].delta(), rtol=1e-4, atol=1e-6)
        and (kept.magnitude is None) == (changes[name].magnitude is None)
        for name, kept in read_changes(target, family).items()
    )
    return same, len(changes)


def _lycoris(
    source: Path, target: Path, layout: str, family: type[Family], facts: Mapping[str, str]
) -> tuple[int, int]:
    """The same for LyCORIS, whose numbers stay as they are."""
    import torch

    from simpletuner.adapters.lycoris_names import to_layout, to_library
    from simpletuner.core.tensors import read_tensors, write_tensors

    ours = to_library(read_tensors(source), family)
    write_tensors(target, to_layout(ours, layout, family), {"format": "pt", **facts})
    back = to_library(read_tensors(target), family)
    wrong = {
        name.partition(".")[0]
        for name, tensor in ours.items()
        if name not in back or not torch.equal(back[name], tensor)
    }
    modules = {name.partition(".")[0] for name in ours}
    return len(modules - wrong), len(modules)


def family_name(named: str | None, facts: Mapping[str, str], source: Path) -> str:
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
