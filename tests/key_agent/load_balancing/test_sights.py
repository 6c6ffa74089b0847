"""What is said of the agents: once in the log, and always to whoever asks."""

import re

import structlog

from key_agent.load_balancing.settings import Label
from key_agent.load_balancing.sights import STATUS_QUESTION, AgentSights, Word


def test_the_log_has_a_line_when_the_word_changes() -> None:
    sights = AgentSights(["a", "b"])
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            sights.note("a", Word.DOUBTED, "rows of other instead of acme")
            sights.note("b", Word.UNREACHED, "timeout: 3 s")
        sights.note("b", Word.UNREACHED, "refused")  # still not reached: no news
        sights.note("a", Word.DOUBTED, "another reason")
        for _ in range(2):
            sights.note("a", Word.BELIEVED)
    assert [(line["agent"], line["event"], line.get("cause")) for line in lines] == [
        ("a", "an agent's rows are not believed", "rows of other instead of acme"),
        ("b", "an agent is not reached", "timeout: 3 s"),
        ("a", "an agent's rows are not believed", "another reason"),
        ("a", "an agent's rows are believed", None),
    ]
    assert sights.word("a") == (Word.BELIEVED, None)
    assert sights.word("b") == (Word.UNREACHED, "refused")


def test_nobody_was_heard_in_the_beginning() -> None:
    assert AgentSights(["a"]).word("a") == (Word.UNASKED, None)


def test_the_question_is_no_servers_name() -> None:
    (meta,) = Label.__value__.__metadata__
    assert re.fullmatch(meta.pattern, "a-1")
    assert not re.fullmatch(meta.pattern, STATUS_QUESTION)
