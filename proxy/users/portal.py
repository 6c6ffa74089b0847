"""What a tenant's users need to reach its forward proxy: a PAC file, the interception CA, a page about both.

1. Nothing here is secret, and nothing here changes anything: GET of what stands in the directory.
2. The PAC file sends managed hosts to the tenant's proxies, one after the other, and never past them: with
   all of them down a managed host is out of reach, not in the clear. Other hosts go where they always went.
3. Everything in the script was checked when it was provisioned (names, addresses) and is quoted once more.
4. A CA that is downloaded has to be compared: the page shows its SHA-256, and the administrator has the same
   from `sealgate tenant ca`. Serve the portal by TLS where the network is not trusted.
"""

import html
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import fingerprint
from proxy.plans.routing import managed_hosts
from proxy.tenants.certificates import CredentialError, read_certificate
from proxy.tenants.model import Directory, TenantEntry
from runtime.serve import ProblemError, make_application

PAC_TYPE: Final = "application/x-ns-proxy-autoconfig"
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def pac_script(hosts: Iterable[str], proxies: Iterable[str], *, by_tls: bool = False) -> str:
    """The PAC file: *hosts* (`*.domain` for all below it) go to *proxies* in turn, the rest directly.

    JavaScript as browsers take it: ES3, no library functions that resolve names (they would leak them).
    """
    word = "HTTPS" if by_tls else "PROXY"
    way = "; ".join(f"{word} {proxy}" for proxy in proxies)
    exact = sorted(host for host in hosts if not host.startswith("*."))
    below = sorted(host[1:] for host in hosts if host.startswith("*."))
    return f"""\
function FindProxyForURL(url, host) {{
  var exact = {json.dumps(exact)};
  var below = {json.dumps(below)};
  var name = host.toLowerCase();
  if (name.charAt(name.length - 1) === ".") name = name.substring(0, name.length - 1);
  var managed = false;
  for (var i = 0; i < exact.length; i++) if (name === exact[i]) managed = true;
  for (var j = 0; j < below.length; j++) {{
    var end = below[j];
    if (name.length > end.length && name.substring(name.length - end.length) === end) managed = true;
  }}
  return managed ? {json.dumps(way)} : "DIRECT";
}}
"""


def proxies_of(tenant: TenantEntry) -> tuple[str, ...]:
    """As users reach them: what was provisioned, else the listener, unless it listens at every address."""
    listen = tenant.forward_listen
    if tenant.access.proxies or listen is None:
        return tenant.access.proxies
    return () if listen.host in {"0.0.0.0", "::"} else (str(listen),)


def make_portal(directory: Callable[[], Directory]) -> web.Application:
    """The portal's application; *directory* gives the picture that is served."""

    def tenant_of(request: web.Request) -> TenantEntry:
        entry = directory().tenants.get(request.match_info["tenant"])
        if entry is None or entry.forward_listen is None:
            raise ProblemError(
                404, "not-there", "There is no forward proxy of this tenant here.", "Check the address."
            )
        return entry

    def authority_of(entry: TenantEntry) -> x509.Certificate:
        try:
            return read_certificate(entry.interception_ca.certificate_file)
        except CredentialError:
            raise ProblemError(
                503, "unreadable", "The interception CA cannot be read.", "Run `sealgate doctor`."
            ) from None

    async def pac(request: web.Request) -> web.Response:
        entry = tenant_of(request)
        proxies = proxies_of(entry)
        if not proxies:
            raise ProblemError(
                404,
                "no-address",
                "The proxy does not know by which address its users reach it.",
                f"sealgate tenant access {entry.tenant} --proxy HOST:PORT",
            )
        script = pac_script(
            managed_hosts(directory(), entry.tenant), proxies, by_tls=entry.access.proxies_speak_tls
        )
        return web.Response(text=script, content_type=PAC_TYPE, headers=_HEADERS)

    async def pem(request: web.Request) -> web.Response:
        entry = tenant_of(request)
        return _file(
            authority_of(entry).public_bytes(Encoding.PEM), "application/x-pem-file", f"{entry.tenant}-ca.pem"
        )

    async def der(request: web.Request) -> web.Response:
        entry = tenant_of(request)
        return _file(
            authority_of(entry).public_bytes(Encoding.DER),
            "application/x-x509-ca-cert",
            f"{entry.tenant}-ca.crt",
        )

    async def page(request: web.Request) -> web.Response:
        entry = tenant_of(request)
        return web.Response(
            text=_page(entry, authority_of(entry), directory()), content_type="text/html", headers=_HEADERS
        )

    application = make_application()
    application.router.add_get("/{tenant}/", page)
    application.router.add_get("/{tenant}/proxy.pac", pac)
    application.router.add_get("/{tenant}/ca.pem", pem)
    application.router.add_get("/{tenant}/ca.crt", der)
    return application


def _file(content: bytes, content_type: str, name: str) -> web.Response:
    headers = {**_HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
    return web.Response(body=content, content_type=content_type, headers=headers)


def _page(entry: TenantEntry, authority: x509.Certificate, directory: Directory) -> str:
    digest = fingerprint(authority).hex().upper()
    shown = ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))
    until = authority.not_valid_after_utc.astimezone(UTC)
    proxies = "".join(f"<li><code>{html.escape(proxy)}</code></li>" for proxy in proxies_of(entry))
    hosts = "".join(
        f"<li><code>{html.escape(host)}</code></li>" for host in managed_hosts(directory, entry.tenant)
    )
    return f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Sealgate for {html.escape(entry.tenant)}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 42rem; margin: 2rem auto; padding: 0 1rem; }}
code {{ overflow-wrap: anywhere; }}
</style>
<h1>Sealgate for {html.escape(entry.tenant)}</h1>
<p>Files you keep in the services below are encrypted before they leave for them, with keys that your
organisation alone holds. Two steps, once per machine:</p>
<ol>
<li>Trust the certificate authority of this proxy: <a href="ca.crt">ca.crt</a> (Windows, macOS, phones) or
<a href="ca.pem">ca.pem</a> (Linux, command-line tools). Compare its SHA-256 with the one your administrator
tells you:<br><code>{shown}</code><br>It ends on {_day(until)}.</li>
<li>Set the automatic proxy configuration to this page's address with <a href="proxy.pac">proxy.pac</a>
at its end.</li>
</ol>
<h2>Services</h2>
<ul>{hosts or "<li>none yet</li>"}</ul>
<h2>Proxies</h2>
<ul>{proxies or "<li>ask your administrator</li>"}</ul>
</html>
"""


def _day(moment: datetime) -> str:
    return f"{moment:%d %B %Y}"
