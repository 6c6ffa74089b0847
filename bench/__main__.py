"""`python -m bench [ONLY]`: run the comparisons, write bench/results.json, print a table.

ONLY is a row's name or the beginning of it (`proxy_put`, `core`). Exit status 1 if a part did not run; a goal
that is missed is reported, not an error.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from bench import agent, core, environments, key_sets, levers, proxies, rejoin, results, s3, service, webdav
from bench.machine import BenchError

type Rows = list[dict[str, Any]]


def _as_json(measure: Callable[[], list[results.Row]]) -> Callable[[], Rows]:
    return lambda: [row.as_json() for row in measure()]


# Rows by name -> what measures them. One measurement may give more than one row.
SUITES: Final[list[tuple[tuple[str, ...], Callable[[], Rows]]]] = [
    (("core_seal", "core_open"), core.run),
    (("proxy_put_h1", "proxy_put_nginx"), _as_json(lambda: proxies.bulk("PUT"))),
    (("proxy_get_h1", "proxy_get_nginx"), _as_json(lambda: proxies.bulk("GET"))),
    (("proxy_put_h2",), _as_json(lambda: proxies.bulk_http2("PUT"))),
    (("proxy_get_h2",), _as_json(lambda: proxies.bulk_http2("GET"))),
    (("proxy_small_put",), _as_json(lambda: proxies.small("PUT"))),
    (("proxy_small_get",), _as_json(lambda: proxies.small("GET"))),
    (("proxy_new_connections",), _as_json(proxies.new_connections)),
    (("proxy_rss_growth",), _as_json(proxies.rss_growth)),
    (webdav.NAMES, _as_json(webdav.run)),
    (s3.NAMES, _as_json(s3.run)),
    (("proxy_workers_2",), _as_json(proxies.workers)),
    (service.NAMES, _as_json(service.encrypt)),
    (("xks_p99_1800",), _as_json(service.xks)),
    (("service_noisy_neighbour",), _as_json(service.noisy_neighbour)),
    (("service_workers_2",), _as_json(service.workers)),
    (levers.NAMES, _as_json(levers.run)),
    (agent.NAMES, _as_json(agent.run)),
    (environments.NAMES, _as_json(environments.run)),
    (environments.PROXIES_NAMES, _as_json(environments.proxies)),
    (key_sets.NAMES, _as_json(key_sets.run)),
    (rejoin.NAMES, _as_json(rejoin.run)),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("only", nargs="?", default="", metavar="ONLY")
    only: str = parser.parse_args().only
    chosen = [(names, suite) for names, suite in SUITES if any(name.startswith(only) for name in names)]
    if not chosen:
        known = ", ".join(name for names, _ in SUITES for name in names)
        parser.error(f"no row begins with {only!r}; there are {known}")
    print(f"{os.cpu_count()} cores; load before: {os.getloadavg()[0]:.2f}", file=sys.stderr)
    rows: Rows = []
    failed = False
    for names, suite in chosen:
        print(f"... {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            measured = [row for row in suite() if row["name"].startswith(only)]
        except BenchError as error:
            failed = True
            print(f"error: {', '.join(names)}: {error}", file=sys.stderr)
            continue
        rows += measured
        results.save(measured)
    print(results.table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
