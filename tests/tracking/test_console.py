import io
import os
import pty
import re
import subprocess
import sys

import pytest

from lorl.tracking import console
from lorl.tracking.console import Console, printable, step_line

METRICS = {
    "reward/mean": 0.4125,
    "policy/kl": 0.0031,
    "policy/entropy": 0.41,
    "rollout/response_tokens_mean": 11.2,
    "throughput/rollout_tokens_per_s": 1240.4,
    "time/step_s": 9.76,
}
SESSION = """
from lorl.tracking.console import Console
c = Console()
c.info("before")
with c.phase("evaluating", total=4) as advance:
    advance(4)
with c.training(total_steps=3, done_steps=1):
    for step in (2, 3):
        with c.phase("rollout", total=2) as advance:
            advance()
        c.step(step, {"reward/mean": step / 4}, total=3)
        c.warn("careful")
c.info("after")
"""


def run_on_a_terminal(term):
    """What SESSION sends to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", SESSION], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        received = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            received += part
    os.close(ours)
    assert process.returncode == 0, received.decode()
    return received.decode()


def test_into_a_pipe_go_plain_lines():
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, check=True)
    assert re.sub(r"\d+\.\d s", "T s", done.stdout).splitlines() == [
        "before",
        "evaluating (4) ...",
        "evaluating: done in T s",
        "step 2/3  reward  0.500",
        "warning: careful",
        "step 3/3  reward  0.750",
        "warning: careful",
        "after",
    ]


def test_a_dumb_terminal_gets_no_control_codes():
    assert "\x1b" not in run_on_a_terminal("dumb")


def test_a_terminal_gets_whole_lines_above_a_bar_with_the_time_left():
    output = run_on_a_terminal("xterm-256color")
    assert "\x1b[?25l" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor comes back
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    # Every such line is written where the bar was wiped out, and ends before the bar is drawn again.
    whole_lines = re.findall(r"\x1b\[2K(step.*?)\r\n", output)
    assert whole_lines == ["step 2/3  reward  0.500", "step 3/3  reward  0.750"]
    assert text.count("warning: careful\r\n") == 2
    assert re.search(r"training .*2/3.*left", text)
    assert text.startswith("before\r\n")
    assert text.endswith("after\r\n")


def test_a_step_says_what_was_measured_and_nothing_else():
    assert step_line(12, METRICS, total=40) == (
        "step 12/40  reward  0.412  kl  0.0031  entropy  0.410  length   11.2    1,240 tokens/s     9.8 s"
    )
    evaluated = {"eval/accuracy": 0.667, "eval/accuracy_low": 0.61, "eval/accuracy_high": 0.72}
    assert step_line(0, evaluated) == "step    0  accuracy 0.667 [0.610, 0.720]"


def test_markup_and_escape_codes_in_a_text_are_shown_not_obeyed():
    stream = io.StringIO()
    Console(stream).warn("[red]a[/red] \x1b[2J\x07")
    assert stream.getvalue() == "warning: [red]a[/red] \\x1b[2J\\x07\n"
    assert printable("naïve 数 \t") == "naïve 数 \\t"


def test_long_lines_are_left_whole_for_log_files():
    stream = io.StringIO()
    Console(stream).info("word " * 100)
    assert stream.getvalue().count("\n") == 1


def test_a_long_phase_inside_plain_training_gives_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(console, "HEARTBEAT_S", 0.0)
    stream = io.StringIO()
    lines = Console(stream)
    with lines.training(5), lines.phase("rollout", total=8) as advance:
        advance(3)
    assert stream.getvalue() == "rollout: 3/8 after 0 s\n"


def test_an_error_inside_a_phase_comes_through_and_claims_no_success():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Console(stream).phase("loading"):
        raise RuntimeError("torn file")
    assert stream.getvalue() == "loading ...\n"
