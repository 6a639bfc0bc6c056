"""Rewards that hang, crash, lie or grow, and numbers that run away, inside real runs: the step's time stays bounded,
each outcome is logged as what it was, and the adapter stays sound."""

import itertools
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorl_command import Forks, adapter_sha256, metrics, rollouts, small_run, write_rows

HOSTILE_REWARD = r"""
import math, os, signal, sys, time
from lorl.rewards import graders

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return REWARDS[ground_truth](solution_str)

def forever(text):
    while True:
        pass

REWARDS = {
    "fine": lambda text: sum(map(ord, text)) % 97 / 97,
    "raise": lambda text: {}["missing"],
    "loop": forever,
    "sleep": lambda text: time.sleep(1e9),
    "sys.exit": lambda text: sys.exit(0),
    "os._exit": lambda text: os._exit(0),
    "kill": lambda text: os.kill(os.getpid(), signal.SIGKILL),
    "four gigabytes": lambda text: float(len(bytearray(4 << 30))),
    "nan": lambda text: math.nan,
    "none": lambda text: None,
    "no score": lambda text: {"acc": 1.0},
    "tower": lambda text: graders.math("math", r"\boxed{9^{9^{9}}}", "7"),
    "spam": lambda text: print("spam" * 1_000_000) or 1.0,
}
"""

# What each trick comes to. `tower` runs out of time or of memory, whichever is first.
OUTCOMES = {
    "fine": {"ok"},
    "raise": {"raised"},
    "loop": {"timeout"},
    "sleep": {"timeout"},
    "sys.exit": {"crashed"},
    "os._exit": {"crashed"},
    "kill": {"crashed"},
    "four gigabytes": {"memory"},
    "nan": {"invalid"},
    "none": {"invalid"},
    "no score": {"invalid"},
    "tower": {"timeout", "memory"},
    "spam": {"ok"},
}
DEADLINE_S = 1.0


def test_hostile_rewards_cost_their_own_samples_and_never_the_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    write_rows(tmp_path / "hostile.jsonl", [{"prompt": f"{name}?", "answer": name} for name in OUTCOMES])
    argv = small_run(
        *(tmp_path, tiny_model, "data.train=hostile.jsonl", f"data.prompts_per_step={len(OUTCOMES)}"),
        *("rollout.n=2", "trainer.total_steps=2", f"reward.deadline_s={DEADLINE_S}", "reward.memory_mib=1024"),
        *("reward.workers=2", "data.max_prompt_tokens=64"),
        reward=HOSTILE_REWARD,
    )
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    run = tmp_path / "runs/r"
    hanging = 2 * sum("timeout" in statuses for statuses in OUTCOMES.values())
    for step, line in enumerate((run / "metrics.jsonl").read_text().splitlines(), 1):
        seconds = json.loads(line)["time/step_s"]
        assert seconds < hanging * DEADLINE_S + 20, "bounded by the deadlines"
        rows = rollouts(run, step)
        assert len(rows) == 2 * len(OUTCOMES)
        for row in rows:
            assert row["status"] in OUTCOMES[row["ground_truth"]], row
            assert (row["reward"] is None) == (row["status"] != "ok"), "a failure is not a reward of zero"
            assert bool(row["detail"]) == (row["status"] != "ok")
            assert "\n" not in row["detail"]
        logged = json.loads(line)
        for status in {row["status"] for row in rows}:
            share = sum(row["status"] == status for row in rows) / len(rows)
            assert logged[f"reward/{status}_fraction"] == pytest.approx(share)
        graded = [row["reward"] for row in rows if row["status"] == "ok"]
        assert logged["reward/mean"] == pytest.approx(sum(graded) / len(graded)), "over what was graded"
        assert logged["policy/grad_norm"] > 0, "the sound group still teaches"
        assert f"graded {len(graded) / len(rows):.0%}" in done.out
    for status in ("raised", "timeout", "crashed", "memory", "invalid"):
        assert done.out.count(f"warning: step 1: a reward came to '{status}' (") == 1, "named once"
    assert "spam" not in done.out.replace("spam?", "") + done.err


BATCHED = """
def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
    return {body}
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("[1.0] * (len(solution_strs) - 1)", "invalid"),
        ("1.0", "invalid"),
        ("[float('nan')] + [0.5] * (len(solution_strs) - 1)", "invalid"),
        ("solution_strs[len(solution_strs)]", "raised"),
    ],
)
def test_a_batched_reward_that_fails(forks: Forks, tiny_model: Path, tmp_path: Path, body: str, status: str):
    keys = ["reward.batched=true", "trainer.max_skipped_steps=9"]
    argv = small_run(tmp_path, tiny_model, *keys, reward=BATCHED.format(body=body))
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    rows = rollouts(tmp_path / "runs/r", 3)
    assert rows[0]["status"] == status
    others = {row["status"] for row in rows[1:]}
    assert others == ({"ok"} if "nan" in body else {status})


BROKEN = """
import pathlib
def compute_score(solution_str, ground_truth):
    return len(set(solution_str)) / 16 if pathlib.Path("mended").exists() else {}["score"]
"""


def test_a_reward_that_never_comes_to_anything_ends_the_run_which_goes_on_once_it_is_mended(
    forks: Forks, tiny_model: Path, tmp_path: Path
):
    (tmp_path / "mended").touch()
    argv = small_run(tmp_path, tiny_model, reward=BROKEN)
    assert forks.run(*argv, "trainer.total_steps=1", cwd=tmp_path).code == 0
    (tmp_path / "mended").unlink()
    done = forks.run(*argv, "trainer.total_steps=9", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("lorl: no sample was graded in 3 steps in a row ('raised': KeyError: 'score' (reward.py")
    assert done.err.count("\n") == 1
    assert "go on after step 4" in done.err
    assert adapter_sha256(tmp_path / "runs/r", 4) == adapter_sha256(tmp_path / "runs/r", 1), "nothing was trained on it"
    assert len(rollouts(tmp_path / "runs/r", 4)) == 8
    again = forks.run(*argv, "trainer.total_steps=9", cwd=tmp_path)
    assert (again.code, len(metrics(tmp_path / "runs/r"))) == (2, 5), "a run that goes on broken ends at its first step"
    (tmp_path / "mended").touch()
    assert forks.run(*argv, "trainer.total_steps=9", cwd=tmp_path).code == 0
    assert metrics(tmp_path / "runs/r")[-1]["reward/ok_fraction"] == 1.0


def test_evaluating_with_a_reward_that_never_comes_to_anything_is_an_error(
    forks: Forks, tiny_model: Path, tmp_path: Path
):
    _, *keys = small_run(tmp_path, tiny_model, reward=BROKEN)
    done = forks.run("eval", *keys, "data.val=train.jsonl", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    told = "lorl: data.val: no answer to its 8 prompts was graded; samples not graded: 8 'raised' (KeyError: 'score'"
    assert done.err.splitlines()[-1].startswith(told)


def test_completions_of_every_kind_reach_the_reward_whole(forks: Forks, tiny_model: Path, tmp_path: Path):
    """A random model over bytes says control characters, half characters and markers; the files hold them all."""
    argv = small_run(tmp_path, tiny_model, "rollout.max_response_tokens=64", "rollout.n=8", "rollout.temperature=2")
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    said = "".join(row["completion"] for step in (1, 2, 3) for row in rollouts(tmp_path / "runs/r", step))
    assert "\ufffd" in said
    assert any(ord(character) < 32 for character in said)
    assert all(row["reward"] == len(set(row["completion"])) / 16 for row in rollouts(tmp_path / "runs/r", 3))
    page = forks.run("report", "runs/r", cwd=tmp_path)
    assert page.code == 0, page
    shown = re.findall(r"<pre>(.*?)</pre>", (tmp_path / "runs/r/report.html").read_text(), re.DOTALL)
    assert len(shown) > 3
    assert not [c for c in "".join(shown) if ord(c) < 32 and c != "\n"], "control characters are spelled out"


# Numbers that run away


def assert_sound(run: Path) -> None:
    """Every checkpoint holds finite values only."""
    for file in run.glob("checkpoints/step-*/**/*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(file).values()), file


HUGE_REWARD = """
def compute_score(solution_str, ground_truth):
    return 3e38 if len(set(solution_str)) % 2 else -3e38
"""


def test_a_loss_that_is_not_finite_skips_the_step_and_then_ends_the_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(
        *(tmp_path, tiny_model, "trainer.total_steps=9", "trainer.max_skipped_steps=2", "checkpoint.every_steps=1"),
        reward=HUGE_REWARD,
    )
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 3
    assert done.err.startswith("lorl: 2 steps in a row were not finite (loss nan")
    assert "optim.lr" in done.err
    assert done.err.count("\n") == 1
    assert "warning: optimizer step skipped, adapter unchanged: loss nan" in done.out
    assert [row["train/skipped"] for row in metrics(tmp_path / "runs/r")] == [1.0]
    assert_sound(tmp_path / "runs/r")


ONCE = """
import pathlib
def compute_score(solution_str, ground_truth):
    huge = pathlib.Path("huge")
    return (3e38 if len(set(solution_str)) % 2 else -3e38) if huge.exists() else len(set(solution_str)) / 16
"""


def test_a_run_gets_over_a_step_that_was_not_finite(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=40", reward=ONCE)
    (tmp_path / "huge").touch()
    command = forks.start(*argv, "trainer.max_skipped_steps=99", cwd=tmp_path)
    command.wait_for(lambda: "skipped" in command.stdout.read_text())
    (tmp_path / "huge").unlink()
    assert command.wait().code == 0
    skipped = [row["train/skipped"] for row in metrics(tmp_path / "runs/r")]
    assert [skip for skip, _ in itertools.groupby(skipped)] == [1.0, 0.0]
    assert metrics(tmp_path / "runs/r")[-1]["policy/grad_norm"] > 0
    assert_sound(tmp_path / "runs/r")


def test_an_adapter_that_ran_away_ends_the_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "optim.lr=1e30", "checkpoint.every_steps=1", "trainer.total_steps=9")
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 3
    assert done.err.startswith("lorl: the model's outputs are not finite")
    assert "optim.lr" in done.err
    assert done.err.count("\n") == 1


def test_rollouts_of_another_policy_end_the_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "rollout.max_mismatch=1e-12", "checkpoint.every_steps=1")
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 3
    assert done.err.startswith("lorl: engine and trainer disagree")
    assert "rollout.max_mismatch=1e-12" in done.err
    assert done.err.count("\n") == 1
    assert not list((tmp_path / "runs/r/checkpoints").glob("*")), "nothing was trained on it"
