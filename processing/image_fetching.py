"""Fetches an image file from the web, from public addresses only, within limits of time and size."""

import http
import io
import ipaddress
import os
import socket
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import httpx


try:
    import httpcore2 as httpcore  # used by huggingface_hub 2
except ImportError:
    import httpcore  # type: ignore[no-redef]  # used by huggingface_hub 1


MAX_REDIRECTS = 5
ALLOW_PRIVATE = "PRISMER_ALLOW_PRIVATE_URLS"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch_url(
    url: str, name: str, timeout: float | None, max_bytes: int | None, allow_private: bool | None = None
) -> io.BytesIO:
    """
    Fetches the file at a URL.

    Every connection, also after a redirect, uses an address that has been checked. The name is not resolved again in
    between, so a second answer of the name server has no effect. With a proxy (`HTTPS_PROXY` and similar variables),
    the proxy resolves names; a name is refused if it resolves to a private address here.

    Args:
        url (`str`): an `http(s)://` URL.
        name (`str`): the name of the image in error messages.
        timeout (`float`, *optional*): time limit in seconds for all connections, redirects and the body.
        max_bytes (`int`, *optional*): the largest accepted size of the body.
        allow_private (`bool`, *optional*):
            Whether addresses may be private, such as 127.0.0.1 or 10.0.0.1. By default, the environment variable
            `PRISMER_ALLOW_PRIVATE_URLS=1` allows it.

    Raises:
        OSError: if the file cannot be fetched or is refused, and always when offline (`HF_HUB_OFFLINE`). The message
            has the name and the reason.
    """
    if is_offline_mode():
        raise OSError(f"'{name}' cannot be fetched: HF_HUB_OFFLINE is set. Pass a local file instead")
    if allow_private is None:
        allow_private = os.environ.get(ALLOW_PRIVATE, "").lower() in ("1", "true", "yes", "on")
    deadline = _Deadline(timeout)
    try:
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            moved_to, body = _get(target, deadline, max_bytes, allow_private)
            if moved_to is None:
                return body
            target = target.join(moved_to)
    except Exception as error:  # the errors of the client have no common class
        reason = f"it took longer than {timeout:g} seconds" if deadline.is_over() else error
        raise OSError(f"'{name}' cannot be fetched: {reason}") from error
    raise OSError(f"'{name}' cannot be fetched: it redirects more than {MAX_REDIRECTS} times")


def _get(url: Any, deadline: "_Deadline", max_bytes: int | None, allow_private: bool) -> tuple[str | None, io.BytesIO]:
    """The target of a redirect, or `None` and the body."""
    if url.scheme not in ("http", "https") or not url.host:
        raise OSError(f"{url} is not an http(s) URL")
    proxy = _proxy_for(url)
    if proxy is not None and not allow_private:
        _require_public_if_known(url.host)
    pool = httpcore.ConnectionPool(
        ssl_context=httpx.create_ssl_context() if url.scheme == "https" else None,
        proxy=proxy,
        network_backend=_Network(deadline, public_only=proxy is None and not allow_private),
    )
    request = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    # no compression: a small response could fill the memory
    headers = [("User-Agent", "modeling-prismer"), ("Accept", "image/*, */*"), ("Accept-Encoding", "identity")]
    body = io.BytesIO()
    with pool, pool.stream("GET", request, headers=headers) as response:
        answered = {key.lower(): value.decode("latin-1") for key, value in response.headers}
        if response.status in (301, 302, 303, 307, 308) and b"location" in answered:
            return answered[b"location"], body
        if response.status != http.HTTPStatus.OK:
            known = response.status in set(http.HTTPStatus)
            phrase = http.HTTPStatus(response.status).phrase if known else ""
            raise OSError(f"{url} answers {response.status} {phrase}".rstrip())
        encoding = answered.get(b"content-encoding", "identity")
        if encoding not in ("", "identity"):
            raise OSError(f"{url} answers in the encoding {encoding!r}; accepted is only identity")
        length = answered.get(b"content-length", "")
        _require_length(int(length) if length.isdigit() else 0, max_bytes)
        for chunk in response.iter_stream():
            _require_length(body.tell() + len(chunk), max_bytes)
            body.write(chunk)
    body.seek(0)
    return None, body


def _require_length(length: int, max_bytes: int | None) -> None:
    if max_bytes is not None and length > max_bytes:
        raise OSError(f"it has more than max_bytes={max_bytes:,} bytes; raise the limit if you trust the server")


def _proxy_for(url: Any) -> Any:
    """The proxy for a URL from the environment, or `None`."""
    address = urllib.request.getproxies().get(url.scheme) or urllib.request.getproxies().get("all")
    if not address or urllib.request.proxy_bypass(url.host):
        return None
    proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
    target = httpcore.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=b"/")
    return httpcore.Proxy(target, auth=proxy.raw_auth)


# ---- addresses ----


def _resolve(host: str, port: int | None = None) -> list[str]:
    """The IP addresses of a host without duplicates, in the order of the system. Resolves any notation of numbers."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _require_public(host: str, addresses: list[str]) -> None:
    for address in addresses:
        if not _is_public(address):
            raise OSError(
                f"'{host}' is the address {address}, which is not public. If you trust it, pass allow_private=True to "
                f"load_image, or set {ALLOW_PRIVATE}=1"
            )


def _require_public_if_known(host: str) -> None:
    try:
        addresses = _resolve(host)
    except OSError:  # only the proxy can resolve the name
        return
    _require_public(host, addresses)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.sixtofour is not None or ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


# ---- connections ----


class _Deadline:
    """The time limit of a download."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def seconds_left(self) -> float | None:
        if self.end is None:
            return None
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the time limit has passed")
        return seconds


class _Network(httpcore.NetworkBackend):
    """Connects only to checked addresses, and no longer than until the deadline."""

    def __init__(self, deadline: _Deadline, public_only: bool):
        self.deadline = deadline
        self.public_only = public_only
        self.backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Any:
        addresses = _resolve(host, port)
        if self.public_only:
            _require_public(host, addresses)
        for number, address in enumerate(addresses, 1):
            left = self.deadline.seconds_left()
            share = None if left is None else left / (len(addresses) - number + 1)
            try:
                stream = self.backend.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
            else:
                return _Stream(stream, self.deadline)


class _Stream(httpcore.NetworkStream):
    """A connection that ends at the deadline, even if the server sends slowly."""

    def __init__(self, stream: Any, deadline: _Deadline):
        self.stream = stream
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.deadline.seconds_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, self.deadline.seconds_left())

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
        stream = self.stream.start_tls(ssl_context, server_hostname, self.deadline.seconds_left())
        return _Stream(stream, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)

    def close(self) -> None:
        self.stream.close()
