"""The documented `hf upload` of huggingface_hub, against a server on this machine: what it would
publish of a checkpoint."""

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import ROOT
from json_server import JsonHandler

from files import sha256
from training.checkpoint import find_checkpoint


class Hub(ThreadingHTTPServer):
    """The parts of the hub's interface that an upload of a folder uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: dict[str, bytes] = {}                # by path in the repository

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(JsonHandler):
    server: Hub

    def do_GET(self) -> None:
        self.reply({"id": "user/name", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.reply({"url": f"{self.server.address}/user/name"})
        elif self.path == "/api/models/user/name/preupload/main":
            self.reply({"files": [{"path": file["path"], "uploadMode": "regular",
                                   "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif self.path == "/api/models/user/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.received[line["value"]["path"]] = content
            self.reply({"commitUrl": f"{self.server.address}/user/name/commit/{'1' * 40}",
                        "commitOid": "1" * 40})
        else:
            self.send_error(404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_documented_upload_publishes_a_checkpoint_without_its_training_state(
        hub, trained, tmp_path):
    line, = [line for line in (ROOT / "docs" / "import.md").read_text("utf-8").splitlines()
             if line.startswith("hf upload ")]
    words = shlex.split(line, comments=True)
    folder = words.index("runs/NAME/checkpoints/latest")
    assert words[2] == "USER/NAME"
    words[2], words[folder] = "user/name", str(trained / "checkpoints" / "latest")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
    done = subprocess.run([Path(sys.executable).with_name("hf"), *words[1:]], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint = find_checkpoint(trained)
    assert sorted(hub.received) == sorted(
        path.name for path in checkpoint.iterdir() if path.name != "training_state")
    for name, content in hub.received.items():
        (tmp_path / name).write_bytes(content)
        assert sha256(tmp_path / name) == sha256(checkpoint / name)
