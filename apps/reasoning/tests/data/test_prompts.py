"""Reading and tokenizing prompts, and messages about unusable data."""

import json
from pathlib import Path

import pytest
from mbridge_reasoning.data.prompts import Prompt, read_prompts, tokenize_prompts
from mbridge_reasoning.quickstart.model import build_tokenizer
from mbridge_train.data.errors import DataError
from mbridge_train.errors import TrainError

GOOD_LINE = '{"prompt": "p", "solutions": "s"}'
MANY_DIGITS = '{"prompt": "p", "solutions": ' + "9" * 5000 + "}"
OTHER_KEY = '{"prompt": "p", "answers": "s"}'


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["Calculate 1 + 2."], 300)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_jsonl_and_json_keep_order_and_values(tmp_path):
    lines = write(
        tmp_path / "a.jsonl",
        json.dumps({"prompt": "one", "solutions": ["1", "1.0"]}),
        "",
        json.dumps(
            {"prompt": [{"role": "user", "content": "two\u2028halves", "x": 1}], "solutions": "2"}, ensure_ascii=False
        ),
    )
    array = write(tmp_path / "b.json", json.dumps([{"prompt": "three", "solutions": 3}]))
    problems = read_prompts([lines, array])
    assert [p.content for p in problems] == ["one", [{"role": "user", "content": "two\u2028halves"}], "three"]
    assert [p.solutions for p in problems] == [("1", "1.0"), ("2",), ("3",)]
    assert problems[1].row["prompt"][0]["x"] == 1  # a reward function gets the whole row
    assert [p.source for p in problems] == [f"{lines}:1", f"{lines}:3", f"{array}, record 1"]


def test_other_keys(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "q", "answer": "a"}))
    (problem,) = read_prompts([path], prompt_key="question", solutions_key="answer")
    assert (problem.content, problem.solutions) == ("q", ("a",))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", GOOD_LINE + "\n{\"prompt\": \"p\" 1}", ["a.jsonl:2", "not JSON", "delimiter", "column 16"]),
        ("a.json", '[\n{"prompt": 1,\n}]', ["a.json:3", "not JSON"]),
        ("a.json", '{"prompt": "p"}', ["a.json", "object", "array of objects"]),
        ("a.jsonl", OTHER_KEY, ["a.jsonl:1", "'solutions'", "'prompt', 'answers'", "data.answer_key"]),
        ("a.jsonl", '{"solutions": "s"}', ["a.jsonl:1", "'prompt'", "data.prompt_key"]),
        ("a.jsonl", "[1, 2]", ["a.jsonl:1", "array"]),
        ("a.jsonl", '{"prompt": "", "solutions": "s"}', ["a.jsonl:1", "'prompt'"]),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "solutions": "s"}', ["a.jsonl:1", "'prompt'"]),
        ("a.jsonl", '{"prompt": "p", "solutions": []}', ["a.jsonl:1", "'solutions'", "[]"]),
        ("a.jsonl", '{"prompt": "p", "solutions": true}', ["a.jsonl:1", "'solutions'", "true"]),
        ("a.jsonl", "\n\n", ["a.jsonl", "no examples"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1"]),
        ("a.jsonl", '{"prompt": "a\\ud800b", "solutions": "s"}', ["a.jsonl:1", "'prompt'", r"\ud800", "character 2"]),
        ("a.jsonl", '{"prompt": [{"role": "\\ud800", "content": "c"}], "solutions": "s"}', ["a.jsonl:1", "'prompt'"]),
        ("a.json", '[{"prompt": "p", "solutions": ["s", "\\udfff"]}]', ["record 1", "'solutions'", r"\udfff"]),
        ("a.jsonl", '{"prompt": "p", "solutions": NaN}', ["a.jsonl:1", "'solutions'", "NaN"]),
        ("a.jsonl", '{"prompt": "p", "solutions": [1, -Infinity]}', ["a.jsonl:1", "'solutions'", "-Infinity"]),
        ("a.jsonl", '{"prompt": "p", "solutions": 1e999}', ["a.jsonl:1", "'solutions'", "Infinity"]),
        ("a.parquet", "x", ["a.parquet", ".jsonl"]),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_prompts([path])
    for part in parts:
        assert part in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("name", "start", "end"), [("a.jsonl", "", ""), ("a.json", "[", "]")])
def test_number_of_thousands_of_digits(tmp_path, name, start, end):
    comma = "," if start else ""
    path = write(tmp_path / name, start + GOOD_LINE + comma, MANY_DIGITS + end)
    with pytest.raises(DataError, match=rf"{name}:2: a number has more than 4300 digits.*as text"):
        read_prompts([path])


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist .*data\.train_data_paths"):
        read_prompts([tmp_path / "nowhere.jsonl"])
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        read_prompts([tmp_path / "latin.jsonl"])
    with pytest.raises(DataError, match="data files"):
        read_prompts([])


def problem(prompt, number=1) -> Prompt:
    return Prompt(content=prompt, solutions=("1",), source=f"file.jsonl:{number}")


def tokens(problems, tokenizer, **changes):
    settings = {"max_prompt_length": 20, "apply_chat_template": True, "filter_long": False, **changes}
    return [p.tokens for p in tokenize_prompts(problems, tokenizer, **settings)]


def test_text_messages_and_template(tokenizer):
    text = "Calculate 1 + 2."
    plain = tuple(tokenizer(text)["input_ids"])
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    messages = [{"role": "user", "content": text}]
    assert tokens([problem(text)], tokenizer, apply_chat_template=False) == [plain]
    assert tokens([problem(text), problem(messages)], tokenizer) == [(user, *plain, assistant)] * 2
    assert tokens([problem(messages)], tokenizer, apply_chat_template=False) == [(user, *plain, assistant)]


def test_messages_need_a_template():
    bare = build_tokenizer(["a b"], 300)
    bare.chat_template = None
    with pytest.raises(DataError, match=r"file\.jsonl:1.*no chat template"):
        tokens([problem([{"role": "user", "content": "a"}])], bare)
    with pytest.raises(DataError, match=r"data\.apply_chat_template is true.*set it to false"):
        tokens([problem("a")], bare)


def test_templates_that_refuse_a_prompt_or_are_none():
    tokenizer = build_tokenizer(["a b"], 300)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(DataError, match=r"file\.jsonl:1: the chat template of .* refuses the prompt: no user here"):
        tokens([problem("a")], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}\n{{ m['content' }}{% endfor %}"
    with pytest.raises(TrainError, match="line 2 of its chat template is not valid Jinja: unexpected '}'"):
        tokens([problem("a")], tokenizer)


def test_long_prompts_are_an_error_or_left_out(tokenizer):
    short, long = problem("1 + 2", 1), problem("1 + 2 + 3 + 4 + 5 + 6 + 7 + 8", 2)
    length = len(tokens([long], tokenizer, max_prompt_length=99)[0])
    with pytest.raises(
        DataError, match=rf"file\.jsonl:2.*has {length} tokens.*allows {length - 1}.*filter_prompt_by_length"
    ):
        tokens([short, long], tokenizer, max_prompt_length=length - 1)
    assert len(tokens([short, long], tokenizer, max_prompt_length=length)) == 2
    assert len(tokens([short, long], tokenizer, max_prompt_length=length - 1, filter_long=True)) == 1
    with pytest.raises(DataError, match="all 2 prompts"):
        tokens([short, long], tokenizer, max_prompt_length=1, filter_long=True)
