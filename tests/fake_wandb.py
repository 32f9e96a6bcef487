"""A wandb server that keeps what it is sent: wandb's own programs log to it and upload to it."""

import collections
import gzip
import json
import threading
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple

from json_server import JsonHandler

HIDDEN = 2                      # the number of this option in a run's config


class Axis(NamedTuple):
    """How a metric is drawn."""

    step_metric: str | None     # on its x axis
    hidden: bool


class StoredRun:
    """What the server holds of a run."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = collections.defaultdict(list)    # of its file stream
        self.config: dict[str, Any] = {}
        self.summary = "{}"
        self.group: str | None = None
        self.sweep: str | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files["wandb-history.jsonl"]]

    @property
    def axes(self) -> dict[str, Axis]:
        """Every metric logged, with its definition. It is an error if two match: wandb may then
        take either."""
        metrics = self.config["_wandb"]["value"]["m"]
        definitions = []
        for metric in metrics:
            number, name = metric.get("5"), metric.get("4")     # before 0.30 by name
            step_metric = metrics[number - 1]["1"] if number else name
            if step_metric or HIDDEN in metric["6"]:
                definitions.append((metric.get("1") or metric["2"],
                                    Axis(step_metric, HIDDEN in metric["6"])))
        axes = {}
        for key in {key for row in self.history for key in row if not key.startswith("_")}:
            exact = [axis for name, axis in definitions if name == key]
            matches = exact or [axis for name, axis in definitions
                                if name.endswith("*") and key.startswith(name[:-1])]
            assert len(matches) == 1, (key, matches)
            axes[key] = matches[0]
        return axes


class FakeWandb:
    """`with FakeWandb() as server`: it answers at `server.url`; `server.env` leads wandb there."""

    def __init__(self, commands: list[dict[str, Any]] | None = None, sweep: str = "") -> None:
        """`commands`: what it tells the agent of a sweep to do; `sweep`: that sweep's YAML."""
        self.runs: dict[str, StoredRun] = collections.defaultdict(StoredRun)
        self.commands, self.sweep = list(commands or []), sweep
        self.lock = threading.Lock()
        fake = self

        class Handler(JsonHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.read_body()
                with fake.lock:
                    self.reply(fake.answer(self.path, body))

            def do_GET(self) -> None:
                self.read_body()
                self.reply({})

            do_HEAD = do_PUT = do_GET

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that was killed has closed its connection."""

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online",
                    "WANDB_ERROR_REPORTING": "false", }

    def __enter__(self) -> "FakeWandb":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/graphql"):
            request = json.loads(body)
            return {"data": self.answer_query(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            run = self.runs[path.split("/")[-2]]
            for name, chunk in (json.loads(body).get("files") or {}).items():
                lines, first = run.files[name], chunk["offset"]
                lines[first:first + len(chunk["content"])] = chunk["content"]
                if name == "wandb-summary.json":
                    run.summary = lines[-1]
        return {}

    def answer_query(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "u", "username": "me", "name": "me", "email": "", "entity": "me",
                "flags": "{}", "admin": False, "teams": {"edges": []}}
        answer: dict[str, Any] = {
            "viewer": user, "entity": None, "model": {"bucket": None},
            "serverInfo": {"features": [], "latestLocalVersionInfo": None, "cliVersionInfo": {
                "min_cli_version": "0.1.0", "max_cli_version": "99.0.0"}},
            "QueryType": {"fields": []}, "MutationType": {"fields": []},
            "TypeInfo": {"fields": [], "inputFields": []},
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": [
                {"name": name, "uploadUrl": f"{self.url}/upload"}
                for name in values.get("files") or []]}}
        if "upsertBucket" in query:
            run = self.runs[values["name"]]
            run.config = json.loads(values.get("config") or "null") or run.config
            run.group = values.get("groupName") or run.group
            run.sweep = values.get("sweep") or run.sweep
            answer["upsertBucket"] = {"bucket": self.bucket(values["name"]), "inserted": True,
                                      "configValidationErrors": None}
        elif "RunResumeStatus" in query and values["name"] in self.runs:
            answer["model"] = {"id": "p", "name": "p", "bucket": self.bucket(values["name"])}
        elif "query ArtifactType(" in query:
            answer["project"] = {"artifact": None}
        elif "createArtifact(" in query:             # a table; this says that it is there already
            answer["createArtifact"] = {"artifact": {
                "id": "QXJ0", "state": "COMMITTED", "versionIndex": 0,
                "artifactSequence": {"id": "c2Vx", "name": "table", "latestArtifact": None}}}
        elif "createAgent" in query:
            answer["createAgent"] = {"agent": {"id": "agent"}}
        elif "agentHeartbeat" in query:
            commands = [self.commands.pop(0)] if self.commands else [{"type": "exit"}]
            busy = json.loads(values.get("runState") or "{}")
            answer["agentHeartbeat"] = {"agent": {"id": "agent"}, "commands": json.dumps(
                [] if busy else commands)}
            if busy and commands != [{"type": "exit"}]:
                self.commands.insert(0, commands[0])
        elif "sweep(" in query:
            answer["project"] = {"sweep": {"id": "s", "name": "s", "state": "RUNNING",
                                           "config": self.sweep, "method": "grid",
                                           "runs": {"edges": []}}}
        return answer

    def bucket(self, name: str) -> dict[str, Any]:
        """A run as wandb asks for it."""
        run = self.runs[name]
        history, events = run.files["wandb-history.jsonl"], run.files["wandb-events.jsonl"]
        return {
            "id": "UnVuOg==", "name": name, "displayName": name, "description": None,
            "config": json.dumps(run.config), "sweepName": run.sweep, "tags": [], "commit": None,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}},
            "summaryMetrics": run.summary, "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events), "eventsTail": json.dumps(events[-1:]),
            "logLineCount": len(run.files["output.log"])}
