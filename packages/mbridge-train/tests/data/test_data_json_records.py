"""Records of json and jsonl files: their content and place, and the message for one that cannot be read."""

import pickle

import pytest
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.json_records import JsonRecords

MANY_DIGITS = '{"a": ' + "7" * 5000 + "}"


def records(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return JsonRecords(path)


def test_lines_of_a_jsonl_file(tmp_path):
    found = records(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": "\u2028\u00e9"}\r\n{"a": 3}')
    assert [found[index] for index in range(len(found))] == [{"a": 1}, {"a": "\u2028\u00e9"}, {"a": 3}]
    assert [found.source(index) for index in range(3)] == [f"{tmp_path}/a.jsonl:{line}" for line in (1, 4, 5)]
    assert pickle.loads(pickle.dumps(found))[2] == {"a": 3}
    with pytest.raises(IndexError):
        found[3]


def test_objects_of_a_json_file(tmp_path):
    found = records(tmp_path / "a.json", '[\n{"a": 1},\n{"a": 2}]')
    assert (len(found), found[1], found.source(1)) == (2, {"a": 2}, f"{tmp_path}/a.json, record 2")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    content = '{"a": 1}' if name == "a.jsonl" else '[{"a": 1}]'
    assert records(tmp_path / name, content.encode("utf-8-sig"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1 2}', r"not JSON: Expecting ',' delimiter at column 9; each line .* which starts '{\"a\": 1 2}'"),
        ("[" * 100_000, r"JSON nested too deep to read"),
        (MANY_DIGITS, r"a number has more than 4300 digits: write it as text, in quotes"),
        ('{"a": "é"}'.encode("latin-1"), r"not UTF-8 text \(invalid .* at byte 7\): save the file as UTF-8"),
        ("[1]", r"a JSON array, not an object"),
        ("null", r"a JSON null, not an object"),
    ],
)
def test_a_bad_line_is_the_error_of_its_row_alone(tmp_path, line, message):
    found = records(tmp_path / "a.jsonl", b'{"a": 1}\n' + (line.encode() if isinstance(line, str) else line) + b"\n")
    assert found[0] == {"a": 1}
    with pytest.raises(RowError, match=rf"a\.jsonl:2: {message}"):
        found[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"a": 1,\n}]', r"a\.json:3: not JSON: .*; a \.json file holds one array of objects"),
        ('{"a": 1}', r"a\.json holds a JSON object, not an array of objects"),
        (f'[{{"a": 1}},\n{MANY_DIGITS}]', r"a\.json:2: a number has more than 4300 digits"),
        ('[{"a": 1},\n"é"]'.encode("latin-1"), r"a\.json:2: not UTF-8 text"),
        ("[]", r"a\.json holds no examples"),
        ("", r"a\.json holds no examples"),
    ],
)
def test_a_json_file_is_good_as_a_whole_or_not(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as raised:
        records(tmp_path / "a.json", content)
    assert not isinstance(raised.value, RowError)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist \(from /.*data\.train_data_paths"):
        JsonRecords(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"a\.csv is neither \.json nor \.jsonl"):
        records(tmp_path / "a.csv", "a")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: Is a directory"):
        JsonRecords(tmp_path / "b.jsonl")
    found = records(tmp_path / "c.jsonl", "{}")
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(DataError, match=r"c\.jsonl cannot be read any more: No such file"):
        found[0]
