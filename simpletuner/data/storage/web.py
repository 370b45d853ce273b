"""Pictures at web addresses, each fetched once into a folder of ours."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from simpletuner.core.errors import CacheError
from simpletuner.core.files import write_bytes, writing
from simpletuner.data.storage.base import FileFacts

SCHEMES = ("http://", "https://")

HEADERS = {"User-Agent": "SimpleTuner", "Accept": "image/*", "Accept-Encoding": "identity"}

KINDS = ("image/", "application/octet-stream", "binary/octet-stream")
"""How the Content-Type of a picture begins; an answer without one is taken for a picture too."""

PAGE_STARTS = (b"<", b"{")
"""No picture begins like this: a page or a message that calls itself one."""

LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals that ask to come again, as every error of the server's own (5xx) does."""

_KEPT_IN_ADDRESSES = "%/:=&?~#+!$,;'@()*[]"


@dataclass(frozen=True)
class Patience:
    """How long a download may take and how large it may be.

    Args:
        tries: How often it is begun.
        pause_seconds: Before the second try; doubled before each further one.
        silence_seconds: Without a byte from the server.
        whole_seconds: For one try, however steadily it drips.
        most_bytes: Larger answers are refused.
    """

    tries: int = 3
    pause_seconds: float = 1.0
    silence_seconds: float = 30.0
    whole_seconds: float = 300.0
    most_bytes: int = 1 << 28


class WebStorage:
    """The pictures at some addresses; a key is the whole address.

    What was fetched is never asked for again, so that a run goes on without the network. Whoever
    reads from several threads downloads as many pictures at once.

    Args:
        urls: The addresses.
        folder: What was fetched is kept here, named by a digest of its whole address.
        patience: See there.
    """

    def __init__(
        self, urls: Iterable[str], folder: Path, *, patience: Patience | None = None
    ) -> None:
        self._urls = sorted(set(urls))
        self.folder = folder
        self.patience = patience or Patience()

    @property
    def title(self) -> str:
        """Where the downloads are kept."""
        return f"web addresses, kept in {self.folder}"

    @property
    def place(self) -> str:
        """The web: an address means the same everywhere."""
        return "web"

    def keys(self) -> list[str]:
        """Every address, sorted, whether it was fetched or not."""
        return self._urls

    def read(self, key: str) -> bytes:
        """The picture at an address, fetched if it was not yet.

        Raises:
            OSError: It cannot be fetched, or what came is no picture.
            CacheError: It cannot be kept.
        """
        file = self._file(key)
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            data = self._fetched(key)
        fix = "make room, or set cache_dir to another disk, then start again"
        with writing(CacheError, "a download", self.folder, fix):
            write_bytes(file, data)
        return data

    def facts(self, key: str) -> FileFacts | None:
        """Size and time of what was fetched, None before that."""
        try:
            found = self._file(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileFacts(found.st_size, found.st_mtime_ns)

    def _file(self, url: str) -> Path:
        name = blake2b(url.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name

    def _fetched(self, url: str) -> bytes:
        for again in range(self.patience.tries - 1):
            try:
                return self._try(url)
            except _Passing:
                time.sleep(self.patience.pause_seconds * 2**again)
        return self._try(url)

    def _try(self, url: str) -> bytes:
        """One try.

        Raises:
            _Passing: The next one may go better.
            OSError: It would not.
        """
        seconds = self.patience.silence_seconds
        try:
            request = Request(quote(url, safe=_KEPT_IN_ADDRESSES), headers=HEADERS)
            with urlopen(request, timeout=seconds) as answer:
                return self._body(answer)
        except HTTPError as error:
            error.close()
            passing = error.code in LATER or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR
            raise (_Passing if passing else OSError)(f"{error.code} {error.reason}") from error
        except TimeoutError as error:
            raise _Passing(f"no answer within {seconds:g} s") from error
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing(f"no answer within {seconds:g} s") from error
            raise _Passing(f"no connection: {error.reason}") from error
        except (InvalidURL, ValueError) as error:
            raise OSError(f"not a web address: {error}") from error
        except (HTTPException, ConnectionError) as error:
            raise _Passing(f"the answer broke off: {error!r}") from error

    def _body(self, answer: HTTPResponse) -> bytes:
        """What came, if it is whole and may be a picture."""
        if answer.status != HTTPStatus.OK:
            raise OSError(f"answered {answer.status} {answer.reason} instead of a picture")
        kind = answer.headers.get("Content-Type", KINDS[0])
        if not kind.lower().startswith(KINDS):
            raise OSError(f"answered with {kind} instead of a picture")
        length = answer.headers.get("Content-Length", "")
        data = self._received(answer)
        if length.isdecimal() and len(data) < int(length):
            raise _Passing(f"the answer broke off after {len(data)} of {length} bytes")
        if not data:
            raise _Passing("answered with nothing")
        if data.lstrip()[:1] in PAGE_STARTS:
            raise OSError(f"answered with a page that calls itself {kind}")
        return data

    def _received(self, answer: HTTPResponse) -> bytes:
        most = self.patience.most_bytes
        end = time.monotonic() + self.patience.whole_seconds
        data = bytearray()
        # read1 comes back with what one packet brought, so that the clock is looked at.
        while block := answer.read1(1 << 20):
            data += block
            if len(data) > most:
                raise OSError(f"answered with more than {most / 1e6:g} MB")
            if time.monotonic() > end:
                raise _Passing(f"not whole after {self.patience.whole_seconds:g} s")
        return bytes(data)


class _Passing(OSError):
    """A failure that may be gone at the next try."""
