"""A local stand-in of the hub's HTTP API: what creating a repository, committing to it and
fetching one use."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Keeps what is committed in ``files`` and the requests in ``log``; ``refuse`` answers 403.
    ``served`` has the files, by path, of the one repository that can be fetched."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.served: dict[str, bytes] = {}
        self.refuse = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.log.append(f"{self.command} {path}")
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name in hub.served:
            data = hub.served[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)
        elif hub.served and "/revision/" in path:
            self._answer({"id": "someone/head", "sha": COMMIT})
        elif hub.served and "/tree/" in path:
            self._answer(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for path, data in hub.served.items()
                ]
            )
        else:
            self._answer({"error": "not here"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.log.append("PUT object")
        data = self._body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def do_POST(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.log.append(f"POST {path}")
        body = self._body()
        if hub.refuse or self.headers.get("Authorization") != "Bearer a-token":
            return self._answer({"error": "not allowed"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            return self._answer({"url": f"{hub.url}/{asked.get('organization')}/{asked['name']}"})
        if path == "/api/validate-yaml":
            hub.card = json.loads(body)["content"]
            return self._answer({"warnings": [], "errors": []})
        if re.fullmatch(r"/api/models/.+/preupload/main", path):
            return self._answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            "oid": o["oid"],
                            "size": o["size"],
                            "actions": {"upload": {"href": f"{hub.url}/object", "header": {}}},
                        }
                        for o in json.loads(body)["objects"]
                    ],
                }
            )
        if re.fullmatch(r"/api/models/.+/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            url = f"{hub.url}/{repo}/commit/{COMMIT}"
            return self._answer({"commitUrl": url, "commitOid": COMMIT})
        return self._answer({"error": f"unknown {path}"}, 404)


@contextmanager
def running():
    """A hub, until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
