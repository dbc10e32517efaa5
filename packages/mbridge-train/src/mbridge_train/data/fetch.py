"""Fetching a URL that a row of the data names: within one deadline, and from public addresses alone.

Rows are often not the user's own. So the address is checked after each connection, before anything is sent: a redirect,
or a name that resolves to another address the second time, must not reach services of the cluster. Where the
environment names a proxy, the proxy decides which addresses can be reached.
"""

import ipaddress
import threading
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import SHUT_RDWR, socket
from urllib.parse import urlsplit

FETCH_SECONDS = 30.0
"""Deadline of a fetch: name lookup, redirects, headers and body together."""


def fetch(url: str, *, networks: Sequence[str], most_bytes: int) -> bytes:
    """Return the first `most_bytes` + 1 bytes at an http(s) URL, from a public address or one of `networks`.

    Raises `OSError` if the server does not give them in `FETCH_SECONDS`, or is at an address that is not allowed.
    """
    transfer = _Transfer(url, networks, most_bytes)
    # A thread can be left behind wherever it waits, in the name lookup, too, which has no timeout.
    threading.Thread(target=transfer.run, name="fetch", daemon=True).start()
    if not transfer.done.wait(FETCH_SECONDS):
        transfer.abandon()
        raise TimeoutError(f"it was not complete after {FETCH_SECONDS:g} seconds")
    if isinstance(transfer.result, bytes):
        return transfer.result
    raise transfer.result


class _Transfer:
    """One fetch, which runs in a thread and can be abandoned by another; `done` is set once `result` is there."""

    def __init__(self, url: str, networks: Sequence[str], most_bytes: int) -> None:
        self._url = url
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._most_bytes = most_bytes
        proxies = urllib.request.getproxies()
        self._proxies = {urlsplit("//" + proxy.rpartition("//")[2]).hostname for proxy in proxies.values()}
        self._sockets: list[socket] = []
        self._is_abandoned = False
        self.done = threading.Event()
        self.result: bytes | OSError = OSError("the fetch did not end")

    def run(self) -> None:
        opener = urllib.request.OpenerDirector()  # build_opener would follow redirects to ftp as well
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Handler(self._check),
        ):
            opener.add_handler(handler)
        try:
            with opener.open(self._url, timeout=FETCH_SECONDS) as response:
                self.result = response.read(self._most_bytes + 1)
        except OSError as error:
            reason = getattr(error, "reason", None)  # of a URLError
            self.result = reason if isinstance(reason, OSError) else error
        except (ValueError, HTTPException) as error:  # a URL, or an answer, that is not HTTP's
            self.result = OSError(str(error) or type(error).__name__)
        finally:
            for connected in self._sockets:
                connected.close()
            self.done.set()

    def _check(self, host: str, connected: socket) -> None:
        """Raise `PermissionError` if `connected` leads to an address that is not allowed."""
        self._sockets.append(connected.dup())  # TLS takes the socket itself away
        if self._is_abandoned:
            self.abandon()
        address = ipaddress.ip_address(connected.getpeername()[0])
        if not address.is_global and host not in self._proxies and not any(address in one for one in self._networks):
            raise PermissionError(
                f"{host} is at {address}, which is not a public address; if the rows may read from there, set "
                f"data.private_networks=[{address}]"
            )

    def abandon(self) -> None:
        """Have whatever `run` is waiting for fail."""
        self._is_abandoned = True
        for connected in self._sockets:
            try:
                connected.shutdown(SHUT_RDWR)
            except OSError:
                continue  # it has ended by itself


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https URLs, and calls `check` with host and socket after each connection."""

    def __init__(self, check: Callable[[str, socket], None]) -> None:
        super().__init__()

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                check(self.host, self.sock)

        class TLS(HTTPSConnection, Plain):  # whose connect() calls Plain's before it starts TLS
            pass

        self._plain, self._tls = Plain, TLS

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._plain, request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._tls, request)
