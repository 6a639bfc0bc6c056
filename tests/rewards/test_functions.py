"""A user's function: how it is found, called, and understood."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorl.config import RewardConfig
from lorl.experience import Outcome
from lorl.rewards.pool import RewardPool, RewardRequest

REQUEST = RewardRequest("source", "four", ground_truth="4", extra_info={"index": 7})


def outcome_of(tmp_path: Path, source: str, **config: Any) -> Outcome:
    path = tmp_path / "reward.py"
    path.write_text(source)
    with RewardPool(RewardConfig(path=str(path), workers=1, **config), ["source"]) as pool:
        (future,) = pool.submit([REQUEST])
        return future.result()


VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert (data_source, solution_str, ground_truth, extra_info) == ("source", "four", "4", {"index": 7})
    return kwargs["scale"]
"""


@pytest.mark.parametrize(
    ("source", "config", "reward"),
    [
        (VERL, {"kwargs": {"scale": 2}}, 2.0),
        ("def compute_score(solution_str):\n    return len(solution_str)", {}, 4.0),
        (
            "def compute_score(ground_truth, *, weight=1.0):\n    return int(ground_truth) * weight",
            {"kwargs": {"weight": 3}},
            12.0,
        ),
        ("def compute_score(**everything):\n    return len(everything)", {}, 4.0),
        ("def compute_score():\n    return True", {}, 1.0),
        ("def mine(solution_str):\n    return 0.25", {"name": "mine"}, 0.25),
        ("import asyncio\nasync def compute_score(solution_str):\n    await asyncio.sleep(0)\n    return 0.5", {}, 0.5),
        ("import numpy as np\ndef compute_score():\n    return np.float32(0.5)", {}, 0.5),
        ("import numpy as np\ndef compute_score():\n    return np.array(3)", {}, 3.0),
        ("class Grader:\n    def __call__(self, solution_str):\n        return 6\ncompute_score = Grader()", {}, 6.0),
        ("import helper\ncompute_score = helper.score", {}, 9.0),
    ],
)
def test_functions_that_verls_users_write(tmp_path: Path, source: str, config: dict[str, Any], reward: float) -> None:
    (tmp_path / "helper.py").write_text("def score(solution_str):\n    return 9")
    outcome = outcome_of(tmp_path, source, **config)
    assert (outcome.status, outcome.reward) == ("ok", reward), outcome.detail


def test_a_dicts_other_numbers_and_strings_become_extras(tmp_path: Path) -> None:
    outcome = outcome_of(
        tmp_path,
        "import numpy as np\n"
        "def compute_score(solution_str):\n"
        "    return {'score': 1, 'acc': np.bool_(True), 'length': 4, 'pred': 'four', 'steps': [1, 2], 'note': None}\n",
    )
    assert outcome.reward == 1.0
    assert outcome.extras == {"acc": 1.0, "length": 4.0, "pred": "four"}
    assert outcome.seconds > 0


def test_an_event_loop_lives_between_calls(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(
        "import asyncio\n"
        "loops = []\n"
        "async def compute_score():\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    return len(set(loops))\n"
    )
    with RewardPool(RewardConfig(path=str(path), workers=1)) as pool:
        assert [future.result().reward for future in pool.submit([REQUEST, REQUEST])] == [1.0, 1.0]


def test_workers_do_not_import_torch_and_see_no_gpu(tmp_path: Path) -> None:
    outcome = outcome_of(
        tmp_path,
        "import os, sys\n"
        "def compute_score():\n"
        "    return {'score': 1.0, 'torch': 'torch' in sys.modules, 'gpus': os.environ['CUDA_VISIBLE_DEVICES'],\n"
        "            'threads': os.environ['OMP_NUM_THREADS']}\n",
    )
    assert outcome.extras == {"torch": 0.0, "gpus": "", "threads": "1"}


def test_memory_is_counted_from_what_each_call_starts_with(tmp_path: Path) -> None:
    """A reward that keeps 40 MiB a call stays within a limit of 100 a call; its worker is replaced as it grows."""
    path = tmp_path / "reward.py"
    path.write_text(
        "import os\n"
        "kept = []\n"
        "def compute_score():\n"
        "    kept.append(bytearray(40 << 20))\n"
        "    return {'score': len(kept), 'pid': os.getpid()}\n"
    )
    with RewardPool(RewardConfig(path=str(path), workers=1, memory_mib=100)) as pool:
        outcomes = [future.result() for future in pool.submit([REQUEST] * 7)]
    assert [outcome.reward for outcome in outcomes] == [1, 2, 3, 1, 2, 3, 1]
    assert len({outcome.extras["pid"] for outcome in outcomes}) == 3


def test_numpy_memory_errors_are_memory_too(tmp_path: Path) -> None:
    outcome = outcome_of(
        tmp_path, "import numpy as np\ndef compute_score():\n    return np.ones(1 << 28).sum()", memory_mib=256
    )
    assert outcome.status == "memory"
    assert np.__name__ in outcome.detail or "allocate" in outcome.detail
