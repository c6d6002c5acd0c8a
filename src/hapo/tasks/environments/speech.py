"""Texts of an episode as token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for a text in a rendered chat."""


class Speech:
    """Texts as token ids: prompts, what a turn says, and what the environment answers.

    A prompt that is a text begins a plain text; messages go through the tokenizer's chat template, and so does
    then what the environment answers, as a message of the user's. A text that reads like a special token is none.

    Args:
        tokenizer: of the model.
        ends: tokens that end a turn.
        template: further variables of the chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], template: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.template = {"add_generation_prompt": True, "tokenize": False, **(template or {})}
        self._around: dict[str, list[str]] = {}

    def prompt(self, prompt: Any, more: str | None) -> list[int]:
        """The context that an episode begins with; `more` is what `reset` said.

        Raises:
            ValueError: messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return self._plain(prompt + (more or ""), special=True)
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the prompts of the environment are messages, and the tokenizer has no chat template: take a "
                "model that has one, or prompts that are text (hapo.tasks.environments.code:load_text for code)"
            )
        messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + (more or "")}]
        rendered = self.tokenizer.apply_chat_template(messages, **self.template)
        return self._plain(str(rendered), special=False, trusted=True)

    def said(self, ids: list[int]) -> str:
        """The text of a turn."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def answer(self, prompt: Any, turn: list[int], text: str) -> list[int]:
        """What stands between a turn and the next one, where the environment answered `text`."""
        if isinstance(prompt, str):
            return self._plain(text, special=False)
        before, after = self._chat()
        if turn and turn[-1] in self.ends:  # the template closes a message with the end that the turn has already
            before = before.removeprefix(str(self.tokenizer.decode([turn[-1]])))
        whole = (self._plain(part, special=False, trusted=True) for part in (before, after))
        first, last = whole
        return [*first, *self._plain(text, special=False), *last]

    def _chat(self) -> list[str]:
        """The template's text between a message of the model's and one of the user's, and from there to the
        next."""
        if "chat" not in self._around:
            messages = [
                {"role": "user", "content": "-"},
                {"role": "assistant", "content": MARK},
                {"role": "user", "content": MARK},
            ]
            rendered = self.tokenizer.apply_chat_template(messages, **self.template)
            parts = str(rendered).split(MARK)
            if len(parts) != 3:
                raise ValueError(
                    "the chat template does not show every message as it is: episodes cannot be rendered"
                )
            self._around["chat"] = parts[1:]
        return self._around["chat"]

    def _plain(self, text: str, *, special: bool, trusted: bool = False) -> list[int]:
        return list(
            self.tokenizer(text, add_special_tokens=special, split_special_tokens=not trusted)["input_ids"]
        )
