"""A run's folder is never reused silently, goes on where it may, and holds no secret."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorl import checkpoint, settings
from lorl.checkpoint import Checkpoint, SaveFailed
from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.run_folder import RunFolder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(*overrides: str) -> RunConfig:
    return settings.load(None, ["run.name=x", *overrides])


def opened(*overrides: str) -> RunFolder:
    config = config_of(*overrides)
    return RunFolder.open(config, settings.to_yaml(config))


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        opened(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(folder: str, step: int) -> Path:
    return checkpoint.save(Path(folder, "checkpoints"), Checkpoint(step, {}, {}, {"step": step}))


def test_a_new_folder_holds_the_configuration_and_the_environment():
    with opened("optim.lr=0.5") as folder:
        assert folder.path == Path("runs/x")
        assert folder.resume_from is None
        assert settings.load(folder.path / "config.yaml") == config_of("optim.lr=0.5")
        environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["python"] == sys.version.split()[0]
    assert set(environment["packages"]) >= {"torch", "transformers", "peft"}
    assert environment["cpus"] == os.cpu_count()
    assert str(os.cpu_count()) in environment["machine"]
    assert environment["git"] is None


def test_a_mistake_before_the_run_began_leaves_no_folder():
    for mistake in (UserError("data.train: no rows"), RuntimeError("a bug")):
        with pytest.raises(type(mistake)), opened("run.name=null") as folder:
            raise mistake
        assert folder.path.exists() is isinstance(mistake, RuntimeError), "what tells about a bug stays"
    with opened():
        pass
    with pytest.raises(UserError), opened():
        raise UserError("a mistake in a folder that was there already")
    assert sorted(os.listdir("runs/x")) == [".lock", "config.yaml", "environment.json"]


def test_the_state_of_the_repository_is_written_down():
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    Path("file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run(git + command, check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for text, dirty in (("a", False), ("b", True)):
        Path("file").write_text(text)
        with opened() as folder:
            environment = json.loads((folder.path / "environment.json").read_text())
        assert environment["git"] == {"commit": commit, "dirty": dirty}


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        ".hidden",
        "../up",
        "a/b",
        "/abs",
        "a\\\\b",
        "-flag",
        "",
        " ",
        "a b",
        "a\nb",
        "ünï",
        "a" * 65,
        "a\x00",
        "%2e",
    ],
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str):
    config = config_of()
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    with pytest.raises(UserError, match=re.escape("run.name=")):
        RunFolder.open(config, settings.to_yaml(config))
    assert not list(tmp_path.iterdir())


def test_names_are_made_from_model_algorithm_and_time_and_never_twice():
    folders = []
    for _ in range(3):
        with opened("run.name=null", "model.path=some/Model-1.5B", "algorithm.advantage=rloo") as folder:
            folders.append(folder.path)
    assert len(set(folders)) == 3
    for path in folders:
        assert re.fullmatch(r"Model-1\.5B-rloo-\d{8}-\d{6}(-\d)?", path.name)


def test_a_folder_of_something_else_is_left_alone():
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/thesis.tex").write_text("")
    assert "not the folder of a run" in refused()
    assert os.listdir("runs/x") == ["thesis.tex"]
    Path("runs/y").write_text("")
    assert "not the folder of a run" in refused("run.name=y")
    assert "cannot be used" in refused("run.dir=runs/y")


def test_a_folder_in_use_names_its_process_and_is_free_after_a_kill():
    code = (
        "import sys, time; from lorl import settings; from lorl.run_folder import RunFolder\n"
        "config = settings.load(None, ['run.name=x']); folder = RunFolder.open(config, settings.to_yaml(config))\n"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"in use by process {holder.pid}" in refused()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    opened().close()


def test_an_unfinished_run_goes_on_from_its_newest_whole_checkpoint():
    opened().close()
    saved("runs/x", 5)
    newest = saved("runs/x", 10)
    with opened() as folder:
        assert folder.resume_from == newest
    with opened(f"resume={newest}") as folder:
        assert folder.resume_from == newest
    (newest / "state.json").write_text("")
    with opened() as folder:
        assert folder.resume_from == Path("runs/x/checkpoints/step-5")


def test_a_run_without_a_checkpoint_starts_again_under_any_configuration():
    opened("data.train=missing.jsonl").close()
    with opened("data.train=there.jsonl") as folder:
        assert folder.resume_from is None
        assert settings.load(folder.path / "config.yaml").data.train == "there.jsonl"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew():
    opened().close()
    (saved("runs/x", 5) / "state.json").write_text("")
    assert "none of the 1 checkpoints" in refused()


def test_what_changed_forbids_to_go_on_and_what_may_change_does_not():
    opened().close()
    saved("runs/x", 5)
    message = refused("optim.lr=0.5", "seed=3")
    assert "optim.lr=3e-05" in message
    assert "optim.lr=0.5" in message
    assert "1 more" in message
    before = Path("runs/x/config.yaml").read_text()
    assert "checkpoints" not in before
    with opened("trainer.total_steps=99", "checkpoint.keep=1", "trainer.trackers=[tensorboard]") as folder:
        assert folder.resume_from is not None
    assert settings.load("runs/x/config.yaml").trainer.total_steps == 99


def test_resume_never_refuses_what_exists():
    opened("resume=never").close()
    assert "resume=never" in refused("resume=never")


def test_a_finished_run_goes_on_only_for_more_steps():
    with opened("trainer.total_steps=5") as folder:
        saved("runs/x", 5)
        folder.write_summary({"steps": 5, "before": None})
    assert json.loads(Path("runs/x/summary.json").read_text())["steps"] == 5
    message = refused("trainer.total_steps=5")
    assert "finished run of 5 steps" in message
    assert "trainer.total_steps" in message
    for _ in range(2):  # also if it was killed on the way
        with opened("trainer.total_steps=6") as folder:
            assert folder.resume_from == Path("runs/x/checkpoints/step-5")


def test_a_run_finished_by_epochs_goes_on_for_more_epochs():
    with opened("trainer.total_epochs=2") as folder:
        saved("runs/x", 8)
        folder.write_summary({"steps": 8})
    assert "finished" in refused("trainer.total_epochs=2")
    with opened("trainer.total_epochs=3") as folder:
        assert folder.resume_from is not None


def test_a_new_run_branches_off_another_runs_checkpoint_and_remembers_it():
    opened("run.name=a").close()
    source = saved("runs/a", 5)
    with opened("run.name=b", f"resume={source}", "optim.lr=0.5") as folder:
        assert folder.resume_from == source.resolve()
    for _ in range(2):  # killed before its own first checkpoint, it begins where it began
        with opened("run.name=b", "optim.lr=0.5") as folder:
            assert folder.resume_from == source.resolve()
    own = saved("runs/b", 7)
    with opened("run.name=b", "optim.lr=0.5") as folder:
        assert folder.resume_from == own
    assert "step-7" in refused("run.name=b", "optim.lr=0.5", f"resume={source}")


def test_a_checkpoint_that_is_none_is_refused_before_a_folder_is_made():
    assert "expected auto, never" in refused("resume=nevr")
    Path("empty").mkdir()
    assert "not a checkpoint" in refused("resume=empty")
    assert not Path("runs").exists()


def test_rollouts_are_written_by_step_and_rewound():
    rows = [{"step": 1, "completion": "a\u2028\ud800\n", "reward": None}, {"step": 1, "completion": "b", "reward": 1.0}]
    with opened() as folder:
        for step in (1, 2, 10):
            folder.write_rollouts(step, rows)
        written = (folder.path / "rollouts/step-1.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line) for line in written[:-1]] == rows
        folder.rewind(2)
        assert sorted(os.listdir("runs/x/rollouts")) == ["step-1.jsonl", "step-2.jsonl"]
        folder.rewind(None)
        assert os.listdir("runs/x/rollouts") == []


def test_a_disk_that_takes_nothing_costs_the_rollouts_and_fails_the_summary(caplog):
    with opened() as folder:
        folder.write_rollouts(1, [{"a": 1}])
        os.rename("runs/x/rollouts", "runs/x/rollouts-1")
        os.symlink("/dev/full", "runs/x/rollouts")  # not a folder: every write below it fails
        folder.write_rollouts(2, [{"a": 1}])
        assert "rollouts of step 2 were not written" in caplog.text
        os.mkdir("runs/x/summary.json")
        with pytest.raises(SaveFailed, match=re.escape("summary.json")):
            folder.write_summary({"steps": 1})
        assert not [name for name in os.listdir("runs/x") if name.endswith(".tmp")]


SECRETS = {"HF_TOKEN": "hf-planted-token-1", "WANDB_API_KEY": "planted-key-2", "AWS_SECRET_ACCESS_KEY": "planted-key-3"}


def test_no_secret_of_the_environment_or_the_command_line_is_written(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    typed = ["--api-key=typed-secret-4", "--token", "typed-secret-5", "reward.kwargs.password=typed-secret-6"]
    forms = ["x=hf_abcdefghijklmnopqrst", "data.prompt_key=question"]
    monkeypatch.setattr(sys, "argv", ["lorl", "train", f"x={SECRETS['HF_TOKEN']}", *typed, *forms])
    with opened() as folder:
        folder.write_summary({"steps": 1})
    text = "".join(path.read_text() for path in Path("runs").rglob("*") if path.is_file())
    for secret in [*SECRETS.values(), "typed-secret", "hf_abc"]:
        assert secret not in text
    command = json.loads(Path("runs/x/environment.json").read_text())["command"]
    assert command[:3] == ["lorl", "train", "x=***"]
    assert command[-1] == "data.prompt_key=question"


def test_a_secret_in_the_configuration_is_refused(monkeypatch):
    monkeypatch.setenv("GRADER_API_KEY", "planted-key-7")
    assert "$GRADER_API_KEY" in refused("reward.kwargs.key=${oc.env:GRADER_API_KEY}")
    assert "access token" in refused("reward.kwargs.key=sk-abcdefghijklmnopqrst")
    assert not Path("runs").exists()
