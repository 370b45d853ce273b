"""The run as a whole: its folder, its randomness, its processes."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from simpletuner.core.section import Section, setting


class RuntimeSettings(Section):
    """Where a run leaves its files, and what it runs on."""

    output_dir: Path = setting(Path("simpletuner-results"), path=True)
    """The folder for the trained weights, checkpoints, validation pictures and logs."""

    seed: int = setting(42, ge=0, le=2**31 - 1)
    """Decides every random choice; the same seed on the same data gives the same run."""

    num_processes: int = setting(1, ge=1, unit="processes")
    """How many processes train together, one for each device."""

    num_machines: int = setting(1, pending=True, ge=1, unit="machines")
    """How many machines train together."""

    machine_rank: int = setting(0, pending=True, ge=0)
    """Which of the machines this is, counted from 0."""

    main_process_ip: str = setting("127.0.0.1", pending=True)
    """The address of the machine with rank 0."""

    main_process_port: int = setting(29500, pending=True, ge=1, le=65535)
    """The port of the machine with rank 0."""

    accelerate_config: Path | None = setting(None, pending=True, path=True)
    """A settings file of accelerate that says how processes are started."""

    accelerate_extra_args: str | None = setting(None, pending=True)
    """More arguments for accelerate's launcher."""

    torch_num_threads: int | None = setting(None, pending=True, ge=1, unit="threads")
    """Threads that torch computes with on the CPU; without it, torch's own choice."""

    @field_validator("num_processes")
    @classmethod
    def _one_process(cls, value: int) -> int:
        if value > 1:
            raise ValueError(
                f"training in several processes is not built yet; set num_processes to 1 and"
                f" multiply gradient_accumulation_steps by {value} for the same effective batch"
            )
        return value
