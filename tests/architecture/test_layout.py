"""Files are named for what they hold, and every source file has its tests."""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Final

import pytest

from tests.architecture.tree import PACKAGES, ROOT, Module, modules, parse

BANNED: Final = re.compile(r"(.*_)?(utils?|helpers?|common|misc|managers?|base|stuff|tools)")
# A word of design.md: the key agent that generates keys for all environments.
WORDS_OF_THE_DESIGN: Final = {
    "key_agent/environments/keys/manager.py",
    "tests/key_agent/environments/keys/test_manager.py",
}
# A source file -> the tests that stand for it, and why they are not its mirror.
_AGENT: Final = (
    "tests/key_agent/test_agent.py",
    "a part of the agent, which is tested whole: real parts, fake HSM and proxies",
)
_PROCESS: Final = (
    "tests/key_agent/test_agent_softhsm.py",
    "only a real process with a real HSM shows that it is right",
)
_COMMANDS: Final = (
    "tests/key_agent/test_agent_softhsm.py",
    "commands: given to a real agent with a real HSM; what they say, in test_cli.py",
)
_WORKER: Final = (
    "tests/key_agent/sources/test_pkcs11.py",
    "runs in the worker process only, seen through its answers",
)
_METHODS: Final = (
    "tests/key_agent/sources/test_methods.py",
    "runs in the worker process only: every method on every module that does it, and refused where it lies",
)
_STORE: Final = ("tests/key_agent/registry/test_store.py", "seen through the store, on both databases")
_ROWS: Final = (
    "tests/proxy/gate/test_rows.py",
    "a patch is right when the engine behaves: a test per row of the table",
)
_JOB: Final = (
    "tests/integration/test_proxy_main_job.py",
    "an adapter of mitmproxy, right when real clients and services are served",
)
_TRANSIT: Final = (
    "tests/proxy/encryption_service/dialects/test_transit_against_bao.py",
    "its words are right when the original says the same",
)
_BROKER: Final = (
    "tests/key_agent/push/test_roads.py",
    "one end of a broker: only a real broker between both ends shows that it is right",
)
_WORKERS: Final = (
    "tests/integration/test_workers.py",
    "only real processes show that keys are everywhere and that a dead one is replaced",
)
_KACLS: Final = (
    "tests/proxy/encryption_service/dialects/test_kacls.py",
    "a part of the dialect: each rule is seen in what a call is answered",
)
_PEERS: Final = (
    "tests/key_agent/environments/peers/test_peer_transport.py",
    "one side of a connection: right when the other one, over real TLS, says so",
)
_TALKS: Final = (
    "tests/integration/test_profile_hooks.py",
    "carries out what profiles plan: on real sockets, through the real gate",
)
_PEERING: Final = (
    "tests/key_agent/environments/peers/test_peering.py",
    "agents in step with each other: right when several of them, over real TLS and databases, are",
)
_TAMPERING: Final = (
    "tests/key_agent/environments/shared/test_shared_tampering.py",
    "right when everything that somebody can do to the database is noticed",
)
_MANAGER: Final = (
    "tests/key_agent/environments/keys/test_manager.py",
    "what the manager is asked for: right when every environment has it, over real TLS and databases",
)
_SHARED: Final = (
    "tests/key_agent/environments/shared/test_shared.py",
    "a part of the shared registry, seen through it on both databases",
)
_PROXY_COMMANDS: Final = ("tests/proxy/test_cli.py", "commands: what each does is seen through them all")
_SERVICE_COMMANDS: Final = (
    "tests/proxy/encryption_service/test_cli.py",
    "commands: given one after the other, as an operator does",
)
_DIRECTORY: Final = (
    "tests/proxy/tenants/test_directory.py",
    "a part of the directory: what is provisioned is found again, what is refused is not, on both databases",
)
_CONNECTIONS: Final = (
    "tests/proxy/encryption_service/test_http_connection.py",
    "a part of what connections do: seen on sockets",
)
_SERVICE_STORES: Final = (
    "tests/proxy/tenants/test_encryption_service_stores.py",
    "keys, dialects and credentials name each other: right when they do so together",
)
_USERS: Final = ("tests/proxy/tenants/test_user_store.py", "seen through the store, on both databases")
_PLANS: Final = ("tests/proxy/plans/test_planner.py", "what the planner asks and answers with")
_BREACH = ("tests/environments/test_breach.py", "commands: given one after the other, with real environments")
_RECOVERY = (
    "tests/key_agent/environments/shared/test_recovery.py",
    "the road back when no environment counts: right when agents with real rows and databases come back",
)
_HEALING = (
    "tests/key_agent/environments/incidents/test_healing.py",
    "what an agent does by itself while an environment heals",
)

_AZURE_BLOCKS: Final = (
    "tests/integration/test_azure_blocks.py",
    "right when a real service answers as it does directly, request by request",
)
_GCS_UPLOADS: Final = (
    "tests/proxy/profiles/gcs/test_resumable.py",
    "a part of what an upload is: right when the object is, whatever fails on the way",
)
TESTED_BY: Final[Mapping[str, tuple[str, str]]] = {
    "key_agent/environments/commands/approval_cli.py": _BREACH,
    "key_agent/environments/commands/approval_commands.py": _BREACH,
    "key_agent/environments/commands/healing_cli.py": _BREACH,
    "key_agent/environments/commands/incident_cli.py": _BREACH,
    "key_agent/environments/keys/own_wraps.py": _RECOVERY,
    "key_agent/environments/commands/recovery_cli.py": _RECOVERY,
    "key_agent/environments/commands/recovery_commands.py": _RECOVERY,
    "key_agent/environments/commands/incident_commands.py": (
        "tests/key_agent/environments/incidents/test_incidents.py",
        "what it asks of Incidents, in one go",
    ),
    "key_agent/environments/incidents/incident_parts.py": _HEALING,
    "key_agent/environments/incidents/reaction.py": _HEALING,
    "key_agent/reencryption/store_file.py": _BREACH,
    "envelope/errors.py": ("tests/envelope/test_tampering.py", "declarations; who raises them is tested"),
    "envelope/strict_json.py": ("tests/envelope/test_material.py", "each refusal is one of an envelope"),
    "proxy/tenants/user_rows.py": _USERS,
    "proxy/tenants/vault_rows.py": (
        "tests/proxy/tenants/test_vault_store.py",
        "what is written there is read here",
    ),
    "proxy/profiles/s3/call.py": (
        "tests/proxy/profiles/s3/test_uploading.py",
        "what the plans of uploads are made of: seen in them",
    ),
    "proxy/profiles/azure_blob/call.py": (
        "tests/proxy/profiles/azure_blob/test_profile.py",
        "what plans are made of: seen in them",
    ),
    "proxy/profiles/azure_blob/options.py": (
        "tests/proxy/profiles/azure_blob/test_profile.py",
        "values; what they decide is the profile's",
    ),
    "proxy/profiles/azure_blob/properties.py": _AZURE_BLOCKS,
    "proxy/profiles/azure_blob/uploading.py": _AZURE_BLOCKS,
    "proxy/profiles/entry_mapping.py": (
        "tests/proxy/profiles/test_xml_rewriting.py",
        "the same for XML and JSON, and seen in both",
    ),
    "proxy/profiles/gcs/chunks.py": _GCS_UPLOADS,
    "proxy/profiles/gcs/starting.py": _GCS_UPLOADS,
    "proxy/profiles/s3/options.py": (
        "tests/proxy/profiles/s3/test_profile.py",
        "values; what they decide is the profile's",
    ),
    "key_agent/api/bodies.py": (
        "tests/key_agent/api/test_server.py",
        "declarations: what is not one of them is refused",
    ),
    "key_agent/app.py": _PROCESS,
    "key_agent/doctor.py": _PROCESS,
    "key_agent/environments/peers/etcd.py": (
        "tests/key_agent/environments/peers/test_leadership.py",
        "right when a real etcd says so",
    ),
    "key_agent/environments/assembly.py": _PEERING,
    "key_agent/environments/commands/cli.py": (
        "tests/environments/test_site.py",
        "commands, seen through the processes that carry them out",
    ),
    "key_agent/environments/commands/environment_commands.py": _PEERING,
    "key_agent/environments/commands/membership_commands.py": _PEERING,
    "key_agent/environments/commands/promotion_commands.py": _PEERING,
    "key_agent/environments/keys/key_making.py": _MANAGER,
    "key_agent/environments/keys/key_writing.py": _MANAGER,
    "key_agent/environments/keys/readiness.py": (
        "tests/key_agent/environments/keys/test_key_progress.py",
        "seen in what a key waits for before it is active",
    ),
    "key_agent/environments/keys/wrap_messages.py": (
        "tests/key_agent/environments/keys/test_wrapping.py",
        "declarations: a message that is none of them is refused",
    ),
    "key_agent/environments/keys/key_parts.py": (
        "tests/environments/test_site.py",
        "wiring, right when keys come to every environment's proxies",
    ),
    "key_agent/environments/shared/projection.py": (
        "tests/key_agent/environments/shared/test_shared.py",
        "the other half of the shared registry, seen through it on both databases",
    ),
    "key_agent/environments/shared/mark.py": _TAMPERING,
    "key_agent/environments/shared/shared_tables.py": _TAMPERING,
    "key_agent/environments/shared/believing.py": (
        "tests/key_agent/environments/shared/test_terms.py",
        "right when whoever has no say, whatever it signs, is not believed",
    ),
    "key_agent/environments/shared/draft.py": _SHARED,
    "key_agent/environments/shared/restrictions.py": _SHARED,
    "key_agent/environments/shared/shared_errors.py": _SHARED,
    "key_agent/environments/shared/shared_state.py": _SHARED,
    "key_agent/environments/shared/shared_view.py": _SHARED,
    "key_agent/environments/workplace.py": _PEERING,
    "key_agent/environments/shared/forewords.py": _PEERING,
    "key_agent/environments/peers/own_word.py": _PEERING,
    "key_agent/environments/peers/peer_rows.py": _PEERING,
    "key_agent/environments/peers/peer_sights.py": _PEERING,
    "key_agent/registry/wrap_rows.py": (
        "tests/key_agent/environments/keys/test_manager.py",
        "seen where keys of several environments are stored, lost and damaged",
    ),
    "key_agent/environments/peers/following.py": (
        "tests/environments/test_site.py",
        "what an agent does about changed rows, seen at its proxies",
    ),
    "key_agent/environments/changes/founding.py": (
        "tests/environments/test_site.py",
        "one environment's keys, found again in all of them",
    ),
    "key_agent/environments/peers/peer_routes.py": _PEERING,
    "key_agent/environments/peers/peers.py": _PEERING,
    "key_agent/environments/peers/peer_api.py": _PEERS,
    "key_agent/environments/peers/peer_trust.py": _PEERS,
    "key_agent/errors.py": (
        "tests/key_agent/sources/test_contract.py",
        "declarations; who raises them is tested",
    ),
    "key_agent/operations/operations.py": _AGENT,
    "key_agent/push/broker.py": _BROKER,
    "key_agent/push/pusher.py": _AGENT,
    "key_agent/push/recipients.py": _AGENT,
    "key_agent/push/sealing.py": _AGENT,
    "key_agent/command_line/backup_cli.py": _COMMANDS,
    "key_agent/command_line/kek_cli.py": _COMMANDS,
    "key_agent/command_line/key_cli.py": _COMMANDS,
    "key_agent/command_line/proxy_cli.py": _COMMANDS,
    "key_agent/command_line/reinstating_cli.py": _COMMANDS,
    "key_agent/command_line/status_cli.py": _COMMANDS,
    "key_agent/command_line/wording.py": ("tests/key_agent/test_cli.py", "what all commands say alike"),
    "key_agent/operations/survey.py": _AGENT,
    "key_agent/command_line/performing.py": (
        "tests/key_agent/test_cli.py",
        "what all commands do, seen through them",
    ),
    "key_agent/operations/commands.py": (
        "tests/key_agent/operations/test_key_commands.py",
        "what all commands share, seen through them",
    ),
    "key_agent/registry/access.py": _STORE,
    "key_agent/registry/archive.py": (
        "tests/key_agent/registry/test_archiving.py",
        "values, made and taken apart by archiving.py",
    ),
    "key_agent/registry/database.py": _STORE,
    "key_agent/registry/model.py": _STORE,
    "key_agent/registry/rows.py": _STORE,
    "key_agent/registry/states.py": _STORE,
    "key_agent/registry/tables.py": _STORE,
    "key_agent/reencryption/connector.py": (
        "tests/key_agent/reencryption/test_webdav.py",
        "an interface: one connector, and a store in memory that the job's tests use",
    ),
    "key_agent/setup.py": ("tests/key_agent/test_config.py", "what it sets up is what the settings say"),
    "key_agent/sources/envelopes.py": _WORKER,
    "key_agent/sources/hsm/diagnosis.py": ("tests/key_agent/sources/test_diagnosis.py", _WORKER[1]),
    "key_agent/sources/hsm/gcm.py": _METHODS,
    "key_agent/sources/hsm/hybrid_wrapping.py": _METHODS,
    "key_agent/sources/hsm/keks.py": _METHODS,
    "key_agent/sources/hsm/key_objects.py": _METHODS,
    "key_agent/sources/hsm/key_wrapping.py": _METHODS,
    "key_agent/sources/hsm/material.py": _WORKER,
    "key_agent/sources/hsm/methods.py": _METHODS,
    "key_agent/sources/hsm/module.py": _WORKER,
    "key_agent/sources/hsm/proof.py": _METHODS,
    "key_agent/sources/hsm/session.py": _WORKER,
    "key_agent/sources/hsm/wrapping.py": _METHODS,
    "key_agent/sources/server_worker_main.py": (
        "tests/key_agent/sources/test_key_server.py",
        "runs in the worker process only, seen through its answers",
    ),
    "key_agent/sources/servers/openbao.py": (
        "tests/key_agent/sources/servers/test_server.py",
        "an adapter of a key server, right when the real one gives the right answers",
    ),
    "key_agent/sources/source.py": (
        "tests/key_agent/sources/test_contract.py",
        "an interface: one contract for all sources",
    ),
    "key_agent/sources/verdict.py": ("tests/key_agent/sources/test_diagnosis.py", "the words of a diagnosis"),
    "key_agent/sources/worker_main.py": _WORKER,
    "key_agent/sources/worker_process.py": _WORKER,
    "key_agent/sources/worker_source.py": _WORKER,
    "proxy/addon.py": _JOB,
    "proxy/exchange/conversation.py": _TALKS,
    "proxy/exchange/answering.py": _TALKS,
    "proxy/exchange/exchange.py": _TALKS,
    "proxy/exchange/heads.py": _TALKS,
    "proxy/exchange/sending.py": _TALKS,
    "proxy/bodies/opening.py": (
        "tests/proxy/bodies/test_bodies.py",
        "the way down of what bodies.py sends up: tested as round trips",
    ),
    "proxy/bodies/resealing.py": (
        "tests/integration/test_object_states.py",
        "what an upload may be, and what is stored then",
    ),
    "proxy/bodies/spooling.py": _TALKS,
    "proxy/recording.py": (
        "tests/integration/test_proxy_refusals.py",
        "what the audit log says of real requests",
    ),
    "proxy/api/broker.py": _BROKER,
    "proxy/api/environment.py": (
        "tests/proxy/test_environments.py",
        "the words of environments.py, as load balancers ask for them",
    ),
    "proxy/data_plane.py": (
        "tests/integration/test_proxy_process.py",
        "the parts of one process, right when the process serves",
    ),
    "proxy/encryption_service/dialects/bearer.py": (
        "tests/proxy/encryption_service/dialects/test_transit.py",
        "what two dialects have in common, seen through both",
    ),
    "proxy/encryption_service/dialects/native_errors.py": (
        "tests/proxy/encryption_service/dialects/test_native.py",
        "a table: its rows are what the calls are answered",
    ),
    "proxy/encryption_service/dialects/transit_errors.py": _TRANSIT,
    "proxy/encryption_service/dialects/transit_system.py": _TRANSIT,
    "proxy/encryption_service/dialects/transit_data.py": _TRANSIT,
    "proxy/encryption_service/dialects/transit_call.py": _TRANSIT,
    "proxy/encryption_service/dialects/transit_keys.py": _TRANSIT,
    "proxy/encryption_service/dialects/transit_signing.py": _TRANSIT,
    "proxy/encryption_service/dialects/dialect.py": (
        "tests/proxy/encryption_service/test_http_server.py",
        "an interface: what the HTTP layer asks of every dialect",
    ),
    "proxy/encryption_service/errors.py": (
        "tests/proxy/encryption_service/test_core.py",
        "declarations; who raises them is tested",
    ),
    "proxy/encryption_service/dialects/kacls_answers.py": _KACLS,
    "proxy/encryption_service/dialects/kacls_calls.py": _KACLS,
    "proxy/encryption_service/dialects/kacls_identity.py": _KACLS,
    "proxy/encryption_service/dialects/kacls_messages.py": _KACLS,
    "proxy/encryption_service/dialects/kacls_policy.py": _KACLS,
    "proxy/engine.py": _JOB,
    "proxy/gate/__init__.py": _ROWS,
    "proxy/gate/answers.py": _ROWS,
    "proxy/gate/framing.py": _ROWS,
    "proxy/gate/handler.py": _ROWS,
    "proxy/gate/http1.py": _ROWS,
    "proxy/gate/judge.py": _ROWS,
    "proxy/gate/keeper.py": _ROWS,
    "proxy/gate/leg.py": _ROWS,
    "proxy/gate/peers.py": _ROWS,
    "proxy/gate/selftest.py": ("tests/proxy/gate/test_pins.py", "what the engine refuses to start with"),
    "proxy/gate/stream.py": _ROWS,
    "proxy/metrics.py": _JOB,
    "proxy/plans/answer_plan.py": _PLANS,
    "proxy/plans/conversing.py": _TALKS,
    "proxy/plans/plan.py": _PLANS,
    "proxy/messages/ranges.py": _PLANS,
    "proxy/plans/request.py": _PLANS,
    "proxy/profiles/__init__.py": _PLANS,
    "proxy/profiles/webdav/chunking.py": (
        "tests/integration/test_webdav_chunks.py",
        "carries uploads out: right when a strict server and rclone are content",
    ),
    "proxy/profiles/webdav/locks.py": (
        "tests/integration/test_webdav_clients.py",
        "what a lock leaves behind is seen at real servers",
    ),
    "proxy/profiles/generic.py": _PLANS,
    "proxy/profiles/profile.py": _PLANS,
    "proxy/encryption_service/body_stream.py": _CONNECTIONS,
    "proxy/encryption_service/http_site.py": _CONNECTIONS,
    "proxy/encryption_service/key_states.py": (
        "tests/proxy/encryption_service/test_core.py",
        "what a state allows is what the core's calls are answered",
    ),
    "proxy/encryption_service/credential_cli.py": _SERVICE_COMMANDS,
    "proxy/encryption_service/dialect_cli.py": _SERVICE_COMMANDS,
    "proxy/encryption_service/key_cli.py": _SERVICE_COMMANDS,
    "proxy/encryption_service/provisioning.py": _SERVICE_COMMANDS,
    "proxy/command_line/errors_cli.py": _PROXY_COMMANDS,
    "proxy/command_line/inspect_cli.py": _PROXY_COMMANDS,
    "proxy/command_line/network_service_cli.py": _PROXY_COMMANDS,
    "proxy/command_line/operating.py": _PROXY_COMMANDS,
    "proxy/command_line/profile_cli.py": _PROXY_COMMANDS,
    "proxy/command_line/tenant_cli.py": _PROXY_COMMANDS,
    "proxy/tenants/credential_store.py": _SERVICE_STORES,
    "proxy/tenants/dialect_store.py": _SERVICE_STORES,
    "proxy/tenants/named_key_store.py": _SERVICE_STORES,
    "proxy/tenants/directory_rows.py": _DIRECTORY,
    "proxy/tenants/errors.py": _DIRECTORY,
    "proxy/tenants/key_files.py": _DIRECTORY,
    "proxy/tenants/network_service_store.py": _DIRECTORY,
    "proxy/tenants/recipient_store.py": _DIRECTORY,
    "proxy/tenants/rules.py": _DIRECTORY,
    "proxy/tenants/tenant_store.py": _DIRECTORY,
    "proxy/tenants/service_rows.py": (
        "tests/proxy/tenants/test_encryption_service_stores.py",
        "rows read as they were written, on both databases",
    ),
    "proxy/workers/link.py": _WORKERS,
    "proxy/refusals.py": (
        "tests/integration/test_proxy_refusals.py",
        "a table: each row is answered on a real socket",
    ),
}


def badly_named(paths: Iterable[str]) -> list[str]:
    return [
        path
        for path in paths
        if path not in WORDS_OF_THE_DESIGN
        and any(BANNED.fullmatch(part.removesuffix(".py")) for part in PurePosixPath(path).parts)
    ]


def holds_code(module: Module) -> bool:
    """Whether there is something to test: more than a docstring, imports and names."""
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for node in ast.walk(module.tree)
    )


def untested(found: Iterable[Module], tests: set[str], elsewhere: Mapping[str, tuple[str, str]]) -> list[str]:
    """Source files without `tests/<folder>/test_<name>*.py`."""
    missing = []
    for module in found:
        if not holds_code(module) or "/migrations/" in module.path:  # a migration's test is the store's
            continue
        if module.path in elsewhere:
            if elsewhere[module.path][0] not in tests:
                missing.append(f"{module.path} (its tests {elsewhere[module.path][0]} are gone)")
            continue
        source = PurePosixPath(module.path)
        name = source.parent.name if source.name == "__init__.py" else source.stem
        mirror = re.compile(re.escape(f"tests/{source.parent}/test_{name}") + r"(_\w+)?\.py")
        if not any(mirror.fullmatch(test) for test in tests):
            missing.append(module.path)
    return missing


def test_files_are_named_for_what_they_hold() -> None:
    everywhere = [*PACKAGES, "tests", "bench", "certs", "deploy"]
    assert (
        badly_named(str(path.relative_to(ROOT)) for top in everywhere for path in (ROOT / top).rglob("*.py"))
        == []
    )


def test_every_source_file_has_its_tests() -> None:
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert untested(modules(*PACKAGES, "certs"), tests, TESTED_BY) == []


def test_exceptions_are_needed() -> None:
    """What is listed exists, and has no mirror after all."""
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    listed = [module for module in modules(*PACKAGES, "certs") if module.path in TESTED_BY]
    assert {module.path for module in listed} == set(TESTED_BY)
    assert untested(listed, tests, {}) == [module.path for module in listed]


@pytest.mark.parametrize(
    "path",
    [
        "proxy/utils.py",
        "proxy/http_utils.py",
        "proxy/helpers/x.py",
        "key_agent/key_manager.py",
        "runtime/common.py",
    ],
)
def test_a_bad_name_is_found(path: str) -> None:
    assert badly_named([path])


def test_a_good_name_is_not_found() -> None:
    assert badly_named(["proxy/utility.py", "key_agent/environments/keys/manager.py"]) == []


def test_a_file_without_tests_is_found() -> None:
    code = "def f(): pass"
    found = [
        parse("proxy/keys/cache.py", code),
        parse("proxy/keys/receive.py", code),
        parse("proxy/plans/plan.py", code),
        parse("proxy/gate/__init__.py", code),
        parse("proxy/names.py", "X = 1"),
        parse("proxy/odd.py", code),
        parse("proxy/gone.py", code),
    ]
    tests = {"tests/proxy/keys/test_cache.py", "tests/proxy/plans/test_plan_odd.py", "tests/proxy/test_x.py"}
    elsewhere = {
        "proxy/odd.py": ("tests/proxy/test_x.py", "why"),
        "proxy/gone.py": ("tests/proxy/test_y.py", "why"),
    }
    assert untested(found, tests, elsewhere) == [
        "proxy/keys/receive.py",
        "proxy/gate/__init__.py",
        "proxy/gone.py (its tests tests/proxy/test_y.py are gone)",
    ]
