"""The rows without the gate: each must turn red, or its test proves nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# One case of each row that a plain addon on mitmproxy's own classes does not close.
CASES = (
    "test_row_01_requestheaders_raises[h1-h1-Exception-sync]",
    "test_row_01_request_raises_on_a_message_without_a_body[h1-h1-Exception-sync]",
    "test_row_02_the_addon_is_silent[h1-h1]",
    "test_row_03_a_hook_raises_what_is_no_exception[requestheaders-BaseException-sync]",
    "test_row_04_stream_large_bodies_and_the_hook_raises[h1-h1]",
    "test_row_05_the_transform_raises_in_mid_body[h1-h1-length]",
    "test_row_05_the_transform_raises_in_mid_body[h2-h2-no-length]",
    "test_row_06_the_transform_raises_at_the_end[h1-h1-no-length]",
    "test_row_07_the_flow_is_killed_while_it_streams[h1-h1]",
    "test_row_07_the_flow_is_killed_while_it_streams[h2-h2]",
    "test_row_09_a_plain_callable_is_no_transform[h1-h1]",
    "test_row_10_a_response_and_a_streamed_request[h1-h1]",
    "test_row_11_content_length_removed_and_nothing_in_its_place[clear]",
    "test_row_12_http2_without_a_length_to_an_http1_origin[clear]",
    "test_row_13_http1_request_trailers",
    "test_row_14_http2_request_trailers[h2-h2]",
    "test_row_15_connect_and_then_something_else[rawtcp-ssh]",
    "test_row_16_an_upgrade_is_not_relayed[websocket]",
    "test_row_17_the_transform_makes_less_or_more_than_it_promised[h1-h1-1]",
    "test_row_18_the_origin_is_out_of_reach_after_the_100[h1-h1]",
    "test_row_19_the_response_is_not_permitted[h1-h1]",
    "test_row_20_a_response_fails_late[h1-h1-middle-length]",
    "test_row_21_nobody_is_served_under_unsafe_options[request_client_cert-True]",
)

# The same of bodies that are collected.
COLLECT_CASES = (
    "test_what_nobody_approved_stays_here[h1-h1]",
    "test_more_than_the_limit_is_refused[True-h1-h1]",
    "test_an_answer_longer_than_the_limit_is_refused",
    "test_what_cannot_be_settled_ends_the_message[<lambda>-upstream-changed-h1-h1]",
)

# What works without the gate too: else the cases above were red for a reason of the harness's.
CONTROL = "test_what_is_permitted_passes_whole[h1-h1-100-length]"

# Longer than any case's own patience: an alarm that strikes within a task ends that task and not the case, so
# what the case has begun is waited for in vain, for more than a minute.
ALARM_S = 120
ALL_S = 600


def test_the_rows_turn_red_without_the_gate() -> None:
    file = "tests/proxy/gate/test_rows.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
    # asyncio's complaints about what mitmproxy leaves behind are not what is tested here.
    command += ["-W", "ignore", f"--timeout={ALARM_S}", *(f"{file}::{case}" for case in (*CASES, CONTROL))]
    command += [f"tests/proxy/gate/test_collect.py::{case}" for case in COLLECT_CASES]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "SEALGATE_TEST_STOCK": "1"},
        capture_output=True,
        text=True,
        timeout=ALL_S,
        check=False,
    )
    failed = set(re.findall(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE))
    assert failed == {*CASES, *COLLECT_CASES}, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_one_of_the_rows(case: str) -> None:
    source = (ROOT / "tests/proxy/gate/test_rows.py").read_text()
    assert f"def {case.partition('[')[0]}(" in source
