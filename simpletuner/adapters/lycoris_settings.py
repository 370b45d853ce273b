"""What a lycoris_config holds, as SimpleTuner's documents write it."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from simpletuner.core.section import Section, setting

ALGORITHMS = ("lora", "locon", "loha", "lokr", "glora", "full", "diag-oft", "boft")

_REFUSED = {
    "dylora": "draws ranks at random, and its file does not hold what was trained",
    "ia3": "writes files that the library itself cannot read back",
    "tlora": "needs to be told the noise of every step, which is not built",
    "oft": "is called diag-oft",
}


class LycorisPreset(Section):
    """Which modules get an adapter, and which of them another one."""

    target_module: tuple[str, ...] | None = setting(None, min_length=1)
    """Classes of modules; every linear layer and convolution inside gets an adapter."""

    target_name: tuple[str, ...] | None = setting(None, min_length=1)
    """Modules by their names, as regular expressions from the beginning of the name."""

    exclude_name: tuple[str, ...] | None = setting(None, min_length=1)
    """Modules that are left out, likewise."""

    module_algo_map: dict[str, dict[str, Any]] | None = setting(None)
    """Options of their own, by class."""

    name_algo_map: dict[str, dict[str, Any]] | None = setting(None)
    """Options of their own, by name."""

    use_fnmatch: bool | None = setting(None)
    """Names are patterns as of a shell, such as ``*to_q``."""

    enable_conv: bool = setting(True)
    """Convolutions larger than 1x1 get an adapter too."""


class LycorisConfig(Section):
    """The algorithm and its options; what is not said is the library's own default."""

    algo: str = setting()
    """The algorithm: lora, locon, loha, lokr, glora, full, diag-oft or boft."""

    multiplier: float = setting(1.0)
    """Only 1: programs that load the file apply it once."""

    linear_dim: int = setting(4, ge=1)
    """The width of the adapter; lokr: 10000 for whole matrices instead of two factors."""

    linear_alpha: float = setting(1.0, gt=0)
    """Its strength is linear_alpha / linear_dim."""

    conv_dim: int | None = setting(None, ge=1)
    """The same for convolutions larger than 1x1."""

    conv_alpha: float | None = setting(None, gt=0)
    """The same for convolutions larger than 1x1."""

    factor: int | None = setting(None)
    """lokr: the size of the first factor; larger is a smaller adapter; -1 splits evenly."""

    dropout: float | None = setting(None, ge=0, lt=1)
    """The share of the adapter's outputs that is dropped in each step."""

    rank_dropout: float | None = setting(None, ge=0, lt=1)
    """The share of the adapter's ranks, or rows, that is dropped in each step."""

    module_dropout: float | None = setting(None, ge=0, lt=1)
    """The share of the modules whose adapters are left out in each step."""

    full_matrix: bool | None = setting(None)
    """lokr: the second factor is a whole matrix."""

    decompose_both: bool | None = setting(None)
    """lokr: the first factor is a product of two as well."""

    unbalanced_factorization: bool | None = setting(None)
    """lokr: the larger side goes to the other factor."""

    use_tucker: bool | None = setting(None)
    """Convolutions are decomposed by their kernels too."""

    use_scalar: bool | None = setting(None)
    """A trained number scales each adapter, from 0 on."""

    dora_wd: bool | None = setting(None)
    """Train magnitude and direction apart (DoRA)."""

    wd_on_output: bool | None = setting(None)
    """DoRA by the rows of the weight instead of its columns."""

    train_norm: bool | None = setting(None)
    """The scales and biases of norms train too."""

    block_size: int | None = setting(None, ge=1)
    """The oft kinds: the size of a block."""

    constraint: float | None = setting(None, ge=0)
    """The oft kinds: how far a block may turn; 0 is free."""

    rescaled: bool | None = setting(None)
    """The oft kinds: a trained scale beside each turn."""

    bypass_mode: bool | None = setting(None)
    """Add the adapter's output to the module's, instead of its change to the weight."""

    apply_preset: LycorisPreset = setting(LycorisPreset())
    """Which modules; without it, those around the family's usual LoRA targets."""

    @field_validator("algo")
    @classmethod
    def _is_one_of_ours(cls, value: str) -> str:
        if value in ALGORITHMS:
            return value
        why = f" {_REFUSED[value]}; it" if value in _REFUSED else ""
        raise ValueError(f"{value!r}{why} is none of {', '.join(ALGORITHMS)}")

    @field_validator("multiplier")
    @classmethod
    def _is_one(cls, value: float) -> float:
        if value != 1:
            raise ValueError("must be 1, which is what loads the file; change linear_alpha instead")
        return value
