import json
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest

from lorl.data.tasks import json_safe, render, write_task
from lorl.errors import UserError

reasoning_gym = pytest.importorskip("reasoning_gym")

SORT_THREE = {"min_numbers": 3, "max_numbers": 3, "min_value": 10, "max_value": 99, "max_decimals": 0}
COMPACT = {"template": "Sort {direction}: {original_numbers}", "answer_template": "[{sorted_numbers}]"}


def rows(path):
    return pq.read_table(path).to_pylist()


def asked(row):
    return row["prompt"][-1]["content"]


def test_rows_are_verls_and_graded_by_reasoning_gyms_scorer(tmp_path):
    paths = write_task("number_sorting", tmp_path, train=20, val=5, options=SORT_THREE)
    assert {split: len(rows(path)) for split, path in paths.items()} == {"train": 20, "val": 5}
    score = reasoning_gym.get_score_answer_fn("number_sorting")
    for index, row in enumerate(rows(tmp_path / "train.parquet")):
        entry = json.loads(row["extra_info"]["entry"])
        assert row["data_source"] == "reasoning_gym/number_sorting"
        assert row["prompt"] == [{"role": "user", "content": entry["question"]}]
        assert row["reward_model"]["ground_truth"] == entry["answer"]
        assert (row["extra_info"]["split"], row["extra_info"]["index"]) == ("train", index)
        assert score(row["reward_model"]["ground_truth"], entry) == 1
        assert score("['1', '2', '3']", entry) == 0


def test_no_question_is_in_two_places(tmp_path):
    # 1 to 9, two at a time: 162 questions with their directions, so that draws meet again and again
    options = {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9, "max_decimals": 0}
    paths = write_task("number_sorting", tmp_path, train=90, val=30, shots=3, options=options, **COMPACT)
    train, val = rows(paths["train"]), rows(paths["val"])
    shots = {message["content"] for message in train[0]["prompt"][:-1] if message["role"] == "user"}
    questions = [asked(row) for row in train + val]
    assert len(shots) == 3
    assert len({*questions, *shots}) == 90 + 30 + 3


def test_the_same_seed_gives_the_same_files_and_val_ignores_the_size_of_train(tmp_path):
    def write(name, seed, train):
        return write_task("gsm_symbolic", tmp_path / name, train=train, val=5, seed=seed)

    one, same, more, other = write("a", 0, 9), write("b", 0, 9), write("c", 0, 14), write("d", 1, 9)
    assert rows(one["train"]) == rows(same["train"])
    assert rows(one["val"]) == rows(more["val"])
    assert rows(one["train"]) == rows(more["train"])[:9]
    assert {asked(row) for row in rows(one["train"])}.isdisjoint(asked(row) for row in rows(other["train"]))


def test_compact_questions_with_worked_examples(tmp_path):
    given = {"shots": 2, "options": SORT_THREE, "where": {"direction": "ascending"}, **COMPACT}
    turns = rows(write_task("number_sorting", tmp_path / "turns", train=4, val=2, **given)["train"])
    score = reasoning_gym.get_score_answer_fn("number_sorting")
    for row in turns:
        assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
        question = asked(row)
        numbers = question.removeprefix("Sort ascending: ").split(", ")
        assert len(numbers) == 3
        assert all(10 <= int(number) <= 99 for number in numbers)  # "61", where the entry has "61.0"
        entry = json.loads(row["extra_info"]["entry"])
        assert score(f"[{', '.join(sorted(numbers))}]", entry) == 1
    worked = turns[0]["prompt"][1]["content"]
    assert json.loads(worked) == sorted(json.loads(worked))

    inline = rows(write_task("number_sorting", tmp_path / "i", train=4, val=2, shot_style="inline", **given)["train"])
    (message,) = inline[0]["prompt"]
    contents = [m["content"] for m in turns[0]["prompt"]]
    assert message["content"] == "{}\n{}\n\n{}\n{}\n\n{}".format(*contents)


def test_a_template_goes_around_the_question(tmp_path):
    template = '{question} Write "#### " before the answer.'
    row = rows(write_task("gsm_symbolic", tmp_path, train=1, val=1, template=template)["train"])[0]
    entry = json.loads(row["extra_info"]["entry"])
    assert asked(row) == f'{entry["question"]} Write "#### " before the answer.'


def test_braces_can_be_written():
    assert render("{{{answer}}}", {"answer": "4"}) == "{4}"


def test_options_may_be_text_as_on_the_command_line(tmp_path):
    options = {name: str(value) for name, value in SORT_THREE.items()}
    as_text = write_task("number_sorting", tmp_path / "a", train=3, val=1, options=options)
    as_numbers = write_task("number_sorting", tmp_path / "b", train=3, val=1, options=SORT_THREE)
    assert rows(as_text["train"]) == rows(as_numbers["train"])


MISTAKES = {
    "task": ({"name": "number_sortin"}, "no task 'number_sortin'; did you mean 'number_sorting'"),
    "option": ({"options": {"min_number": 3}}, "no option 'min_number'; did you mean 'min_numbers'"),
    "option's type": ({"options": {"min_numbers": "three"}}, "can't take min_numbers='three'"),
    "option's value": ({"options": {"min_numbers": 30}}, "refuses the options .*max_numbers must be >= min_numbers"),
    "reserved option": ({"options": {"size": 30}}, "'size' is lorl's own"),
    "field": ({"template": "{numbrs}"}, "unknown field 'numbrs'; did you mean 'numbers'"),
    "attribute": ({"template": "{question.__class__}"}, "unknown field 'question.__class__'"),
    "template": ({"template": "{question"}, "is malformed"),
    "ungradable answer": ({"answer_template": "{sorted_numbers}"}, "scorer refuses the answer"),
    "filter": ({"where": {"directon": "ascending"}}, "no 'directon' to filter by; did you mean 'direction'"),
    "filter's value": ({"where": {"direction": "up"}}, "gave 0 new questions in .* the filter"),
    "shot style": ({"shot_style": "inlin"}, "did you mean 'inline'"),
    "count": ({"val": 0}, "val=0"),
    "too few questions": (
        {"options": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 2, "max_decimals": 0}, "val": 20},
        "gave 8 new questions .* 20 are wanted; ask for fewer",
    ),
    "scorer that needs tuples": ({"name": "arc_agi"}, "arc_agi can't be written"),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(tmp_path, given, message):
    with pytest.raises(UserError, match=message) as refused:
        write_task(**({"name": "number_sorting", "output": tmp_path / "out", "train": 2, "val": 2} | given))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_without_reasoning_gym_the_command_that_brings_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)  # what an import of a missing package meets
    with pytest.raises(UserError, match=r"pip install 'lorl\[tasks\]'"):
        write_task("number_sorting", tmp_path, train=1, val=1)


def test_entries_become_json():
    entry = {
        "pair": (1, 2),
        "set": {2, 1},
        "decimal": Decimal("0.10"),
        "fraction": Fraction(1, 3),
        "float": np.float64(0.5),
        "int": np.int64(3),
        "array": np.arange(2),
    }
    assert json.loads(json.dumps(entry, default=json_safe)) == {
        "pair": [1, 2],
        "set": [1, 2],
        "decimal": "0.10",
        "fraction": "1/3",
        "float": 0.5,
        "int": 3,
        "array": [0, 1],
    }
