"""What operators see: structured logs, metrics.

1. Logs are JSON lines on stderr, pretty on a terminal. stdout belongs to the commands' results.
2. Nothing secret is logged by accident: values under secret-looking names and all bytes are replaced, also
   inside nested values. Tracebacks are plain: no local variables (structlog's rich and dict formatters print
   them).
3. Logs of other libraries (stdlib logging) take the same road, from WARNING on: in the proxy each record of
   theirs becomes an event that mitmproxy hands to all its addons (mitmproxy/log.py, LegacyLogEvents).
4. A log that cannot be written (stderr closed, disk full) costs lines, not the service; lost lines are
   counted. What must not be lost is an audit event (runtime/audit.py).
5. Metrics live in a registry of our own, named `sealgate_...`; labels hold names from closed sets, never user
   input.
"""

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO, override

import structlog
from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector

NAMESPACE: Final = "sealgate"

_SECRET_WORDS: Final = frozenset(
    {
        "authorization", "bearer", "cookie", "credential", "credentials", "ekm", "km", "material",
        "passphrase", "passwd", "password", "pin", "plaintext", "secret", "secrets", "token", "tokens",
    }
)  # fmt: skip
# Of a compound name the last word says what it is: `pin_file` is a path, `token_label` a label, `object_key`
# a key.
_SECRET_ENDINGS: Final = _SECRET_WORDS | {"key", "keys"}
_HARMLESS_ENDINGS: Final = frozenset(
    {
        "age", "bytes", "code", "count", "file", "id", "ids", "label", "length", "name", "ms", "path", "s",
        "serial", "sha256", "size", "state", "type", "uri", "use", "url",
    }
)  # fmt: skip
_WORD: Final = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")


def make_registry() -> CollectorRegistry:
    """A registry with the process's own figures (memory, descriptors, garbage collection)."""
    registry = CollectorRegistry()
    ProcessCollector(namespace=NAMESPACE, registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


REGISTRY: Final = make_registry()
LOST_LOG_LINES: Final = Counter(
    "log_lines_lost", "Log lines that could not be written", namespace=NAMESPACE, registry=REGISTRY
)


def is_secret_name(name: str) -> bool:
    """Whether a value of this name is not to be shown."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _HARMLESS_ENDINGS:
        return False
    return words[-1] in _SECRET_ENDINGS or not _SECRET_WORDS.isdisjoint(words)


def redact(value: object, name: str = "") -> object:
    """*value* as JSON-able data without what must not be shown."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if value is not None and not isinstance(value, bool) and is_secret_name(name):
        return "<redacted>"
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if type(value).__str__ is not object.__str__:
        return str(value)
    # A repr was written for debuggers, not for logs.
    return f"<{type(value).__name__}>"


def configure_logging(
    *, json: bool | None = None, level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Set up structlog and the stdlib's logging for this process.

    *json* None: JSON unless *stream* (stderr) is a terminal. *level* is for our own events (rule 3).
    """
    stream = sys.stderr if stream is None else stream
    pretty = stream.isatty() if json is None else not json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _redact_event,
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, sort_keys=False)]
        if pretty
        else [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    sink = _Sink(stream)
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    handler = _SinkHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _SinkHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


def _redact_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        # structlog's own entries: the record and the exception are rendered further down.
        if not name.startswith("_") and name not in {"event", "exc_info", "stack"}:
            event[name] = redact(value, name)
    return event


class _Sink:
    """Writes lines, and survives not being able to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            LOST_LOG_LINES.inc()

    # structlog calls the method of the level.
    debug = info = warning = error = critical = exception = fatal = warn = log = msg


class _SinkHandler(logging.Handler):
    def __init__(self, sink: _Sink) -> None:
        super().__init__()
        self._sink = sink

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a record whose arguments do not fit must not end its caller
            LOST_LOG_LINES.inc()
            return
        self._sink.msg(line)
