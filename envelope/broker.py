"""Envelopes and receipts on their way through a broker (docs/format.md, "By a broker").

1. The broker learns who speaks to whom as tags, how much, and when: no name, no key id, no outcome. A tag is
   a hash: whoever guesses a name can confirm the guess. Envelopes name the certificate they are for, as hash.
2. Envelopes protect themselves. Who sent a message is the sender's word, and decides nothing: it only finds
   the session by which the envelope is judged.
3. Receipts are encrypted under a key that follows from the session's challenge, which only agent and proxy
   know, and bound to the message they answer: a broker that could forge one could keep a withdrawal from
   arriving and nobody would notice. Without a challenge there are no receipts.
"""

import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from envelope.derive import lp
from envelope.errors import FormatError, IntegrityError, MisuseError

TAG_SIZE: Final = 16
MESSAGE_ID_SIZE: Final = 16
MAX_ENVELOPES: Final = 1000
_DELIVERY: Final = b"SGBD\x01"
_ANSWER: Final = b"SGBA\x01"
_NONCE_SIZE: Final = 12
_HEAD_SIZE: Final = len(_DELIVERY) + 1 + MESSAGE_ID_SIZE + TAG_SIZE


def proxy_tag(proxy_id: str) -> bytes:
    """What stands for a proxy in subjects, TAG_SIZE bytes."""
    return _tag(b"proxy", proxy_id)


def agent_tag(tenant: str, agent_id: str) -> bytes:
    """What stands for an agent in subjects and messages, TAG_SIZE bytes."""
    return _tag(b"agent", tenant, agent_id)


def _tag(kind: bytes, *names: str) -> bytes:
    told = b"".join(lp(name.encode()) for name in names)
    return sha256(lp(b"sealgate/v1 broker tag") + lp(kind) + told).digest()[:TAG_SIZE]


def delivery_subject(proxy_id: str, *, withdraws: bool) -> str:
    """Where envelopes for a proxy are published; withdrawals apart, so that they wait for no keys."""
    return f"sealgate.v1.{'withdrawals' if withdraws else 'envelopes'}.{proxy_tag(proxy_id).hex()}"


ALL_DELIVERIES: Final = ("sealgate.v1.envelopes.*", "sealgate.v1.withdrawals.*")


def answer_subject(agent: bytes, proxy_id: str | None = None) -> str:
    """Where an agent (its tag) hears the receipts of one proxy, or of all."""
    return f"sealgate.v1.receipts.{agent.hex()}.{'*' if proxy_id is None else proxy_tag(proxy_id).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokeredDelivery:
    """Envelopes for one proxy. *agent*: its tag. *is_challenged*: they answer the session's challenge."""

    message_id: bytes
    agent: bytes
    is_challenged: bool
    tokens: tuple[str, ...]

    def encode(self) -> bytes:
        """MisuseError if a size or a token is none that `decode_delivery` takes."""
        if len(self.message_id) != MESSAGE_ID_SIZE or len(self.agent) != TAG_SIZE:
            raise MisuseError("a message id and a tag have 16 bytes each")
        body = "\n".join(self.tokens)
        if not 1 <= len(self.tokens) <= MAX_ENVELOPES or not all(map(_is_token, self.tokens)):
            raise MisuseError(f"1 to {MAX_ENVELOPES} compact tokens make a delivery")
        return b"".join(
            (_DELIVERY, bytes((self.is_challenged,)), self.message_id, self.agent, body.encode("ascii"))
        )


def decode_delivery(message: bytes) -> BrokeredDelivery:
    """Inverse of `BrokeredDelivery.encode`. FormatError for anything else."""
    flag = message[len(_DELIVERY) : len(_DELIVERY) + 1]
    if not message.startswith(_DELIVERY) or flag not in (b"\x00", b"\x01") or len(message) <= _HEAD_SIZE:
        raise FormatError("not a delivery of envelopes")
    try:
        body = message[_HEAD_SIZE:].decode("ascii")
    except UnicodeDecodeError:
        raise FormatError("envelopes are ASCII") from None
    tokens = tuple(body.split("\n"))
    if len(tokens) > MAX_ENVELOPES or not all(map(_is_token, tokens)):
        raise FormatError(f"not 1 to {MAX_ENVELOPES} envelopes")
    ids = message[len(_DELIVERY) + 1 : _HEAD_SIZE]
    return BrokeredDelivery(
        message_id=ids[:MESSAGE_ID_SIZE],
        agent=ids[MESSAGE_ID_SIZE:],
        is_challenged=flag == b"\x01",
        tokens=tokens,
    )


def seal_answer(
    receipts: bytes, *, challenge: bytes, message_id: bytes, agent: bytes, proxy_id: str
) -> bytes:
    """*receipts*, whatever they are, as the answer to one message: for who knows *challenge*."""
    nonce = os.urandom(_NONCE_SIZE)
    key = _answer_key(challenge, agent, proxy_id)
    return _ANSWER + message_id + nonce + AESGCM(key).encrypt(nonce, receipts, _ANSWER + message_id)


def answered_message(answer: bytes) -> bytes:
    """Which message *answer* says it is to: proves nothing. FormatError if it is no answer."""
    if not answer.startswith(_ANSWER) or len(answer) < len(_ANSWER) + MESSAGE_ID_SIZE + _NONCE_SIZE:
        raise FormatError("not an answer to a delivery")
    return answer[len(_ANSWER) : len(_ANSWER) + MESSAGE_ID_SIZE]


def open_answer(answer: bytes, *, challenge: bytes, message_id: bytes, agent: bytes, proxy_id: str) -> bytes:
    """The receipts. FormatError, or IntegrityError unless this proxy sealed them for this message."""
    if answered_message(answer) != message_id:
        raise IntegrityError("the answer is to another message")
    rest = answer[len(_ANSWER) + MESSAGE_ID_SIZE :]
    try:
        return AESGCM(_answer_key(challenge, agent, proxy_id)).decrypt(
            rest[:_NONCE_SIZE], rest[_NONCE_SIZE:], _ANSWER + message_id
        )
    except InvalidTag:
        raise IntegrityError("the answer does not verify") from None


def _answer_key(challenge: bytes, agent: bytes, proxy_id: str) -> bytes:
    info = lp(b"sealgate/v1 broker receipts") + lp(agent) + lp(proxy_id.encode())
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(challenge)


def _is_token(text: str) -> bool:
    return bool(text) and text.isascii() and not any(map(str.isspace, text))
