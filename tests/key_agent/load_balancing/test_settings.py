"""What the companion's settings take, and what they must not."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from key_agent.environments.shared.registry_key import public_text
from key_agent.load_balancing.settings import Rule, load, unusable_files
from runtime.settings import SettingsError

KEY = public_text(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
"""Always the same: it stands in the names of tests, which both of the suite's processes must agree on."""
GOOD = f"""\
[lb_agent]
id = "lb-1"
tenant = "acme"
root_certificate_file = "root.pem"
certificate_file = "lb.pem"
key_file = "lb.key"

[[agents]]
id = "agent-a"
url = "https://a.example:8330"
registry_key = "{KEY}"
[[agents]]
id = "agent-b"
url = "https://b.example:8330"
registry_key = "{KEY}"

[[servers]]
name = "a-1"
environment = "a"
address = "10.0.0.1:8200"
status_url = "http://10.0.0.1:9080"
geo = "us"

[frontend]
bind = "0.0.0.0:8200"
rule = "geo"
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "lb.toml"
    file.write_text(text)
    return file


def test_what_is_needed(tmp_path: Path) -> None:
    settings = load(written(tmp_path, GOOD), {})
    assert settings.frontend.rule is Rule.GEO
    assert settings.servers[0].geo == "us"
    assert settings.lb_agent.key_file == tmp_path / "lb.key"
    assert len(list(unusable_files(settings))) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('id = "agent-b"', 'id = "agent-a"'),
        ('url = "https://b.example:8330"', 'url = "http://b.example:8330"'),
        ('url = "https://b.example:8330"', 'url = "https://b.example:8330/x"'),
        (f'registry_key = "{KEY}"', 'registry_key = "AAAA"'),
        ('name = "a-1"', 'name = "a 1"'),
        ('address = "10.0.0.1:8200"', 'address = "10.0.0.1"'),
        ('address = "10.0.0.1:8200"', 'address = "10.0.0.1:99999"'),
        ('status_url = "http://10.0.0.1:9080"', 'status_url = "file:///etc/passwd"'),
        ('geo = "us"', ""),
        ('rule = "geo"', 'rule = "nearest"'),
        ('bind = "0.0.0.0:8200"', 'bind = "0.0.0.0:8200 ssl crt x"'),
        ('bind = "0.0.0.0:8200"', 'bind = "0.0.0.0:8200"\ntrusted_networks = ["10.0.0.0/8 } deny {"]'),
        ('bind = "0.0.0.0:8200"', 'bind = "0.0.0.0:8200"\nstats_socket = "/run/a b"'),
        ('key_file = "lb.key"', 'key_file = "lb.key"\nstale_s = 0.1'),
        ('key_file = "lb.key"', 'key_file = "lb.key"\nunknown = 1'),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError):
        load(written(tmp_path, GOOD.replace(old, new)), {})


def test_one_agent_is_not_enough(tmp_path: Path) -> None:
    first, _, rest = GOOD.partition('[[agents]]\nid = "agent-b"')
    _, _, servers = rest.partition("\n\n")
    with pytest.raises(SettingsError, match="two agents"):
        load(written(tmp_path, f"{first}\n{servers}"), {})
