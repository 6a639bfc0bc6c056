import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lorl.data.gsm8k import write_gsm8k
from lorl.errors import UserError

ROW = {
    "question": "A farm has 1,200 hens and sells 200. How many are left?",
    "answer": "It has 1200-200 = <<1200-200=1000>>1,000 hens left.\n#### 1,000",
}


def source(folder: Path, *train: object) -> Path:
    folder.mkdir()
    for name, rows in (("train.jsonl", train), ("test.jsonl", [ROW])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_are_what_verls_own_script_writes(tmp_path):
    paths = write_gsm8k(source(tmp_path / "in", ROW, ROW | {"answer": "Down.\n#### -3"}), tmp_path / "out")
    assert paths == {s: tmp_path / "out" / f"{s}.parquet" for s in ("train", "test")}
    first, second = pq.read_table(paths["train"]).to_pylist()
    assert first == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": ROW["question"] + ' Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1000"},
        "extra_info": {"split": "train", "index": 0, **ROW},
    }
    assert (second["reward_model"]["ground_truth"], second["extra_info"]["index"]) == ("-3", 1)
    assert pq.read_table(paths["test"]).to_pylist()[0]["extra_info"]["split"] == "test"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "2 + 2?", "answer": "4"}, "train.jsonl:2: the answer does not end in '#### NUMBER'"),
        ({"question": "2 + 2?"}, "train.jsonl:2 has no text under 'answer'"),
        ([1], "train.jsonl:2 is a JSON list"),
    ],
)
def test_a_row_of_something_else_writes_nothing(tmp_path, row, reason):
    with pytest.raises(UserError, match=reason):
        write_gsm8k(source(tmp_path / "in", ROW, row), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_source_is_told(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        write_gsm8k(tmp_path / "nope", tmp_path / "out")
    folder = source(tmp_path / "in", ROW)
    (folder / "test.jsonl").rename(folder / "tests.jsonl")
    with pytest.raises(UserError, match=r"no file .*test.jsonl; did you mean 'tests.jsonl'"):
        write_gsm8k(folder, tmp_path / "out")


def test_a_failing_write_leaves_the_old_files_whole(tmp_path, monkeypatch):
    paths = write_gsm8k(source(tmp_path / "in", ROW), tmp_path / "out")
    before = {path: path.read_bytes() for path in paths.values()}
    real, calls = pq.write_table, []

    def disk_full_at_the_second(table, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")
        real(table, path)

    monkeypatch.setattr(pq, "write_table", disk_full_at_the_second)
    with pytest.raises(UserError, match=r"cannot write to .*No space left on device"):
        write_gsm8k(source(tmp_path / "in2", ROW, ROW), tmp_path / "out")
    assert {path: path.read_bytes() for path in paths.values()} == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]


def test_an_output_that_is_a_file_is_told(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*out"):
        write_gsm8k(source(tmp_path / "in", ROW), tmp_path / "out")
