import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import override

import pytest
import structlog
from prometheus_client import generate_latest

from envelope.keys import KeyId, KeyState, NetworkService
from runtime.observe import (
    LOST_LOG_LINES,
    REGISTRY,
    configure_logging,
    is_secret_name,
    make_registry,
    redact,
)


@dataclass
class Careless:
    """Its repr shows what it holds."""

    secret: bytes


class Terminal(io.StringIO):
    @override
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    @override
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure_logging(json=True, stream=stream)
    return stream


def test_json_lines(stream: io.StringIO) -> None:
    structlog.get_logger().info(
        "pushed", service="acme/s3", count=3, kid=KeyId(bytes(16)), state=KeyState.ACTIVE
    )
    (line,) = lines(stream)
    assert line["event"] == "pushed"
    assert line["level"] == "info"
    assert str(line["timestamp"]).endswith("Z")
    assert (line["service"], line["count"], line["state"]) == ("acme/s3", 3, "active")
    assert line["kid"] == "0" * 32


def test_json_unless_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        configure_logging(stream=stream)
        structlog.get_logger().info("pushed", service="acme/s3")
    assert lines(plain)
    assert not terminal.getvalue().startswith("{")
    assert "pushed" in terminal.getvalue()


def test_logs_go_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    structlog.get_logger().info("x")
    output, errors = capsys.readouterr()
    assert output == ""
    assert json.loads(errors)["event"] == "x"


@pytest.mark.parametrize(
    "name",
    [
        "pin", "PIN", "user_pin", "password", "db_password", "client_secret", "secret",
        "Authorization", "cookie", "set-cookie", "Set-Cookie", "token", "session_token",
        "private_key", "object_key", "key", "keys", "km", "key_material", "passphrase",
        "proxy-authorization", "apiToken", "signingKey", "secret_value", "plaintext",
    ],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "key_id", "kid", "key_file", "pin_file", "token_label", "token_serial",
        "token_id", "service", "tenant", "key_state", "kek_id", "path", "method",
        "shipping", "opinion", "spinning", "monkey", "seq", "key_count", "token_url",
        "material_bytes",
    ],
)  # fmt: skip
def test_harmless_names(name: str) -> None:
    assert not is_secret_name(name)


def test_no_name() -> None:
    assert not is_secret_name("")


@pytest.mark.parametrize("json_wanted", [True, False])
def test_secrets_are_not_logged(json_wanted: bool) -> None:
    stream = io.StringIO()
    configure_logging(json=json_wanted, stream=stream)
    secret = b"\x01s3cr3t"
    log = structlog.get_logger().bind(bound_pin="s3cr3t")
    try:
        local = secret
        raise ValueError(f"{len(local)} bytes")  # noqa: TRY301
    except ValueError:
        log.exception(
            "failed",
            password="s3cr3t",
            raw=secret,
            buffer=bytearray(secret),
            view=memoryview(secret),
            nested={"pin": "s3cr3t", "list": [secret, {"token": "s3cr3t"}]},
            careless=Careless(secret),
            several=(secret, Careless(secret)),
            hsm_pin=12345678,
            key_id="visible",
        )
    text = stream.getvalue()
    assert "s3cr3t" not in text
    assert "12345678" not in text
    assert "visible" in text
    assert "<7 bytes>" in text
    assert "<Careless>" in text
    assert "ValueError: 7 bytes" in text  # the traceback is there ...
    assert "local = " not in text or "local = secret" in text  # ... its source lines, but no values


def test_the_stdlibs_logs_take_the_same_road(stream: io.StringIO) -> None:
    logging.getLogger("mitmproxy").info("too much")
    logging.getLogger("some.library").warning("odd %s", "thing", extra={"password": "s3cr3t"})
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == ("odd thing", "some.library", "warning")
    assert "s3cr3t" not in stream.getvalue()
    assert logging.getLogger().level == logging.WARNING


def test_a_libraries_exception_shows_no_values(stream: io.StringIO) -> None:
    try:
        pin = "s3cr3t"
        raise RuntimeError(len(pin))  # noqa: TRY301
    except RuntimeError:
        logging.getLogger("library").exception("failed")
    (line,) = lines(stream)
    assert "RuntimeError: 6" in str(line["exception"])
    assert "s3cr3t" not in stream.getvalue().replace('pin = \\"s3cr3t\\"', "")


def test_a_record_that_cannot_be_formatted_does_not_end_its_caller(stream: io.StringIO) -> None:
    (ours,) = (handler for handler in logging.getLogger().handlers if "observe" in type(handler).__module__)
    before = LOST_LOG_LINES._value.get()
    ours.handle(logging.LogRecord("library", logging.WARNING, "file", 1, "%d", ("not a number",), None))
    assert LOST_LOG_LINES._value.get() == before + 1


def test_a_log_that_cannot_be_written_costs_lines_not_the_service() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        configure_logging(json=True, stream=stream)
        before = LOST_LOG_LINES._value.get()
        structlog.get_logger().info("x")
        logging.getLogger("library").warning("y")
        assert LOST_LOG_LINES._value.get() == before + 2


def test_configuring_twice_writes_once() -> None:
    stream = io.StringIO()
    configure_logging(json=True, stream=io.StringIO())
    configure_logging(json=True, stream=stream)
    logging.getLogger("library").warning("once")
    structlog.get_logger().info("once")
    assert len(lines(stream)) == 2


def test_levels(stream: io.StringIO) -> None:
    structlog.get_logger().debug("hidden")
    configure_logging(json=True, stream=stream, level=logging.DEBUG)
    structlog.get_logger().debug("shown")
    assert [line["event"] for line in lines(stream)] == ["shown"]


def test_redact_keeps_what_may_be_seen() -> None:
    assert redact({"a": 1, "b": [True, None, 1.5, "x"]}) == {"a": 1, "b": [True, None, 1.5, "x"]}
    assert redact(Path("/a/b")) == "/a/b"
    assert redact(NetworkService("acme", "s3")) == "acme/s3"
    assert redact(ValueError("x")) == "ValueError: x"
    assert redact({"has_pin": None, "pin": True}) == {"has_pin": None, "pin": True}


def test_metrics_are_ours() -> None:
    names = generate_latest(REGISTRY).decode()
    assert "sealgate_log_lines_lost_total" in names
    assert "sealgate_process_resident_memory_bytes" in names
    assert make_registry() is not make_registry()
