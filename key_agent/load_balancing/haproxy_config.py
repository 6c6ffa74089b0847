"""HAProxy's configuration for several environments, as text: every line has a reason.

1. Servers begin `disabled`: the first `up ready` opens one, so that a restart sends nothing to an environment
   that heals before the first check.
2. `retry-on 503` with redispatch makes a breach invisible to callers: the environment refuses by itself, and
   the request goes to another one. A request is sent again only if all of it lay in the buffer when it was
   sent first, and only where nothing is changed by doing it twice: the encryption service's own paths, in
   every dialect. So HAProxy waits for the body there: without that it sends a request's head as soon as it
   has it, and whoever sends the body in a packet of its own gets the 503.
3. Never a fallback to a server that is down: with none left, 503 `no_environment` and Retry-After.
4. `weight 100`: a percentage of the default weight 1 would be none. No cookies, no stick tables: anybody can
   open what any other has sealed.
"""

import json
from collections.abc import Iterable
from typing import Final

from key_agent.load_balancing.settings import FrontendSettings, Rule, Server, Settings

RETRIED_PATHS: Final = "{ path_beg /sealgate/v1/ /v1/ } || { path_sub /kms/xks/v1/ }"
"""Native, transit, XKS; KACLS stands where a tenant's settings put it, so its callers see the 503."""
BUFFER_BYTES: Final = 65536
BODY_WAIT_S: Final = 75
"""For the body, or as much of it as the buffer takes. The service bears 1 KiB/s after its first 10 s."""


def _problem(**content: str | int) -> str:
    """RFC 9457, as a word of the configuration."""
    return json.dumps(json.dumps({"type": "about:blank", **content}, separators=(",", ":")))


_NO_ENVIRONMENT: Final = _problem(
    title="Service Unavailable",
    status=503,
    code="no_environment",
    detail="No environment is sound at the moment.",
    next_step="Try again as Retry-After says.",
)
_TOO_SLOW: Final = _problem(
    title="Request Timeout",
    status=408,
    code="request_timeout",
    detail=f"The head, or the first {BUFFER_BYTES >> 10} KiB of the body, did not arrive in time.",
    next_step="Send it again, without pauses.",
)


def haproxy_config(settings: Settings) -> str:
    """The whole file."""
    front = settings.frontend
    parts = [_global(front), _DEFAULTS, _frontend(front, settings.servers), _any(settings)]
    if front.rule is Rule.GEO:
        parts += [_geo(front, geo, settings.servers) for geo in _geos(settings.servers)]
    return "\n".join(parts)


_DEFAULTS: Final = f"""\
defaults
  mode http
  log global
  option httplog
  option dontlognull
  option redispatch 1
  retries 2
  retry-on conn-failure empty-response 503
  timeout connect 500ms
  timeout client 60s
  timeout server 15s
  timeout http-request 10s
  timeout queue 2s
  http-error status 408 content-type "application/problem+json" string {_TOO_SLOW}
  http-error status 503 content-type "application/problem+json" string {_NO_ENVIRONMENT} hdr Retry-After 2
"""


def _global(front: FrontendSettings) -> str:
    lines = ["# Written by `key-agent lb config`: change its settings, not this file.", "global"]
    lines += [f"  tune.bufsize {BUFFER_BYTES}", "  log stderr format raw local0 notice"]
    lines.append("  ssl-default-bind-options ssl-min-ver TLSv1.2")
    if front.stats_socket is not None:
        group = front.stats_socket_group
        mode = f"mode 660 group {group}" if group else "mode 600"
        lines.append(f"  stats socket {front.stats_socket} {mode} level admin")
    return "\n".join([*lines, ""])


def _frontend(front: FrontendSettings, servers: Iterable[Server]) -> str:
    tls = f" ssl crt {front.certificate_file} alpn http/1.1" if front.certificate_file is not None else ""
    lines = ["frontend callers", f"  bind {front.bind}{tls}"]
    lines.append(f"  http-request disable-l7-retry unless {RETRIED_PATHS}")
    lines.append(f"  http-request wait-for-body time {BODY_WAIT_S}s if {RETRIED_PATHS}")
    if front.rule is Rule.GEO:
        trusted = " ".join(front.trusted_networks)
        lines.append(
            "  http-request del-header Sealgate-Region" + (f" unless {{ src {trusted} }}" if trusted else "")
        )
        found = "{ req.hdr(Sealgate-Region) -m found }"
        lines.append(f"  http-request set-var(txn.geo) req.hdr(Sealgate-Region),lower if {found}")
        if front.geo_map_file is not None:
            lines.append(
                f"  http-request set-var(txn.geo) src,map_ip({front.geo_map_file},any) "
                "if !{ var(txn.geo) -m found }"
            )
        for geo in _geos(servers):
            sound = "" if front.strict_geo else f" {{ nbsrv(geo_{geo}) gt 0 }}"
            lines.append(f"  use_backend geo_{geo} if {{ var(txn.geo) -m str {geo.lower()} }}{sound}")
    lines.append("  default_backend any")
    return "\n".join([*lines, ""])


def _any(settings: Settings) -> str:
    front, mine = settings.frontend, settings.lb_agent
    lines = ["backend any", "  balance random(2)", "  option httpchk GET /readyz"]
    lines.append("  default-server check inter 500ms fall 2 rise 2 weight 100 disabled")
    lines.append("  default-server on-marked-down shutdown-sessions")
    asked = f"agent-inter {front.agent_inter_ms}ms agent-addr {mine.host} agent-port {mine.port}"
    lines.append(f"  default-server agent-check {asked}")
    lines += [_server(front, server) for server in settings.servers]
    return "\n".join([*lines, ""])


def _server(front: FrontendSettings, server: Server) -> str:
    tls = f" ssl verify required ca-file {front.server_ca_file}" if front.server_ca_file is not None else ""
    host, _, port = server.status_url.partition("://")[2].rpartition(":")
    secure = " check-ssl" if server.status_url.startswith("https://") else " no-check-ssl"
    check = f" addr {host} port {port}{secure}"
    return f'  server {server.name} {server.address}{tls}{check} agent-send "{server.name}\\n"'


def _geo(front: FrontendSettings, geo: str, servers: Iterable[Server]) -> str:
    tls = f" ssl verify required ca-file {front.server_ca_file}" if front.server_ca_file is not None else ""
    lines = [f"backend geo_{geo}", "  balance random(2)"]
    lines += [
        f"  server {server.name} {server.address}{tls} weight 100 track any/{server.name}"
        for server in servers
        if server.geo == geo
    ]
    return "\n".join([*lines, ""])


def _geos(servers: Iterable[Server]) -> list[str]:
    return sorted({server.geo for server in servers if server.geo is not None})
