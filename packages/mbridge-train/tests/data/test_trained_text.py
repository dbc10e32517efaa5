"""The trained part of a conversation: the answer and its end token, under templates of several kinds."""

import pytest
from mbridge_sft.quickstart.model import CHAT_TEMPLATE, build_processor
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import ImageReference, Message
from mbridge_train.data.trained_text import ChatTemplate

# Like Qwen3's: thoughts are taken out of past turns, and the last answer gets a think block of its own.
THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- set content = message.content.split('</think>')[-1].strip() %}
    {%- if message.role == 'assistant' and loop.last %}
        {%- set thought = message.content.split('</think>')[0] if '</think>' in message.content else '' %}
        {{- '<think>\\n' + thought.replace('<think>', '').strip() + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + PROMPT }}{%- endif %}
"""
INSTRUCTION = (  # like Llama 2's: there is no generation prompt, and a space before the end token
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
)


def user(*parts):
    return Message(role="user", parts=parts)


def assistant(text):
    return Message(role="assistant", parts=(text,))


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor(["a"], 300).tokenizer


@pytest.fixture
def split(tokenizer):
    def segments(messages, answer, train_on="last", template=CHAT_TEMPLATE):
        return ChatTemplate(tokenizer, template, "the model").segments(
            messages, answer, train_on=train_on, source="here"
        )

    return segments


@pytest.mark.parametrize(
    "answer", ["A cat.", "7", "", " leading and trailing ", "\n", "<|im_end|>", "<|im_start|>assistant\n", "answer@"]
)
def test_the_answer_and_its_end_token(split, answer):
    assert split([user("What is it?")], answer) == [
        ("<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        (f"{answer}<|im_end|>", True),
        ("\n", False),
    ]


def test_question_that_equals_the_answer(split):
    assert split([user("7<|im_end|>")], "7<|im_end|>")[1] == ("7<|im_end|><|im_end|>", True)


def test_images_stand_where_they_are(split):
    image = ImageReference(data=b"")
    pieces = split([user("Is", image, "or", image, "larger?")], "The first")
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert pieces[0][0] == f"<|im_start|>user\nIs{place}or{place}larger?<|im_end|>\n<|im_start|>assistant\n"


def test_all_turns_or_the_last(split):
    messages = [Message(role="system", parts=("S",)), user("Q1"), assistant("A1"), user("Q2")]
    head = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    middle = "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    assert split(messages, "A2", "all") == [
        (head, False),
        ("A1<|im_end|>", True),
        (middle, False),
        ("A2<|im_end|>", True),
        ("\n", False),
    ]
    assert split(messages, "A2") == [
        (f"{head}A1<|im_end|>{middle}", False),
        ("A2<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize(("train_on", "unmarked"), [("all", ["A3<|im_end|>"]), ("last", [])])
def test_a_turn_that_says_itself_whether_it_is_trained(split, train_on, unmarked):
    turns = [Message(role="assistant", parts=(f"A{n}",), is_trained=mark) for n, mark in enumerate((False, True), 1)]
    messages = [user("Q1"), turns[0], user("Q2"), turns[1], user("Q3"), assistant("A3"), user("Q4")]
    pieces = split(messages, "A4", train_on)
    assert [text for text, is_trained in pieces if is_trained] == ["A2<|im_end|>", *unmarked, "A4<|im_end|>"]
    assert "".join(text for text, _ in pieces) == "".join(text for text, _ in split(messages, "A4", "last"))


@pytest.mark.parametrize(
    ("prompt", "answer", "trained"),
    [
        # The model has to write the block itself, because generation does not start with one …
        ("''", "A2", ["A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"]),
        ("''", "<think>hm</think>A2", ["A1<|im_end|>", "<think>\nhm\n</think>\n\nA2<|im_end|>"]),
        # … it starts inside of the block, which past turns have lost …
        ("'<think>\\n'", "<think>hm</think>A2", ["A1<|im_end|>", "hm\n</think>\n\nA2<|im_end|>"]),
        # … or behind it.
        ("'<think>\\n\\n</think>\\n\\n'", "A2", ["A1<|im_end|>", "A2<|im_end|>"]),
    ],
)
def test_think_blocks(split, prompt, answer, trained):
    messages = [user("Q1"), assistant("<think>so</think>A1"), user("Q2")]
    pieces = split(messages, answer, "all", THINKING.replace("PROMPT", prompt))
    assert [text for text, is_trained in pieces if is_trained] == trained


def test_no_generation_prompt(split):
    pieces = split([user("Q1"), assistant("A1"), user("Q2")], "A2", "all", INSTRUCTION)
    assert pieces == [
        ("[INST] Q1 [/INST] ", False),
        ("A1 <|im_end|>", True),
        ("[INST] Q2 [/INST] ", False),
        ("A2 <|im_end|>", True),
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT_TEMPLATE.replace("<|im_end|>", "###"), r"writes '###\\n' after an answer"),
        ("{{ messages | length }} turns", r"does not show where the assistant's turn 2 begins"),
        (CHAT_TEMPLATE.replace("assistant\\n", "assistant: "), r"does not show where the assistant's turn 2 begins"),
        (  # as in Mistral Nemo's: the system's message stands before the last question, and no other
            "{% for m in messages %}{{ 'S' if loop.last and m.role == 'user' else '' }}{{ m.content }}<|im_end|>"
            "{% endfor %}",
            r"does not show where the assistant's turn 2 begins",
        ),
        (  # as in DeepSeek R1's: reasoning is taken out of answers, and generation begins with it
            THINKING.replace(" and loop.last", " and false").replace("PROMPT", "'<think>\\n'"),
            r"does not show where the assistant's turn 2 begins",
        ),
        (  # the header of a turn says how many follow
            "{% for m in messages %}{{ loop.revindex ~ m.role ~ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}1assistant{% endif %}",
            r"does not show where the assistant's turn 2 begins",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_named(split, template, message):
    with pytest.raises(DataError, match=f"here: the chat template of the model {message}") as raised:
        split([user("Q")], "A", template=template)
    assert not isinstance(raised.value, RowError)


def test_an_answer_that_the_template_cuts_is_refused(split):
    template = THINKING.replace(" and loop.last", " and false").replace("PROMPT", "''")
    assert split([user("Q")], "A", template=template)[1] == ("A<|im_end|>", True)
    with pytest.raises(DataError, match="here: the chat template of the model leaves out a part of the answer, .*'A'"):
        split([user("hm A")], "<think>hm</think>A", template=template)


def test_the_day_is_the_same_on_every_day(split):
    template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    assert split([user("Q")], "A", template=template)[0][0].startswith("26 Jul 2024<|im_start|>user")


def test_past_turns_that_change_can_be_left_out(split):
    # As in Mistral's: the last question, and no other, is preceded by the system's message.
    template = (
        "{% set last = 1 if add_generation_prompt else 2 %}{% for m in messages %}"
        "{{ 'S' if m.role == 'user' and loop.revindex <= last else '' }}{{ m.role ~ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    messages = [user("Q1"), assistant("A1"), user("Q2")]
    with pytest.raises(DataError, match=r"turn 2 begins .*, or set data.train_on=last"):
        split(messages, "A2", "all", template)
    assert split(messages, "A2", "last", template)[1] == ("A2<|im_end|>", True)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(split):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="here: the chat template of the model refuses the messages: roles must alt"):
        split([user("Q")], "A", template=template)
