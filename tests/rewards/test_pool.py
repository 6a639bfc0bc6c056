"""The pool itself: order, batches, what loading says, and that no process is left when it or the trainer ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pool_helpers import HOSTILE_FILE, SLACK_S, ask, children, left_behind

from lorl.config import RewardConfig
from lorl.errors import UserError
from lorl.rewards.pool import RewardPool, RewardRequest


@pytest.mark.parametrize("reward", ["true", "SIGINT", "flood", "leave child"])
def test_these_are_graded(reward: str, capfd: pytest.CaptureFixture[str]) -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=30, workers=1)) as pool:
        (outcome,) = ask(pool, reward)
    assert (outcome.status, outcome.reward) == ("ok", 1.0)
    assert capfd.readouterr() == ("", "")


def test_a_fork_bomb_is_ended_before_its_deadline() -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=60, workers=1)) as pool:
        bomb, after = ask(pool, "fork bomb", "fine")
        assert (bomb.status, after.reward) == ("crashed", 1.0)
        assert "processes" in bomb.detail
    assert left_behind() == []


def test_a_worker_that_dies_between_calls_costs_no_sample() -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, workers=1)) as pool:
        ask(pool, "die later")
        time.sleep(0.5)
        assert ask(pool, "fine")[0].reward == 1.0


def test_a_failure_in_python_keeps_the_worker_and_a_timeout_replaces_it() -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=1, workers=1)) as pool:
        first, _, second, _, third = ask(pool, "pid", "raise", "pid", "loop", "pid")
        assert first.reward == second.reward != third.reward


def test_futures_are_in_the_order_of_requests_whatever_order_they_end_in(tmp_path: Path) -> None:
    path = tmp_path / "slow_first.py"
    path.write_text(
        "import time\n"
        "def compute_score(ground_truth):\n"
        "    time.sleep(0.3 if ground_truth == 0 else 0)\n"
        "    return ground_truth\n"
    )
    with RewardPool(RewardConfig(path=str(path))) as pool:
        futures = pool.submit([RewardRequest("test", "", ground_truth=i) for i in range(20)])
        assert [future.result().reward for future in futures] == list(range(20))


BATCHED = """
def good(data_sources, solution_strs, ground_truths, extra_infos, bonus=0):
    return [len(s) + g + bonus for s, g in zip(solution_strs, ground_truths)]

def short(solution_strs):
    return [1.0] * (len(solution_strs) - 1)

def long(solution_strs):
    return [1.0] * (len(solution_strs) + 1)

def no_list(solution_strs):
    return 1.0

def mixed(solution_strs):
    return (1.0, None, {"score": 2, "acc": 1})

def broken(solution_strs):
    raise ValueError("all of them")
"""


@pytest.mark.parametrize(
    ("name", "statuses", "rewards"),
    [
        ("good", ["ok"] * 3, [12.0, 23.0, 34.0]),
        ("short", ["invalid"] * 3, [None] * 3),
        ("long", ["invalid"] * 3, [None] * 3),
        ("no_list", ["invalid"] * 3, [None] * 3),
        ("mixed", ["ok", "invalid", "ok"], [1.0, None, 2.0]),
        ("broken", ["raised"] * 3, [None] * 3),
    ],
)
def test_a_batched_function_gets_the_requests_of_one_submit_together(
    tmp_path: Path, name: str, statuses: list[str], rewards: list[float | None]
) -> None:
    path = tmp_path / "batched.py"
    path.write_text(BATCHED)
    kwargs = {"bonus": 1} if name == "good" else {}
    config = RewardConfig(path=str(path), name=name, batched=True, kwargs=kwargs, workers=1)
    with RewardPool(config) as pool:
        futures = pool.submit([RewardRequest("test", "x" * i, ground_truth=10 * i) for i in (1, 2, 3)])
        outcomes = [future.result() for future in futures]
    assert [outcome.status for outcome in outcomes] == statuses
    assert [outcome.reward for outcome in outcomes] == rewards


def test_submit_does_not_wait() -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=30, workers=1)) as pool:
        start = time.monotonic()
        futures = pool.submit([RewardRequest("test", "sleep"), RewardRequest("test", "fine")])
        assert time.monotonic() - start < 1
        assert not any(future.done() for future in futures)
    # and closing ends what is running, with no future left for anyone to wait on
    assert all(future.done() for future in futures)
    assert left_behind() == []


def test_values_that_json_does_not_have_are_refused_when_submitted() -> None:
    np = pytest.importorskip("numpy")
    with RewardPool(RewardConfig(path=HOSTILE_FILE, workers=1)) as pool:
        with pytest.raises(UserError, match="a set in ground_truth or extra_info"):
            pool.submit([RewardRequest("test", "fine", ground_truth={1, 2})])
        (future,) = pool.submit([RewardRequest("test", "fine", extra_info={"index": np.int64(3), "xs": np.arange(2)})])
        assert future.result().reward == 1.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import no_such_module\ndef compute_score(): ...",
            r"ModuleNotFoundError: No module named 'no_such_module' \(broken.py:1\)",
        ),
        ("def compute_score(): ...\nimport os\nos._exit(7)", "exited with code 7 while loading"),
        (
            "def compute_score(answer): ...",
            "compute_score requires 'answer', but it is called by keyword with data_source",
        ),
        ("def compute_score(data_sources, solution_strs): ...", "requires 'data_sources'.*; set reward.batched=true"),
        ("def compute_score(solution_str, scale): ...", "takes no argument 'scal'.*did you mean 'scale'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_the_users_error_before_training(
    tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    kwargs = {"scal": 2} if "scale" in source else {}
    with pytest.raises(UserError, match=message):
        RewardPool(RewardConfig(path=str(path), kwargs=kwargs))
    assert left_behind() == []


def test_a_data_set_that_reasoning_gym_does_not_have_is_said_before_training() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=r"no data set 'chain_sums'; did you mean 'chain_sum'\?"):
        RewardPool(RewardConfig(workers=1), ["reasoning_gym/chain_sums"])


def test_built_in_graders_grade_mixed_data_sources_in_one_run() -> None:
    library = pytest.importorskip("reasoning_gym")
    entry = library.create_dataset("chain_sum", size=1, seed=0)[0]
    requests = [
        RewardRequest("openai/gsm8k", "#### 72", "72"),
        RewardRequest("math", r"\boxed{\frac{1}{2}}", "0.5"),
        RewardRequest("reasoning_gym/chain_sum", entry["answer"], None, {"entry": entry}),
        RewardRequest("unheard/of", "72", "72"),
    ]
    with RewardPool(RewardConfig(workers=1), {request.data_source for request in requests[:3]}) as pool:
        outcomes = [future.result() for future in pool.submit(requests)]
    assert [(outcome.status, outcome.reward) for outcome in outcomes] == [("ok", 1.0)] * 3 + [("raised", None)]
    assert outcomes[0].extras == {"well_formed": 1.0}
    assert "unheard/of" in outcomes[3].detail


TRAINER = """
import os, sys, time
from lorl.config import RewardConfig
from lorl.rewards.pool import RewardPool, RewardRequest

pool = RewardPool(RewardConfig(path=sys.argv[1], deadline_s=1000))
pool.submit([RewardRequest("test", "loop"), RewardRequest("test", "child and hang")])
time.sleep(0.5)
holder = os.fork()  # as a data loader would: it inherits the sockets and holds them open
if holder:
    print(holder, flush=True)
time.sleep(1000)
"""


def test_no_process_outlives_a_killed_trainer() -> None:
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, HOSTILE_FILE], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    holder = int(trainer.stdout.readline())
    try:
        family = [p for p in psutil.Process(trainer.pid).children(recursive=True) if p.pid != holder]
        assert len(family) >= 4  # fork server, two workers, a sleeper
        trainer.kill()
        trainer.wait()
        _, alive = psutil.wait_procs(family, timeout=SLACK_S)
    finally:
        trainer.kill()
        os.kill(holder, signal.SIGKILL)
    assert alive == []
    assert left_behind() == []


def test_ctrl_c_and_a_schedulers_sigterm_leave_workers_grading() -> None:
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=30, workers=1)) as pool:
        (server,) = children()
        for process in [server, *server.children()]:
            process.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGTERM)
        assert os.getpgid(server.pid) != os.getpgid(0)
        assert ask(pool, "fine")[0].reward == 1.0
        assert children() == [server]
