import importlib.util
import json
import subprocess
import sys
import time

import pytest

from lorl.errors import UserError
from lorl.tracking import trackers

CONFIG = {"model": {"path": "smollm2-135m"}, "optim": {"lr": 3e-5, "betas": [0.9, 0.999]}}
SECRETS = (
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_PROJECT",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run folder on a machine where nobody is logged in anywhere."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    folder = tmp_path / "runs" / "sort-42"
    folder.mkdir(parents=True)
    return folder


def log_steps(run_folder, names, steps, resume_step=None):
    def refuse(text):
        raise AssertionError(text)

    opened = trackers.open(names, run_folder, CONFIG, resume_step, warn=refuse)
    for step in steps:
        opened.log(step, {"reward/mean": step / 8, "policy/kl": 0.5})
    opened.close()


def test_jsonl_is_written_though_nobody_asked_for_it(run_folder):
    log_steps(run_folder, [], range(3))
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 0.125), (2, 0.25)]


def test_tensorboard_holds_each_step_once_after_a_resumption(run_folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(run_folder, ["tensorboard"], range(3))
    log_steps(run_folder, ["tensorboard"], range(2, 4), resume_step=1)
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375)]
    assert "smollm2-135m" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_mlflow_keeps_files_in_the_run_folder_and_goes_on_in_the_same_run(run_folder):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    log_steps(run_folder, ["mlflow"], range(2))
    log_steps(run_folder, ["mlflow"], range(2, 4), resume_step=1)
    client = MlflowClient(tracking_uri=(run_folder / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("lorl").experiment_id])
    assert run.info.run_name == "sort-42"
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "3e-05"
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375)]


def test_trackio_stores_the_steps_on_this_machine(run_folder):
    """In a process of its own: trackio fixes its folder when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import pathlib, sys\n"
        "from lorl.tracking import trackers\n"
        "opened = trackers.open(['trackio'], pathlib.Path(sys.argv[1]), {'seed': 0}, None)\n"
        "for step in range(3): opened.log(step, {'reward/mean': step / 8})\n"
        "opened.close()\n"
        "print('the only line')\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print([(row['step'], row['reward/mean']) for row in SQLiteStorage.get_logs('lorl', 'sort-42')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)],
        env={"TRACKIO_DIR": str(run_folder / "trackio"), "PATH": "", "HOME": str(run_folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the only line\n[(0, 0.0), (1, 0.125), (2, 0.25)]\n"


def test_wandb_writes_an_offline_run_where_nobody_is_logged_in(run_folder):
    pytest.importorskip("wandb")
    log_steps(run_folder, ["wandb"], range(3))
    (offline,) = (run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process may write its last records after finish() has returned
    while b"0.25" not in (stored := offline.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(part in stored for part in (b"sort-42", b"smollm2-135m", b"reward/mean", b"0.125", b"0.25"))


def test_wandb_mode_of_the_user_is_respected(run_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_steps(run_folder, ["wandb"], range(3))
    assert not list(run_folder.glob("wandb/*run-*"))


def test_an_unknown_tracker_is_refused_with_the_nearest_name(run_folder):
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord': did you mean 'tensorboard'\?"):
        trackers.open(["tensorbord"], run_folder, CONFIG, None)
    assert not (run_folder / "metrics.jsonl").exists()


def test_a_missing_package_is_refused_with_the_command_that_brings_it(run_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(UserError, match=r"pip install 'lorl\[wandb\]'"):
        trackers.check(["jsonl", "wandb"])


class Unreachable:
    name = "unreachable"

    def __init__(self):
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no route to host\nwith details")

    def close(self):
        raise ConnectionError("still no route")


class Remembering:
    name = "remembering"

    def __init__(self):
        self.steps = []
        self.closed = False

    def log(self, step, metrics):
        self.steps.append(step)

    def close(self):
        self.closed = True


def test_a_failing_tracker_warns_once_and_the_others_get_every_step():
    warnings, bad, good = [], Unreachable(), Remembering()
    all_of_them = trackers.Trackers([bad, good], warnings.append)
    for step in range(6):
        all_of_them.log(step, {"reward/mean": 0.0})
    all_of_them.close()
    assert warnings == ["tracker unreachable failed, the run goes on: ConnectionError: no route to host"]
    assert bad.calls == trackers.MAX_FAILURES_IN_A_ROW
    assert good.steps == list(range(6))
    assert good.closed


def test_a_tracker_that_cannot_start_is_left_out_with_a_warning(run_folder, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings = []
    opened = trackers.open(["mlflow"], run_folder, CONFIG, None, warn=warnings.append)
    opened.log(0, {"reward/mean": 1.0})
    opened.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker mlflow did not start, the run goes on without it: ")
    assert json.loads((run_folder / "metrics.jsonl").read_text())["reward/mean"] == 1.0
