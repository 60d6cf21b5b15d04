"""A stand-in for the Hugging Face hub: keeps what is pushed in a folder, and gives it back."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
  """What huggingface_hub asks for to push and to fetch a model; any token but "wrong" is good.

  Nobody sees a model that is called private or gated.
  """

  root: Path

  def log_message(self, *_: object) -> None:
    """Nothing."""

  def _answer(
    self, value: Any = None, content: bytes = b"", status: int = 200, **headers: str
  ) -> None:
    body = json.dumps(value).encode() if value is not None else content
    self.send_response(status)
    for name, text in headers.items():
      self.send_header(name.replace("_", "-"), text)
    self.send_header("X-Repo-Commit", COMMIT)
    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if self.headers.get("Authorization") == "Bearer wrong":
      self._answer({"error": "Invalid username or password."}, status=401)
    elif self.path == "/api/repos/create":
      about = json.loads(body)
      name = "/".join(x for x in (about.get("organization"), about["name"]) if x)
      self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
    elif self.path == "/api/validate-yaml":
      self._answer({"errors": [], "warnings": []})
    elif self.path.endswith("/preupload/main"):
      files = [file["path"] for file in json.loads(body)["files"]]
      modes = [{"path": x, "uploadMode": "regular", "shouldIgnore": False} for x in files]
      self._answer({"files": modes})
    elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
      for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
          path = self.root / found[1] / line["value"]["path"]
          path.parent.mkdir(parents=True, exist_ok=True)
          path.write_bytes(base64.b64decode(line["value"]["content"]))
      url = f"http://{self.headers['Host']}/{found[1]}/commit/{COMMIT}"
      self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
    else:
      self._answer({"error": self.path}, status=404)

  def do_GET(self) -> None:
    if self.headers.get("Authorization") == "Bearer wrong":
      wrong = "Invalid credentials in Authorization header"
      self._answer({"error": wrong}, status=401, X_Error_Message=wrong)
      return
    if "/me/private" in self.path:
      self._answer({"error": "Repository not found"}, status=401, X_Error_Code="RepoNotFound")
      return
    if "/me/gated" in self.path:
      self._answer({"error": "Ask"}, status=403, X_Error_Code="GatedRepo")
      return
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", self.path):
      files = sorted(path.name for path in (self.root / found[1]).glob("*"))
      if files:
        siblings = [{"rfilename": name} for name in files]
        self._answer({"id": found[1], "sha": COMMIT, "siblings": siblings})
        return
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", self.path):
      files = sorted((self.root / found[1]).glob("*"))
      kept = [(path.name, path.stat().st_size) for path in files]
      self._answer([{"type": "file", "path": x, "size": size, "oid": x} for x, size in kept])
      return
    elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
      path = self.root / found[1] / found[2]
      if path.is_file():
        self._answer(content=path.read_bytes())
        return
    self._answer({"error": "Repository not found"}, status=404)

  do_HEAD = do_GET


@contextlib.contextmanager
def running(root: Path) -> Iterator[str]:
  """The address of a hub that keeps its models in a folder."""
  server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": root}))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()


def variables(address: str, cache: Path) -> dict[str, str]:
  """Of a process that asks the hub at an address."""
  return {
    "HF_ENDPOINT": address,
    "HF_HOME": str(cache),
    "HF_TOKEN": "good",
    "HF_HUB_OFFLINE": "0",
  }
