from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from PIL import Image

from simpletuner.core.events import Bus, Event, Notice, Stage
from simpletuner.core.files import content_digest
from simpletuner.data import index as index_module
from simpletuner.data import looking
from simpletuner.data.columns import COLUMNS
from simpletuner.data.index import Index
from simpletuner.data.looking import UNSURE
from simpletuner.data.storage.base import FileFacts
from simpletuner.data.storage.local import LocalStorage
from tests.hearing import Heard


class Counted(LocalStorage):
    """A folder that counts what is read from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, key: str) -> bytes:
        self.reads[key] += 1
        return super().read(key)


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return aged(path)


def aged(path: Path, seconds: float = 3600) -> Path:
    """The file as if it had been written a while ago: younger ones are looked at twice."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def scan(
    folder: Path, file: Path, *, texts: bool = False, workers: int = 2
) -> tuple[pa.Table, Counter[str], list[Event]]:
    storage, heard = Counted(folder), Heard()
    bus = Bus([heard])
    index = Index(file, storage, workers=workers, bus=bus, title="index test")
    table = index.scan(texts=texts)
    bus.close()
    return table, storage.reads, heard.events


def row(table: pa.Table, path: str) -> dict[str, object]:
    return next(found for found in table.to_pylist() if found["path"] == path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("b.png", "red"), ("a/c.jpg", "green"), ("d.webp", "blue")):
        picture(tmp_path / "data" / name, colour)
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "index.parquet"


def test_a_row_holds_what_the_file_is(folder: Path, file: Path) -> None:
    table, _, _ = scan(folder, file)
    assert table.schema.equals(COLUMNS)
    assert table["path"].to_pylist() == ["a/c.jpg", "b.png", "d.webp"]
    found = row(table, "b.png")
    data = (folder / "b.png").read_bytes()
    facts = (folder / "b.png").stat()
    assert found["content"] == bytes.fromhex(content_digest(data))
    assert (found["size"], found["mtime_ns"]) == (facts.st_size, facts.st_mtime_ns)
    assert (found["width"], found["height"]) == (30, 20)
    assert (found["alpha"], found["frames"]) == (False, False)
    assert (found["status"], found["reason"]) == ("ok", None)


def test_a_second_scan_reads_nothing_and_finds_the_same(folder: Path, file: Path) -> None:
    first, reads, _ = scan(folder, file)
    assert set(reads) == {"a/c.jpg", "b.png", "d.webp"}
    written = file.stat().st_mtime_ns
    second, reads, _ = scan(folder, file)
    assert not reads
    assert second.equals(first)
    assert file.stat().st_mtime_ns == written


def test_only_what_changed_is_read_again(folder: Path, file: Path) -> None:
    before, _, _ = scan(folder, file)
    picture(folder / "b.png", "white", (40, 40))
    picture(folder / "new.png")
    (folder / "d.webp").unlink()
    after, reads, _ = scan(folder, file)
    assert set(reads) == {"b.png", "new.png"}
    assert after["path"].to_pylist() == ["a/c.jpg", "b.png", "new.png"]
    assert row(after, "b.png")["width"] == 40
    assert row(after, "a/c.jpg") == row(before, "a/c.jpg")


def test_a_younger_file_of_the_same_size_is_read_again(folder: Path, file: Path) -> None:
    scan(folder, file)
    aged(folder / "b.png", 1800)
    assert set(scan(folder, file)[1]) == {"b.png"}


def test_a_file_written_just_now_is_looked_at_twice(folder: Path, file: Path) -> None:
    now = time.time()
    os.utime(folder / "b.png", (now, now))
    scan(folder, file)
    assert set(scan(folder, file)[1]) == {"b.png"}


def test_rejects_are_remembered_until_the_file_changes(folder: Path, file: Path) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    aged(folder / "bad.png")
    table, _, _ = scan(folder, file)
    assert row(table, "bad.png")["status"] == "reject"
    assert row(table, "bad.png")["reason"] == "not a picture"
    assert not scan(folder, file)[1]
    picture(folder / "bad.png")
    assert row(scan(folder, file)[0], "bad.png")["status"] == "ok"


class Locked(Counted):
    """A folder in which one file may not be read."""

    def read(self, key: str) -> bytes:
        if key == "b.png":
            raise PermissionError(13, "Permission denied")
        return super().read(key)


def test_a_file_that_may_not_be_read_is_tried_again(folder: Path, file: Path) -> None:
    index = Index(file, Locked(folder), workers=1, bus=Bus(), title="t")
    assert row(index.scan(texts=False), "b.png")["reason"] == "cannot be read: Permission denied"
    table, reads, _ = scan(folder, file)
    assert set(reads) == {"b.png"}
    assert row(table, "b.png")["status"] == "ok"


def test_the_number_of_threads_changes_nothing(folder: Path, tmp_path: Path) -> None:
    tables = [scan(folder, tmp_path / f"{n}.parquet", workers=n)[0] for n in (1, 4)]
    assert tables[0].equals(tables[1])


def test_a_damaged_index_is_made_anew_and_said(folder: Path, file: Path) -> None:
    first, _, _ = scan(folder, file)
    file.write_bytes(file.read_bytes()[:200])
    second, reads, events = scan(folder, file)
    assert second.equals(first)
    assert len(reads) == 3
    assert any("is made anew" in event.text for event in events if isinstance(event, Notice))


def test_a_flipped_byte_in_the_index_never_changes_what_is_known(folder: Path, file: Path) -> None:
    scan(folder, file)
    whole, _, _ = scan(folder, file)
    data = file.read_bytes()
    for at in range(4, len(data), 41):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        storage = LocalStorage(folder)
        found = Index(file, storage, workers=1, bus=Bus(), title="index").load()
        if len(found) and found["mtime_ns"] != whole["mtime_ns"]:  # it passes for another folder's
            times = ["mtime_ns", "caption_mtime_ns"]
            assert {found[name][row].as_py() for name in times for row in range(3)} == {UNSURE}, at
            assert found.drop_columns(times).equals(whole.drop_columns(times)), at
        else:
            assert len(found) == 0 or found.equals(whole), at


def test_an_index_of_another_format_is_not_used(folder: Path, file: Path) -> None:
    import pyarrow.parquet as pq

    scan(folder, file)
    pq.write_table(pq.read_table(file).replace_schema_metadata({b"format": b"0"}), file)
    assert len(scan(folder, file)[1]) == 3


def test_progress_begins_and_ends_once(folder: Path, file: Path) -> None:
    stages = [event for event in scan(folder, file)[2] if isinstance(event, Stage)]
    assert [event.state for event in stages].count("finished") == 1
    assert (stages[0].state, stages[0].done, stages[0].total) == ("running", 0, 3)
    assert stages[-1].state == "finished"
    assert stages[-1].done == stages[-1].total == 3
    assert stages[-1].note == "3 pictures, 3 new or changed"


def text(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    aged(path)


def test_texts_are_read_once_and_again_when_they_change(folder: Path, file: Path) -> None:
    text(folder / "b.txt", b"a bee\r\n")
    text(folder / "a/c.txt", b"a sea")
    table, reads, _ = scan(folder, file, texts=True)
    assert table["caption"].to_pylist() == ["a sea", "a bee", None]
    assert reads["b.txt"] == 1
    assert not scan(folder, file, texts=True)[1]
    text(folder / "b.txt", b"two bees")
    text(folder / "d.txt", b"")
    (folder / "a/c.txt").unlink()
    table, reads, _ = scan(folder, file, texts=True)
    assert set(reads) == {"b.txt", "d.txt"}
    assert table["caption"].to_pylist() == [None, "two bees", ""]


def test_a_changed_picture_keeps_its_text_and_the_other_way_round(folder: Path, file: Path) -> None:
    text(folder / "b.txt", b"a bee")
    scan(folder, file, texts=True)
    picture(folder / "b.png", "white", (9, 9))
    table, reads, _ = scan(folder, file, texts=True)
    assert reads["b.png"] == 1
    assert (row(table, "b.png")["caption"], row(table, "b.png")["width"]) == ("a bee", 9)


def test_a_text_that_is_not_utf8_is_read_as_cp1252_and_named(folder: Path, file: Path) -> None:
    text(folder / "b.txt", "café".encode("cp1252"))
    text(folder / "d.txt", b"\x81\x8d\xff")
    table, _, events = scan(folder, file, texts=True)
    assert row(table, "b.png")["caption"] == "café"
    assert row(table, "d.webp")["caption_reason"] == "caption is neither UTF-8 nor cp1252"
    said = [event.text for event in events if isinstance(event, Notice)]
    assert any("read as cp1252: b.txt" in line for line in said)


def test_a_name_that_is_not_utf8_is_left_out_and_named(folder: Path, file: Path) -> None:
    odd = os.fsencode(str(folder)) + b"/caf\xe9.png"
    try:
        os.rename(os.fsencode(str(folder / "b.png")), odd)
    except OSError:
        pytest.skip("this file system holds only UTF-8 names")
    table, _, events = scan(folder, file)
    assert table["path"].to_pylist() == ["a/c.jpg", "d.webp"]
    assert any("not UTF-8" in event.text for event in events if isinstance(event, Notice))


class Many:
    """A storage of pictures that are all alike, for size."""

    title = "many"
    place = "many"

    def __init__(self, count: int) -> None:
        self.names = [f"folder/{number:07}.bmp" for number in range(count)]
        self.data = b"no picture"

    def keys(self) -> list[str]:
        return self.names

    def read(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read though nothing changed")

    def facts(self, key: str) -> FileFacts | None:
        return FileFacts(10, 1)


@pytest.mark.slow
def test_two_hundred_thousand_known_files_are_checked_in_seconds(file: Path) -> None:
    storage = Many(200_000)
    count = len(storage.names)
    columns = {
        "path": storage.names,
        "size": [10] * count,
        "mtime_ns": [1] * count,
        "content": [number.to_bytes(16, "big") for number in range(count)],
        "width": [30] * count,
        "height": [20] * count,
        "mode": ["RGB"] * count,
        "status": ["ok"] * count,
    }
    known = pa.table(
        [pa.array(columns.get(field.name, [None] * count), field.type) for field in COLUMNS],
        schema=COLUMNS,
    )
    index = Index(file, storage, workers=2, bus=Bus(), title="t")
    index.save(known)
    start = time.process_time()
    assert len(index.scan(texts=False)) == count
    assert time.process_time() - start < 10  # of both workers


def test_many_files_are_looked_at_by_processes_and_nothing_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    for number in range(40):
        picture(folder / f"{number:02}.png", size=(16 + number, 16))
    (folder / "07.png").write_bytes(b"nothing")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(index_module, "CHUNK", 8)
    scans = []
    for many in (1_000, 10):
        monkeypatch.setattr(looking, "MANY", many)
        index = Index(
            tmp_path / f"{many}.parquet", LocalStorage(folder), workers=2, bus=Bus(), title="t"
        )
        scans.append(index.scan(texts=False))
    assert scans[0].equals(scans[1])
    assert scans[0]["status"].to_pylist().count("reject") == 1


class Deadly(LocalStorage):
    """A folder at whose n-th read the process is killed."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left = at

    def read(self, key: str) -> bytes:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(key)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_scan_that_is_killed_goes_on_where_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    for number in range(40):
        os.utime(picture(folder / f"{number:02}.png", size=(16 + number, 16)), (1, 1))
    monkeypatch.setattr(index_module, "CHUNK", 4)
    monkeypatch.setattr(index_module, "SAVE_SECONDS", -1)

    def index(storage: LocalStorage) -> Index:
        return Index(tmp_path / "i.parquet", storage, workers=1, bus=Bus(), title="t")

    child = os.fork()
    if not child:
        index(Deadly(folder, 23)).scan(texts=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    storage = Counted(folder)
    table = index(storage).scan(texts=False)
    assert len(table) == 40
    assert storage.reads.total() == 20  # five chunks of four were saved
    assert table.equals(
        Index(tmp_path / "new.parquet", LocalStorage(folder), workers=1, bus=Bus(), title="t").scan(
            texts=False
        )
    )


_SCAN = """
import os, signal, sys, multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from simpletuner.data import looking
from simpletuner.data.storage.local import LocalStorage
if __name__ == "__main__":
    looking.MANY = 1
    chunks = [[(name, 1, 1)] for name in sys.argv[2:]]
    look = looking.Look(LocalStorage(Path(sys.argv[1])), {})
    rows = look.all(chunks, ThreadPoolExecutor(1), 2)
    next(rows)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), getattr(signal, "SIGKILL"))
"""


def test_a_scan_that_is_killed_leaves_no_process_behind(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "scan.py"
    script.write_text(_SCAN, encoding="utf-8")
    names = [path.name for path in folder.iterdir()]
    env = {**os.environ, "PYTHONPATH": str(Path(index_module.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, folder, *names], env=env, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "a worker waits for ever"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
