"""One file of pip's package index, downloaded without pip.

pip runs the build step of a source archive to read its metadata, even for ``pip download``; here
nothing of an archive is run.
"""

from __future__ import annotations

import ast
import base64
import http.client
import re
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT = 60.0
CHUNK = 1 << 20
# Where pip looks for its settings, the stronger last.
SECTIONS = ("global", "download", ":env:")


class IndexFailure(Exception):
    """What an index answered instead of the file."""


@dataclass(frozen=True)
class Index:
    """A package index as pip is configured to use it.

    Attributes:
        url: Its address, without an account.
        account: ``name:password`` to send to its host alone; empty for none.
        certificates: File of certificates to trust; None for the system's.
    """

    url: str
    account: str = ""
    certificates: str | None = None

    def chunks(self, project: str, filename: str) -> Iterator[bytes]:
        """Yields the content of a file.

        Args:
            project: Name of the package.
            filename: Name of the file, as in the index.

        Raises:
            IndexFailure: No network, no such file, or a connection that broke.
        """
        name = re.sub(r"[-_.]+", "-", project).lower()
        page = f"{self.url.rstrip('/')}/{name}/"
        if page.startswith("file:"):
            page += "index.html"
        try:
            with self._open(page) as answer:
                links = _Links(answer.geturl())
                links.feed(answer.read().decode("utf-8", "replace"))
            if filename not in links.found:
                raise IndexFailure(f"no {filename} at {urlsplit(page).netloc or page}")
            with self._open(links.found[filename]) as answer:
                got, size = 0, int(answer.headers.get("Content-Length") or 0)
                while chunk := answer.read(CHUNK):
                    got += len(chunk)
                    yield chunk
            if got < size:
                raise IndexFailure(f"a connection that broke after {got} of {size} bytes")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise IndexFailure(str(error) or repr(error)) from error

    def _open(self, url: str) -> Any:
        """Opens an address; the account is for the index's own host, not where it redirects."""
        request = urllib.request.Request(url, headers={"Accept": "text/html, */*;q=0.1"})
        if self.account and urlsplit(url).netloc == urlsplit(self.url).netloc:
            token = base64.b64encode(self.account.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        context = ssl.create_default_context(cafile=self.certificates)
        return urllib.request.urlopen(request, timeout=TIMEOUT, context=context)


class _Links(HTMLParser):
    """The files that a page of an index links to, by name."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "a" and target:
            url = urljoin(self.base, target)
            self.found[unquote(urlsplit(url).path.rpartition("/")[2])] = url.partition("#")[0]


def configured_index() -> Index:
    """The index that pip uses: its configuration files and ``PIP_INDEX_URL``, else the default.

    Raises:
        IndexFailure: pip is told to use no index.
    """
    settings = _pip_settings()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        raise IndexFailure("pip is configured with no-index")
    parts = urlsplit(settings.get("index-url", DEFAULT_INDEX))
    account, _, host = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return Index(url, unquote(account), settings.get("cert"))


def _pip_settings() -> dict[str, str]:
    """What is set for ``pip download``; nothing where there is no pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name] = str(ast.literal_eval(value))
    return {name: value for section in SECTIONS for name, value in found[section].items()}
