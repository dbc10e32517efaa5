"""Questions in parquet files: every way to write choices and answers, and a message for anything else."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mbridge_train.data import question_rows
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import ImageReference, ReadSettings, readable
from mbridge_train.data.rows import read_examples

IMAGE = {"bytes": b"not decoded here", "path": "a.png"}


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def row(**changes):
    return {"question": "Open?", "choices": ["Yes", "No", "3"], "correct_answer": 1, "image": IMAGE} | changes


def read(path, **settings):
    return read_examples([path], ReadSettings(**settings))


@pytest.mark.parametrize("choices", [["Yes", "No", "3"], "['Yes', 'No', '3']", '["Yes", "No", 3]', "('Yes', 'No', 3)"])
def test_choices_are_a_list_or_the_text_of_one(tmp_path, choices):
    (example,) = read(write(tmp_path / "a.parquet", [row(choices=choices)]))
    assert example.choices == ("Yes", "No", "3")
    assert example.answer == "No"
    (message,) = example.messages
    assert message.role == "user"
    assert message.parts == (ImageReference(data=IMAGE["bytes"]), "Open?\nChoose one:\nYes\nNo\n3")
    assert example.source == f"{tmp_path}/a.parquet row 0"


@pytest.mark.parametrize(
    ("answer", "right"),
    [(0, "Yes"), (2.0, "3"), ("No", "No"), ("b", "No"), ("C", "3"), (" 0 ", "Yes"), ("3", "3"), ("2", "3")],
)
def test_answer_is_an_index_a_letter_or_the_choice_itself(tmp_path, answer, right):
    assert read(write(tmp_path / "a.parquet", [row(correct_answer=answer)]))[0].answer == right


def test_letters_as_answers(tmp_path):
    example = read(write(tmp_path / "a.parquet", [row()]), answer_format="letter")[0]
    assert example.answer == "B"
    assert example.choices == ("A", "B", "C")
    assert example.messages[0].text == "Open?\nChoose one:\nA. Yes\nB. No\nC. 3"


def test_without_choices_the_answer_is_text(tmp_path):
    columns = {"prompt_key": "q", "answer_key": "a", "image_keys": ()}
    path = write(tmp_path / "a.parquet", [{"q": "1+1", "a": "2"}, {"q": "1+1", "a": None}])
    examples = read(path, **columns)
    assert (examples[0].answer, examples[0].choices, examples[0].images) == ("2", None, [])
    with pytest.raises(RowError, match=r"a.parquet row 1: 'a' is None without choices"):
        examples[1]


def test_several_columns_of_images_in_their_order(tmp_path):
    images = {f"image_{number}": {"bytes": str(number).encode(), "path": None} for number in (10, 2, 0)}
    rows = [row(**images), row(**images | {"image_2": None, "image": None}), row(**dict.fromkeys([*images, "image"]))]
    path = write(tmp_path / "a.parquet", rows)
    assert [image.data for image in read(path)[0].images] == [IMAGE["bytes"], b"0", b"2", b"10"]
    assert [image.data for image in read(path)[1].images] == [b"0", b"10"]
    assert [image.data for image in read(path, image_keys=("image_2",))[0].images] == [b"2"]
    with pytest.raises(RowError, match="row 2: no image in image, image_0, image_2, image_10"):
        read(path)[2]


def test_raw_bytes_are_an_image(tmp_path):
    assert read(write(tmp_path / "a.parquet", [row(image=b"raw")]))[0].images == [ImageReference(data=b"raw")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct_answer": 3}, r"'correct_answer': 3 is none of the 3 choices"),
        ({"correct_answer": "x" * 5000}, r"'xx.{20,40}xx' is none of the 3 choices"),
        ({"correct_answer": -1}, r"-1 is none of the 3 choices"),
        ({"correct_answer": "Maybe"}, r"'Maybe' is none"),
        ({"correct_answer": "D"}, r"'D' is none"),
        ({"correct_answer": None}, r"None is none"),
        ({"correct_answer": 0.5}, r"0.5 is none"),
        ({"correct_answer": float("nan")}, r"nan is none"),
        ({"correct_answer": float("inf")}, r"inf is none"),
        ({"correct_answer": True}, r"True is none"),
        ({"choices": "__import__('os').getpid()"}, r"is no list; write one such as"),
        ({"choices": "[" * 5000}, r"is no list; write one such as"),
        ({"choices": "[" + "1," * 60_000 + "]"}, r"120002 characters, more than 100000"),
        ({"choices": "{'a': 1}"}, r"is no list of 2 to 26 texts"),
        ({"choices": ["alone"]}, r"is no list of 2 to 26 texts"),
        ({"choices": "[True, False]"}, r"is no list of 2 to 26 texts"),
        ({"question": " "}, r"'question' is ' ', not a question"),
        ({"image": {"bytes": None, "path": "a.png"}}, r"column 'image': no bytes of an image"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    path = write(tmp_path / "a.parquet", [row(**changes)])
    with pytest.raises(RowError, match=rf"a\.parquet row 0.*{message}"):
        read(path)[0]


def test_row_groups_are_read_when_needed_and_few_are_kept(tmp_path, monkeypatch):
    rows = [row(question=f"{number}?", image={"bytes": bytes([number]) * 1000, "path": None}) for number in range(23)]
    path = write(tmp_path / "a.parquet", rows, row_group_size=5)
    opened = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **k: opened.append(group) or read_row_group(self, group, **k),
    )
    monkeypatch.setattr(question_rows, "KEPT_BYTES", 2 * 5500)
    examples = read(path)
    assert opened == []
    asked = [0, 4, 7, 1, 22, 3, 8]
    assert [examples[index].images[0].data for index in asked] == [bytes([index]) * 1000 for index in asked]
    assert opened == [0, 1, 4, 0, 1]
    monkeypatch.setattr(question_rows, "KEPT_BYTES", 5000)  # every group is larger, and is read up to the row
    copy = pickle.loads(pickle.dumps(examples))
    assert [copy[index].messages[0].text[:3].strip("?\n") for index in (21, 19, 0)] == ["21", "19", "0"]
    assert opened == [0, 1, 4, 0, 1]
    assert len(pickle.dumps(examples)) < 2000
    with pytest.raises(IndexError):
        examples[23]


def test_files_and_directories_as_one_sequence(tmp_path):
    for name, count in (("b", 2), ("a", 3)):
        write(tmp_path / f"{name}.parquet", [row(question=f"{name}{number}") for number in range(count)])
    (tmp_path / "c.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "c0"}, {"role": "assistant", "content": "x"}]}\n'
    )
    (tmp_path / "README.md").write_text("no data")
    examples = read_examples([tmp_path, tmp_path / "b.parquet"])
    questions = [examples[index].messages[0].text.partition("\n")[0] for index in range(len(examples))]
    assert questions == ["a0", "a1", "a2", "b0", "b1", "c0", "b0", "b1"]
    assert [examples.source(index).rpartition("/")[2] for index in (3, 5)] == ["b.parquet row 0", "c.jsonl:1"]


def test_readable_rows(tmp_path):
    path = write(tmp_path / "a.parquet", [row(), row(correct_answer=9), row(correct_answer=2)])
    assert [example.answer for example in readable(read(path))] == ["No", "3"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"a\.parquet does not exist \(from .*\): correct data.train_data_paths"),
        (lambda path: path.write_bytes(b"PAR1 and no more"), r"a\.parquet cannot be read as parquet"),
        (lambda path: write(path, [{"question": "?"}]), r"no column 'correct_answer', only question.*data.answer_key"),
        (lambda path: path.mkdir(), r"a\.parquet holds no \.parquet and no \.jsonl file"),
        (lambda path: pq.write_table(pa.Table.from_pylist([row()])[:0], path), r"a\.parquet has no rows"),
    ],
)
def test_unusable_files_are_errors_at_once(tmp_path, make, message):
    path = tmp_path / "a.parquet"
    make(path)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert raised.value.exit_code == 2
    assert not isinstance(raised.value, RowError)


def test_no_files_and_unknown_files():
    with pytest.raises(DataError, match="no data files are given"):
        read_examples([])
    with pytest.raises(DataError, match=r"\.py is neither \.parquet nor \.jsonl"):
        read_examples([__file__])


def test_a_damaged_row_group_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.parquet", [row(image=bytes(range(256)) * 40) for _ in range(4)], compression="zstd")
    content = bytearray(path.read_bytes())
    content[60:400] = bytes(340)
    path.write_bytes(content)
    examples = read(path)
    with pytest.raises(RowError, match=r"a\.parquet row group 0 cannot be read"):
        examples[2]


def test_a_column_of_lists_of_images(tmp_path):
    rows = [{"question": "Which?", "correct_answer": "a", "photos": photos} for photos in ([IMAGE, IMAGE], [IMAGE], [])]
    examples = read(write(tmp_path / "a.parquet", rows), image_keys=("photos",))
    assert [len(example.images) for example in (examples[0], examples[1])] == [2, 1]
    with pytest.raises(RowError, match="row 2: no image in photos"):
        examples[2]


@pytest.mark.parametrize("photo", [b"raw", IMAGE, [IMAGE]])
def test_images_under_another_name_are_not_passed_over(tmp_path, photo):
    path = write(tmp_path / "a.parquet", [{"question": "Which?", "correct_answer": "a", "photo": photo}])
    with pytest.raises(DataError, match=r"a\.parquet has no column named image.* set data\.image_keys=\[photo\], or"):
        read(path)
    assert read(path, image_keys=())[0].images == []


def test_choices_under_another_name_are_not_passed_over(tmp_path):
    path = write(tmp_path / "a.parquet", [row()])
    with pytest.raises(DataError, match="no column 'options', only question, choices.* correct data.choice_key"):
        read(path, choice_key="options")


def test_a_mark_in_the_question_is_the_place_of_its_image(tmp_path):
    images = {"image_0": {"bytes": b"0", "path": None}, "image_1": {"bytes": b"1", "path": None}, "image": None}
    rows = [row(question="Is <image> like <image>?", choices=None, correct_answer="No", **images)]
    rows += [row(question="Is <image>?", choices=None, correct_answer="No", **images)]
    rows += [row(question="<image><image><image>", choices=None, correct_answer="No", **images)]
    found = read(write(tmp_path / "a.parquet", rows))
    zero, one = ImageReference(data=b"0"), ImageReference(data=b"1")
    assert found[0].messages[0].parts == ("Is ", zero, " like ", one, "?")
    with pytest.raises(RowError, match="row 1: the question has fewer <image> than the row has images"):
        found[1]
    with pytest.raises(RowError, match="row 2: the text holds <image> where there is no image for it"):
        found[2]


def test_an_empty_answer_is_a_bad_row(tmp_path):
    with pytest.raises(RowError, match="row 0: the answer is empty"):
        read(write(tmp_path / "a.parquet", [row(choices=None, correct_answer=" ")]))[0]
