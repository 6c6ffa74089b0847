"""A program with google-cloud-storage that uploads one file in chunks, and tries again as that is meant to.

Run by `.venv-referees`; knows nothing of Sealgate. One JSON document on standard input: url (of the service),
bucket, ca, proxy (or null), name, file, chunk_bytes. Prints what it ended with.
"""

import json
import sys

import requests
from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage import blob as blob_module
from google.cloud.storage.exceptions import InvalidResponse

SPEC = json.load(sys.stdin)
session = AuthorizedSession(AnonymousCredentials())
session.trust_env = False
session.verify = SPEC["ca"]
session.proxies = {"https": SPEC["proxy"]} if SPEC["proxy"] else {}
client = storage.Client(
    project="referee",
    credentials=AnonymousCredentials(),
    client_options={"api_endpoint": SPEC["url"]},
    _http=session,
)
# Above it the client uses its other protocol.
blob_module._MAX_MULTIPART_SIZE = -1
# Its own, but for how long it waits.
eager = blob_module.DEFAULT_RETRY.with_delay(initial=0.05, maximum=0.2)
blob = client.bucket(SPEC["bucket"]).blob(SPEC["name"], chunk_size=SPEC["chunk_bytes"])
blob.metadata = {"x": "y"}
try:
    blob.upload_from_filename(SPEC["file"], retry=eager)
except (GoogleAPIError, InvalidResponse, requests.RequestException) as error:
    json.dump([type(error).__name__, str(error)[:300]], sys.stdout)
else:
    json.dump([blob.size, blob.crc32c], sys.stdout)
