"""The optional trackers. Each imports its package when it is opened, and writes into the run folder where it can."""

import contextlib
import io
import json
import netrc
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROJECT = "lorl"  # what runs are filed under without run.project
IDS_FILE = "trackers.json"  # in the run folder: the ids under which a resumed run goes on


class TensorBoardTracker:
    """Event files in RUN/tensorboard. A resumed run purges the steps after its checkpoint."""

    name = "tensorboard"

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step)
        if resume_step is None:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases, offline unless logged in; WANDB_MODE and wandb's other variables win over this choice."""

    name = "wandb"

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None):
        import wandb  # pyright: ignore[reportMissingImports]

        run_id = _saved_id(run_folder, self.name) if resume_step is not None else None
        if run_id is None:
            run_id = secrets.token_hex(8)
            _save_id(run_folder, self.name, run_id)
        mode: Any = os.environ.get("WANDB_MODE") or (None if _wandb_logged_in() else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _project(config),
            name=run_folder.name,
            id=run_id,
            resume="allow",
            dir=run_folder,
            config=config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),  # lorl's console owns the terminal
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio's local store (`trackio show --project PROJECT`), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    name = "trackio"

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None):
        import trackio  # pyright: ignore[reportMissingImports]

        # trackio prints its greetings on stdout, unasked.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=_project(config),
                name=run_folder.name,
                config=config,
                resume="never" if resume_step is None else "allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self._finish = trackio.finish  # also stops trackio from finishing the run again, aloud, at exit

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


class MlflowTracker:
    """MLflow at MLFLOW_TRACKING_URI, or a file store in RUN/mlflow."""

    name = "mlflow"

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None):
        # Five retries with backoff would hold a step for minutes when the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow 3 wants a database, which its skinny package can't open, unless told that files are meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run_folder / "mlflow").resolve().as_uri()
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient(tracking_uri=uri)
        run_id = _saved_id(run_folder, self.name) if resume_step is not None else None
        self._run_id = run_id or self._create_run(run_folder, config)

    def _create_run(self, run_folder: Path, config: dict[str, Any]) -> str:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _project(config)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment_id, run_name=run_folder.name).info.run_id
        _save_id(run_folder, self.name, run_id)
        params = [Param(key, str(value)[:6000]) for key, value in _flatten(config).items()]  # MLflow's longest value
        for start in range(0, len(params), 100):  # MLflow's largest batch
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(name, value, now_ms, step) for name, value in metrics.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _wandb_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _project(config: dict[str, Any]) -> str:
    return config.get("run", {}).get("project", PROJECT)


def _saved_id(run_folder: Path, tracker: str) -> str | None:
    try:
        return json.loads((run_folder / IDS_FILE).read_text(encoding="utf-8")).get(tracker)
    except (OSError, ValueError):
        return None


def _save_id(run_folder: Path, tracker: str, run_id: str) -> None:
    path = run_folder / IDS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    path.write_text(json.dumps({**ids, tracker: run_id}), encoding="utf-8")


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
