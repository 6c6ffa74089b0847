"""Quotas and shares on a clock that only the test moves."""

import pytest

from proxy.encryption_service.errors import QuotaExceeded
from proxy.encryption_service.limits import BUSY, MAX_CHARGE_S, WINDOW_S, Limiter, Limits, Quota
from tests.fakes.clock import ManualClock

TIGHT = Limits(
    tenant=Quota(requests_per_s=10, burst=20), credential=Quota(requests_per_s=5, burst=10), places=3
)
ENDLESS = Limits(tenant=Quota(requests_per_s=1e6, burst=1e6))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def admitted(limiter: Limiter, tenant: str, credential: str | None, attempts: int) -> int:
    count = 0
    for _ in range(attempts):
        try:
            limiter.admit(tenant, credential)
        except QuotaExceeded:
            continue
        count += 1
    return count


def test_a_burst_then_the_rate(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    assert admitted(limiter, "acme", "one", 50) == 10
    for _ in range(5):
        clock.shift(1)
        assert admitted(limiter, "acme", "one", 50) == 5
    clock.shift(1000)
    assert admitted(limiter, "acme", "one", 50) == 10


def test_credentials_share_their_tenants_quota(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    assert [admitted(limiter, "acme", name, 50) for name in ("one", "two", "three")] == [10, 10, 0]
    assert admitted(limiter, "globex", "four", 50) == 10, "another tenant's is its own"


def test_callers_by_tokens_have_their_tenants_quota(clock: ManualClock) -> None:
    assert admitted(Limiter(clock, TIGHT), "acme", None, 50) == 20


def test_the_wait_that_is_told_is_enough_and_not_too_long(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    admitted(limiter, "acme", "one", 50)
    with pytest.raises(QuotaExceeded) as caught:
        limiter.admit("acme", "one", 2)
    wait_s = caught.value.retry_after_s
    clock.shift(wait_s - 0.01)
    with pytest.raises(QuotaExceeded):
        limiter.admit("acme", "one", 2)
    clock.shift(0.011)
    limiter.admit("acme", "one", 2)


def test_a_refused_call_takes_nothing(clock: ManualClock) -> None:
    """The credential has room, the tenant has none: the credential's room stays."""
    limiter = Limiter(clock, TIGHT)
    admitted(limiter, "acme", "one", 50)
    admitted(limiter, "acme", "two", 50)
    assert admitted(limiter, "acme", "three", 50) == 0
    clock.shift(2)
    assert admitted(limiter, "acme", "three", 50) == 10


def test_a_batch_costs_its_items_and_a_full_bucket_takes_any(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    limiter.admit("acme", "one", 1000)  # more than would ever fit
    with pytest.raises(QuotaExceeded):
        limiter.admit("acme", "one")
    clock.shift(3)
    with pytest.raises(QuotaExceeded):  # and it is paid for in full
        limiter.admit("acme", "one")


def test_a_credentials_own_rate(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT, credential_rate={"slow": 1.0, "one": None}.__getitem__)
    assert admitted(limiter, "acme", "slow", 50) == 2
    assert admitted(limiter, "acme", "one", 50) == 10


def test_processes_share_a_quota(clock: ManualClock) -> None:
    limiters = [Limiter(clock, TIGHT, processes=2) for _ in range(2)]
    assert sum(admitted(limiter, "acme", "one", 50) for limiter in limiters) == 10
    assert sum(admitted(limiter, "acme", None, 50) for limiter in limiters) == 10


def test_places_are_counted_and_given_back(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    held = [limiter.hold("acme", None) for _ in range(4)]
    for place in held[:3]:
        place.__enter__()
    with pytest.raises(QuotaExceeded):
        held[3].__enter__()
    held[0].__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), limiter.hold("acme", None):
        _ = 1 / 0
    with limiter.hold("acme", None), limiter.hold("globex", None):
        pass


def test_without_a_place_nothing_is_taken(clock: ManualClock) -> None:
    limiter = Limiter(clock, TIGHT)
    with limiter.hold("acme", "one"), limiter.hold("acme", "one"), limiter.hold("acme", "one"):
        for _ in range(100):
            with pytest.raises(QuotaExceeded, match="at the same time"), limiter.hold("acme", "one"):
                pytest.fail("more places than agreed")
        assert admitted(limiter, "acme", "one", 50) == 10 - 3


def test_alone_a_tenant_may_have_everything(clock: ManualClock) -> None:
    limiter = Limiter(clock, ENDLESS)
    for _ in range(1000):
        limiter.admit("noisy", None)
        limiter.charge("noisy", 0.001)
        clock.shift(0.001)
    assert limiter.busy() > BUSY


def test_a_noisy_tenant_leaves_the_others_their_part(clock: ManualClock) -> None:
    """One asks for all of the process's time, one for little: the little is always served."""
    limiter = Limiter(clock, ENDLESS)
    used_s = {"noisy": 0.0, "quiet": 0.0}
    for step in range(20_000):  # milliseconds; a call takes one
        if step % 50 == 0:
            limiter.admit("quiet", None)
            limiter.charge("quiet", 0.001)
            used_s["quiet"] += 0.001
        work(limiter, "noisy", used_s)
        clock.shift(0.001)
    assert used_s["quiet"] == pytest.approx(0.4)
    assert BUSY / 2 < used_s["noisy"] / 20 < BUSY, "what the others leave, up to BUSY of the process's time"


def test_two_that_want_all_get_the_same(clock: ManualClock) -> None:
    assert contest(clock, {"one": 1.0, "two": 1.0}) == pytest.approx(1.0, rel=0.1)


def test_weights_divide_the_time(clock: ManualClock) -> None:
    """Refused calls cost their sender as well, so it is not exactly the weights."""
    assert contest(clock, {"one": 3.0, "two": 1.0}) == pytest.approx(3.0, rel=0.4)


def contest(clock: ManualClock, weights: dict[str, float]) -> float:
    """How much more of 20 s "one" gets than "two", both asking for all."""
    limiter = Limiter(clock, ENDLESS, weight=weights.__getitem__)
    used_s = dict.fromkeys(weights, 0.0)
    for step in range(20_000):
        for tenant in ("one", "two") if step % 2 else ("two", "one"):
            work(limiter, tenant, used_s)
        clock.shift(0.001)
    assert sum(used_s.values()) / 20 < BUSY + 0.1
    return used_s["one"] / used_s["two"]


def work(limiter: Limiter, tenant: str, used_s: dict[str, float]) -> None:
    """One call of a millisecond, if it is admitted."""
    if admitted(limiter, tenant, None, 1):
        limiter.charge(tenant, 0.001)
        used_s[tenant] += 0.001


def test_a_process_at_its_end_divides_what_little_it_has(clock: ManualClock) -> None:
    """A third of a core is all it gets: by its charges it is idle, by the kernel's account at its end."""
    limiter = Limiter(clock, ENDLESS)
    served = {"noisy": 0, "quiet": 0}
    for step in range(20_000):
        if step % 100 == 0:
            limiter.strained(1.0)
            served["quiet"] += admitted(limiter, "quiet", None, 1)
            limiter.charge("quiet", 0.001)
        if step % 4 == 0 and admitted(limiter, "noisy", None, 1):
            limiter.charge("noisy", 0.001)
            served["noisy"] += 1
        clock.shift(0.001)
    assert served["quiet"] == 200
    assert served["noisy"] < 1000, "of the 5,000 that it asked for"
    limiter.strained(0.3)
    assert admitted(limiter, "noisy", None, 1) == 1, "and all that it wants when there is time again"


def test_who_has_gone_silent_holds_no_part(clock: ManualClock) -> None:
    limiter = Limiter(clock, ENDLESS)
    limiter.charge("former", MAX_CHARGE_S)
    clock.shift(60 * WINDOW_S)
    for _ in range(1000):
        limiter.admit("noisy", None)
        limiter.charge("noisy", 0.001)
        clock.shift(0.001)


def test_one_long_call_is_not_held_against_a_tenant_for_ever(clock: ManualClock) -> None:
    limiter = Limiter(clock)
    limiter.charge("acme", 1e9)
    limiter.charge("acme", -5.0)
    assert limiter.busy() <= 2 * MAX_CHARGE_S / WINDOW_S


def test_what_the_directory_has_dropped_is_forgotten(clock: ManualClock) -> None:
    rates: dict[str, float | None] = {"one": 1.0}
    limiter = Limiter(clock, TIGHT, credential_rate=rates.__getitem__)
    admitted(limiter, "acme", "one", 50)
    limiter.forget({"acme"}, {"one"})
    assert admitted(limiter, "acme", "one", 50) == 0, "what is still there keeps its level"
    limiter.forget({"globex"}, set())
    rates["one"] = None
    assert admitted(limiter, "acme", "one", 50) == 10
