"""A reward that hangs, dies or lies costs its own sample, in bounded time, and the pool goes on."""

import time

import pytest
from pool_helpers import HOSTILE_FILE, SLACK_S, ask, left_behind

from lorl.config import RewardConfig
from lorl.rewards.pool import RewardPool, RewardRequest

DEADLINE_S = 1.0


@pytest.fixture(scope="module")
def pool():
    with RewardPool(RewardConfig(path=HOSTILE_FILE, deadline_s=DEADLINE_S, memory_mib=256)) as pool:
        yield pool
    assert left_behind() == []


@pytest.mark.parametrize(
    ("reward", "status", "detail"),
    [
        ("loop", "timeout", "reward.deadline_s=1"),
        ("sleep", "timeout", "reward.deadline_s=1"),
        ("ignore SIGTERM", "timeout", "reward.deadline_s=1"),
        ("sys.exit", "crashed", "sys.exit(3)"),
        ("os._exit", "crashed", "exited with code 3"),
        ("SIGKILL", "crashed", "SIGKILL"),
        ("close all", "crashed", ""),
        ("write garbage", "crashed", "garbage"),
        ("gigabyte", "memory", "MemoryError"),
        ("kill server", "crashed", ""),
        ("raise", "raised", "KeyError: 'missing' (hostile_rewards.py:"),
        ("base exception", "raised", "BaseException: odd"),
        ("unprintable", "raised", "Unprintable"),
        ("nan", "invalid", "nan"),
        ("inf", "invalid", "inf"),
        ("huge int", "invalid", "inf"),
        ("none", "invalid", "None"),
        ("str", "invalid", "a str"),
        ("no score", "invalid", "without 'score' (it has acc)"),
        ("nan score", "invalid", "nan"),
        ("child and exit", "crashed", "exited with code 0"),
        ("child and hang", "timeout", "reward.deadline_s=1"),
    ],
)
def test_a_failing_reward_costs_its_own_sample_only(pool: RewardPool, reward: str, status: str, detail: str) -> None:
    start = time.monotonic()
    before, failed, after = ask(pool, "fine", reward, "fine")
    assert time.monotonic() - start < DEADLINE_S + SLACK_S
    assert (failed.status, failed.reward) == (status, None)
    assert detail in failed.detail
    assert "\n" not in failed.detail
    assert [before.reward, after.reward] == [1.0, 1.0]


def test_children_end_with_the_call_that_started_them(pool: RewardPool) -> None:
    ask(pool, "leave child", "child and exit", "child and hang")
    assert [p for p in left_behind() if "lorl-test-child" in p.cmdline()] == []


def test_expressions_that_never_end_are_timeouts_not_wrong_answers() -> None:
    endless = [
        "9^{9^{9}}",
        "9^{9^{9^{9}}}",
        "10^{10^{10}}",
        "(10^{9})!",
        r"\binom{10^{9}}{5 \cdot 10^{8}}",
        r"\sum_{k=1}^{10^{9}} k^{k}",
        "2^{2^{2^{2^{2^{2}}}}}",
    ]
    answers = [r"\frac{14}{2}", *endless, r"\frac{21}{3}"]
    with RewardPool(RewardConfig(deadline_s=DEADLINE_S, memory_mib=1024), ["math"]) as pool:
        start = time.monotonic()
        futures = pool.submit([RewardRequest("math", rf"\boxed{{{answer}}}", "7") for answer in answers])
        first, *hostile, last = [future.result(timeout=60) for future in futures]
    assert time.monotonic() - start < len(endless) * DEADLINE_S + SLACK_S
    assert [first.reward, last.reward] == [1.0, 1.0]
    assert {outcome.status for outcome in hostile} <= {"timeout", "memory"}
