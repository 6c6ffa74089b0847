"""`sealgate key`: named keys of the encryption service."""

from pathlib import Path
from typing import Annotated

import typer

from envelope.certificates import fingerprint
from envelope.keys import KeyUse, SigningAlgorithm
from proxy.command_line.operating import (
    Operator,
    certificate_from,
    check_csr_file,
    not_there,
    operating,
    parse_owner,
    write_csr,
)
from proxy.encryption_service.model import NamedKey
from proxy.encryption_service.provisioning import OnlyTenant, Operations, say_effective
from proxy.tenants.certificates import KeyType
from proxy.tenants.named_key_store import add_key, remove_key, set_blocked
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from proxy.tenants.service_rows import joined

key_app = typer.Typer(no_args_is_help=True, help="Named keys of the encryption service.")


KeyName = Annotated[str, typer.Argument(metavar="TENANT/KEY", help="Named key id, immutable.")]
CsrFile = Annotated[
    Path, typer.Option("--csr", metavar="OUT", help="Where to write the certificate request (PEM).")
]


@key_app.command("add", epilog="Example: sealgate key add acme/orders --csr orders.csr")
def key_add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    name: KeyName,
    csr: CsrFile,
    use: Annotated[KeyUse, typer.Option("--use", help="data: encrypt; sign: sign and verify.")] = KeyUse.DATA,
    algorithm: Annotated[
        SigningAlgorithm | None, typer.Option("--algorithm", help="Of a signing key, as the agent makes it.")
    ] = None,
    operation: Operations = None,
    key_type: Annotated[
        KeyType, typer.Option("--key-type", help="Of the private key made here, which opens envelopes.")
    ] = KeyType.P256,
) -> None:
    """Provision a named key: make its private key here, write the CSR for the tenant's root."""
    with operating(context) as operator:
        owner = parse_owner(name)
        check_csr_file(csr)
        operations = None if not operation else frozenset(operation)
        known = operator.store.snapshot().encryption_service.keys.get(owner)
        same = known is not None and (known.use, known.algorithm) == (use, algorithm)
        if known is not None and same and operations in {None, known.operations}:
            request = certificate_request(operator.store, owner)
        else:
            known = None
            request = add_key(
                operator.store,
                owner,
                actor=operator.actor,
                use=use,
                algorithm=algorithm,
                operations=operations,
                key_type=key_type,
            )
        write_csr(request, csr)
        _show_key(operator, _key_of(operator, name), changed=known is None, csr=csr)


@key_app.command("renew", epilog="Example: sealgate key renew acme/orders --csr orders.csr")
def key_renew(
    context: typer.Context,
    name: KeyName,
    csr: CsrFile,
    key_type: Annotated[KeyType, typer.Option("--key-type", help="Of the new private key.")] = KeyType.P256,
) -> None:
    """Make a new private key and its CSR; the present certificate serves until the new one is imported."""
    with operating(context) as operator:
        check_csr_file(csr)
        key = _key_of(operator, name)
        request = renew_key(operator.store, key.owner, actor=operator.actor, key_type=key_type)
        write_csr(request, csr)
        _show_key(operator, _key_of(operator, name), changed=True, csr=csr)


@key_app.command("import-cert", epilog="Example: sealgate key import-cert acme/orders orders.pem")
def key_import(
    context: typer.Context,
    name: KeyName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The certificate (PEM or DER).")],
) -> None:
    """Take the certificate that the tenant's root made of the CSR."""
    with operating(context) as operator:
        certificate = certificate_from(file)
        key, before = _key_of(operator, name), operator.store.revision()
        import_certificate(operator.store, key.owner, certificate, actor=operator.actor)
        _show_key(operator, _key_of(operator, name), changed=operator.store.revision() != before)


@key_app.command("list", epilog="Example: sealgate key list --tenant acme --json")
def key_list(context: typer.Context, tenant: OnlyTenant = None) -> None:
    """The named keys."""
    with operating(context, looks=True) as operator:
        found = [
            key
            for key in operator.store.snapshot().encryption_service.keys.values()
            if tenant is None or key.tenant == tenant
        ]
        found.sort(key=lambda key: key.owner)
        operator.say(
            {"keys": [_key_json(key) for key in found]},
            lambda: "\n".join(line for key in found for line in _key_lines(key)) or "no named keys",
        )


@key_app.command("block", epilog="Example: sealgate key block acme/orders")
def key_block(context: typer.Context, name: KeyName) -> None:
    """Refuse every use of the key; keys go on being pushed, other keys are not touched."""
    _set_blocked(context, name, blocked=True)


@key_app.command("unblock", epilog="Example: sealgate key unblock acme/orders")
def key_unblock(context: typer.Context, name: KeyName) -> None:
    """Let the key be used again."""
    _set_blocked(context, name, blocked=False)


@key_app.command("remove", epilog="Example: sealgate key remove acme/orders")
def key_remove(context: typer.Context, name: KeyName) -> None:
    """Remove a named key from this proxy. What it has encrypted opens again when it is provisioned again."""
    with operating(context) as operator:
        owner = parse_owner(name)
        remove_key(operator.store, owner, actor=operator.actor)
        say_effective(operator, {"changed": True, "removed": str(owner)}, f"key {owner} removed")


def _set_blocked(context: typer.Context, name: str, *, blocked: bool) -> None:
    with operating(context) as operator:
        before = operator.store.revision()
        key = set_blocked(operator.store, parse_owner(name), blocked=blocked, actor=operator.actor)
        _show_key(operator, key, changed=operator.store.revision() != before)


def _key_of(operator: Operator, name: str) -> NamedKey:
    key = operator.store.snapshot().encryption_service.keys.get(parse_owner(name))
    if key is None:
        raise not_there(f"there is no key {name}")
    return key


def _show_key(operator: Operator, key: NamedKey, *, changed: bool, csr: Path | None = None) -> None:
    data: dict[str, object] = {"changed": changed, "key": _key_json(key)}
    lines = ([] if changed else ["unchanged"]) + _key_lines(key)
    if csr is not None:
        data["csr_file"] = str(csr)
        lines.append(f"  request written to {csr}; have the tenant's root sign it, then")
        lines.append(f"  sealgate key import-cert {key.owner} FILE")
    say_effective(operator, data, "\n".join(lines))


def _key_json(key: NamedKey) -> dict[str, object]:
    certificate = key.certificate
    return {
        "key": str(key.owner),
        "state": "waits for its certificate" if certificate is None else "provisioned",
        "use": key.use.value,
        "algorithm": None if key.algorithm is None else key.algorithm.value,
        "operations": sorted(key.operations),
        "blocked": key.blocked,
        "certificate_sha256": None if certificate is None else fingerprint(certificate).hex(),
        "not_after": None if certificate is None else certificate.not_valid_after_utc.isoformat(),
    }


def _key_lines(key: NamedKey) -> list[str]:
    kind = key.use.value if key.algorithm is None else f"{key.use.value} {key.algorithm.value}"
    lines = [f"key {key.owner} ({kind}: {joined(key.operations)}){', BLOCKED' if key.blocked else ''}"]
    if key.certificate is None:
        lines.append("  waits for its certificate: refuses everything")
    else:
        end = key.certificate.not_valid_after_utc.date()
        lines.append(f"  certificate sha256 {fingerprint(key.certificate).hex()}, until {end}")
    return lines
