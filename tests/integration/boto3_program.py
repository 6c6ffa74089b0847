"""A few lines of Python with boto3, run in the referees' environment: uploads in parts, step by step."""

import asyncio
import base64
import json
from typing import Any

from tests.children import output_of
from tests.integration.s3_site import Way
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

PRELUDE = """
import boto3, json, sys, base64
from botocore.config import Config
from botocore.exceptions import ClientError
s3 = boto3.client('s3', endpoint_url=sys.argv[1], config=Config(s3={'addressing_style': 'path'},
    retries={'total_max_attempts': 1}, connect_timeout=5, read_timeout=60))
given = json.load(sys.stdin)
def told(do):
    try:
        return do()
    except ClientError as error:
        answer = error.response
        return [answer['ResponseMetadata']['HTTPStatusCode'], answer['Error'].get('Code'),
                answer['ResponseMetadata'].get('HTTPHeaders', {}).get('sealgate-error')]
def part(number, body):
    return s3.upload_part(Bucket='bucket', Key='key', UploadId=given['upload'], PartNumber=number,
        Body=base64.b64decode(body))['ETag']
def complete(parts):
    return s3.complete_multipart_upload(Bucket='bucket', Key='key', UploadId=given['upload'],
        MultipartUpload={'Parts': [{'PartNumber': n, 'ETag': e} for n, e in parts]})['ETag']
"""


async def boto3(way: Way, code: str, **given: Any) -> Any:
    """What *code* leaves in `out`."""
    process = await asyncio.create_subprocess_exec(
        BIN / "python",
        "-c",
        f"{PRELUDE}\n{code}\njson.dump(out, sys.stdout)",
        way.endpoint,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**clean_environment(), **way.environment},
    )
    out, errors = await output_of(process, json.dumps(given).encode())
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(out)


def text(body: bytes) -> str:
    return base64.b64encode(body).decode()
