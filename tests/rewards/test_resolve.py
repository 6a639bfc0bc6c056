"""Mistakes in reward.* are one sentence before any work, and the user's file is not run to find them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lorl.config import RewardConfig
from lorl.errors import UserError
from lorl.rewards.resolve import resolve


def test_auto_picks_by_data_source() -> None:
    sources = {"openai/gsm8k", "aime2025", "math_dapo"}
    assert resolve(RewardConfig(), sources) == {"openai/gsm8k": "gsm8k", "aime2025": "math", "math_dapo": "math"}


def test_a_named_grader_takes_any_data_source() -> None:
    assert resolve(RewardConfig(name="exact"), {"anything"}) == {"anything": "exact"}


@pytest.mark.parametrize(
    ("config", "sources", "message"),
    [
        (
            {},
            {"openai/gsm8"},
            r"'openai/gsm8' has no built-in reward; did you mean 'openai/gsm8k'\?.*reward.name.*reward.path",
        ),
        ({}, {""}, "rows without a data_source have no built-in reward"),
        ({"name": "gms8k"}, {"x"}, r"reward.name='gms8k' is no built-in grader; did you mean 'gsm8k'\?"),
        ({"name": "regex"}, {"x"}, "reward.name=regex needs reward.kwargs.pattern"),
        ({"name": "regex", "kwargs": {"patern": "a"}}, {"x"}, r"reward.kwargs.patern: .*did you mean 'pattern'\?"),
        (
            {"name": "regex", "kwargs": {"pattern": "(a"}},
            {"x"},
            r"reward.kwargs.pattern='\(a' is no regular expression",
        ),
        ({"name": "regex", "kwargs": {"pattern": 3}}, {"x"}, "reward.kwargs.pattern=3 is no regular expression"),
        ({"name": "math", "kwargs": {"scale": 3}}, {"x"}, "reward.kwargs.scale: .*it takes none"),
        ({"batched": True}, {"openai/gsm8k"}, "reward.batched.*set reward.path"),
    ],
)
def test_mistakes_are_one_sentence(config: dict[str, Any], sources: set[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve(RewardConfig(**config), sources)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "auto", "there is no such file"),
        ("def score(): ...\nasync def other(): ...", "auto", "no function 'compute_score'; it has score, other"),
        ("x = 1", "auto", "has no functions"),
        ("def compute_score(:\n  pass", "auto", r"reward.py:1: invalid syntax"),
        ("def compute_score(): ...", "scor", "no function 'scor'; it has compute_score"),
        ("\0", "auto", "is no Python source|null bytes"),
    ],
)
def test_the_users_file_is_read_not_run(tmp_path: Path, source: str | None, name: str, message: str) -> None:
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=message):
        resolve(RewardConfig(path=str(path), name=name), {"x"})


def test_a_file_that_cannot_be_read() -> None:
    unreadable = "/proc/self/mem"  # for root as well
    with pytest.raises(UserError, match=f"reward.path={unreadable} cannot be read: Input/output error"):
        resolve(RewardConfig(path=unreadable), {"x"})


@pytest.mark.parametrize(
    "source",
    [
        "def compute_score(): ...",
        "async def compute_score(): ...",
        "from math import sqrt as compute_score",
        "from helper import *",
        "compute_score = lambda: 1",
        "compute_score: object = print",
        "try:\n    import x\nexcept ImportError:\n    def compute_score(): ...",
        "class compute_score: ...",
        "raise SystemExit\ndef compute_score(): ...",  # seen to be there; running it is the worker's part
    ],
)
def test_a_function_may_be_bound_in_any_way(tmp_path: Path, source: str) -> None:
    path = tmp_path / "reward.py"
    path.write_text(source)
    assert resolve(RewardConfig(path=str(path)), {"x"}) == {"x": "compute_score"}


def test_kwargs_of_auto_may_belong_to_any_grader_in_use() -> None:
    config = RewardConfig(kwargs={"format_score": 0.1})
    assert resolve(config, {"openai/gsm8k", "math"})
    with pytest.raises(UserError, match="format_score"):
        resolve(config, {"math"})


def test_a_missing_reasoning_gym_is_said_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'lorl\[tasks\]'"):
        resolve(RewardConfig(), {"reasoning_gym/chain_sum"})


def test_reasoning_gym_needs_a_data_sets_name() -> None:
    with pytest.raises(UserError, match="reasoning_gym/NAME"):
        resolve(RewardConfig(name="reasoning_gym"), {"sums"})
