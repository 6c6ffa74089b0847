"""Several environments on real parts: `make demo-environments` (`KEEP=1` leaves it running).

One enterprise in three environments, each with a token and a KEK of its own kind (AES-256, RSA-3072, EC P-256), a key agent
with its own database, and a proxy; HAProxy before them. While callers seal and open without a pause, one environment is
breached by one command, re-keyed, healed and brought back. No caller may see an error. A picture of it is written.

How the environments are set up stands in demo_environments_site.py; here is what is done to them, and what is shown of
it. The stage's rules are those of deploy/stage.py.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Final, override

from deploy.demo_environments_callers import KEY_REFUSED, Callers
from deploy.demo_environments_chart import Chart, Moment, Shade
from deploy.demo_environments_load import SAMPLE_S, LoadOfCallers, Recording
from deploy.demo_environments_site import KEY, KINDS, Environment, EnvironmentsSite
from deploy.stage import BIN, DemoError, Stage, play

BREACHED: Final = "b"
COLOURS: Final = {"a": "#1f6fb2", "b": "#b35c00", "c": "#2e7d32"}
REROUTE_LIMIT_S: Final = 1.0
"""From the answer of `incident open` until the load balancer's own state is DOWN."""
SMOOTH_S: Final = 1.0


class EnvironmentsDemo(EnvironmentsSite):
    def __init__(self, stage: Stage, home: Path, *, picture: Path, seconds: float) -> None:
        """*picture*: where the SVG goes. *seconds*: of calm, before and after the breach."""
        super().__init__(stage, home)
        self.picture, self._calm_s = picture, seconds
        self.load: LoadOfCallers | None = None
        self._breached_s = self._back_s = self._up_s = 0.0
        """When `incident open` had answered, `env rejoin` was given, HAProxy said that the environment is up."""

    @property
    def breached(self) -> Environment:
        return self.environments[BREACHED]

    # The acts.

    def balance(self) -> None:
        self.stage.act(
            "4. HAProxy before them, by a configuration that the agent writes; callers begin, without stickiness"
        )
        self.build_balancer()
        callers = Callers(
            f"https://localhost:{self.front_port}", self.token, KEY, pause_s=0.025, tls=self.tls
        )
        self.load = LoadOfCallers(callers, self.statistics, KINDS)
        self.load.start()
        self._calm()
        seen = self._sealed_by_owner(since_s=0)
        self.stage.say(f"{callers.answered} calls answered; sealed by {dict(sorted(seen.items()))}")
        self.stage.verify("all three environments serve", set(seen) == set(KINDS), seen=seen)
        self._no_errors("no caller has seen an error")

    def _calm(self) -> None:
        time.sleep(self._calm_s)  # the only thing that is not waited for: time in which nothing happens

    def _sealed_by_owner(self, *, since_s: float) -> Counter[str]:
        """Bodies sealed in calls that began after *since_s*, by whose key."""
        assert self.load is not None
        sealed = [one.version for one in list(self.load.callers.sealed) if one.began_s >= since_s]
        owners = self.owners()  # read later than those: every version that sealed is in it
        return Counter(owners[version] for version in sealed)

    def _no_errors(self, claim: str) -> None:
        assert self.load is not None
        errors = self.load.callers.errors
        self.stage.verify(claim, not errors, seen=errors[:5])

    def _mark(self, text: str) -> None:
        assert self.load is not None
        self.load.recording.moments.append(Moment(self.load.recording.now_s(), text))

    def breach(self) -> None:
        self.stage.act(f"5. Environment {BREACHED} is breached. One command, while everybody goes on calling")
        assert self.load is not None
        status, old = self.call(self.breached.service_port, "encrypt", {"plaintext": "b2xk"})
        self.stage.verify(f"before: {BREACHED} seals a body that somebody keeps", status == 200, seen=old)
        self._old = str(old["ciphertext"])
        self._mark("incident open")
        self.stage.say(
            self.at(
                self.manager,
                "incident",
                "open",
                "--env",
                BREACHED,
                "--kind",
                "runtime",
                "--reason",
                "IR-2214",
                "--idempotency-key",
                "demo",
            )
        )
        self._breached_s = time.monotonic()
        down_s = self.until("HAProxy sees it down", lambda: self.haproxy_says()[BREACHED].startswith("DOWN"))
        self.stage.verify(
            f"HAProxy has taken {BREACHED} out {down_s:.2f} s after the command's answer (limit {REROUTE_LIMIT_S:g} s)",
            down_s <= REROUTE_LIMIT_S,
        )
        self.until(
            "contained", lambda: bool(self.ask(self.manager, "incident", "status", "inc-1")["contained"])
        )
        self._mark("contained")
        self.stage.say(self.at(self.manager, "incident", "status", "inc-1"))
        self._calm()
        late = self._sealed_by_owner(since_s=self._breached_s)
        self.stage.verify(
            f"since that answer {sum(late.values())} bodies were sealed, none by {BREACHED}",
            BREACHED not in late and set(late) == set(KINDS) - {BREACHED},
            seen=late,
        )
        owners = self.owners()
        last_s = max(one.at_s for one in list(self.load.callers.sealed) if owners[one.version] == BREACHED)
        self.stage.say(
            f"the last answer that it gave was {(self._breached_s - last_s) * 1000:.0f} ms before the command's own"
        )
        refused = Counter(owners[one.version] for one in list(self.load.callers.refused))
        self.stage.verify(
            f"what {BREACHED}'s key had sealed is not opened any more, anywhere ({sum(refused.values())} of the callers' last bodies)",
            set(refused) <= {BREACHED} and self._is_refused_by("a", "c"),
            seen=refused,
        )
        self.show_databases()
        for one in self.environments.values():
            found = {(owner, status) for owner, status, *_ in self.database_of(one)}
            self.stage.verify(
                f"the database of {one.name}: exactly {BREACHED}'s key is disabled",
                found == {("a", "active"), ("b", "disabled"), ("c", "active")},
                seen=found,
            )
        self._no_errors(
            "no caller has seen an error: who was refused by the breached environment was served by another"
        )

    def _is_refused_by(self, *names: str) -> bool:
        """Whether what the breached key had sealed is refused at each of these, because of the key."""
        answers = [
            self.call(self.environments[name].service_port, "decrypt", {"ciphertext": self._old})
            for name in names
        ]
        return all(status in KEY_REFUSED and "compromised" in json.dumps(body) for status, body in answers)

    def rekey(self) -> None:
        self.stage.act(
            "6. A new key for it, made by a sound environment; a new KEK in its HSM; its operator's word"
        )
        self.stage.say(self.at(self.manager, "incident", "rekey", "inc-1"))
        self.until(
            "a successor", lambda: self.ask(self.manager, "incident", "status", "inc-1")["state"] == "rekeyed"
        )
        self._mark("re-keyed")
        before = self.database_of(self.breached)
        told = self.at(self.breached, "--json", "env", "new-kek", "--type", self.breached.kek_type)
        made = json.loads(told)
        self.stage.say(told)
        self.until(
            "the new KEK's announcement",
            lambda: self.ask(self.manager, "env", "status", BREACHED)["kek"] == made["kek"],
        )
        self.at(
            self.manager, "env", "heal-complete", BREACHED, "--attest", "CHG-88", "--new-certs",
            "--kek", made["fingerprint"],
        )  # fmt: skip
        self._mark("healed")
        self.stage.verify(
            "healed, and nothing was stored there yet: that waits for the load balancer's word",
            self.states()[BREACHED] == "healed" and self.database_of(self.breached) == before,
            seen=(self.states(), self.database_of(self.breached)),
        )

    def rejoin(self) -> None:
        self.stage.act(
            "7. Back: the load balancer confirms, every key is stored, opened and compared there; then it serves"
        )
        assert self.load is not None
        self._back_s = time.monotonic()
        self.stage.say(self.at(self.manager, "env", "rejoin", BREACHED))
        self._mark("rejoined")
        self.until("HAProxy sees it up", lambda: self.haproxy_says()[BREACHED] == "UP")
        self._up_s = time.monotonic()
        self.until(f"{BREACHED} seals again", lambda: BREACHED in self._sealed_by_owner(since_s=self._back_s))
        seals_s = time.monotonic()
        self._calm()
        seen = self._sealed_by_owner(since_s=seals_s)
        self.stage.verify(
            f"all three serve again: {dict(sorted(seen.items()))}", set(seen) == set(KINDS), seen=seen
        )
        self.show_databases()
        rows = self.database_of(self.breached)
        self.stage.verify(
            f"{BREACHED} has every live key under its new KEK, and a new one of its own",
            {("a", "active"), ("b", "active"), ("c", "active")}
            <= {(owner, status) for owner, status, *_ in rows},
            seen=rows,
        )
        self.stage.verify(
            "the compromised key stays disabled, in the environment that came back too",
            self._is_refused_by(*KINDS),
        )

    def conclude(self) -> None:
        self.stage.act("8. The count, the evidence, the picture")
        assert self.load is not None
        self.load.stop()
        callers, recording = self.load.callers, self.load.recording
        self._no_errors(f"{callers.answered} calls were answered, and no caller has seen an error")
        served = self._served_by_haproxy(self._breached_s + SAMPLE_S, self._back_s)
        self.stage.verify(
            f"HAProxy's own count: {served} requests answered by {BREACHED} between its breach and its return",
            served == 0,
        )
        self.at(self.manager, "incident", "close", "inc-1")
        evidence = self.home / "inc-1.zip"
        self.at(self.manager, "incident", "evidence", "inc-1", "-o", evidence)
        self.stage.say(
            self.at(self.manager, "incident", "verify", evidence, "--root", self.root / "root.pem")
        )
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        self.picture.write_text(self._chart(recording).svg())
        self.stage.say(f"the picture of it: file://{self.picture.resolve()}")

    def _served_by_haproxy(self, begin_s: float, end_s: float) -> int:
        assert self.load is not None
        recording = self.load.recording
        inside = [
            count
            for at_s, count in zip(recording.times_s, recording.counts[BREACHED], strict=True)
            if begin_s <= at_s + recording.began_s < end_s
        ]
        return inside[-1] - inside[0] if inside else 0

    def _chart(self, recording: Recording) -> Chart:
        every = max(1, round(SMOOTH_S / SAMPLE_S))
        assert self.load is not None
        callers = self.load.callers
        return Chart(
            title="Requests per second that each environment answered (HAProxy's own count)",
            footer=(
                f"{callers.answered} calls answered, {len(callers.errors)} errors; {len(callers.refused)} refused because "
                f"the key that had sealed was compromised. {BREACHED} was breached, re-keyed and brought back meanwhile."
            ),
            times_s=recording.times_s[::every],
            counts={f"environment {name}": counts[::every] for name, counts in recording.counts.items()},
            colours={f"environment {name}": colour for name, colour in COLOURS.items()},
            moments=recording.moments,
            shades=[
                Shade(
                    name=f"environment {BREACHED}",
                    begin_s=self._breached_s - recording.began_s,
                    end_s=self._up_s - recording.began_s,
                    text="healing: answers nobody",
                )
            ],
        )

    # The demo as a whole.

    def play(self) -> None:
        self.build_hsms()
        self.unite()
        self.build_proxies()
        self.balance()
        self.breach()
        self.rekey()
        self.rejoin()
        self.conclude()

    @override
    def stop(self) -> None:
        try:
            if self.load is not None:
                with contextlib.suppress(DemoError):
                    self.load.stop()
        finally:
            super().stop()

    def addresses(self) -> str:
        return "\n".join(
            [
                (
                    f'callers          curl --cacert {self.operator}/ca.pem -H "Authorization: Bearer $(jq -r .token {self.home}/token.json)"'
                    f' https://localhost:{self.front_port}/sealgate/v1/keys/{KEY}/encrypt --json \'{{"plaintext": "aGVsbG8="}}\''
                ),
                *(
                    f"environment {one.name}    SOFTHSM2_CONF={one.home}/softhsm2.conf {BIN}/key-agent --config {one.agent_config} env list"
                    for one in self.environments.values()
                ),
                f"HAProxy          {self.home}/haproxy.cfg, its socket {self.statistics}",
                f"logs             {self.home}/*.log",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make demo-environments", description="A breach, and callers who do not notice."
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave it running until Ctrl-C, and keep its files"
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("build/demo-environments.svg"), help="where the SVG goes"
    )
    parser.add_argument(
        "--calm-s", type=float, default=6.0, help="seconds of calm before, during and after the breach"
    )
    chosen = parser.parse_args()
    if not 0.5 <= chosen.calm_s <= 600:
        parser.error("--calm-s is between 0.5 and 600")
    try:
        return play(
            partial(EnvironmentsDemo, picture=chosen.picture, seconds=chosen.calm_s), keep=chosen.keep
        )
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
