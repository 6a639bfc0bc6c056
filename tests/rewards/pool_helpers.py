"""What the tests of the reward pool share."""

from pathlib import Path

import psutil

from lorl.experience import Outcome
from lorl.rewards.pool import RewardPool, RewardRequest

HOSTILE_FILE = str(Path(__file__).with_name("hostile_rewards.py"))
SLACK_S = 15.0  # a busy machine; what is never ended takes for ever


def children() -> list[psutil.Process]:
    """This process's, but for the session's driver of `lorl` commands, which other tests may have started."""
    return [child for child in psutil.Process().children() if not any("lorl_forks" in word for word in child.cmdline())]


def left_behind() -> list[psutil.Process]:
    """Processes below this one, and sleepers that a reward started, wherever they went."""
    marked = [p for p in psutil.process_iter(["cmdline"]) if "lorl-test-child" in (p.info["cmdline"] or [])]
    own = [process for child in children() for process in [child, *child.children(recursive=True)]]
    return [*own, *marked]


def ask(pool: RewardPool, *solutions: str) -> list[Outcome]:
    futures = pool.submit([RewardRequest("test", solution) for solution in solutions])
    return [future.result(timeout=60) for future in futures]
