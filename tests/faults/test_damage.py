"""Damaged files, signals in the wrong moment, and two runs that share a cache."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from simpletuner.core.errors import RESUME
from simpletuner.training.checkpoint import DamagedCheckpoint, verify
from tests.faults.forks import (
    assert_whole,
    encoded_at_start,
    leavings,
    newest_step,
    sealed_keys,
)
from tests.faults.small import CAPTIONS, LATENTS, Small, SmallRun

FILES = (
    "pytorch_lora_weights.safetensors",
    "trainable.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


def test_a_checkpoint_cut_short_in_any_file_does_not_verify(small: Small) -> None:
    folder = small.copy().out / "checkpoint-4"
    verify(folder)
    for name in FILES:
        data = (folder / name).read_bytes()
        for left in (0, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:left])
            if not (name == "manifest.json" and left == len(data) - 1):  # its final newline
                with pytest.raises(DamagedCheckpoint, match=f"checkpoint-4/{name}"):
                    verify(folder)
        (folder / name).unlink()
        with pytest.raises(DamagedCheckpoint, match=name):
            verify(folder)
        (folder / name).write_bytes(data)
    verify(folder)


def test_a_damaged_checkpoint_is_passed_over_and_made_again(small: Small) -> None:
    run = small.fresh()
    keep = {"checkpoints_total_limit": 0}
    assert small.forks.train(run, **keep).code == 0
    whole = {name: (run.out / "checkpoint-4" / name).read_bytes() for name in FILES}
    for name in ("optimizer.safetensors", "manifest.json"):
        (run.out / "checkpoint-4" / name).write_bytes(whole[name][:100])
        ended = small.forks.train(run, **keep)
        assert ended.code == 0, ended.output
        assert f"checkpoint-4/{name}" in ended.output
        assert "trying the one before" in ended.output
        assert {each: (run.out / "checkpoint-4" / each).read_bytes() for each in FILES} == whole
        assert run.weights == small.straight.weights


def test_a_damaged_checkpoint_that_was_asked_for_exits_7_and_names_the_others(
    small: Small,
) -> None:
    run = small.copy()
    (run.out / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    ended = small.forks.train(run, resume_from_checkpoint="checkpoint-4")
    assert ended.code == 7
    assert "checkpoint-4/optimizer.safetensors is damaged" in ended.output
    assert "resume_from_checkpoint=latest" in ended.output
    ended = small.forks.train(run)  # the only one: nothing is started over unasked
    assert ended.code == 7
    assert "resume_from_checkpoint=none starts over" in ended.output


def flip_a_byte(pack: Path) -> str:
    """Change one byte in the middle of an entry; the entry's key."""
    with safe_open(pack, "pt") as opened:
        key = sorted(name for name in opened.keys() if "." in name)[0].split(".")[0]
    data = bytearray(pack.read_bytes())
    header = json.loads(data[8 : int.from_bytes(data[:8], "little") + 8])
    begin, end = next(v["data_offsets"] for k, v in header.items() if k.startswith(key))
    data[(1 << 20) + (begin + end) // 2] ^= 4
    pack.write_bytes(data)
    return key


@pytest.mark.parametrize(
    ("kind", "stage", "named"),
    [("text", "text embeddings", "the caption '"), ("vae", "latents", "the latents of ")],
)
def test_a_flipped_byte_in_a_pack_is_named_and_that_entry_alone_encoded_again(
    small: Small, kind: str, stage: str, named: str
) -> None:
    run = small.copy()
    pack = sorted((run.out / "cache" / kind).rglob("*.safetensors"))[0]
    key = flip_a_byte(pack)
    for left in run.out.glob("checkpoint-*"):
        shutil.rmtree(left)  # so that all there is to do meets the entry
    codes = []
    for _ in range(3):
        lines = len(run.events())
        ended = small.forks.train(run)
        codes.append(ended.code)
        told = run.events()[lines:]
        if ended.code == 4:
            assert f"{pack} is damaged at entry {key}" in ended.output
            assert named in ended.output
            assert "start again: it is encoded again" in ended.output
        elif len(codes) == 2:
            assert encoded_at_start(told, stage) == 1
            assert f"{pack} was found damaged at {key}" in ended.output
        else:
            assert encoded_at_start(told, stage) == 0
            assert "damaged" not in ended.output
    assert codes == [4, 0, 0]
    assert run.weights == small.straight.weights


def stopped(
    small: Small, run: SmallRun, *signals: int, what: str, only: str, at: int = 1
) -> tuple[int, str]:
    """The exit code and the words of a run that gets these signals at a point."""
    plan = {"act": "signals", "signals": signals, "what": what, "only": only, "at": at}
    ended = small.forks.train(run, plan)
    assert_whole(run.out)
    return ended.code, ended.output


def test_a_signal_while_caching_keeps_what_was_encoded_by_then(small: Small) -> None:
    run = small.fresh()
    code, output = stopped(small, run, signal.SIGTERM, what="create", only="cache/text")
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in output
    assert "start it again with the same command: it does what is missing" in output
    text = len(sealed_keys(run.out / "cache" / "text"))
    assert 1 <= text < CAPTIONS  # what was handed over by then
    lines = len(run.events())
    code, output = stopped(small, run, signal.SIGTERM, what="fsync", only="cache/text")
    assert code == 128 + signal.SIGTERM
    assert encoded_at_start(run.events()[lines:], "text embeddings") == CAPTIONS - text
    assert len(sealed_keys(run.out / "cache" / "text")) == CAPTIONS
    code, output = stopped(small, run, signal.SIGINT, what="create", only="cache/vae")
    assert code == 128 + signal.SIGINT
    latents = len(sealed_keys(run.out / "cache" / "vae"))
    assert latents >= 1
    lines = len(run.events())
    assert small.forks.train(run).code == 0
    assert encoded_at_start(run.events()[lines:], "latents") == LATENTS - latents
    assert run.weights == small.straight.weights


def test_a_signal_in_the_loop_saves_and_a_second_one_ends_at_once(small: Small) -> None:
    run = small.fresh()
    code, output = stopped(small, run, signal.SIGTERM, what="fsync", only="step_3_validation")
    assert code == 128 + signal.SIGTERM
    assert "after step 3 of 4; it is saved" in output
    assert newest_step(run.out) == 3
    # the next start: a second signal while checkpoint-4 is being written
    twice = {"what": "half", "only": "checkpoint-4.partial/.optimizer"}
    for number in (signal.SIGTERM, signal.SIGINT):
        code, output = stopped(small, run, signal.SIGTERM, number, **twice)
        assert code == 128 + number
        assert not (run.out / "checkpoint-4").exists()
        assert newest_step(run.out) == 3
    # and one while the result is being written
    result = {"what": "half", "only": ".pytorch_lora_weights", "at": 2}
    code, output = stopped(small, run, signal.SIGINT, **result)
    assert code == 128 + signal.SIGINT
    assert newest_step(run.out) == 4
    assert small.forks.train(run).code == 0
    assert run.weights == small.straight.weights
    assert leavings(run.out) == []


def test_a_run_that_starts_over_comes_to_its_result_as_a_signal_there_advises(
    small: Small,
) -> None:
    run, result = small.fresh(), "staging/pytorch_lora_weights.safetensors"
    plan = {"act": "signals", "signals": [signal.SIGINT], "what": "half", "path": result, "at": 1}
    ended = small.forks.train(run, plan, resume_from_checkpoint="none")
    assert ended.code == 128 + signal.SIGINT, ended.output
    assert f"\n  start it again; {RESUME}\n" in ended.output
    steps = len(run.events("step"))
    ended = small.forks.train(run, resume_from_checkpoint="latest")
    assert ended.code == 0, ended.output
    assert len(run.events("step")) == steps
    assert not list(run.out.glob("previous-*"))
    assert run.weights == small.straight.weights


@pytest.mark.parametrize(
    ("what", "path", "captions", "latents"),
    [
        ("fsync", "cache/text/FAMILY/PACK.partial", CAPTIONS, LATENTS),
        ("mkdir", "cache/text/FAMILY/PACK.parquet", 0, LATENTS),
        ("fsync", "cache/vae/FAMILY/two/PACK.partial", 0, LATENTS),
        ("mkdir", "cache/vae/FAMILY/two/PACK.parquet", 0, LATENTS // 2),
    ],
    ids=["unsealed-text", "text-without-part", "unsealed-latents", "latents-without-part"],
)
def test_two_runs_fill_one_cache_at_the_same_time(
    small: Small, what: str, path: str, captions: int, latents: int, tmp_path: Path
) -> None:
    """One waits with a pack of its own not yet sealed, or not yet in the index; the other passes.

    Args:
        captions: Those the other one has to encode; it uses a sealed pack without a part.
        latents: The same of latents.
    """
    run, other = small.fresh(), small.fresh()
    shared = tmp_path / "shared"
    plan = {"what": what, "path": path.removeprefix("cache/"), "at": 1}
    gate = tmp_path / "gate"
    holding = small.forks.hold(run, gate, plan, root=shared, cache_dir=str(shared))
    ended = small.forks.train(other, cache_dir=str(shared))
    assert ended.code == 0, ended.output
    assert other.encoded() == captions + latents
    gate.touch()
    held = holding.wait()
    assert held.code == 0, held.output
    assert [each.weights == small.straight.weights for each in (run, other)] == [True, True]
    assert_whole(shared)
    assert not list(shared.rglob("*.partial"))
    assert len(sealed_keys(shared)) == LATENTS + CAPTIONS
    assert {p.stem for p in shared.rglob("*.parquet")} - {"one", "two"} == {
        p.stem for p in shared.rglob("*.safetensors")
    }
    third = small.fresh()
    assert small.forks.train(third, cache_dir=str(shared)).code == 0
    assert third.encoded() == 0
    assert third.weights == small.straight.weights
