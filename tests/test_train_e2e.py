"""From a prompt file to a trained adapter that other tools load, through the command line alone."""

import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy.load import TRAINED, load_policy
from lorl_command import (
    ENVIRONMENT,
    Forks,
    Result,
    adapter_sha256,
    metrics,
    rollouts,
    run_installed,
    sha256,
    small_run,
    write_prompts,
    write_rows,
)

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "gsm8k_grpo_lora.yaml"
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"

# In GSM8K's own form; these are ours.
PROBLEMS = [
    ("Ann has 3 boxes with 12 eggs each and breaks 5. How many eggs are left?", "3*12=<<3*12=36>>36\n#### 31"),
    ("A train goes 60 miles an hour for 2.5 hours. How many miles is that?", "60*2.5=<<60*2.5=150>>150\n#### 150"),
    ("Bo earns $15 an hour. How much does he earn in 40 hours?", "15*40=<<15*40=600>>600\n#### 600"),
    ("A farm has 1,000 hens and sells a tenth of them. How many are left?", "1000-100=900\n#### 900"),
    ("Cy reads 20 pages a day. How many pages does she read in a week?", "20*7=<<20*7=140>>140\n#### 140"),
    ("Half of 48 pupils walk to school. How many do not?", "48/2=<<48/2=24>>24\n#### 24"),
    ("A shop sold 70 pens on Monday and twice as many on Tuesday. How many in all?", "70+140=210\n#### 210"),
    ("Di saves $250 a month. How much is that after a year?", "250*12=<<250*12=3000>>3,000\n#### 3,000"),
]

SMALL = (
    "data.prompts_per_step=2",
    "data.max_prompt_tokens=480",
    "rollout.n=4",
    "rollout.max_response_tokens=16",
    "trainer.total_steps=3",
)


def write_gsm8k(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", [{"question": q, "answer": a} for q, a in PROBLEMS])
    return folder


def assert_trained(result: Result, run: Path, steps: int = 3) -> None:
    """The run ended well, moved its adapter, and left what the run folder promises."""
    assert result.code == 0, result
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == steps
    assert set(summary["after"]) >= {"accuracy", "low", "high", "n"}
    assert [row["step"] for row in metrics(run)] == list(range(steps + 1))  # 0: the evaluation before
    tensors = load_file(run / summary["adapter"] / "adapter_model.safetensors")
    assert any(bool((value != 0).any()) for name, value in tensors.items() if "lora_B" in name)
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    for row in metrics(run)[1:]:
        assert row["reward/ok_fraction"] == 1.0
        assert all(math.isfinite(value) for value in row.values())


# Three steps on the problems that issue 4 names, on a language model


def test_gsm8k_trains_on_smollm2_by_the_example(smollm2: str, tmp_path: Path):
    """`lorl data gsm8k` on GSM8K's files (a stand-in in their form), then the example with the sizes of a laptop. The
    reward makes every group differ, since this model is right on nothing in three steps."""
    source = write_gsm8k(tmp_path / "gsm8k")
    written = run_installed("data", "gsm8k", "--source", source, "--output", "data/gsm8k", cwd=tmp_path)
    assert written.code == 0, written
    assert written.out == "wrote data/gsm8k/train.parquet\nwrote data/gsm8k/test.parquet\n"
    (tmp_path / "reward.py").write_text(
        "def compute_score(solution_str, ground_truth):\n    return len(set(solution_str)) / 50\n"
    )
    mine = (f"model.path={smollm2}", "data.max_val_prompts=1", "run.name=g")
    varied = ("reward.path=reward.py", "reward.name=compute_score", "eval.success=0.5")
    trained = run_installed("train", EXAMPLE, *SMALL, *mine, *varied, cwd=tmp_path)
    run = tmp_path / "runs/g"
    assert_trained(trained, run)
    assert all(row["rollout/mismatch"] < 1e-4 for row in metrics(run)[1:])
    rows = rollouts(run, 3)
    assert len(rows) == 8
    assert all("####" in row["prompt"] for row in rows)
    assert {row["ground_truth"] for row in rows} <= {"31", "150", "600", "900", "140", "24", "210", "3000"}
    base, adapter = Path(cached_folder(smollm2)), run / "checkpoints/step-3/adapter"
    assert_peft_agrees(base, adapter, tmp_path, vocabulary=49_000)


def test_gsm_symbolic_trains_on_smollm2(forks: Forks, smollm2: str, tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    written = forks.run(*("data", "task", "gsm_symbolic", "--output", "data/s", "--train", 8, "--val", 1), cwd=tmp_path)
    assert written.code == 0, written
    trained = forks.run(
        *("train", f"model.path={smollm2}", "data.train=data/s/train.parquet", "data.val=data/s/val.parquet"),
        *(*SMALL, "algorithm.entropy_coef=0.001", "run.name=s"),
        cwd=tmp_path,
    )
    assert_trained(trained, tmp_path / "runs/s")
    assert all(0 <= row["reward"] <= 1 for row in rollouts(tmp_path / "runs/s", 3))


def cached_folder(name: str) -> str:
    from lorl.policy.fetch import resolve

    return resolve(name)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's own files are not at hand")
def test_all_of_gsm8k_is_read_and_trained_on(forks: Forks, tiny_model: Path, tmp_path: Path):
    assert forks.run("data", "gsm8k", "--source", GSM8K, "--output", "data/gsm8k", cwd=tmp_path).code == 0
    sizes = (
        "data.max_prompt_tokens=400",
        "data.overlong=skip",
        "data.max_val_prompts=8",
        "data.max_train_prompts=400",
        "rollout.max_response_tokens=8",
    )
    trained = forks.run(
        "train",
        EXAMPLE,
        *SMALL,
        *sizes,
        f"model.path={tiny_model}",
        "run.name=g",
        "algorithm.kl_coef=0.01",
        cwd=tmp_path,
    )
    assert trained.code == 0, trained
    assert metrics(tmp_path / "runs/g")[-1]["step"] == 3
    assert rollouts(tmp_path / "runs/g", 1)[0]["ground_truth"].lstrip("-").replace(".", "").isdigit()


# Adapters in and out


@pytest.fixture(scope="module")
def trained(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder that a run left, moved far enough to matter."""
    folder = tmp_path_factory.mktemp("trained")
    done = forks.run(*small_run(folder, tiny_model, "optim.lr=0.02", "adapter.rslora=true"), cwd=folder)
    assert done.code == 0, done
    return folder / "runs/r/checkpoints/step-3/adapter"


PLAIN_PEFT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, sequences = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
out = {"base": [], "adapter": []}
def score(model, kind):
    for prompt, completion in json.load(open(sequences)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        out[kind].append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1).tolist())
score(model, "base")
score(PeftModel.from_pretrained(model, adapter), "adapter")
assert not any(name.partition(".")[0] == "lorl" for name in sys.modules)
print(json.dumps(out))
"""


def assert_peft_agrees(base: Path, adapter: Path, tmp_path: Path, vocabulary: int) -> None:
    """Plain peft in a process of its own gives lorl's log-probabilities of the same sequences within 1e-5."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    sequences = [(draw(9 + i), draw(5 + i)) for i in range(4)]
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, base, adapter, tmp_path / "sequences.json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = {kind: torch.tensor(list(chain.from_iterable(rows))) for kind, rows in json.loads(done.stdout).items()}
    policy = load_policy(ModelConfig(path=str(base), dtype="float32"), AdapterConfig(path=str(adapter)), seed=0)
    completions = [
        Completion(Prompt(f"p{i}", prompt, ""), 0, completion, [0.0] * len(completion), "", "stop", 1)
        for i, (prompt, completion) in enumerate(sequences)
    ]
    packed = pack(completions, [Outcome("ok", 1.0)] * len(completions))
    with torch.no_grad():
        ours = {
            "adapter": policy.logprobs(packed.forest, adapter=TRAINED).logprobs,
            "base": policy.logprobs(packed.forest, adapter=None).logprobs,
        }
    assert (ours["adapter"] - ours["base"]).abs().max() > 1e-3, "the adapter does something"
    for kind in ours:
        assert (ours[kind] - theirs[kind]).abs().max() < 1e-5


def test_an_adapter_that_lorl_saved_says_the_same_under_plain_peft(trained: Path, tiny_model: Path, tmp_path: Path):
    assert_peft_agrees(tiny_model, trained, tmp_path, vocabulary=258)


@pytest.fixture
def from_peft(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter that peft made and saved, with weights as if it had been trained."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_an_adapter_that_peft_made_trains_on(forks: Forks, tiny_model: Path, from_peft: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model, f"adapter.path={from_peft}", "algorithm.kl_coef=0.1")
    done = forks.run(*[word for word in argv if not word.startswith("adapter.rank")], cwd=tmp_path)
    assert done.code == 0, done
    run = tmp_path / "runs/r"
    config = json.loads((run / "checkpoints/step-3/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 8, {"q_proj", "down_proj"})
    first = metrics(run)[0]
    assert first["policy/kl"] == pytest.approx(0, abs=1e-9), "the reference is the adapter that it started from"
    assert metrics(run)[-1]["policy/kl"] > 0
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (from_peft, run / "checkpoints/step-3/adapter")
    )
    assert before.keys() == after.keys()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 0.1, "it trained on from peft's values"


def test_a_run_goes_on_from_a_checkpoint_of_another_run(forks: Forks, tiny_model: Path, tmp_path: Path):
    argv = small_run(tmp_path, tiny_model)
    assert forks.run(*argv, cwd=tmp_path).code == 0
    branch = forks.run(*argv, "run.name=b", "resume=runs/r/checkpoints/step-3", "trainer.total_steps=5", cwd=tmp_path)
    assert branch.code == 0, branch
    straight = forks.run(*argv, "run.name=c", "trainer.total_steps=5", cwd=tmp_path)
    assert straight.code == 0, straight
    assert adapter_sha256(tmp_path / "runs/b", 5) == adapter_sha256(tmp_path / "runs/c", 5)


# Merging


def test_a_merged_model_is_the_base_with_its_adapter(forks: Forks, trained: Path, tiny_model: Path, tmp_path: Path):
    done = forks.run("merge", tiny_model, trained, "merged", cwd=tmp_path)
    assert (done.code, done.out) == (0, "wrote merged\n"), done
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokens = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, trained).eval()
        assert (adapted(tokens).logits - plain).abs().max() > 0.01, "the adapter does something"
        assert (merged(tokens).logits - adapted(tokens).logits).abs().max() < 1e-4
    answers = [m.generate(tokens, max_new_tokens=12, do_sample=False) for m in (merged, adapted)]
    assert answers[0].tolist() == answers[1].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_merged_model_trains_again(forks: Forks, trained: Path, tiny_model: Path, tmp_path: Path):
    assert forks.run("merge", tiny_model, trained, "merged", cwd=tmp_path).code == 0
    assert forks.run(*small_run(tmp_path, tmp_path / "merged"), cwd=tmp_path).code == 0


def test_merging_overwrites_nothing(forks: Forks, trained: Path, tiny_model: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    done = forks.run("merge", tiny_model, trained, "there", cwd=tmp_path)
    assert done.code == 2
    assert done.err == "lorl: there exists already; name a new folder for the merged model.\n"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


# Evaluation


EASY_REWARD = """
def compute_score(solution_str, ground_truth):
    return float(ord(solution_str[:1] or "a") % 4 == 0)
"""


def evaluate(forks: Forks, folder: Path, model: Path, *more: object) -> dict[str, object]:
    write_prompts(folder / "val.jsonl", 40)
    (folder / "easy.py").write_text(EASY_REWARD)
    keys = ("data.val=val.jsonl", "reward.path=easy.py", "rollout.max_response_tokens=4")
    done = forks.run("eval", f"model.path={model}", *keys, *more, "--json", cwd=folder)
    assert done.code == 0, done
    return json.loads(done.out)  # nothing else on standard output


def test_evaluation_of_the_base_and_of_an_adapter(forks: Forks, trained: Path, tiny_model: Path, tmp_path: Path):
    base = evaluate(forks, tmp_path, tiny_model)
    assert base["n"] == 40
    assert 0 <= base["low"] <= base["accuracy"] <= base["high"] <= 1
    assert base["pass_at"] == {}
    assert base == evaluate(forks, tmp_path, tiny_model), "greedy and counted: it repeats"
    adapted = evaluate(forks, tmp_path, tiny_model, f"adapter.path={trained}")
    assert adapted["accuracy"] != base["accuracy"]
    assert not (tmp_path / "runs").exists(), "evaluating writes nothing"


def test_pass_at_k(forks: Forks, tiny_model: Path, tmp_path: Path):
    found = evaluate(forks, tmp_path, tiny_model, "eval.n=4", "eval.temperature=1.0")
    assert set(found["pass_at"]) == {"2", "4"}
    at2, at4 = (found["pass_at"][k] for k in ("2", "4"))
    assert found["accuracy"] < at2["value"] < at4["value"] < 1
    assert all(at["low"] < at["value"] < at["high"] for at in (at2, at4))


def test_an_evaluation_in_words(forks: Forks, tiny_model: Path, tmp_path: Path):
    write_prompts(tmp_path / "val.jsonl", 5)
    keys = ("data.val=val.jsonl", "reward.name=exact", "rollout.max_response_tokens=4")
    done = forks.run("eval", f"model.path={tiny_model}", *keys, "eval.n=2", "eval.temperature=1", cwd=tmp_path)
    assert done.code == 0, done
    assert done.out.startswith("accuracy 0.000 (95%: 0.000 to ")
    assert "\npass@2 0.000 (95%: " in done.out
    assert sha256(tmp_path / "val.jsonl")
