"""The `lorl` command as a stranger meets it: help, answers in words, exit codes, clean output."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from lorl.config import RunConfig
from lorl_command import Forks, run_installed, small_run

COMMANDS = ["train", "eval", "report", "merge", "doctor", "algorithms", "data", "model"]


@pytest.mark.parametrize(
    "command", [(), *[(name,) for name in COMMANDS], ("data", "gsm8k"), ("data", "task"), ("model", "fetch")]
)
def test_every_command_has_help(forks: Forks, tmp_path: Path, command: tuple[str, ...]):
    shown = forks.run(*command, "--help", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert " ".join(["Usage: lorl", *command]) in shown.out


def test_the_version_is_the_installed_one(forks: Forks, tmp_path: Path) -> None:
    shown = forks.run("--version", cwd=tmp_path)
    assert (shown.code, shown.out) == (0, f"lorl {importlib.metadata.version('lorl')}\n")


def test_help_lists_every_command_and_where_to_begin(forks: Forks, tmp_path: Path):
    shown = forks.run("--help", cwd=tmp_path).out
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\b", shown, re.MULTILINE), name
    begin = " ".join(re.sub(r"[│╭╰]", " ", shown).split())
    made = ["lorl doctor", "lorl data task number_sorting --output data/sort"]
    made += ["lorl train data.train=data/sort/train.parquet data.val=data/sort/val.parquet"]
    assert all(command in begin for command in made)
    data = forks.run(
        "data", "task", "number_sorting", "--output", "data/sort", "--train", "2", "--val", "2", cwd=tmp_path
    )
    assert data.code == 0, data
    assert {file.name for file in (tmp_path / "data/sort").iterdir()} == {"train.parquet", "val.parquet"}


def test_a_bare_command_shows_its_help(forks: Forks, tmp_path: Path):
    for command in ((), ("data",), ("model",)):
        shown = forks.run(*command, cwd=tmp_path)
        assert shown.code == 2
        assert "Usage: lorl" in shown.out
        assert "Traceback" not in shown.err


def test_the_keys_with_their_defaults_and_meanings(forks: Forks, tmp_path: Path):
    shown = forks.run("train", "--help-keys", cwd=tmp_path)
    assert shown.code == 0
    assert "rollout.n=8  [a whole number >= 1]  Samples a prompt" in shown.out.splitlines()
    named = {line.partition("=")[0] for line in shown.out.splitlines()}
    assert {"seed", "resume", "model.path", "adapter.rank", "optim.lr", "checkpoint.keep"} <= named


def test_the_printed_configuration_is_one_that_trains(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=1")
    printed = forks.run(*argv, "--print-config", cwd=tmp_path)
    assert (printed.code, printed.err) == (0, "")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "whole.yaml").write_text(printed.out)
    assert forks.run("train", "whole.yaml", "--print-config", cwd=tmp_path).out == printed.out
    assert forks.run("train", "whole.yaml", cwd=tmp_path).code == 0
    assert (tmp_path / "runs/r/config.yaml").read_text() == printed.out


def test_training_without_data_says_what_to_do(forks: Forks, tmp_path: Path):
    told = forks.run("train", cwd=tmp_path)
    assert told.code == 2
    assert told.err.startswith("lorl: data.train is not set")
    assert "lorl data" in told.err
    assert not (tmp_path / "runs").exists()


def test_the_doctor_says_what_lorl_will_use(forks: Forks, tmp_path: Path):
    shown = forks.run("doctor", cwd=tmp_path)
    assert shown.code == 0, shown
    assert re.search(r"ok +torch +2\.", shown.out)
    assert "memory" in shown.out


def test_the_algorithms_with_their_sources(forks: Forks, tmp_path: Path):
    shown = forks.run("algorithms", cwd=tmp_path)
    assert shown.code == 0
    assert re.search(r"^advantage +grpo +.*Shao", shown.out, re.MULTILINE)
    kinds = {"advantage", "policy loss", "KL estimator", "aggregation", "correction", "preset"}
    assert {re.split("  +", line)[0] for line in shown.out.splitlines()} == kinds
    assert re.search(r"^correction +decoupled_token_is +token weights truncated at 2 .*Yao", shown.out, re.MULTILINE)
    assert re.search(r"^KL estimator +k3\+ +Straight-through.*2506\.09477", shown.out, re.MULTILINE)
    default = RunConfig.model_validate({}).algorithm
    for name in (default.advantage, default.policy_loss, default.kl_estimator):
        assert f" {name} " in shown.out


def test_the_algorithms_of_a_users_own_file(forks: Forks, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from lorl.algorithms.registry import advantage\n\n\n"
        '@advantage("shifted", source="a notebook")\ndef shifted(inputs, *, shift: float = 1.0):\n'
        '    "A = R - shift"\n'
    )
    shown = forks.run("algorithms", "algorithm.path=mine.py", cwd=tmp_path)
    assert shown.code == 0, shown
    assert re.search(r"^advantage +shifted +A = R - shift +\[a notebook\]", shown.out, re.MULTILINE)
    missing = forks.run("algorithms", "algorithm.path=yours.py", cwd=tmp_path)
    assert (missing.code, missing.out) == (2, "")
    assert "yours.py" in missing.err


def test_the_models_that_can_be_fetched(tmp_path: Path):
    (tmp_path / "models/smollm2-135m").mkdir(parents=True)
    shown = run_installed("model", "list", cwd=tmp_path, LORL_CACHE=str(tmp_path))
    assert shown.code == 0
    assert re.match(r"smollm2-135m +not fetched +SmolLM2-135M-Instruct", shown.out)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "models/smollm2-135m" / file).touch()
    shown = run_installed("model", "list", cwd=tmp_path, LORL_CACHE=str(tmp_path))
    assert re.match(r"smollm2-135m +here ", shown.out)
    fetched = run_installed("model", "fetch", "smollm2-135m", cwd=tmp_path, LORL_CACHE=str(tmp_path))
    assert fetched.out == f"{tmp_path}/models/smollm2-135m\n"


def test_task_files_by_options_and_filters(forks: Forks, tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    from pyarrow import parquet

    written = forks.run(
        *("data", "task", "number_sorting", "--output", "sort", "--train", 6, "--val", 3, "--shots", 2, "--inline"),
        *("--option", "min_numbers=3", "--option", "max_numbers=3", "--where", "direction=ascending"),
        *("--template", "Sort: {original_numbers}"),
        cwd=tmp_path,
    )
    assert (written.code, written.out) == (0, "wrote sort/train.parquet\nwrote sort/val.parquet\n"), written
    rows = parquet.read_table(tmp_path / "sort/train.parquet").to_pylist()
    assert len(rows) == 6
    for row in rows:
        entry = json.loads(row["extra_info"]["entry"])
        assert entry["metadata"]["direction"] == "ascending"
        assert len(entry["metadata"]["original_numbers"]) == 3
        assert row["prompt"][0]["content"].count("Sort: ") == 3
    again = forks.run("data", "task", "number_sorting", "--output", "more", "--train", 2, "--val", 3, cwd=tmp_path)
    assert again.code == 0


def test_a_run_ends_with_what_comes_next_and_the_report_is_made(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "data.val=train.jsonl", "eval.success=0.5", "data.max_val_prompts=4")
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    *_, before, after, adapter, following = done.out.splitlines()
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    for line, moment in ((before, "before"), (after, "after")):
        found = summary[moment]
        assert line == (
            f"{moment:6}  accuracy {found['accuracy']:.3f}  95% [{found['low']:.3f}, {found['high']:.3f}]  n=4"
        )
    folder = adapter.removeprefix("adapter: ")
    assert (tmp_path / folder / "adapter_config.json").exists()
    assert following == "next: lorl report runs/r"
    page = forks.run(*following.split()[2:], cwd=tmp_path)
    assert (page.code, page.out) == (0, "wrote runs/r/report.html\n"), page
    assert f"{summary['after']['accuracy']:.1%}" in (tmp_path / "runs/r/report.html").read_text()


def test_output_that_is_no_terminal_is_plain_lines(tiny_model: Path, tmp_path: Path):
    """The installed command, so that what libraries print while they load is seen too."""
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=2", "data.val=train.jsonl")
    done = run_installed(*argv, cwd=tmp_path)
    assert done.code == 0, done
    assert done.err == ""
    assert not [c for c in done.out if ord(c) < 32 and c != "\n"]
    steps = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps if "reward" in line] == ["1/2", "2/2"]
