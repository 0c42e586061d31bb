"""URLs are not trusted: only public addresses are contacted, within limits of time and size."""

import base64
import gzip
import http.server
import io
import os
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from modeling_prismer.processing import PrismerImageProcessor, image_fetching, load_image, load_images
from modeling_prismer.processing.image_fetching import httpcore


PUBLIC = "93.184.216.34"


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        name = self.path.partition("?")[0].rpartition("/")[2].partition(".")[0]
        getattr(self, f"send_{name}", self.send_missing)()

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_image(self):
        self.answer(200, png(), Content_Length=len(png()))

    def send_missing(self):
        self.answer(404, b"no such page")

    def send_moved(self):
        self.answer(302, Location=self.path.partition("?")[2])

    def send_cut(self):
        self.answer(200, png()[:40], Content_Length=len(png()))

    def send_packed(self):
        self.answer(200, gzip.compress(png()), Content_Encoding="gzip")

    def send_large(self):
        self.answer(200, Content_Length=10**12)

    def send_endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
                self.server.sent += 1 << 16
        except OSError:
            pass

    def drip(self, data):
        try:
            for number in range(len(data)):
                self.wfile.write(data[number : number + 1])
                time.sleep(0.02)
        except OSError:
            pass

    def send_slowly(self):
        self.send_response(200)
        self.end_headers()
        self.drip(png())

    def send_headers(self):
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Filler: %s\r\n\r\n%s" % (len(png()), b"x" * 60, png()))

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.sent = [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv(image_fetching.ALLOW_PRIVATE, raising=False)
    monkeypatch.setattr(image_fetching, "is_offline_mode", lambda: False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Internet:
    """Simulates name servers, and connects every public address to the server of the test."""

    def __init__(self, server, monkeypatch):
        self.addresses, self.asked, self.connected = {}, [], []
        resolve, connect = socket.getaddrinfo, httpcore.SyncBackend.connect_tcp

        def getaddrinfo(host, *args, **kwargs):
            self.asked.append(host)
            answers = self.addresses.get(host, [[host]])
            addresses = answers.pop(0) if len(answers) > 1 else answers[0]
            return [info for address in addresses for info in resolve(address, *args, **kwargs)]

        def connect_tcp(backend, host, port, *args, **kwargs):
            self.connected.append(host)
            return connect(backend, "127.0.0.1", server.server_port, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)


@pytest.fixture
def internet(server, monkeypatch):
    internet = Internet(server, monkeypatch)
    internet.addresses["images.example"] = [[PUBLIC]]
    return internet


def test_public_url_is_fetched(server, internet):
    for url in ("http://images.example/image.png?size=large#top", "HTTP://Images.Example/image.png"):
        assert load_image(url).size == (7, 5)
    assert internet.connected == [PUBLIC] * 2
    assert server.seen == ["/image.png?size=large", "/image.png"]


# ---- addresses ----


def test_private_address_is_refused_unless_allowed(server, monkeypatch):
    url = f"{server.url}/image.png"
    with pytest.raises(OSError, match=r"/image.png' cannot be fetched: '127.0.0.1' is .* not public. If you trust it"):
        load_image(url)
    monkeypatch.setenv("PRISMER_ALLOW_PRIVATE_URLS", "0")
    with pytest.raises(OSError, match="set PRISMER_ALLOW_PRIVATE_URLS=1"):
        load_images([url])
    assert server.seen == []
    assert load_image(url, allow_private=True).size == (7, 5)
    monkeypatch.setenv("PRISMER_ALLOW_PRIVATE_URLS", "1")
    assert load_image(url).size == (7, 5)
    with pytest.raises(OSError, match="not public"):
        load_image(url, allow_private=False)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "0.0.0.0",
        "0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:a00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::10.0.0.1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fec0::1]",
        "[fc00::1]",
        "[ff02::1]",
    ],
)
def test_private_address_is_refused_in_any_notation(internet, host):
    with pytest.raises(OSError, match="is not public|Invalid IPv4"):
        load_image(f"http://{host}/image.png")
    assert internet.connected == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses_of_every_kind_are_contacted(internet, address):
    internet.addresses["images.example"] = [[address]]
    assert load_image("http://images.example/image.png").size == (7, 5)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"]])
def test_name_of_a_private_address_is_refused(internet, addresses):
    internet.addresses["images.example"] = [addresses]
    with pytest.raises(OSError, match="'images.example' is the address .* is not public"):
        load_image("http://images.example/image.png")
    assert internet.connected == []


def test_checked_address_is_the_contacted_one(internet):
    internet.addresses["images.example"] = [[PUBLIC], ["127.0.0.1"]]  # the second answer differs
    assert load_image("http://images.example/image.png").size == (7, 5)
    assert internet.connected == [PUBLIC] and internet.asked.count("images.example") == 1
    with pytest.raises(OSError, match="not public"):
        load_image("http://images.example/image.png")


def test_next_address_is_tried_if_one_does_not_answer(internet, monkeypatch):
    internet.addresses["images.example"] = [["2606:4700::1111", PUBLIC]]
    connect = httpcore.SyncBackend.connect_tcp

    def only_ipv4(backend, host, *args, **kwargs):
        if ":" in host:
            raise httpcore.ConnectError("no route to host")
        return connect(backend, host, *args, **kwargs)

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", only_ipv4)
    assert load_image("http://images.example/image.png").size == (7, 5)


# ---- redirects ----


def test_redirects_are_followed(internet):
    internet.addresses["cdn.example"] = [["8.8.8.8"]]
    assert load_image("http://images.example/moved?/moved?http://cdn.example/image.png").size == (7, 5)
    assert internet.connected == [PUBLIC, PUBLIC, "8.8.8.8"]


@pytest.mark.parametrize(
    "target, message",
    [
        ("http://127.0.0.1/image.png", "'127.0.0.1' is .* not public"),
        ("//localhost/image.png", "not public"),
        ("http://[::ffff:169.254.169.254]/image.png", "not public"),
        ("file:///etc/hostname", "is not an http.* URL"),
        ("ftp://images.example/image.png", "is not an http.* URL"),
    ],
)
def test_redirect_has_the_same_limits_as_a_url(server, internet, target, message):
    with pytest.raises(OSError, match=f"cannot be fetched: .*{message}"):
        load_image(f"http://images.example/moved?{target}")
    assert internet.connected == [PUBLIC] and len(server.seen) == 1


def test_number_of_redirects_is_limited(server, internet):
    internet.addresses["images.example"] = [[PUBLIC]]
    with pytest.raises(OSError, match="it redirects more than 5 times"):
        load_image("http://images.example/moved?" + "/moved?" * 9)
    assert len(server.seen) == 6


# ---- size and time ----


def test_too_large_announced_body_is_refused(server):
    with pytest.raises(OSError, match="it has more than max_bytes=100,000,000 bytes; raise the limit if you trust"):
        load_image(f"{server.url}/large.png", allow_private=True)


def test_endless_body_is_refused_at_the_limit(server):
    with pytest.raises(OSError, match="more than max_bytes=1,000,000 bytes"):
        load_image(f"{server.url}/endless.png", max_bytes=1_000_000, allow_private=True)
    assert load_image(f"{server.url}/image.png", max_bytes=len(png()), allow_private=True).size == (7, 5)


def test_compressed_body_is_refused(server):
    with pytest.raises(OSError, match="answers in the encoding 'gzip'; accepted is only identity"):
        load_image(f"{server.url}/packed.png", allow_private=True)


@pytest.mark.parametrize("page", ["slowly", "headers"])
def test_time_limit_holds_for_a_slow_server(server, page):
    with pytest.raises(OSError, match="cannot be fetched: it took longer than 0.3 seconds"):
        load_image(f"{server.url}/{page}", timeout=0.3, allow_private=True)


def test_incomplete_body_is_refused(server):
    with pytest.raises(OSError, match="cut.png' cannot be fetched: .*40 bytes"):
        load_image(f"{server.url}/cut.png", allow_private=True)


def test_missing_url_is_named(server):
    with pytest.raises(OSError, match="/nothing.png' cannot be fetched: .* answers 404 Not Found"):
        load_image(f"{server.url}/nothing.png", allow_private=True)
    with pytest.raises(OSError, match="'http://' cannot be fetched"):
        load_image("http://")


def test_data_uri_has_the_same_size_limit():
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert load_image(uri, max_bytes=len(png()) + 2).size == (7, 5)
    with pytest.raises(ValueError, match="has more than max_bytes=20 bytes"):
        load_image(uri, max_bytes=20)


# ---- proxies ----


def test_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(image_fetching, "_resolve", lambda host, port=None: known[host])
    known = {"127.0.0.1": ["127.0.0.1"], "images.example": [PUBLIC], "inside.example": ["10.0.0.1"]}
    assert load_image("http://images.example/image.png").size == (7, 5)
    assert server.seen == ["http://images.example/image.png"]
    with pytest.raises(OSError, match="'inside.example' is the address 10.0.0.1"):
        load_image("http://inside.example/image.png")
    assert len(server.seen) == 1


def test_proxy_resolves_names_unknown_here(server, monkeypatch):
    monkeypatch.setenv("all_proxy", f"127.0.0.1:{server.server_port}")

    def resolve(host, port=None):
        if host == "127.0.0.1":
            return [host]
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(image_fetching, "_resolve", resolve)
    assert load_image("http://images.example/image.png").size == (7, 5)


# ---- other entry points ----


def test_image_processor_has_the_same_limits(server):
    with pytest.raises(OSError, match="not public"):
        PrismerImageProcessor().fetch_images([f"{server.url}/image.png"])
    with pytest.raises(OSError, match="not public"):
        PrismerImageProcessor()(f"{server.url}/image.png")
    assert server.seen == []
    kept = np.zeros((2, 2, 3), np.uint8)
    assert PrismerImageProcessor().fetch_images([[kept]]) == [[kept]]


def test_nothing_is_fetched_when_offline(server, monkeypatch):
    monkeypatch.setattr(image_fetching, "is_offline_mode", lambda: True)
    with pytest.raises(OSError, match="/image.png' cannot be fetched: HF_HUB_OFFLINE is set. Pass a local file"):
        load_image(f"{server.url}/image.png", allow_private=True)
    assert server.seen == []
