"""What a person sees in the browser in place of a page that was refused. Pure.

1. Only who asks for a document gets one; scripts get the JSON that programs get.
2. Nothing of it is from the request, nothing is loaded from anywhere, and nothing runs.
"""

import html

from proxy.messages.message import Fields
from proxy.refusals import Refusal

PAGE_TYPE = "text/html; charset=utf-8"
_DOCUMENTS = frozenset({"document", "iframe", "frame"})


def wants_page(fields: Fields) -> bool:
    """Whether the request is a browser's for something to show (Fetch Metadata; RFC 9110 12.5.1)."""
    destination = fields.sole("sec-fetch-dest")
    if destination is not None:
        return destination.lower() in _DOCUMENTS
    accepted = [token.partition(";")[0].strip(" \t") for token in fields.tokens("accept")]
    return accepted[:1] == ["text/html"]


def refusal_page(refusal: Refusal) -> bytes:
    """HTML that says what was refused, why, and what to do next."""
    code, cause, next_step = (html.escape(text) for text in (refusal.code, refusal.cause, refusal.next_step))
    return f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="robots" content="noindex">
<title>Not done: {code}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 36rem; margin: 15vh auto 0; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }}
small {{ color: #595959; }}
</style>
<h1>This was not done</h1>
<p id="cause">{cause}</p>
<p id="next-step">{next_step}</p>
<p><small>Sealgate, the encrypting proxy of your organisation. Code
<code id="code">{code}</code>, status {refusal.status}.</small></p>
</html>
""".encode()
