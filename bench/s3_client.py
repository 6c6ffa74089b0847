"""The client of the rows s3_*: boto3 as its users have it, run by the referees' Python.

    python s3_client.py ENDPOINT CA_FILE BODY_FILE ACCESS_KEY      (the secret in AWS_SECRET_ACCESS_KEY)

Reads `PUT` or `GET` from its standard input, a line each, and prints the seconds that one took: `put_object`
of the file, `get_object` read to its end. An answer of another length than the file's is an error.
"""

import os
import sys
import time
from pathlib import Path

import boto3
from botocore.config import Config

PIECE_BYTES = 1 << 20


def main() -> None:
    endpoint, ca_file, body_file, access_key = sys.argv[1:]
    body = Path(body_file)
    s3 = boto3.client(
        "s3",
        endpoint_url=endpoint,
        verify=ca_file,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    for line in sys.stdin:
        began_s = time.perf_counter()
        if line.strip() == "PUT":
            with body.open("rb") as file:
                s3.put_object(Bucket="bucket", Key="body", Body=file)
        else:
            length = 0
            for piece in s3.get_object(Bucket="bucket", Key="body")["Body"].iter_chunks(PIECE_BYTES):
                length += len(piece)
            if length != body.stat().st_size:
                raise SystemExit(f"{length} bytes came")
        print(time.perf_counter() - began_s, flush=True)


if __name__ == "__main__":
    main()
