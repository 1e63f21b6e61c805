"""Downloads from a local server: intact, broken in every way we know of, and not there at all."""

from __future__ import annotations

import gzip
import hashlib
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from isthmus.errors import DataError, MissingExtraError
from isthmus.training._fetch import RemoteFile, fetch

pytest.importorskip("pooch")

CONTENT = bytes(range(256)) * 1000


class Server(ThreadingHTTPServer):
    """Serves ``CONTENT`` in the way named by the folder of the address, and remembers what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.drops = 0

    def mirror(self, manner: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{manner}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        manner = self.path.split("/")[1]
        wanted = self.headers.get("Range")
        self.server.asked.append((manner, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        content, status = CONTENT, 200
        if manner == "missing":
            self.send_error(404)
            return
        if manner == "wrong":
            content = b"x" * len(CONTENT)
        elif manner == "short":
            content = CONTENT[:1000]
        elif manner == "zipped":
            content = gzip.compress(CONTENT)
        if wanted and manner != "no-ranges":
            if start >= len(content):
                self.send_error(416)
                return
            status, content = 206, content[start:]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{len(CONTENT)}")
        if manner == "zipped":
            self.send_header("Content-Encoding", "gzip")
        if manner == "endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if manner in ("drops", "no-ranges") and self.server.drops > 0:
            self.server.drops -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        if manner == "endless":
            self.close_connection = True


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(running: Server) -> Server:
    running.asked.clear()
    running.drops = 0
    return running


def remote(*mirrors: str) -> RemoteFile:
    return RemoteFile("data.bin", hashlib.md5(CONTENT).hexdigest(), mirrors)


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_an_intact_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = tmp_path / "deep" / "folder"
    path = fetch(remote(server.mirror("good")), folder, on_progress=lambda *a: seen.append(a))
    assert path == folder / "data.bin"
    assert path.read_bytes() == CONTENT
    assert [have for _, have, _ in seen] == sorted(have for _, have, _ in seen)
    assert seen[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    assert fetch(remote(server.mirror("good")), folder) == path
    assert server.asked == [("good", None)]


def test_a_damaged_file_on_disk_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1])
    assert fetch(remote(server.mirror("good")), tmp_path).read_bytes() == CONTENT


def test_a_dropped_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.drops = 2
    path = fetch(remote(server.mirror("drops")), tmp_path, pause=0)
    assert path.read_bytes() == CONTENT
    half, quarter = len(CONTENT) // 2, len(CONTENT) // 4
    assert server.asked == [
        ("drops", None),
        ("drops", f"bytes={half}-"),
        ("drops", f"bytes={half + quarter}-"),
    ]
    assert visible(tmp_path) == ["data.bin"]


def test_another_mirror_continues(server: Server, tmp_path: Path) -> None:
    server.drops = 1
    file = remote(server.mirror("missing"), server.mirror("drops"), server.mirror("good"))
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert server.asked[1:] == [("drops", None), ("good", f"bytes={len(CONTENT) // 2}-")]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.drops = 1
    assert fetch(remote(server.mirror("no-ranges")), tmp_path, pause=0).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_what_was_kept_of_another_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    for kept in (b"y" * 100, b"y" * (len(CONTENT) + 5), b"y" * len(CONTENT)):
        (tmp_path / ".data.bin.part").write_bytes(kept)
        (tmp_path / "data.bin").unlink(missing_ok=True)
        assert fetch(remote(server.mirror("good")), tmp_path, pause=0).read_bytes() == CONTENT


def test_no_length_and_needless_zipping(server: Server, tmp_path: Path) -> None:
    assert fetch(remote(server.mirror("endless")), tmp_path / "a").read_bytes() == CONTENT
    zipped = gzip.compress(CONTENT)
    file = RemoteFile("data.bin", hashlib.md5(zipped).hexdigest(), (server.mirror("zipped"),))
    # The file is kept as it was sent, so a published .gz is not unzipped on the way.
    assert gzip.decompress(fetch(file, tmp_path / "b").read_bytes()) == CONTENT


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("wrong", "wrong checksum"),
        ("short", "wrong checksum"),
        ("missing", "404"),
    ],
)
def test_failures_are_explained_and_leave_nothing(
    server: Server, tmp_path: Path, manner: str, reason: str
) -> None:
    with pytest.raises(
        DataError, match=rf"Could not download data\.bin in 2 rounds over 1 places:\s.*{reason}"
    ):
        fetch(remote(server.mirror(manner)), tmp_path, attempts=2, pause=0)
    assert visible(tmp_path) == []
    assert len(server.asked) == 2


def test_a_connection_that_always_drops(server: Server, tmp_path: Path) -> None:
    server.drops = 99
    with pytest.raises(DataError, match=r"IncompleteRead|dropped|Connection broken"):
        fetch(remote(server.mirror("drops")), tmp_path, attempts=2, pause=0)
    assert visible(tmp_path) == []


def test_offline_says_which_file_to_put_where(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(
            DataError, match=r"put the file \(MD5 [0-9a-f]{32}\) into .*data folder"
        ) as raised:
            fetch(remote(address), tmp_path, attempts=1)
    assert str(tmp_path) in str(raised.value)
    assert "Connection refused" in str(raised.value)


def test_hosts_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"host cannot be found; is there a network\?"):
        fetch(remote("http://no-such-host.invalid/"), tmp_path, attempts=1)


def test_rounds_are_spaced_out(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("isthmus.training._fetch.time.sleep", pauses.append)
    with pytest.raises(DataError, match="3 rounds"):
        fetch(remote(server.mirror("missing")), tmp_path, pause=0.5)
    assert pauses == [0.5, 1.0]


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot keep data\.bin in .*file.*folder is writable"):
        fetch(remote(server.mirror("good")), tmp_path / "file")
    assert server.asked == []


def test_two_at_once_download_once(server: Server, tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(fetch(remote(server.mirror("good")), tmp_path).read_bytes())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert len(server.asked) == 1


def test_the_terminal_stays_quiet_and_loggers_as_they_were(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pooch

    level = pooch.get_logger().level
    fetch(remote(server.mirror("good")), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert pooch.get_logger().level == level != logging.ERROR


def test_without_pooch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[study\]"'):
        fetch(remote("http://127.0.0.1/"), tmp_path)
