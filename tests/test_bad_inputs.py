"""A user's mistake gets one sentence with the offending name and exit code 2, and nothing in the way of the corrected
command."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from conftest import save_tiny_model, tiny_tokenizer
from lorl import settings
from lorl.checkpoint import ADAPTER_TENSORS
from lorl.setup import advice
from lorl_command import Forks, Result, adapter_sha256, run_installed, small_run, write_rows


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the tiny one, wider."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=64)


@pytest.fixture(scope="module")
def their_adapter(other_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(other_base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path_factory.mktemp("adapters") / "wide")
    return tmp_path_factory.getbasetemp() / "adapters0" / "wide"


def sentence(result: Result) -> str:
    """The one sentence of a refused command, after the checks that hold for every one."""
    assert result.code == 2, result
    assert result.err.startswith("lorl: "), result
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert len(result.err) < 600
    assert "Traceback" not in result.out
    return result.err


def without_progress(result: Result) -> Result:
    """`lorl eval` keeps standard output for its result, and tells its progress on the other."""
    told = ("reading prompts", "loading", "evaluating")
    lines = [line for line in result.err.splitlines(keepends=True) if not line.startswith(told)]
    return Result(result.code, result.out, "".join(lines))


Prepare = Callable[[Path], object]


def _nothing(folder: Path) -> None:
    pass


def _text(name: str, text: str) -> Prepare:
    return lambda folder: (folder / name).write_text(text)


def _rows(*rows: object) -> Prepare:
    good = {"prompt": "1+1=", "answer": "2"}
    return lambda folder: write_rows(folder / "bad.jsonl", [good, *rows])  # type: ignore[list-item]


def _broken_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["1+1="] * 999, "answer": ["2"] * 999}), folder / "bad.parquet")
    whole = (folder / "bad.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(whole[: len(whole) // 2])


def _without_weights(folder: Path) -> None:
    (folder / "bare").mkdir()
    (folder / "bare/config.json").write_text('{"model_type": "llama"}')


def _something_else(folder: Path) -> None:
    (folder / "runs/photos").mkdir(parents=True)
    (folder / "runs/photos/cat.jpg").write_text("a picture")


MISTAKES: dict[str, tuple[str | list[str], Prepare, list[str]]] = {
    # name: what is added to a good command, what is prepared, what the sentence holds
    "unknown section": ("optm.lr=1e-3", _nothing, ["unknown key 'optm.lr'", "'optim.lr'"]),
    "unknown key": ("rollout.temprature=1", _nothing, ["'rollout.temprature'", "'rollout.temperature'"]),
    "wrong type": ("rollout.n=lots", _nothing, ["rollout.n=lots", "a whole number"]),
    "out of bounds": ("optim.lr=-1", _nothing, ["optim.lr=-1", "> 0"]),
    "adapter that vLLM lacks": (
        ["rollout.engine=vllm", "adapter.dora=true"],
        _nothing,
        ["vllm does not compute adapter.dora=true", "use engine=torch"],
    ),
    "engine that lorl lacks": ("rollout.engine=sglang", _nothing, ["no SGLang engine", "use vllm or torch"]),
    "unknown choice": ("algorithm.kl_in=los", _nothing, ["algorithm.kl_in=los", "'loss'"]),
    "no equals sign": ("quickly", _nothing, ["'quickly'", "key=value"]),
    "unknown option": ("--quick", _nothing, ["--quick", "lorl train --help"]),
    "minibatch does not divide": (
        ["data.prompts_per_step=4", "algorithm.minibatch_prompts=3"],
        _nothing,
        ["algorithm.minibatch_prompts=3", "data.prompts_per_step=4", "such as 2"],
    ),
    "equal samples": ("rollout.temperature=0", _nothing, ["rollout.temperature=0", "rollout.n=4"]),
    "missing file": ("data.train=trian.jsonl", _nothing, ["data.train", "trian.jsonl", "'train.jsonl'"]),
    "missing validation file": ("data.val=nowhere/val.jsonl", _nothing, ["data.val", "nowhere"]),
    "broken parquet": ("data.train=bad.parquet", _broken_parquet, ["bad.parquet", "not a whole parquet file"]),
    "empty file": ("data.train=bad.jsonl", _text("bad.jsonl", ""), ["bad.jsonl", "no rows"]),
    "row that is no JSON": ("data.train=bad.jsonl", _text("bad.jsonl", '{"prompt": '), ["bad.jsonl:1", "JSON"]),
    "row without an answer": ("data.train=bad.jsonl", _rows({"prompt": "?"}), ["bad.jsonl:2", "no answer"]),
    "row with an empty prompt": (
        "data.train=bad.jsonl",
        _rows({"prompt": "", "answer": "1"}),
        ["bad.jsonl:2", "empty"],
    ),
    "one id twice": (
        "data.train=bad.jsonl",
        _rows(*[{"prompt": "?", "answer": "1", "id": "a"}] * 2),
        ["bad.jsonl:3", "'a'", "bad.jsonl:2"],
    ),
    "no file": ("data.train=", _nothing, ["data.train names no file"]),
    "no validation file": ("data.val=", _nothing, ["data.val names no file"]),
    "empty stop": ('rollout.stop=[""]', _nothing, ['rollout.stop=[""]', "a list of text that is not empty"]),
    "wrong column": ("data.prompt_key=promt", _nothing, ["'promt'", "'prompt'"]),
    "prompt over the limit": ("data.max_prompt_tokens=9", _nothing, ["data.max_prompt_tokens", "9", "train.jsonl:1"]),
    "fewer prompts than a step": ("data.prompts_per_step=99", _nothing, ["data.prompts_per_step=99", "8"]),
    "unknown tracker": ("trainer.trackers=[tensorbord]", _nothing, ["'tensorbord'", "'tensorboard'"]),
    "unknown advantage": ("algorithm.advantage=grop", _nothing, ["grop", "'grpo'"]),
    "unknown loss": ("algorithm.policy_loss=ppo_clp", _nothing, ["ppo_clp", "'ppo_clip'"]),
    "estimator of groups": (["algorithm.advantage=rloo", "rollout.n=1"], _nothing, ["rloo", "rollout.n"]),
    "unknown grader": (["reward.path=null", "reward.name=gsm9k"], _nothing, ["'gsm9k'", "'gsm8k'"]),
    "no grader for the source": ("reward.path=null", _nothing, ["data_source", "reward.name"]),
    "option that the grader lacks": (
        ["reward.path=null", "reward.name=exact", "reward.kwargs.ignore_cas=true"],
        _nothing,
        ["ignore_cas", "'ignore_case'"],
    ),
    "missing reward file": ("reward.path=rewards.py", _nothing, ["rewards.py", "no such file"]),
    "syntax error": ("reward.path=bad.py", _text("bad.py", "x = 1\ndef compute_score(:\n"), ["bad.py:2"]),
    "algorithms that raise": (
        "algorithm.path=bad.py",
        _text("bad.py", "x = 1\nraise ValueError('no\\nway')\n"),
        ["bad.py:2: ValueError: no"],
    ),
    "algorithms that exit": (
        "algorithm.path=bad.py",
        _text("bad.py", "import sys\nsys.exit(0)\n"),
        ["bad.py:2: SystemExit: 0"],
    ),
    "missing function": (["reward.name=compute_scores"], _nothing, ["'compute_scores'", "compute_score"]),
    "reward file that raises": (
        "reward.path=bad.py",
        _text("bad.py", "import nonsense\ndef compute_score(x):\n    return 1.0\n"),
        ["bad.py", "nonsense"],
    ),
    "model path typo": ("model.path=./tinny", _nothing, ["model.path=./tinny"]),
    "model name typo": ("model.path=smollm2-135", _nothing, ["model.path=smollm2-135", "'smollm2-135m'"]),
    "model without weights": ("model.path=bare", _without_weights, ["model.path=bare", "safetensors"]),
    "device that is not there": ("model.device=cuda", _nothing, ["model.device=cuda"]),
    "adapter that is none": ("adapter.path=runs", _nothing, ["adapter.path", "runs", "adapter_config.json"]),
    "unknown target": ("adapter.target_modules=[q_prj]", _nothing, ["q_prj", "'q_proj'"]),
    "two GPUs in one process": (
        ["parallel.gpus=2", "parallel.strategy=local"],
        _nothing,
        ["parallel.gpus=2", "parallel.strategy=local"],
    ),
    "name with a path": ("run.name=../r", _nothing, ["run.name='../r'"]),
    "hidden name": ("run.name=.r", _nothing, ["run.name='.r'"]),
    "folder of something else": ("run.name=photos", _something_else, ["runs/photos", "run.name"]),
    "file in place of the folder": ("run.dir=reward.py", _nothing, ["reward.py", "run.dir"]),
    "checkpoint that is not there": ("resume=runs/r/step-3", _nothing, ["resume=runs/r/step-3"]),
    "folder that is no checkpoint": ("resume=.", _nothing, ["is not a checkpoint"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_sentence(forks: Forks, tiny_model: Path, tmp_path: Path, mistake: str):
    words, prepare, said = MISTAKES[mistake]
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=1")
    if isinstance(words, str):
        words = [words]
    prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    told = sentence(forks.run(*argv, *words, cwd=tmp_path))
    for part in said:
        assert part in told
    after = set(tmp_path.rglob("*"))
    assert before <= after, "nothing of the user's is gone"
    assert after - before <= {tmp_path / "runs"}, "no folder of a run that never began"


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0.001"], "algorithm.kl_in=reward"),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0.1", "algorithm.advantage=grpo_passk"], "grpo_passk"),
        (["algorithm.kl_in=reward"], None),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0.001", "algorithm.normalize_std=false"], None),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0.001", "algorithm.advantage=reinforce_plus_plus"], None),
        (["algorithm.kl_in=reward", "algorithm.kl_coef=0.001", "algorithm.advantage=gae", "critic.epochs=2"], None),
        (["algorithm.kl_coef=0.001"], None),
        (["critic.epochs=2"], "critic.* has no effect"),
        (["parallel.nodes=2"], "neither encrypted nor authenticated"),
        (["adapter.rank=128", "data.prompts_per_step=128"], "adapter.rank=128"),
        (["adapter.rank=128", "data.prompts_per_step=128", "algorithm.minibatch_prompts=64"], None),
    ],
)
def test_what_has_been_seen_to_go_wrong_is_warned_of(keys: list[str], warned: str | None):
    found = advice(settings.load(None, keys))
    assert len(found) == (warned is not None)
    assert warned is None or warned in found[0]


def test_warnings_come_before_the_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    keys = ["trainer.total_steps=1", "algorithm.kl_in=reward", "algorithm.kl_coef=0.001", "critic.lr=1e-3"]
    done = forks.run(*small_run(tmp_path, tiny_model, *keys), cwd=tmp_path)
    assert done.code == 0, done
    told = done.out + done.err
    assert told.index("algorithm.kl_in=reward with") < told.index("critic.* has no effect") < told.index("run folder")


@pytest.mark.parametrize(("answer", "warned"), [(490, True), (489, False)])
def test_answers_longer_than_the_model_reads_are_warned_of(
    forks: Forks, tiny_model: Path, tmp_path: Path, answer: int, warned: bool
):
    keys = ["trainer.total_steps=1", f"rollout.max_response_tokens={answer}"]
    done = forks.run(*small_run(tmp_path, tiny_model, *keys), cwd=tmp_path)
    assert done.code == 0, done
    told = f"rollout.max_response_tokens={answer} that is more than the 512 positions of model.path={tiny_model}"
    assert (told in done.out) is warned, done
    assert ("at most 489 make sense" in done.out) is warned


def test_prompts_need_no_answers_where_a_model_alone_grades(forks: Forks, tiny_model: Path, tmp_path: Path):
    shape = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_labels=1, pad_token_id=1)  # fmt: skip
    LlamaForSequenceClassification(shape).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    argv = [*small_run(tmp_path, tiny_model, "trainer.total_steps=1"), "reward_model.path=judge"]
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"{i}+{i}="} for i in range(8)])
    assert "data.answer_key" in sentence(forks.run(*argv, cwd=tmp_path))
    alone = forks.run(*argv, "reward_model.rule_weight=0", cwd=tmp_path)
    assert alone.code == 0, alone
    judged = forks.run("eval", "data.val=train.jsonl", *argv[1:], "reward_model.rule_weight=0", cwd=tmp_path)
    assert judged.code == 0, judged


def test_config_files(forks: Forks, tiny_model: Path, tmp_path: Path):
    _, *keys = small_run(tmp_path, tiny_model, "trainer.total_steps=1")
    (tmp_path / "run.yaml").write_text("rollout:\n  n: 4\n   top_k: 3\n")
    assert "run.yaml" in sentence(forks.run("train", "rum.yaml", *keys, cwd=tmp_path))
    assert "run.yaml line 3" in sentence(forks.run("train", "run.yaml", *keys, cwd=tmp_path))
    (tmp_path / "run.yaml").write_text("rollout:\n  top_k: lots\n")
    assert "rollout.top_k=lots" in sentence(forks.run("train", "run.yaml", *keys, cwd=tmp_path))
    (tmp_path / "run.yaml").write_text("rollout:\n  top_k: 3\n")
    assert forks.run("train", "run.yaml", *keys, cwd=tmp_path).code == 0
    assert "top_k: 3" in (tmp_path / "runs/r/config.yaml").read_text()


KINDS = [
    ({"bias": "all"}, ["bias='all'", "bias='none'"]),
    ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "path_initial_model_for_weight_conversion"]),
    ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication=[[0, 2], [1, 2]]", "layer_replication=None"]),
    ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens=[5]"]),
]


@pytest.mark.parametrize(("fields", "said"), KINDS)
def test_an_adapter_that_changes_the_base_or_is_no_lora(
    forks: Forks, tiny_model: Path, tmp_path: Path, fields: dict[str, object], said: list[str]
):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    argv = small_run(tmp_path, tiny_model, "adapter.path=theirs", "algorithm.kl_coef=0.01")
    told = sentence(forks.run(*argv, cwd=tmp_path))
    assert all(part in told for part in ["theirs/adapter_config.json", *said]), told


def test_an_adapter_of_another_base(forks: Forks, tiny_model: Path, their_adapter: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=1")
    told = sentence(forks.run(*argv, f"adapter.path={their_adapter}", cwd=tmp_path))
    assert str(their_adapter) in told
    assert "another base" in told
    told = sentence(forks.run("merge", tiny_model, their_adapter, "merged", cwd=tmp_path))
    assert "another base" in told
    assert not (tmp_path / "merged").exists()
    assert forks.run(*argv, cwd=tmp_path).code == 0


@pytest.fixture
def finished(forks: Forks, tiny_model: Path, tmp_path: Path) -> list[str]:
    """The command of a run that is done, in tmp_path/runs/r."""
    argv = small_run(tmp_path, tiny_model)
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    return argv


def test_a_truncated_checkpoint(forks: Forks, finished: list[str], tmp_path: Path):
    step = tmp_path / "runs/r/checkpoints/step-3"
    weights = step / "adapter" / ADAPTER_TENSORS
    weights.write_bytes(weights.read_bytes()[:-1])
    told = sentence(forks.run(*finished, "run.name=b", f"resume={step}", cwd=tmp_path))
    assert "is damaged: adapter/adapter_model.safetensors has" in told
    assert not (tmp_path / "runs/b").exists()


def test_a_checkpoint_of_another_base(forks: Forks, finished: list[str], other_base: Path, tmp_path: Path):
    step = tmp_path / "runs/r/checkpoints/step-3"
    branch = [*finished, "run.name=b", "trainer.total_steps=4"]
    told = sentence(forks.run(*branch, f"model.path={other_base}", f"resume={step}", cwd=tmp_path))
    assert str(step) in told
    assert "another base" in told
    assert forks.run(*branch, f"resume={step}", cwd=tmp_path).code == 0, "the corrected command has the same run.name"


def test_a_checkpoint_of_another_rank(forks: Forks, finished: list[str], tmp_path: Path):
    step = tmp_path / "runs/r/checkpoints/step-3"
    branch = [*finished, "run.name=b", "trainer.total_steps=4"]
    told = sentence(forks.run(*branch, "adapter.rank=8", f"resume={step}", cwd=tmp_path))
    assert str(step) in told
    assert forks.run(*branch, f"resume={step}", cwd=tmp_path).code == 0


def test_a_finished_run_is_not_reused(forks: Forks, finished: list[str], tmp_path: Path):
    before = adapter_sha256(tmp_path / "runs/r", 3)
    told = sentence(forks.run(*finished, cwd=tmp_path))
    assert "runs/r holds a finished run of 3 steps" in told
    assert adapter_sha256(tmp_path / "runs/r", 3) == before
    assert forks.run(*finished, "trainer.total_steps=4", cwd=tmp_path).code == 0, "as the sentence says"


def test_an_unfinished_run_does_not_go_on_as_another(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, "checkpoint.every_steps=1", "trainer.total_steps=500")
    command = forks.start(*argv, cwd=tmp_path)
    command.wait_for((tmp_path / "runs/r/checkpoints/step-1").exists)
    told = sentence(forks.run(*argv, cwd=tmp_path))
    assert f"runs/r is in use by process {command.process}" in told
    command.signal(signal.SIGTERM)
    assert command.wait().code == 0
    told = sentence(forks.run(*argv, "optim.lr=1e-4", cwd=tmp_path))
    assert "begun with optim.lr=0.003 and this run has optim.lr=0.0001" in told
    assert "resume=never" in sentence(forks.run(*argv, "resume=never", cwd=tmp_path))


def test_other_commands(forks: Forks, finished: list[str], tiny_model: Path, tmp_path: Path):
    gsm8k = tmp_path / "gsm8k"
    gsm8k.mkdir()
    for split in ("train", "test"):
        (gsm8k / f"{split}.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "two"}) + "\n")
    adapter = tmp_path / "runs/r/checkpoints/step-3/adapter"
    (tmp_path / "there").mkdir()
    judged = ["data.val=train.jsonl", f"model.path={tiny_model}", "rollout.max_response_tokens=12"]
    refused: list[tuple[list[object], str]] = [
        (["eval"], "data.val"),
        (["eval", *judged, "eval.n=4"], "eval.n=4"),
        (["eval", *judged, "reward.name=exact", "adapter.path=x"], "'x'"),
        (["report", "runs/q"], "runs/q"),
        (["merge", tiny_model, "runs/r", "out"], "runs/r"),
        (["merge", "tinny", adapter, "out"], "tinny"),
        (["merge", tiny_model, adapter, "there"], "there exists already"),
        (["merge", tiny_model, adapter, "train.jsonl/out"], "cannot write to train.jsonl/out: Not a directory"),
        (["data", "gsm8k", "--source", "nowhere", "--output", "d"], "nowhere"),
        (["data", "gsm8k", "--source", gsm8k, "--output", "d"], "train.jsonl:1"),
        (["data", "task", "number_sort", "--output", "d"], "'number_sorting'"),
        (["data", "task", "number_sorting", "--output", "d", "--option", "max_number=3"], "'max_numbers'"),
        (["data", "task", "number_sorting", "--output", "d", "--train", "0"], "--train"),
        (["data", "task", "number_sorting"], "--output"),
        (["model", "fetch", "smollm"], "'smollm2-135m'"),
        (["trian"], "trian"),
        (["report"], "lorl report --help"),
    ]
    for argv, offender in refused:
        assert offender in sentence(without_progress(forks.run(*argv, cwd=tmp_path))), argv
    assert not any((tmp_path / name).exists() for name in ("out", "d"))


def test_a_mistake_is_told_before_anything_loads(tmp_path: Path):
    """The installed command, from its start: no torch, no model, within two seconds on an idle machine."""
    done = run_installed("train", "optim.lrr=3", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("lorl: unknown key 'optim.lrr'; did you mean 'optim.lr'?")
    assert "lorl.settings" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "pyarrow", "numpy"}
    assert list(tmp_path.iterdir()) == []
