"""All blobs of an account as they are stored, snapshots included: run by `.venv-referees`.

As azure_scenario.py; prints {container: {name [snapshot]: base64}}.
"""

import base64
import json
import sys

from azure.storage.blob import BlobServiceClient

SPEC = json.load(sys.stdin)
service = BlobServiceClient(
    SPEC["url"],
    credential={"account_name": SPEC["account"], "account_key": SPEC["key"]},
    connection_verify=SPEC["ca"],
    retry_total=0,
)
found: dict[str, dict[str, str]] = {}
for container in service.list_containers():
    client = service.get_container_client(container.name)
    blobs = found[container.name] = {}
    for item in client.list_blobs(include=["snapshots"]):
        blob = client.get_blob_client(item.name, snapshot=item.snapshot)
        name = f"{item.name} {item.snapshot}" if item.snapshot else item.name
        blobs[name] = base64.b64encode(blob.download_blob().readall()).decode()
json.dump(found, sys.stdout)
