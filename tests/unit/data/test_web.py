"""Downloads: once, whole, and nothing but pictures; against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simpletuner.core.errors import CacheError
from simpletuner.data.storage.web import Patience, WebStorage
from tests.unit.data.serving import Site, served

PICTURE = b"\x89PNG and so on"
HASTE = Patience(tries=3, pause_seconds=0.01, silence_seconds=0.3, whole_seconds=0.6)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    with served() as found:
        yield found


def storage(folder: Path, *urls: str, patience: Patience = HASTE) -> WebStorage:
    return WebStorage(urls, folder / "kept", patience=patience)


def kept(folder: Path) -> list[Path]:
    return [path for path in (folder / "kept").rglob("*") if path.is_file()]


def test_an_address_is_asked_for_once_in_all_runs(site: Site, tmp_path: Path) -> None:
    url = site.put("/a.png", PICTURE)
    assert storage(tmp_path).facts(url) is None
    for _ in range(2):
        again = storage(tmp_path, url)
        assert again.read(url) == PICTURE
        assert again.facts(url).size == len(PICTURE)
    assert site.asked == {"/a.png": 1}
    assert len(kept(tmp_path)) == 1


def test_addresses_with_the_same_last_part_are_two_pictures(site: Site, tmp_path: Path) -> None:
    urls = [
        site.put(path, PICTURE + path.encode()) for path in ("/a/1.png", "/b/1.png", "/1.png?v")
    ]
    found = [storage(tmp_path, *urls).read(url) for url in urls]
    assert len(set(found)) == len(kept(tmp_path)) == 3


@pytest.mark.parametrize(
    ("answer", "says", "asked"),
    [
        ({"body": b"gone", "status": 404}, "404 Not Found", 1),
        ({"body": b"no", "status": 403}, "403 Forbidden", 1),
        ({"body": b"slow", "status": 429}, "429 Too Many Requests", 3),
        ({"body": b"oh", "status": 500}, "500 Internal Server Error", 3),
        ({"body": b"", "status": 204}, "answered 204 No Content", 1),
        ({"body": b"<html>404", "kind": "text/html"}, "answered with text/html", 1),
        ({"body": b"\n<!doctype html>404"}, "a page that calls itself image/png", 1),
        ({"body": b'{"error": 1}', "kind": None}, "a page that calls itself", 1),
        ({"body": b""}, "answered with nothing", 3),
        ({"body": PICTURE, "length": 99}, "broke off after 14 of 99 bytes", 3),
        ({"body": b"x" * 1001}, "more than 0.001 MB", 1),
        ({"body": PICTURE, "begin": 1.0}, "no answer within 0.3 s", 3),
        ({"body": PICTURE, "drip": 0.1}, "not whole after 0.6 s", 3),
    ],
    ids=str,
)
def test_what_is_no_whole_picture_is_told_and_not_kept(
    site: Site, tmp_path: Path, answer: dict[str, object], says: str, asked: int
) -> None:
    url = site.put("/a.png", **answer)
    patience = Patience(3, 0.01, HASTE.silence_seconds, HASTE.whole_seconds, most_bytes=1000)
    start = time.monotonic()
    with pytest.raises(OSError, match=says):
        storage(tmp_path, url, patience=patience).read(url)
    assert time.monotonic() - start < 4
    assert kept(tmp_path) == []
    assert site.asked["/a.png"] == asked


def test_a_server_that_recovers_is_asked_again_after_a_growing_pause(
    site: Site, tmp_path: Path
) -> None:
    url = site.put("/a.png", PICTURE, failures=2)
    start = time.monotonic()
    patience = Patience(tries=3, pause_seconds=0.1)
    assert storage(tmp_path, url, patience=patience).read(url) == PICTURE
    assert time.monotonic() - start > 0.1 + 0.2
    assert site.asked["/a.png"] == 3


def test_blanks_and_umlauts_in_an_address_are_sent(site: Site, tmp_path: Path) -> None:
    site.put("/a%20b/%C3%BC.png?x=%C3%A4", PICTURE, kind="application/octet-stream")
    url = f"{site.address}/a b/ü.png?x=ä"
    assert storage(tmp_path, url).read(url) == PICTURE


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/a.png", "no connection"),
        ("http://127.0.0.1:port/a.png", "not a web address"),
        ("http:///a.png", "no host"),
    ],
)
@pytest.mark.usefixtures("site")
def test_nobody_there_is_told(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(OSError, match=says):
        storage(tmp_path, url).read(url)


def test_many_threads_and_two_storages_get_the_same_picture(site: Site, tmp_path: Path) -> None:
    url = site.put("/a.png", PICTURE, begin=0.05)
    both = [storage(tmp_path, url), storage(tmp_path, url)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda n: both[n % 2].read(url), range(16))) == {PICTURE}
    assert len(kept(tmp_path)) == 1


def test_a_folder_that_takes_nothing_is_named(site: Site, tmp_path: Path) -> None:
    url = site.put("/a.png", PICTURE)
    (tmp_path / "kept").write_bytes(b"a file in the way")
    with pytest.raises(CacheError, match=r"a download cannot be written to .*kept"):
        storage(tmp_path, url).read(url)
