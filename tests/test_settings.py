"""Bad configuration gets one sentence that names the right key; good configuration survives YAML and back."""

import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorl import settings
from lorl.errors import UserError

KEYS = [key.name for key in settings.describe()]
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        settings.load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def one_letter_slips(word: str, rng: random.Random) -> set[str]:
    """`word` with a letter dropped, with one doubled, and with two swapped, each where `rng` says."""
    drop = {word[:i] + word[i + 1 :] for i in range(len(word))}
    double = {word[:i] + word[i] + word[i:] for i in range(len(word))}
    swap = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    slips = [sorted(kind - {word, ""}) for kind in (drop, double, swap)]
    return {rng.choice(kind) for kind in slips if kind}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_misspelt_by_one_letter_is_refused_with_the_right_one(key: str):
    rng = random.Random(key)
    section, _, last = key.rpartition(".")
    slips = {f"{section}.{slip}" if section else slip for slip in one_letter_slips(last, rng)}
    if section:
        slips.add(f"{min(one_letter_slips(section, rng))}.{last}")
    slips -= {*KEYS, *SECTIONS}
    assert slips
    for slip in slips:
        message = refusal(f"{slip}=1")
        assert f"unknown key {slip!r}" in message
        assert repr(key) in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rank", "adapter.rank"),
        ("rnk", "adapter.rank"),
        ("rank", "adapter.rank"),
        ("+adapter.rnk", "adapter.rank"),
        ("++optim.lrr", "optim.lr"),
        ("actor.optim.lr", "optim.lr"),
        ("trainer.every_steps", "checkpoint.every_steps"),
    ],
)
def test_a_key_in_the_wrong_section_is_refused_with_its_full_name(wrong: str, right: str):
    assert f"did you mean {right!r}" in refusal(f"{wrong}=1")


def test_a_key_that_fits_several_sections_names_them_all():
    message = refusal("temperature=1.0")
    assert "'rollout.temperature' or 'eval.temperature'" in message


def test_a_key_like_no_other_lists_the_valid_ones():
    assert "valid: model, adapter, data" in refusal("zzz=1")
    assert "valid: checkpoint.every_steps, checkpoint.keep" in refusal("checkpoint.xyzzy=1")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lr=abc", ["optim.lr=abc", "expected a number > 0"]),
        ("optim.lr='3'", ["optim.lr='3'", "expected a number"]),
        ("optim.lr=0", ["optim.lr=0", "> 0"]),
        ("optim.lr=-1e-5", ["optim.lr=-1e-05", "> 0"]),
        ("optim.lr=nan", ["optim.lr=NaN", "expected a number"]),
        ("optim.lr=null", ["optim.lr=null", "expected a number"]),
        ("optim.lr=[1,2]", ["optim.lr=[1, 2]", "expected a number"]),
        ("adapter.rank=0", ["adapter.rank=0", "a whole number >= 1"]),
        ("adapter.rank=1.5", ["adapter.rank=1.5", "a whole number"]),
        ("adapter.rank=true", ["adapter.rank=true", "a whole number"]),
        ("adapter.dropout=1.5", ["adapter.dropout=1.5", ">= 0 and <= 1"]),
        ("adapter.target_modules=[1]", ["adapter.target_modules=[1]", "text or a list of text"]),
        ("model.dtype=bfloat", ["model.dtype=bfloat", "auto, float32, bfloat16", "did you mean 'bfloat16'"]),
        ("model.dtype=int8", ["one of auto, float32, bfloat16"]),
        ("rollout.engine=sglang", ["rollout.engine=sglang: lorl has no SGLang", "engines.md", "use vllm or torch"]),
        ("rollout.engine=vlm", ["one of auto, torch, vllm", "did you mean 'vllm'"]),
        ("model.path=true", ["model.path=true", "expected text", "quotes"]),
        ("model=3", ["model=3", "section", "model.path"]),
        ("optim=null", ["optim=null", "section"]),
        ("algorithm.clip_dual=1", ["a number > 1 or null"]),
        ("rollout.top_p=0", ["rollout.top_p=0", "> 0 and <= 1"]),
        ("rollout.stop=x", ["rollout.stop=x", "a list of text"]),
        ("rollout.stop=3", ["rollout.stop=3", "a list of text"]),
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "a list of 2 numbers"]),
        ("optim.betas=[0.9,2]", ["optim.betas=[0.9, 2]", "< 1"]),
        ("reward.kwargs=3", ["reward.kwargs=3", "a mapping"]),
        ("data.shuffle=1", ["data.shuffle=1", "true or false"]),
        ("seed=-1", ["seed=-1", ">= 0"]),
        ("rollout.temperature=0", ["rollout.temperature=0", "rollout.n=8"]),
        ("algorithm.minibatch_prompts=5", ["minibatch_prompts=5", "prompts_per_step=32", "divisor such as 4"]),
        ("optim.lr=1e-5,1e-4", ["sweep", "one value"]),
        ("optim.lr=choice(1,2)", ["sweep"]),
        ("optim.lr", ["'optim.lr'", "key=value"]),
        ("run.name=a=b", ["run.name=a=b", "quote", "run.name='a=b'"]),
        ("optim/lr=3", ["dotted key"]),
        ("~optim.lrr", ["unknown key 'optim.lrr'", "'optim.lr'"]),
        ("~optim.lr=3", ["write ~optim.lr"]),
        ("optim.lr=${sed}", ["optim.lr", "'sed' not found"]),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(override: str, parts: list[str]):
    message = refusal(override)
    for part in parts:
        assert part in message


def test_several_mistakes_are_counted_by_key():
    assert "(and 2 more mistakes)" in refusal("optim.lr=abc", "adapter.target_modules=[1]", "seed=x")
    assert "more" not in refusal("adapter.target_modules=[1]")  # one key, though each member of its union failed


def test_overrides_read_as_hydra_and_verl_write_them():
    config = settings.load(
        None,
        [
            "data.train=['a b.parquet',c.parquet]",
            "adapter.target_modules=[q_proj,v_proj]",
            "adapter.exclude_modules='.*(lm_head|embed)$'",
            "optim.lr=1e-4",
            "optim.weight_decay=0",
            "+trainer.total_steps=5",
            "++rollout.top_k=20",
            "optim.max_grad_norm=null",
            "reward.kwargs={strict:true}",
            "reward.kwargs.weight=2",
            "trainer.trackers=[]",
            "model.path=hf/some-model",
        ],
    )
    assert config.data.train == ["a b.parquet", "c.parquet"]
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.adapter.exclude_modules == ".*(lm_head|embed)$"
    assert config.optim.lr == 1e-4
    assert config.optim.weight_decay == 0.0
    assert config.trainer.total_steps == 5
    assert config.rollout.top_k == 20
    assert config.optim.max_grad_norm is None
    assert config.reward.kwargs == {"strict": True, "weight": 2}
    assert config.model.path == "hf/some-model"


@pytest.mark.parametrize("text", ["123", "007", "1e5", "1_000", "2.50"])
def test_text_that_looks_like_a_number_is_kept_as_written(text: str):
    assert settings.load(None, [f"run.name={text}"]).run.name == text
    assert settings.load(None, [f"data.train={text}"]).data.train == text


def test_a_tilde_goes_back_to_the_default(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 0.5, schedule: cosine}\nadapter: {rank: 4}\n")
    config = settings.load(file, ["~optim.lr", "~adapter"])
    assert (config.optim.lr, config.optim.schedule, config.adapter.rank) == (3e-5, "cosine", 32)


def test_file_then_overrides_then_interpolation(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "seed: 3\noptim:\n  lr: 1e-5\nadapter:\n  rank: 8\n  alpha: ${adapter.rank}\n"
        "run: {name: 'seed-${seed}'}\neval: {n: '${trainer.total_epochs}'}\nreward:\n"
    )
    config = settings.load(file, ["adapter.rank=16", "seed=4"])
    assert (config.optim.lr, config.adapter.rank, config.adapter.alpha) == (1e-5, 16, 16)
    assert config.run.name == "seed-4"
    assert config.eval.n == 1  # a default, referred to
    assert config.reward == settings.load(None, []).reward  # a section left empty


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lr: 1}\noptim: {lr: 2}\n", ["line 2", "duplicate key optim"]),
        ("optim: [1\n", ["line 2", "not valid YAML"]),
        ("- 1\n", ["list", "model:"]),
        ("optim.lr: 3e-5\n", ["'optim.lr'", "nests"]),
        ("optm:\n  lr: 3e-5\n", ["unknown key 'optm.lr'", "'optim.lr'"]),
        ("adapter:\n  rnk: 3\n", ["unknown key 'adapter.rnk'", "'adapter.rank'"]),
        ("model:\n  revision: 0123\n", ["model.revision", "text", "quotes"]),
        ("seed: !!python/object/apply:os.system ['true']\n", ["line 1", "not valid YAML"]),
        ("1: 2\n", ["unknown key '1'"]),
        ("adapter: {1: 2}\n", ["unknown key 'adapter.1'", "valid: adapter.rank"]),
        ("seed: &x [*x]\n", ["cannot be read"]),
        ("seed: ${nothing}\n", ["seed", "'nothing' not found"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, parts: list[str]):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refusal(file=file)
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "gsm8k.yaml").write_text("seed: 1")
    message = refusal(file=tmp_path / "gsm8.yaml")
    assert "does not exist" in message
    assert "gsm8k.yaml" in message
    assert "is a folder" in refusal(file=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in refusal(file=tmp_path / "binary.yaml")


# PyYAML writes U+0085 as it is and reads it as a line break.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85")) | st.sampled_from(
    ["1e5", "007", "null", "yes", "${seed}", "\\${seed}", "\\\\${", "${", "???", "2020-01-01", "a: b", "~", "x\ny "]
)


@hypothesis.settings(max_examples=25, deadline=None)
@given(texts, st.lists(texts.filter(bool)), st.floats(min_value=1e-300, max_value=1e300), st.integers(0))
def test_yaml_gives_back_an_equal_configuration(tmp_path_factory, text, texts, number, seed):
    config = settings.load(None, [])
    config = config.model_copy(
        update={
            "seed": seed,
            "optim": config.optim.model_copy(update={"lr": number}),
            "data": config.data.model_copy(update={"system_prompt": text}),
            "rollout": config.rollout.model_copy(update={"stop": texts}),
            "reward": config.reward.model_copy(update={"kwargs": {"a": text, "b": {"c": [number, None, True]}}}),
        }
    )
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(settings.to_yaml(config), encoding="utf-8")
    assert settings.load(file, []) == config


def test_yaml_keeps_the_order_of_the_schema():
    lines = settings.to_yaml(settings.load(None, [])).splitlines()
    top = [line.partition(":")[0] for line in lines if not line.startswith((" ", "-"))]
    assert top == list(dict.fromkeys(key.partition(".")[0] for key in KEYS))


def test_describe_names_type_default_and_meaning():
    rows = {key.name: key for key in settings.describe()}
    assert rows["optim.lr"].type == "a number > 0"
    assert rows["optim.lr"].default == "3e-05"
    assert rows["rollout.n"].description == "Samples a prompt"
    assert rows["algorithm.kl_in"].type == "one of loss, reward"


def test_every_default_can_be_given_as_an_override():
    plain = settings.load(None, [])
    assert settings.load(None, [f"{key.name}={key.default}" for key in settings.describe()]) == plain


def test_diff_and_what_a_resumed_run_may_change():
    old = settings.load(None, [])
    new = settings.load(None, ["optim.lr=1e-4", "checkpoint.keep=9", "run.name=x", "resume=never", "data.val=v.jsonl"])
    assert settings.diff(old, old) == {}
    assert settings.diff(old, new)["optim.lr"] == (3e-5, 1e-4)
    assert set(settings.diff(old, new)) == {"optim.lr", "checkpoint.keep", "run.name", "resume", "data.val"}
    assert set(settings.resume_conflicts(old, new)) == {"optim.lr", "data.val"}


def test_every_pattern_of_resume_free_keys_names_a_key():
    for pattern in settings.RESUME_FREE:
        assert any(key == pattern or key.startswith(pattern.removesuffix("*")) for key in KEYS)


def test_a_config_error_is_answered_without_torch():
    code = (
        "import sys\nfrom lorl import settings\nfrom lorl.errors import UserError\n"
        "try:\n    settings.load(None, ['adapter.rnk=3'])\nexcept UserError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "adapter.rank" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
