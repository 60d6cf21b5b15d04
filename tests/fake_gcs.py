"""Google Cloud Storage in this process, as far as TensorStore and gcsfs ask.

Objects in memory, by the JSON API: media, multipart and resumable uploads, conditions, ranges,
listings, copies, deletions. `with FakeGcs() as gcs:` serves it; `gcs.variables` are the environment
of processes that shall take it for the real one.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

_PATH = re.compile(r"^(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?$")
_COPY = re.compile(r"^(.*)/(moveTo|rewriteTo)/(?:b/[^/]+/)?o/(.*)$")


class FakeGcs:
  """The server of one bucket; whatever its name, it is the same.

  Attributes:
    objects: name -> (content, generation).
    asked: the method of each request, such as GET.
    variables: environment of its clients.
  """

  def __init__(self) -> None:
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.asked: list[str] = []
    self.uploads: dict[str, tuple[str, bytes]] = {}
    self.lock = threading.Lock()
    self._generation = 1000
    handler = type("Handler", (_Handler,), {"gcs": self})
    self._server = ThreadingHTTPServer(("localhost", 0), handler)
    self._server.handle_error = lambda *_: None  # clients hang up as they like
    address = f"http://localhost:{self._server.server_port}"
    self.variables = {
      "STORAGE_EMULATOR_HOST": address,
      "TENSORSTORE_GCS_HTTP_URL": address,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
      "NO_GCE_CHECK": "true",
    }

  def __enter__(self) -> FakeGcs:
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()

  def write(self, name: str, content: bytes) -> dict[str, str]:
    """Makes an object; what the API tells of it."""
    with self.lock:
      self._generation += 1
      self.objects[name] = (content, self._generation)
    return self.about(name)

  def copy(self, folder: Path, name: str) -> None:
    """Makes objects NAME/... of the files of a folder."""
    for path in folder.rglob("*"):
      if path.is_file():
        self.write(f"{name}/{path.relative_to(folder)}", path.read_bytes())

  def about(self, name: str) -> dict[str, str]:
    """What the API tells of an object."""
    content, generation = self.objects[name]
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": "bucket",
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }


class _Handler(BaseHTTPRequestHandler):
  gcs: FakeGcs
  protocol_version = "HTTP/1.1"

  def log_message(self, *_: Any) -> None:
    """Says nothing."""

  def log_request(self, *_: Any) -> None:
    """Notes what was asked."""
    self.gcs.asked.append(self.command)

  def _answer(self, code: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _missing(self) -> None:
    self._answer(404, {"error": {"code": 404, "message": f"there is no {self.path}"}})

  def _ask(self) -> tuple[str, dict[str, str], str | None]:
    """(path, query, name of the object if one is meant)."""
    url = urlsplit(self.path)
    match = _PATH.match(url.path)
    return url.path, dict(parse_qsl(url.query)), match[2] if match else None

  def do_GET(self) -> None:
    """Content, what is known of an object, or a listing."""
    path, query, name = self._ask()
    if name is None:
      self._answer(200, self._listing(query) if path.endswith("/o") else {"name": "bucket"})
      return
    name = unquote(name)
    if name not in self.gcs.objects:
      self._missing()
      return
    content, generation = self.gcs.objects[name]
    if query.get("alt") != "media" and not path.startswith("/download"):
      self._answer(200, self.gcs.about(name))
      return
    headers = {"x-goog-generation": str(generation)}
    if query.get("ifGenerationNotMatch") == str(generation):
      self._answer(304)
    elif found := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first, last = found.groups()
      begin = int(first) if first else len(content) - int(last)
      end = min(int(last), len(content) - 1) if first and last else len(content) - 1
      headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
      self._answer(206, content[begin : end + 1], headers)
    else:
      self._answer(200, content, headers)

  def _listing(self, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, folders = [], set()
    for name in sorted(self.gcs.objects):
      rest = name.removeprefix(prefix)
      before, after = query.get("startOffset", ""), query.get("endOffset")
      if not name.startswith(prefix) or name < before or (after and name >= after):
        continue
      if delimiter and delimiter in rest:
        folders.add(prefix + rest.split(delimiter)[0] + delimiter)
      else:
        items.append(self.gcs.about(name))
    return {"items": items, "prefixes": sorted(folders)}

  def do_POST(self) -> None:
    """Uploads and copies."""
    path, query, name = self._ask()
    content = self._body()
    if name and (copied := _COPY.match(name)):
      source, verb, target = (unquote(word) for word in copied.groups())
      if source not in self.gcs.objects:
        self._missing()
        return
      about = self.gcs.write(target, self.gcs.objects[source][0])
      if verb == "moveTo":
        self.gcs.objects.pop(source)
      self._answer(200, about if verb == "moveTo" else {"done": True, "resource": about})
      return
    if path.startswith("/resumed/"):
      self.do_PUT(content)
      return
    name, kind = query.get("name", ""), query.get("uploadType")
    if kind == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
      assert boundary
      _, about, body, _ = content.split(b"--" + boundary[1].encode())
      about, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, body))
      name, content = json.loads(about)["name"], re.sub(rb"\r?\n$", b"", body)
    elif kind == "resumable":
      name = name or json.loads(content)["name"]
      with self.gcs.lock:
        key = str(len(self.gcs.uploads))
        self.gcs.uploads[key] = (name, b"")
      self._answer(200, b"", {"Location": f"http://{self.headers['Host']}/resumed/{key}"})
      return
    wanted = query.get("ifGenerationMatch")
    if wanted and int(wanted) != self.gcs.objects.get(name, (b"", 0))[1]:
      self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
      return
    self._answer(200, self.gcs.write(name, content))

  def do_PUT(self, content: bytes | None = None) -> None:
    """A piece of a resumable upload."""
    key = self.path.rsplit("/", 1)[1]
    name, before = self.gcs.uploads[key]
    whole = before + (self._body() if content is None else content)
    self.gcs.uploads[key] = (name, whole)
    if self.headers.get("Content-Range", "").endswith("/*"):
      self._answer(308, b"", {"Range": f"bytes=0-{len(whole) - 1}"})
    else:
      self._answer(200, self.gcs.write(name, whole))

  def do_DELETE(self) -> None:
    """Takes an object away."""
    _, _, name = self._ask()
    with self.gcs.lock:
      found = self.gcs.objects.pop(unquote(name or ""), None)
    if found:
      self._answer(204)
    else:
      self._missing()

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    pieces = []
    while size := int(self.rfile.readline(), 16):
      pieces.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(pieces)
