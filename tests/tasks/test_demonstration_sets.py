"""Demonstrations as files have them: messages, prompt and completion, or text; and what is refused."""

import json

import pytest

from hapo.tasks.demonstration_sets import DemonstrationConfig, load_demonstrations

USER, ASSISTANT = "user", "assistant"


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def load(tmp_path, rows, seed=0, **options):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_demonstrations(DemonstrationConfig(dataset=str(file), **{"eval_size": 2, **options}), seed=seed)


def test_prompt_and_completion_with_answers(tmp_path):
    rows = [{"question": f"{i}?", "completion": f"so {i}", "answer": i} for i in range(6)]
    data = load(tmp_path, rows, prompt_template="Q: {question}\n")
    assert set(data.train.column_names) == {"prompt", "completion"} and len(data.train) == 4
    assert data.train[0]["prompt"].startswith("Q: ") and data.train[0]["completion"].startswith("so ")
    assert data.problems is not None and data.problems[0]["answer"] == data.eval[0]["completion"][3:]
    assert data.problems[0]["prompt"] == data.eval[0]["prompt"]
    assert not set(data.train["prompt"]) & set(data.eval["prompt"])
    (reward,) = data.reward_funcs
    gold = data.problems[0]
    asked = {"prompts": [gold["prompt"]] * 2, "answer": [gold["answer"]] * 2}
    assert reward(completions=[f"\\boxed{{{gold['answer']}}}", "\\boxed{99}"], **asked) == [1.0, 0.0]


def test_chat_puts_both_into_messages(tmp_path):
    rows = [{"question": f"{i}?", "completion": "yes"} for i in range(4)]
    data = load(tmp_path, rows, chat=True, system_prompt="be brief")
    assert [message["role"] for message in data.train[0]["prompt"]] == ["system", USER]
    assert data.train[0]["completion"] == said((ASSISTANT, "yes")) and data.problems is None


def test_a_conversation_is_asked_without_its_last_message(tmp_path):
    rows = [{"messages": said((USER, f"{i}?"), (ASSISTANT, f"{i}!")), "answer": str(i)} for i in range(5)]
    data = load(tmp_path, rows)
    assert data.train.column_names == ["messages"] and data.train[0]["messages"][-1]["role"] == ASSISTANT
    assert data.problems is not None and len(data.problems[0]["prompt"]) == 1
    assert data.problems[0]["answer"] == data.eval[0]["messages"][1]["content"][:-1]


def test_text_is_held_out_by_what_it_says(tmp_path):
    rows = [{"body": text} for text in ("a", "b", "c", "A ", "b", "d")]
    data = load(tmp_path, rows, text_column="body")
    assert data.train.column_names == ["text"] and data.problems is None
    assert not {t.strip().lower() for t in data.train["text"]} & {t.strip().lower() for t in data.eval["text"]}


def test_addition_comes_with_worked_answers():
    data = load_demonstrations(DemonstrationConfig(train_size=3, eval_size=2), seed=4)
    row = data.train[0]
    assert row["completion"].rpartition(";")[2] == str(sum(map(int, row["prompt"][:-1].split("+"))))
    assert data.problems is not None and data.reward_funcs[0](
        prompts=data.problems["prompt"], completions=data.eval["completion"], answer=data.problems["answer"]
    ) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"question": "1?", "answer": "1"}],
            {},
            "no demonstrations: it has none of the columns 'messages', 'compl",
        ),
        ([{"completion": "yes"}], {}, "no column 'question'; it has 'completion'"),
        ([{"question": "1?", "completion": " "}], {}, "row 1: the completion must be text or messages, got ' '"),
        ([{"text": "a"}, {"text": ""}], {}, "row 2: the text must not be empty, got ''"),
        (
            [{"messages": said((USER, "1?"))}],
            {},
            "row 1: a demonstration is a list of messages that ends with text",
        ),
        (
            [{"question": "1?", "completion": said((ASSISTANT, "1"))}],
            {},
            "the completion is messages and the question is text: set chat to true",
        ),
        ([{"text": "a"}], {"eval_size": 1}, "cannot hold out 1 of 1 distinct questions"),
    ],
)
def test_what_is_refused(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows, **options)


def test_a_task_without_demonstrations_is_refused():
    with pytest.raises(ValueError, match="reasoning_gym:chain_sum has no demonstrations"):
        load_demonstrations(DemonstrationConfig(dataset="reasoning_gym:chain_sum"), seed=0)
