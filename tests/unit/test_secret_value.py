"""Does a node get its secrets with its cloud's role, and start without them where there are none?"""

from __future__ import annotations

import base64
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "cluster" / "secret_value.py"
TOKEN = "ya29.of-the-machine"
VALUE = "what nobody else should see"


class _Cloud(BaseHTTPRequestHandler):
    """Google's metadata server and Secret Manager, and AWS's Secrets Manager, as far as they are asked."""

    def do_GET(self) -> None:
        answers: dict[str, Any] = {
            "/computeMetadata/v1/project/project-id": "my-project",
            "/computeMetadata/v1/instance/service-accounts/default/token": json.dumps({"access_token": TOKEN}),
            "/v1/projects/my-project/secrets/known/versions/latest:access": json.dumps(
                {"payload": {"data": base64.b64encode(VALUE.encode()).decode()}}
            ),
        }
        is_metadata = self.path.startswith("/computeMetadata/")
        allowed = (
            self.headers.get("Metadata-Flavor") == "Google"
            if is_metadata
            else self.headers.get("Authorization") == f"Bearer {TOKEN}"
        )
        body = answers.get(self.path)
        self._answer(403 if not allowed else 404 if body is None else 200, body or "")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["X-Amz-Target"] == "secretsmanager.GetSecretValue" and asked == {"SecretId": "known"}
        body = {"SecretString": VALUE} if known else {"__type": "ResourceNotFoundException", "message": "none"}
        self._answer(200 if known else 400, json.dumps(body))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Cloud) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER", f"http://{address}/")
        monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", f"http://{address}")
        monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
        monkeypatch.setenv("AWS_REGION", "us-west-2")  # which is what cluster/aws.yaml sets
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-role")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-role")
        yield
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def secret_value() -> ModuleType:
    spec = importlib.util.spec_from_file_location("secret_value", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("cloud")
@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_secret_is_printed_and_nothing_else(
    name: str, secret_value: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert secret_value.main([name, "known"]) == 0
    assert capsys.readouterr() == (f"{VALUE}\n", "")


@pytest.mark.usefixtures("cloud")
@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_node_starts_without_a_secret_that_is_not_there(
    name: str, secret_value: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert secret_value.main([name, "unknown"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("no secret unknown: ")
    assert TOKEN not in told.err
