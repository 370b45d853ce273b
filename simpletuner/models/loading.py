"""From what the user named (hub id, folder, file, flavour) to a checkpoint on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.files import read_json
from simpletuner.models.checkpoint import CONFIGS, Checkpoint
from simpletuner.models.control import PART, net_folder
from simpletuner.models.embedded import embedded_folder
from simpletuner.models.families import FAMILIES
from simpletuner.models.single_file import parts_inside

if TYPE_CHECKING:
    from simpletuner.models.family import Family
    from simpletuner.models.settings import ModelSettings

_WEIGHTS = (".safetensors",)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_OTHER_USES = "(Img2Img|Inpaint|ControlNet)*"
"""In a pipeline's name: the same model, used for something else."""


def open_family(settings: ModelSettings, *, digests: Path | None = None) -> Family:
    """The family of `settings` with its checkpoint, fetched if it is on the hub.

    Args:
        settings: What the user named.
        digests: See Checkpoint.

    Raises:
        ModelError: Not found, gated, offline, or of another layout; each says so.
        ConfigError: A flavour the family does not have, or an option the checkpoint cannot follow.
    """
    cls: type[Family] = FAMILIES[settings.model_family].load()  # type: ignore[assignment]
    flavour = settings.model_flavour or next(iter(cls.flavours))
    if flavour not in cls.flavours:
        raise ConfigError(
            f"{cls.name} has no flavour {flavour!r}; it has {', '.join(cls.flavours)}"
        )
    name = settings.pretrained_model_name_or_path or cls.flavours[flavour].repo
    checkpoint = _resolve(name, cls, settings, digests)
    _check_class(checkpoint, cls)
    _check_weights(checkpoint)
    family = cls(checkpoint, settings.model_dump())
    _check_options(family, settings)
    return family


def _resolve(
    name: str, cls: type[Family], settings: ModelSettings, digests: Path | None
) -> Checkpoint:
    embedded = embedded_folder(name)
    path = embedded or Path(name).expanduser()
    vae = None
    if settings.pretrained_vae_model_name_or_path:
        vae = _vae_folder(settings.pretrained_vae_model_name_or_path)
    rest = {"variant": settings.variant, "vae": vae, "digests": digests}
    if path.exists() and settings.revision:
        raise ConfigError(
            f"revision: {settings.revision} is asked of {path.name}, which is on this machine",
            fix="remove it; only models of the hub have revisions",
        )
    if path.is_file():
        return _one_file(path, cls, settings, rest)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{name} is a folder without model_index.json",
                fix="name a folder in diffusers layout, or the .safetensors file itself",
            )
        return Checkpoint(name if embedded else path.resolve().name, path, **rest)  # type: ignore[arg-type]
    if _looks_like_path(name):
        raise ModelError(
            f"pretrained_model_name_or_path: {name} does not exist on this machine",
            fix="correct the path, or name a model of the hub as owner/name",
        )
    folder = fetch(name, settings.revision, settings.variant, cls.pipeline_options)
    return Checkpoint(name, folder, revision=settings.revision, **rest)  # type: ignore[arg-type]


def is_local(name: str) -> bool:
    """True if `name` means a place on this machine, there or not, and not a model of the hub."""
    return Path(name).expanduser().exists() or _looks_like_path(name)


def _one_file(
    path: Path, cls: type[Family], settings: ModelSettings, rest: Mapping[str, Any]
) -> Checkpoint:
    """A single file, and what it lacks from the flavour that the user or else the file names."""
    names = _names(path)
    inside = parts_inside(names, cls.single_file)
    _check_file(path, names, inside, cls, vae_elsewhere=rest["vae"] is not None)
    repo = cls.flavours[settings.model_flavour or cls.flavour_of(names)].repo
    folder = _configs(repo, path.name)
    if cls.whole_in_one_file:
        return Checkpoint(path.name, folder, file=path, **rest)
    if not cls.single_file.keys() <= inside:
        held: dict[str, Any] = dict.fromkeys(inside)
        fetch(repo, None, None, {**cls.pipeline_options, **held})
    return Checkpoint(path.name, folder, file=path, inside=inside, **rest)


def _looks_like_path(name: str) -> bool:
    return name.count("/") != 1 or name[0] in "./~" or Path(name).suffix in _WEIGHTS + _PICKLES


def _names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; reads its header only."""
    if path.suffix in _PICKLES:
        raise ModelError(
            f"{path.name} is a pickle, which can run code when it is opened",
            fix="convert it to .safetensors, or take the model's safetensors release",
        )
    if path.suffix not in _WEIGHTS:
        raise ModelError(
            f"{path.name} is not a .safetensors file",
            fix="name a .safetensors file, a folder in diffusers layout, or a model of the hub",
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path.name} cannot be read: {error}", fix="download it again: it may be incomplete"
        ) from error


def _check_file(
    path: Path,
    names: Collection[str],
    inside: Collection[str],
    cls: type[Family],
    *,
    vae_elsewhere: bool,
) -> None:
    """Refuse what is not a model, or lacks parts that files of the family have."""
    kinds = {"denoiser": {cls.denoiser}}
    if cls.whole_in_one_file:
        kinds |= {} if vae_elsewhere else {"VAE": {"vae"}}
        kinds |= {"text encoder": set(cls.text_parts)}
    missing = [what for what, parts in kinds.items() if not parts & set(inside)]
    if missing and any("lora" in name for name in names):
        raise ModelError(
            f"{path.name} is a LoRA, not a model",
            fix="name the model it was made for here, and the LoRA in init_lora",
        )
    if missing:
        raise ModelError(
            f"{path.name} is not a whole model: it has no {', no '.join(missing)}",
            fix="name a checkpoint that has them all, or the folder if this is a part of one"
            " (a VAE has its own setting, pretrained_vae_model_name_or_path)",
        )


def _configs(repo: str, label: str) -> Path:
    """A folder with the configs and tokenizers (no weights) of `repo`, for a single file."""
    from huggingface_hub import snapshot_download

    try:
        index = read_json(Path(_first_file(repo, None)))
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        wanted = [f"{part}/*{suffix}" for part in parts for suffix in CONFIGS]
        return Path(
            _ask_hub(
                repo,
                None,
                lambda: snapshot_download(repo, allow_patterns=["model_index.json", *wanted]),
            )
        )
    except ModelError as error:
        raise ModelError(
            f"{label} needs the configs and tokenizers of {repo}: {error.message}", fix=error.fix
        ) from error


def _vae_folder(name: str) -> Path:
    return _folder_of_part("pretrained_vae_model_name_or_path", name, "a VAE", ("vae/*",))


def controlnet_folder(name: str) -> Path:
    """The folder with the ControlNet that `name` means, fetched if it is on the hub.

    Raises:
        ModelError: Not found, or of another layout.
    """
    key = "controlnet_model_name_or_path"
    folder = _folder_of_part(key, name, "a ControlNet", (f"{PART}/*",))
    found = net_folder(str(folder))
    if found is None:
        raise ModelError(
            f"{key}: {name} has no config.json",
            fix="name a folder in diffusers layout: config.json beside the .safetensors file",
        )
    return found


def _folder_of_part(key: str, name: str, what: str, inside: tuple[str, ...]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{key}: {path.name} is a file",
            fix=f"name a folder in diffusers layout, or {what} of the hub as owner/name",
        )
    if _looks_like_path(name):
        raise ModelError(f"{key}: {name} does not exist")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", *inside]
    return Path(_ask_hub(name, None, lambda: snapshot_download(name, allow_patterns=patterns)))


def fetch(
    repo: str,
    revision: str | None,
    variant: str | None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """The snapshot folder of a hub model, downloading what its pipeline needs and no more.

    Args:
        options: What the pipeline's constructor is told; parts that are None are not needed.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are huggingface_hub's and mean what they mean
    there.

    Raises:
        ModelError: Gated, missing or unreachable; each says so.
    """
    _first_file(repo, revision)
    from diffusers import DiffusionPipeline

    return Path(
        _ask_hub(
            repo,
            revision,
            lambda: DiffusionPipeline.download(repo, revision=revision, variant=variant, **options),
        )
    )


def _first_file(repo: str, revision: str | None) -> str:
    """Ask for the smallest file first: the hub's answer about it is the clear one."""
    from huggingface_hub import hf_hub_download

    return _ask_hub(
        repo, revision, lambda: hf_hub_download(repo, "model_index.json", revision=revision)
    )


def _ask_hub(repo: str, revision: str | None, call: Any) -> str:
    from huggingface_hub import errors

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        return str(call())
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its owner wants your name before you may download it",
            fix=f"accept its terms at {endpoint}/{repo}, then run: hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}", fix="correct revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo} does not exist at {endpoint}, or it is private and you are not logged in",
            fix="check the spelling; for a private model run: hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo} is not on this machine and {endpoint} cannot be reached",
            fix="check the network or HF_ENDPOINT (and that HF_HUB_OFFLINE is not set),"
            " or name a local folder",
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"{repo} is not in diffusers layout: {error}",
            fix="name a repository that has a model_index.json, or a downloaded .safetensors file",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{repo} cannot be fetched from {endpoint}: {error}") from error


def _check_options(family: Family, settings: ModelSettings) -> None:
    for key in family.idle_settings:
        if dict(settings)[key] != type(settings).model_fields[key].default:
            raise ConfigError(
                f"{key}: {family.checkpoint.label} has no use for it, so it changes nothing",
                fix="remove it, or name another checkpoint",
            )
    if settings.rescale_betas_zero_snr and family.prediction_type == "epsilon":
        raise ConfigError(
            f"rescale_betas_zero_snr: {family.checkpoint.label} predicts the noise, which says"
            " nothing of the picture where there is nothing but noise",
            fix="remove it, or train with prediction_type v_prediction",
        )


def _check_class(checkpoint: Checkpoint, cls: type[Family]) -> None:
    found = str(checkpoint.index.get("_class_name", ""))
    wanted = cls.pipeline.removesuffix("Pipeline")
    if not re.fullmatch(rf"{wanted}{_OTHER_USES}Pipeline", found):
        raise ModelError(
            f"{checkpoint.label} is a {found}, not a model of the family {cls.name}",
            fix="set model_family to the checkpoint's family, or name another checkpoint",
        )


def _check_weights(checkpoint: Checkpoint) -> None:
    found, wanted = checkpoint.variants(), checkpoint.variant
    if checkpoint.file is not None or wanted in found:
        return
    kinds = ", ".join(sorted(kind or "plain ones" for kind in found))
    if None in found:
        fix = "remove variant"
    elif found:
        fix = f"set variant to {' or '.join(sorted(str(kind) for kind in found))}"
    else:
        fix = "take a release of the model that has .safetensors files"
    raise ModelError(
        f"{checkpoint.label} has no {wanted or 'plain'} .safetensors weights, only {kinds}"
        if found
        else f"{checkpoint.label} has no .safetensors weights",
        fix=fix,
    )
