"""What the garbage collector does in the agent's process; in one of its own, for it counts for all of it."""

import json
import subprocess
import sys

_BREACH = """
import gc, json
from key_agent.collector import spare_what_lives

lives = [[number] for number in range(1000)]
spare_what_lives()
walked = []
gc.callbacks.append(lambda phase, info: walked.append(info["generation"]) if phase == "stop" else None)
before = gc.get_freeze_count()
waiting = [{"proxy": number, "answers": []} for number in range(25_000)]
made = len(walked)
del waiting
ring = []
ring.append(ring)
del ring
found = gc.collect()
print(json.dumps({"frozen": before, "walked": walked[:made], "found": found}))
"""


def test_a_breach_is_walked_a_few_times_at_most_and_never_in_full() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BREACH], capture_output=True, text=True, timeout=60, check=True
    )
    told = json.loads(done.stdout)
    assert told["frozen"] > 1000, "what lived before is not walked any more"
    # 50,000 containers: 25 times with Python's own thresholds, two of them deeper.
    assert 1 <= len(told["walked"]) <= 3
    assert set(told["walked"]) == {0}
    assert told["found"] > 0, "what is garbage is still found"
