"""Sessions with services, by real handshakes in memory: what is taken up again, and what must not be."""

from typing import Final

import pytest
from OpenSSL import SSL

from proxy.sessions import MAX_PLACES, MAX_SESSIONS, VERIFIED_S, Handshake, Place, UpstreamSessions
from tests import pki
from tests.fakes.clock import ManualClock

PLACE: Final[Place] = (
    "reverse:https://files.example:443@127.0.0.1:8443",
    "files.example",
    443,
    "files.example",
)


class Service:
    """A service that takes sessions up, as nginx does, and one client context, as the engine has."""

    def __init__(self) -> None:
        credential = pki.issue_server(pki.make_server_ca())
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        self._context.use_certificate(credential.certificate)
        self._context.use_privatekey(credential.key)
        self._context.set_session_id(b"service")
        self._client_context = SSL.Context(SSL.TLS_CLIENT_METHOD)

    def connect(
        self, sessions: UpstreamSessions, place: Place = PLACE, *, succeeds: bool = True
    ) -> tuple[Handshake, bool]:
        """One connection up to where it can end, and whether its handshake took a session up."""
        client, server = SSL.Connection(self._client_context), SSL.Connection(self._context)
        handshake = sessions.resume(place, client)
        client.set_connect_state()
        server.set_accept_state()
        pending = [client, server]
        while pending:
            for connection in tuple(pending):
                try:
                    connection.do_handshake()
                    pending.remove(connection)
                except SSL.WantReadError:
                    pass
                _exchange(client, server)
        server.send(b"200 OK")
        _exchange(client, server)
        assert client.recv(100) == b"200 OK"  # and the tickets before it
        if succeeds:
            handshake.succeeded(client)
        reused = SSL._lib.SSL_session_reused(client._ssl) == 1  # type: ignore[attr-defined]
        return handshake, reused

    def visit(self, sessions: UpstreamSessions, place: Place = PLACE) -> bool:
        """A whole connection; True if a session was taken up."""
        handshake, reused = self.connect(sessions, place)
        handshake.ended()
        return reused


def _exchange(one: SSL.Connection, other: SSL.Connection) -> None:
    for source, sink in ((one, other), (other, one)):
        try:
            sink.bio_write(source.bio_read(1 << 16))
        except SSL.WantReadError:
            continue


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def service() -> Service:
    return Service()


def test_the_next_connection_takes_the_session_up(service: Service, clock: ManualClock) -> None:
    sessions = UpstreamSessions(clock)
    assert [service.visit(sessions) for _ in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("field", range(len(PLACE)))
def test_no_other_place_does(service: Service, clock: ManualClock, field: int) -> None:
    sessions = UpstreamSessions(clock)
    service.visit(sessions)
    listener, host, port, name = PLACE
    others: list[Place] = [
        ("regular@127.0.0.1:8443", host, port, name),
        (listener, "other.example", port, name),
        (listener, host, 8443, name),
        (listener, host, port, "other.example"),
    ]
    assert not service.visit(sessions, others[field])


def test_no_other_tenant_does(service: Service, clock: ManualClock) -> None:
    service.visit(UpstreamSessions(clock))
    assert not service.visit(UpstreamSessions(clock))


def test_a_session_is_used_once(service: Service, clock: ManualClock) -> None:
    sessions = UpstreamSessions(clock)
    service.visit(sessions)
    one, first_reused = service.connect(sessions)
    other, second_reused = service.connect(sessions)
    assert (first_reused, second_reused) == (True, False)
    one.ended()
    other.ended()
    assert [service.connect(sessions)[1] for _ in range(3)] == [True, True, False]


def test_a_certificate_is_seen_again_after_a_while_though_sessions_follow_each_other(
    service: Service, clock: ManualClock
) -> None:
    sessions = UpstreamSessions(clock)
    service.visit(sessions)
    for _ in range(2):
        clock.shift(VERIFIED_S / 3)
        assert service.visit(sessions)
    clock.shift(VERIFIED_S / 3)
    assert not service.visit(sessions)
    assert service.visit(sessions)


def test_a_handshake_that_failed_leaves_none(service: Service, clock: ManualClock) -> None:
    sessions = UpstreamSessions(clock)
    handshake, _ = service.connect(sessions, succeeds=False)
    handshake.ended()
    assert not service.visit(sessions)


def test_the_number_is_bounded(service: Service, clock: ManualClock) -> None:
    sessions = UpstreamSessions(clock)
    handshakes = [service.connect(sessions)[0] for _ in range(MAX_SESSIONS + 2)]
    for handshake in handshakes:
        handshake.ended()
    assert [service.connect(sessions)[1] for _ in range(MAX_SESSIONS + 1)] == [True] * MAX_SESSIONS + [False]
    for handshake in handshakes:
        handshake.ended()  # again: of no effect
    assert not service.connect(sessions)[1]
    service.visit(sessions)
    for port in range(MAX_PLACES):
        sessions.resume(
            (PLACE[0], "n.example", port, "n.example"), SSL.Connection(SSL.Context(SSL.TLS_METHOD))
        )
    assert service.visit(sessions)  # asking alone keeps nothing
