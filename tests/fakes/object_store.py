"""An object store behind a recording origin: keeps bodies by path, serves ranges, judges If-Match.

`POST /join?TARGET` with paths in its body, one a line, joins stored objects as services join parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fakes.origin import Exchange, RecordingOrigin, Reply


@dataclass(slots=True)
class ObjectStore:
    """Use `serve(origin)`. *between* runs before an answer is made: to change things meanwhile."""

    objects: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    between: Callable[[Exchange], None] = lambda _exchange: None
    ranges: bool = True

    def serve(self, origin: RecordingOrigin) -> None:
        origin.reply, origin.reads_first = self.reply, True

    def etag(self, path: str) -> str:
        return f'"v{self.versions.get(path, 0)}"'

    def put(self, path: str, content: bytes) -> None:
        self.objects[path] = content
        self.versions[path] = self.versions.get(path, 0) + 1

    def reply(self, exchange: Exchange) -> Reply:
        self.between(exchange)
        path, _, query = exchange.path.partition("?")
        if exchange.method == "POST" and path == "/join":
            parts = bytes(exchange.body).decode().split()
            self.put(query, b"".join(self.objects[part] for part in parts))
            return Reply(200, [("ETag", self.etag(query))], [b"joined"])
        if exchange.method in ("PUT", "POST"):
            self.put(path, bytes(exchange.body))
            return Reply(201, [("ETag", self.etag(path))], [b"created"])
        content = self.objects.get(path)
        if content is None:
            return Reply(404, [], [b"no such object"])
        if exchange.method == "DELETE":
            del self.objects[path]
            return Reply(204, [], [], framing="none")
        return self._read(exchange, path, content)

    def _read(self, exchange: Exchange, path: str, content: bytes) -> Reply:
        headers = [("ETag", self.etag(path)), ("Content-Type", "application/octet-stream")]
        wanted = exchange.header("if-match")
        if wanted is not None and wanted not in ("*", self.etag(path)):
            return Reply(412, headers, [b"changed"])
        if exchange.method == "HEAD":
            return Reply(200, [*headers, ("Content-Length", str(len(content)))], [], framing="none")
        asked = exchange.header("range")
        if asked is None or not self.ranges:
            return Reply(200, headers, [content])
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = len(content) if not first or not last else min(int(last) + 1, len(content))
        if start >= stop:
            return Reply(416, [("Content-Range", f"bytes */{len(content)}")], [b""])
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}"))
        return Reply(206, headers, [content[start:stop]])
