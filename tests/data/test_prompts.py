import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorl.config import DataConfig
from lorl.data.prompts import load_prompts
from lorl.errors import UserError

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('tool first') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is defined %}<think>{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "2 + 2?"}]


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte; plain text gets <s> before it and <|im_end|> behind it, as some base models' tokenizers do."""
    vocab = {t: i for i, t in enumerate(["<|im_start|>", "<|im_end|>", "<s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", vocab["<s>"]), ("<|im_end|>", vocab["<|im_end|>"])]
    )
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def verl_row(prompt: Any = QUESTION, truth: Any = "4", **more: Any) -> dict[str, Any]:
    reward_model = {"style": "rule", "ground_truth": truth}
    return {"data_source": "sums", "prompt": prompt, "reward_model": reward_model, "extra_info": {"index": 7}} | more


def write(path: Path, *rows: Any) -> str:
    """A parquet or JSON-lines file; text rows are written as they are."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json"])
def test_verl_rows_become_prompts(tmp_path, tokenizer, name):
    path = write(tmp_path / name, verl_row(), verl_row([{"role": "user", "content": "1 + 1?"}], "2"))
    loaded = load_prompts(DataConfig(), path, tokenizer, "train")
    first, second = loaded.prompts
    assert first.text == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    # what transformers itself makes of the messages, its BatchEncoding unpacked
    assert first.tokens == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert (first.data_source, first.ground_truth, first.extra_info) == ("sums", "4", {"index": 7})
    assert second.ground_truth == "2"
    assert loaded.skipped == []


def test_the_simple_layout_needs_a_question_and_an_answer(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "2 + 2?", "answer": 4, "level": "easy"},
        {"prompt": "1 + 1?", "answer": "2"},
    )
    first, second = load_prompts(DataConfig(), path, tokenizer, "train").prompts
    assert first.text == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert (first.ground_truth, first.data_source) == (4, "")
    assert first.extra_info["level"] == "easy"  # other columns reach the reward
    assert "1 + 1?" in second.text


def test_a_json_list_a_byte_order_mark_and_blank_lines_are_read(tmp_path, tokenizer):
    (tmp_path / "list.json").write_text(json.dumps([verl_row(), verl_row(truth="5")], indent=2))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(verl_row()).encode() + b"\r\n\n\n")
    paths = [str(tmp_path / "list.json"), str(tmp_path / "bom.jsonl")]
    assert [p.ground_truth for p in load_prompts(DataConfig(), paths, tokenizer, "train").prompts] == ["4", "5", "4"]


def test_columns_can_have_other_names(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"ask": "2 + 2?", "truth": "4", "kind": "sums"})
    config = DataConfig(prompt_key="ask", answer_key="truth", source_key="kind")
    (prompt,) = load_prompts(config, path, tokenizer, "train").prompts
    assert (prompt.ground_truth, prompt.data_source, prompt.extra_info) == ("4", "sums", {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(prompt_key="promt"), r"no column 'promt' \(data.prompt_key\); did you mean 'prompt'"),
        (
            DataConfig(source_key="datasource"),
            r"no column 'datasource' \(data.source_key\); did you mean 'data_source'",
        ),
        (DataConfig(answer_key="anwser"), r"no column 'anwser' \(data.answer_key\); did you mean 'answer'"),
    ],
)
def test_a_misspelt_column_is_told_with_the_nearest_one(tmp_path, tokenizer, config, message):
    path = write(tmp_path / "a.parquet", {"prompt": "2 + 2?", "answer": "4", "data_source": "sums"})
    for policy in ("error", "skip"):  # a wrong key is not a file full of bad rows
        with pytest.raises(UserError, match=message):
            load_prompts(config.model_copy(update={"bad_rows": policy}), path, tokenizer, "train")


def test_a_reward_that_needs_no_truth_needs_no_answer_column(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "kind": "sums"}, {"prompt": "3 + 3?", "kind": "sums"})
    with pytest.raises(UserError, match=r"no column 'answer'.*set data\.answer_key=null"):
        load_prompts(DataConfig(), path, tokenizer, "train")
    prompts = load_prompts(DataConfig(answer_key=None), path, tokenizer, "train").prompts
    assert [(p.ground_truth, p.extra_info) for p in prompts] == [(None, {"kind": "sums"})] * 2
    assert len({p.id for p in prompts}) == 2
    given = write(tmp_path / "b.jsonl", verl_row(truth="5"))  # a truth that is there is kept
    assert load_prompts(DataConfig(answer_key=None), given, tokenizer, "train").prompts[0].ground_truth == "5"


def test_the_system_prompt_goes_where_there_is_none(tmp_path, tokenizer):
    own = [{"role": "system", "content": "Own."}, *QUESTION]
    path = write(tmp_path / "a.jsonl", verl_row(), verl_row(own))
    first, second = load_prompts(DataConfig(system_prompt="Be brief."), path, tokenizer, "train").prompts
    assert first.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?")
    assert "Own." in second.text
    assert "Be brief." not in second.text


def test_template_arguments_reach_the_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", verl_row())
    config = DataConfig(chat_template_kwargs={"think": True})
    assert load_prompts(config, path, tokenizer, "train").prompts[0].text.endswith("assistant\n<think>")
    with pytest.raises(UserError, match="no chat template"):
        load_prompts(config, path, byte_tokenizer(chat_template=None), "train")


def test_without_a_chat_template_the_texts_are_joined_and_left_open(tmp_path):
    plain = byte_tokenizer(chat_template=None)
    shots = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}, *QUESTION]
    (prompt,) = load_prompts(DataConfig(), write(tmp_path / "a.jsonl", verl_row(shots)), plain, "train").prompts
    assert prompt.text == "1?\n\none\n\n2 + 2?"
    assert plain.decode(prompt.tokens) == "<s>1?\n\none\n\n2 + 2?"  # begun as the tokenizer begins, not ended


def test_ids_belong_to_the_content(tmp_path, tokenizer):
    rows = [verl_row([{"role": "user", "content": f"{i} + {i}?"}], str(2 * i)) for i in range(4)]
    one = load_prompts(DataConfig(), write(tmp_path / "a.jsonl", *rows), tokenizer, "train").prompts
    files = [write(tmp_path / "b.parquet", *rows[2:]), write(tmp_path / "c.jsonl", *rows[:2][::-1])]
    other = load_prompts(DataConfig(system_prompt="Be brief."), files, tokenizer, "val").prompts
    assert {p.ground_truth: p.id for p in one} == {p.ground_truth: p.id for p in other}
    assert len({p.id for p in one}) == 4


def test_equal_rows_get_ids_of_their_own_and_given_ids_are_kept(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", verl_row(), verl_row(), verl_row(id="sum-7"), verl_row(id=8))
    ids = [p.id for p in load_prompts(DataConfig(), path, tokenizer, "train").prompts]
    assert ids[1] == f"{ids[0]}-2"
    assert ids[2:] == ["sum-7", "8"]


BROKEN_ROWS: list[tuple[Any, str]] = [
    ('{"prompt": "2 + 2?", "answer": ', "is not valid JSON: Expecting value"),
    ('{"prompt": "2 + 2?", "answer": NaN}', "NaN is no JSON value"),
    ("[" * 100_000, "is not valid JSON"),
    ('{"prompt": "2 \0 2?", "answer": "4"}', "holds a NUL byte"),
    ('["prompt", "answer"]', "is a JSON list, not an object"),
    (verl_row("2 \0 2?"), "the prompt holds a NUL character"),
    ('{"prompt": "\\ud800", "answer": "4"}', "half a surrogate pair"),
    ({"promt": "2 + 2?", "answer": "4"}, "has no 'prompt'; did you mean 'promt'?"),
    (verl_row(""), "the prompt is empty"),
    (verl_row([]), "the prompt is empty"),
    (verl_row([{"role": "system", "content": "Be brief."}]), "the prompt is empty"),
    (verl_row(7), "the prompt is a number, neither text nor a list of messages"),
    (verl_row(["2 + 2?"]), "must be objects with role and content"),
    (verl_row([{"role": "usr", "content": "2 + 2?"}]), "the role 'usr'; did you mean 'user'?"),
    (verl_row([{"role": "user", "content": ["2 + 2?"]}]), "content is a list, not text"),
    (verl_row([*QUESTION, {"role": "assistant", "content": "4"}]), "the last message is the assistant's"),
    (verl_row([{"role": "tool", "content": "4"}]), "the chat template refuses it: tool first"),
    ({"prompt": "2 + 2?"}, "has no answer, neither reward_model.ground_truth nor 'answer'"),
    (verl_row(truth=None), "has no answer"),
    (verl_row(truth=" "), "the answer is empty"),
    (verl_row(reward_model="4"), "reward_model is text"),
    (verl_row(data_source=3), "data_source is a number, not text"),
    (verl_row(extra_info="7"), "extra_info is text, not an object"),
    (verl_row(id=[1]), "id is a list"),
    (verl_row(id="good"), "has the id 'good' of"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN_ROWS, ids=[reason for _, reason in BROKEN_ROWS])
def test_a_broken_row_is_refused_with_its_place_or_skipped_and_listed(tmp_path, tokenizer, row, reason):
    path = write(tmp_path / "a.jsonl", verl_row(id="good"), row)
    with pytest.raises(UserError) as refused:
        load_prompts(DataConfig(), path, tokenizer, "train")
    assert str(refused.value).startswith(f"data.train: 1 of 2 rows can't be used: {path}:2 ")
    assert reason in str(refused.value)
    assert "data.bad_rows=skip" in str(refused.value)
    assert "\n" not in str(refused.value)

    loaded = load_prompts(DataConfig(bad_rows="skip"), path, tokenizer, "train")
    assert [p.id for p in loaded.prompts] == ["good"]
    assert [note.where for note in loaded.skipped] == [f"{path}:2"]
    assert reason in loaded.skipped[0].reason


def test_the_first_five_bad_rows_are_spelt_out_and_all_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.parquet", *[verl_row("" if i % 2 else "2 + 2?") for i in range(16)])
    with pytest.raises(UserError) as refused:
        load_prompts(DataConfig(), path, tokenizer, "val")
    message = str(refused.value)
    assert message.startswith("data.val: 8 of 16 rows can't be used")
    assert [f"{path}:{row} " in message for row in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    assert "and 3 more" in message


def test_skipping_everything_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", verl_row(""), verl_row(truth=""))
    with pytest.raises(UserError, match=r"2 of 2 rows can't be used.*no prompt is left"):
        load_prompts(DataConfig(bad_rows="skip"), path, tokenizer, "train")


def truncated_parquet(folder: Path) -> str:
    path = folder / "a.parquet"
    write(path, *[verl_row()] * 100)
    path.write_bytes(path.read_bytes()[:-40])
    return str(path)


def corrupt_parquet(folder: Path) -> str:
    path = folder / "a.parquet"
    write(path, *[verl_row(str(i)) for i in range(2000)])
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    return str(path)


def file_with(data: bytes, name: str):
    def make(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    return make


def neighbour_of(name: str):
    def make(folder: Path) -> str:
        write(folder / "train.parquet", verl_row())
        return str(folder / name)

    return make


BROKEN_FILES = {
    "truncated parquet": (truncated_parquet, "is not a whole parquet file"),
    "corrupt parquet": (corrupt_parquet, "is not a whole parquet file"),
    "text called parquet": (file_with(b"{}", "a.parquet"), "is not a whole parquet file"),
    "empty parquet": (file_with(b"", "a.parquet"), "is not a whole parquet file"),
    "parquet called jsonl": (file_with(b"PAR1....PAR1", "a.jsonl"), "rename it to a.parquet"),
    "empty jsonl": (file_with(b"", "a.jsonl"), "holds no rows"),
    "blank jsonl": (file_with(b"\n\n", "a.jsonl"), "holds no rows"),
    "empty list": (file_with(b"[]", "a.json"), "holds no rows"),
    "cut list": (file_with(b'[{"prompt": "2"', "a.json"), "is not valid JSON"),
    "UTF-16": (file_with('{"prompt": "2"}'.encode("utf-16"), "a.jsonl"), "save it as UTF-8"),
    "latin-1": (file_with('{"prompt": "é", "answer": "4"}'.encode("latin-1"), "a.jsonl"), "a.jsonl:1 is not UTF-8"),
    "wrong suffix": (file_with(b"prompt,answer\n", "a.csv"), "suffix '.csv'; lorl reads .parquet, .jsonl"),
    "missing file": (neighbour_of("tran.parquet"), "did you mean 'train.parquet'"),
    "missing folder": (lambda folder: str(folder / "data" / "a.jsonl"), "data does not exist either"),
    "lonely missing file": (lambda folder: str(folder / "a.jsonl"), "no .parquet, .jsonl, .ndjson, .json file lies in"),
}


@pytest.mark.parametrize(("make", "reason"), BROKEN_FILES.values(), ids=BROKEN_FILES)
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_broken_file_is_one_sentence_whatever_the_policy(tmp_path, tokenizer, make, reason, bad_rows):
    path = make(tmp_path)
    with pytest.raises(UserError) as refused:
        load_prompts(DataConfig(bad_rows=bad_rows), path, tokenizer, "train")
    assert reason in str(refused.value)
    assert Path(path).name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_prompt_over_the_limit_is_refused_skipped_or_cut(tmp_path, tokenizer):
    long = verl_row("x" * 100, truth="long")
    path = write(tmp_path / "a.jsonl", verl_row(), long)
    whole = load_prompts(DataConfig(), path, tokenizer, "train").prompts[1].tokens
    limit = 60

    with pytest.raises(UserError, match=rf"a.jsonl:2 the prompt has {len(whole)} tokens .*max_prompt_tokens is 60"):
        load_prompts(DataConfig(max_prompt_tokens=limit, bad_rows="skip"), path, tokenizer, "train")

    skipped = load_prompts(DataConfig(max_prompt_tokens=limit, overlong="skip"), path, tokenizer, "train")
    assert [p.ground_truth for p in skipped.prompts] == ["4"]
    assert [note.where for note in skipped.skipped] == [f"{path}:2"]

    for overlong, kept in (("truncate_left", whole[-limit:]), ("truncate_right", whole[:limit])):
        cut = load_prompts(DataConfig(max_prompt_tokens=limit, overlong=overlong), path, tokenizer, "train")
        assert cut.prompts[1].tokens == kept
        assert cut.prompts[1].text == tokenizer.decode(kept)
        assert [note.where for note in cut.truncated] == [f"{path}:2"]


def test_the_first_rows_can_be_taken(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *[verl_row(truth=str(i)) for i in range(9)])
    config = DataConfig(max_train_prompts=2, max_val_prompts=5)
    assert [p.ground_truth for p in load_prompts(config, path, tokenizer, "train").prompts] == ["0", "1"]
    assert len(load_prompts(config, path, tokenizer, "val").prompts) == 5


def test_a_dataset_folder_gives_its_split(tmp_path, tokenizer):
    import datasets

    splits = {name: datasets.Dataset.from_list([verl_row(truth=name)]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    source = f"hf:{tmp_path / 'saved'}"

    def truths(path: str, split: Any) -> list[Any]:
        return [p.ground_truth for p in load_prompts(DataConfig(), path, tokenizer, split).prompts]

    assert truths(source, "train") == ["train"]
    assert truths(source, "val") == ["test"]
    assert truths(f"{source}:test", "train") == ["test"]
    assert truths(str(tmp_path / "saved"), "train") == ["train"]  # the folder's path alone will do
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        truths(f"{source}:tset", "train")


def test_a_folder_of_parquet_files_is_a_dataset_too(tmp_path, tokenizer):
    write(tmp_path / "train.parquet", verl_row(truth="a"))
    write(tmp_path / "test.parquet", verl_row(truth="b"))
    (prompt,) = load_prompts(DataConfig(), f"hf:{tmp_path}", tokenizer, "val").prompts
    assert prompt.ground_truth == "b"


def test_a_dataset_that_cannot_be_had_is_one_sentence(tokenizer):
    with pytest.raises(UserError, match=r"data.train: cannot load hf:lorl-tests/no-such-dataset: ") as refused:
        load_prompts(DataConfig(), "hf:lorl-tests/no-such-dataset", tokenizer, "train")
    assert "\n" not in str(refused.value)


def test_no_file_at_all_is_told(tokenizer):
    with pytest.raises(UserError, match=r"data.val names no file"):
        load_prompts(DataConfig(), [], tokenizer, "val")
