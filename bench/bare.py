"""The baseline: mitmproxy by itself, streaming, only the addons it needs. A process of its own.

Not `mitmdump`, which takes twice as long per request: this is what a careful user gets without patches. With
`--levers` and `--uvloop` it shows what each lever brings (`make bench ONLY=levers`).
"""

import argparse
import asyncio
import logging

from mitmproxy import http, master, options
from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
from mitmproxy.proxy import mode_specs

from proxy.gate import h2, levers


class Streaming:
    """Pass every body on as it comes."""

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        flow.request.stream = True

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response:
            flow.response.stream = True


async def serve(arguments: argparse.Namespace) -> None:
    opts = options.Options()
    server = proxyserver.Proxyserver()  # type: ignore[no-untyped-call]
    bare = master.Master(opts)
    addons = (core.Core(), server, next_layer.NextLayer(), tlsconfig.TlsConfig(), Streaming())
    bare.addons.add(*addons)  # type: ignore[no-untyped-call]
    spec = f"reverse:https://localhost:{arguments.origin_port}@127.0.0.1:{arguments.port}"
    mode_specs.ProxyMode.parse(spec).transport_protocol = "tcp"  # type: ignore[misc]
    opts.update(  # type: ignore[no-untyped-call]
        mode=[spec],
        certs=[f"*={arguments.certificate}"],
        ssl_verify_upstream_trusted_ca=arguments.ca,
        tls_version_server_min="TLS1_3",
        tls_version_client_min="TLS1_3",
        connection_strategy="lazy",
        http2=True,
        http3=False,
        rawtcp=False,
        websocket=False,
    )
    if levers.Lever.FROZEN_HEAP in arguments.levers:
        asyncio.get_running_loop().call_later(2, levers.warmed_up)
    if not arguments.uvloop:
        await bare.run()
    # `run` puts a task factory on the loop that uvloop 0.23 cannot use on Python < 3.13.3.
    await server.setup_servers()
    await bare.running()
    await asyncio.Event().wait()


def _levers(names: str) -> frozenset[levers.Lever]:
    return frozenset(levers.Lever(name) for name in names.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--origin-port", type=int, required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--certificate", required=True, help="PEM with key and chain")
    parser.add_argument("--levers", type=_levers, default=frozenset(), help="names, comma separated")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--http2-backpressure", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    if arguments.levers:
        levers.install(arguments.levers)
    if arguments.http2_backpressure:
        h2.install()
    if arguments.uvloop:
        import uvloop  # noqa: PLC0415 - part of what is compared

        uvloop.run(serve(arguments))
    else:
        asyncio.run(serve(arguments))


if __name__ == "__main__":
    main()
