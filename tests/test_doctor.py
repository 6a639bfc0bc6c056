import io
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lorl import doctor as diagnosis
from lorl.doctor import Check, check_requirement, doctor, exit_code, print_checks
from lorl.tracking.console import Console


@pytest.fixture
def checks(tmp_path):
    return {check.name: check for check in doctor(tmp_path / "models", tmp_path / "runs")}


def test_the_machine_that_runs_these_tests_can_train(checks):
    assert {name: check.detail for name, check in checks.items() if check.status == "fail"} == {}
    assert exit_code(list(checks.values())) == 0
    assert "engine torch" in checks["lorl will use"].detail
    assert checks["transformers"].status == "ok"
    assert checks["peft"].status == "ok"


def test_every_extra_of_the_package_is_reported_with_its_command_when_absent(checks, monkeypatch, tmp_path):
    assert {"extra tensorboard", "extra wandb", "extra trackio", "extra mlflow", "extra report"} <= set(checks)
    installed = diagnosis._installed_version
    monkeypatch.setattr(diagnosis, "_installed_version", lambda name: None if name == "plotly" else installed(name))
    absent = {check.name: check for check in doctor(tmp_path, tmp_path)}["extra report"]
    assert (absent.status, absent.fix) == ("missing", "pip install 'lorl[report]'")


def test_fetched_models_are_listed_and_their_absence_names_the_command(checks, tmp_path):
    assert checks["fetched models"].fix == "lorl model fetch smollm2-135m"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    listed = {check.name: check for check in doctor(tmp_path / "models", tmp_path)}["fetched models"]
    assert listed.status == "ok"
    assert listed.detail.startswith("tiny in ")


@pytest.mark.parametrize(
    ("installed", "status", "detail"),
    [
        ("0.21.2", "ok", "0.21.2"),
        ("0.22.0", "fail", "0.22.0 is outside peft<0.22,>=0.21"),
        (None, "fail", "not installed, needs peft<0.22,>=0.21"),
    ],
)
def test_a_required_package_outside_its_range_fails_with_the_command(installed, status, detail):
    check = check_requirement(Requirement("peft>=0.21,<0.22"), installed)
    assert (check.status, check.detail) == (status, detail)
    assert check.fix == ("" if status == "ok" else "pip install 'peft<0.22,>=0.21'")


@pytest.mark.parametrize(("installed", "status"), [(None, "missing"), ("0.19.0", "missing"), ("0.24.0", "ok")])
def test_a_vllm_that_lorl_does_not_know_is_told_with_one_that_it_does(installed, status, monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis.versions, "installed", lambda: installed and Version(installed))
    check = {check.name: check for check in doctor(tmp_path, tmp_path)}["vllm"]
    assert check.status == status
    assert check.fix.startswith("pip install vllm==0.24.0 on a GPU machine" if status == "missing" else "")


def test_too_little_disk_keeps_the_main_job_from_running(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "NEEDED_DISK_GIB", 1e9)
    checks = doctor(tmp_path, tmp_path / "not" / "yet" / "there")
    assert [check.name for check in checks if check.status == "fail"] == ["disk for models", "disk for runs"]
    assert exit_code(checks) == 2


def test_the_hub_is_not_asked_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    unasked = {check.name: check for check in doctor(tmp_path, tmp_path)}["model hub"]
    assert (unasked.status, unasked.detail) == ("note", "http://127.0.0.1:9, not asked")
    asked = {check.name: check for check in doctor(tmp_path, tmp_path, ask_hub=True)}["model hub"]
    assert asked.status == "missing"
    assert "127.0.0.1:9" in asked.detail


def test_the_printout_names_each_check_its_fix_and_the_verdict():
    stream = io.StringIO()
    print_checks([Check("a", "ok", "fine"), Check("bcd", "fail", "broken", "mend it")], Console(stream))
    assert stream.getvalue().splitlines() == [
        "     ok  a    fine",
        "   fail  bcd  broken",
        "              -> mend it",
        "lorl cannot train here: see bcd",
    ]


def test_main_prints_and_returns_the_exit_code(tmp_path):
    code = "import sys; from lorl.doctor import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("lorl can train here\n")
