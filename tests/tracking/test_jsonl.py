import json
import math
import os
import signal
import subprocess
import sys

import pytest

from lorl.tracking.jsonl import JsonlTracker, read_jsonl, read_metrics


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def log_steps(folder, steps, resume_step=None):
    tracker = JsonlTracker(folder, resume_step)
    for step in steps:
        tracker.log(step, {"reward/mean": step / 7, "policy/kl": 1e-9 * step})
    tracker.close()


def test_each_step_is_one_line_of_valid_json_with_nulls_for_what_json_lacks(tmp_path):
    tracker = JsonlTracker(tmp_path, None)
    tracker.log(1, {"reward/mean": 0.1 + 0.2, "policy/grad_norm": math.nan, "loss/policy": -math.inf})
    tracker.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = lines(tmp_path)
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "reward/mean": 0.1 + 0.2, "policy/grad_norm": None, "loss/policy": None}


def test_a_resumed_file_equals_the_uninterrupted_one_byte_for_byte(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    log_steps(tmp_path / "whole", range(10))
    log_steps(tmp_path / "resumed", range(7))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/me')  # killed inside a write
    log_steps(tmp_path / "resumed", range(5, 10), resume_step=4)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")


def test_starting_anew_leaves_nothing_of_an_earlier_attempt(tmp_path):
    log_steps(tmp_path, range(5))
    log_steps(tmp_path, range(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_killed_process_leaves_only_whole_lines_but_the_last(tmp_path):
    code = (
        "import pathlib, itertools, sys\n"
        "from lorl.tracking.jsonl import JsonlTracker\n"
        "tracker = JsonlTracker(pathlib.Path(sys.argv[1]), None)\n"
        "for step in itertools.count():\n"
        "    tracker.log(step, {f'm/{i}': step / 3 for i in range(50)})\n"
        "    if step == 20: print('going', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"going\n"
        os.kill(process.pid, signal.SIGKILL)
    *whole, _last = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(whole) >= 21
    assert [json.loads(line)["step"] for line in whole] == list(range(len(whole)))


def test_a_disk_that_fills_up_leaves_the_file_as_it_was_and_logging_goes_on_later(tmp_path):
    """A file-size limit stands for the full disk: the write is cut short, then refused."""
    code = (
        "import pathlib, resource, signal, sys\n"
        "from lorl.tracking.jsonl import JsonlTracker\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "tracker = JsonlTracker(pathlib.Path(sys.argv[1]), None)\n"
        "tracker.log(1, {'a': 1.0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    tracker.log(2, {'a': 2.0, 'b': 2.0})\n"
        "except OSError: print('refused')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "tracker.log(3, {'a': 3.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
    assert lines(tmp_path) == ['{"step": 1, "a": 1.0}', '{"step": 3, "a": 3.0}']


def test_readers_pass_over_a_torn_line_and_merge_the_lines_of_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "a": 1}\n{"step": 1, "a": 0}\n{"step": 2, "b": 3}\n{"step": 3, "a"'
    )
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0}, {"step": 2, "a": 1, "b": 3}]
    assert list(read_jsonl(tmp_path / "absent.jsonl")) == []


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\r"])
def test_line_separators_inside_a_completion_do_not_end_a_line(tmp_path, separator):
    (tmp_path / "rollouts.jsonl").write_bytes(
        (json.dumps({"completion": f"a{separator}b"}, ensure_ascii=False) + "\n").encode()
    )
    assert [row["completion"] for row in read_jsonl(tmp_path / "rollouts.jsonl")] == [f"a{separator}b"]
