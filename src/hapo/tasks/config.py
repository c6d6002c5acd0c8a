"""Options of a task."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .reward_options import TokenRewardOptions

REASONING_GYM = "reasoning_gym:"

RESERVED_COLUMNS = frozenset(
    {
        *("prompt", "prompts", "question", "answer", "entry", "completion", "completions", "completion_ids"),
        *("trainer_state", "log_extra", "log_metric", "environments"),
    }
)
"""Names that the problems themselves or TRL's calls of a reward function use."""


OF_DEMONSTRATIONS = ("demonstration", "messages_column", "completion_column")
"""How the names of the options begin that say what demonstrations are."""


@dataclass
class TaskConfig:
    """Which problems to train on, how they are put to the model, and how its answers are scored.

    Parsed from YAML and flags beside TRL's GRPOConfig, whose `seed` and `reward_weights` it relies on. Raises
    ValueError for values that no data set could make right.
    """

    dataset: str = field(
        default="addition",
        metadata={
            "help": "addition (embedded), reasoning_gym:NAME, a local .jsonl, .json, .parquet, .csv or .tsv file "
            "(text also as .gz), a folder of such files, or the id of a data set on the Hugging Face Hub"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a Hub data set; none takes back what a recipe says"}
    )
    train_split: str = field(
        default="train", metadata={"help": "split of a Hub data set or of a folder to train on"}
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "split of a Hub data set or of a folder to evaluate on; none takes back what a recipe says "
            "(default: hold out part of train_split)"
        },
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "local file or folder to evaluate on (default: hold out part of the training data)"},
    )
    question_column: str = field(
        default="question",
        metadata={
            "help": "column with the problem, text or messages; a.b is key b in column a (default: or prompt)"
        },
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "column with the gold answer (default: or verl's reward_model.ground_truth)"},
    )
    extra_columns: list[str] = field(
        default_factory=list, metadata={"help": "further columns to hand to your own reward function"}
    )
    chat: bool = field(
        default=False, metadata={"help": "put the problem as messages through the chat template of the model"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "system message; needs chat"})
    prompt_template: str = field(
        default="{question}", metadata={"help": "text put to the model; {question} stands for the problem"}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "one or more of auto (the task's own; for files and the Hub math_verify), math_verify, exact, "
            "package.module:function, path/to/file.py:function, reward_model (of token_reward); weighted by "
            "reward_weights"
        },
    )
    token_reward: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "train with the score of a reward model, spread over the tokens of an answer: a mapping with "
            "model, channels, weights and others, on the command line as JSON; none takes back what a recipe "
            "says. rewards are then what held-out answers are measured by"
        },
    )
    reward_timeout: float = field(default=5.0, metadata={"help": "seconds allowed for scoring one sample"})
    on_reward_error: str = field(
        default="raise",
        metadata={"help": "when your own reward function fails on a sample: raise, or the score to give instead"},
    )
    on_bad_gold: str = field(
        default="raise", metadata={"help": "for rows whose gold answer cannot be used: raise, or drop them"}
    )
    train_size: int | None = field(
        default=None, metadata={"help": "training problems (default: all; 4096 of a generated task)"}
    )
    eval_size: int | None = field(
        default=None,
        metadata={"help": "evaluation problems (default: all of test_split or eval_file; otherwise 500)"},
    )
    task_seed: int | None = field(
        default=None,
        metadata={"help": "chooses the training problems (default: seed); evaluation problems never change"},
    )
    task_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "options of a reasoning-gym task: a mapping, on the command line as JSON"}
    )

    environment: str | None = field(
        default=None,
        metadata={
            "help": "episodes of several turns in the place of single answers: addition, code, or "
            "MODULE:FUNCTION, which is called with seed, train_size and eval_size and returns the environment's "
            "class and two data sets; none takes back what a recipe says. max_completion_length is of one turn"
        },
    )
    environment_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'of the environment\'s class, as {"max_turns": 2}'}
    )

    curriculum: str | None = field(
        default=None,
        metadata={
            "help": "file with the columns question, answer and stage (hapo curriculum writes it): train on these "
            "problems, stage after stage; none takes back what a recipe says"
        },
    )

    demonstrations: str | None = field(
        default=None,
        metadata={
            "help": "what to learn from beside rollouts: a file, a folder or a data set of the Hub as in dataset, "
            "or addition (worked sums); none takes back what a recipe says. Its weight: demonstration_weight"
        },
    )
    demonstration_config: str | None = field(
        default=None, metadata={"help": "configuration of demonstrations from the Hub"}
    )
    demonstration_split: str = field(
        default="train", metadata={"help": "split of demonstrations from the Hub or a folder"}
    )
    messages_column: str = field(
        default="messages",
        metadata={"help": "column of the demonstrations with conversations, each ending with the answer"},
    )
    completion_column: str = field(
        default="completion",
        metadata={
            "help": "column of the demonstrations with the answer in full, where there are no conversations; the "
            "problem is in question_column"
        },
    )
    demonstration_size: int | None = field(
        default=None, metadata={"help": "demonstrations (default: all; 4096 worked sums)"}
    )

    def __post_init__(self) -> None:
        self._check_demonstrations()
        # a flag over a recipe that sets them
        for name in ("dataset_config", "test_split", "eval_file", "curriculum", "environment", "token_reward"):
            if getattr(self, name) == "none":
                setattr(self, name, None)
        if isinstance(self.rewards, str):  # a YAML scalar
            self.rewards = [self.rewards]
        if isinstance(self.extra_columns, str):
            self.extra_columns = [self.extra_columns]
        if isinstance(self.task_options, str):
            try:
                self.task_options = json.loads(self.task_options)
            except ValueError as error:
                raise ValueError(f"task_options is no JSON: {self.task_options!r} ({error})") from error
        self._check_environment()
        if not isinstance(self.task_options, dict | None):
            raise ValueError(f"task_options must be a mapping, not {self.task_options!r}")
        if self.task_options and not self.dataset.startswith(REASONING_GYM):
            raise ValueError(f"task_options are for reasoning_gym:NAME, not for dataset {self.dataset!r}")
        reserved = RESERVED_COLUMNS.intersection(self.extra_columns)
        if reserved:
            raise ValueError(f"extra_columns may not contain {', '.join(sorted(reserved))}: these names are taken")
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one, such as auto")
        if "{question}" not in self.prompt_template:
            raise ValueError(f"prompt_template {self.prompt_template!r} does not contain {{question}}")
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt needs chat; for plain text write it into prompt_template")
        if not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be positive, not {self.reward_timeout}")
        if self.on_bad_gold not in ("raise", "drop"):
            raise ValueError(f"on_bad_gold must be raise or drop, not {self.on_bad_gold!r}")
        if self.test_split is not None and self.eval_file is not None:
            raise ValueError("both test_split and eval_file are given; drop one")
        for name in ("train_size", "eval_size", "demonstration_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        self.reward_fallback()
        self._check_token_reward()

    def without_demonstrations(self) -> TaskConfig:
        """The same problems, for what learns nothing."""
        without = copy.copy(self)
        for f in fields(self):
            if f.name.startswith(OF_DEMONSTRATIONS):
                setattr(without, f.name, f.default)
        return without

    def _check_environment(self) -> None:
        if isinstance(self.environment_options, str):
            try:
                self.environment_options = json.loads(self.environment_options)
            except ValueError as error:
                raise ValueError(
                    f"environment_options is no JSON: {self.environment_options!r} ({error})"
                ) from error
        if not isinstance(self.environment_options, dict | None):
            raise ValueError(f"environment_options must be a mapping, not {self.environment_options!r}")
        if self.environment is None:
            if self.environment_options is not None:
                raise ValueError(f"environment_options={self.environment_options!r} needs environment: name one")
            return
        read = ("environment", "environment_options", "train_size", "eval_size", "task_seed")
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name not in read and getattr(self, f.name) != default:
                raise ValueError(
                    f"{f.name}={getattr(self, f.name)!r} does not go with environment={self.environment!r}, which "
                    "brings its problems and rewards: leave one of them out"
                )

    def _check_demonstrations(self) -> None:
        if self.demonstrations == "none":
            vars(self).update(vars(self.without_demonstrations()))
        if self.demonstrations is not None:
            return
        for f in fields(self):
            if f.name.startswith(OF_DEMONSTRATIONS) and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} needs demonstrations: name their source")

    def _check_token_reward(self) -> None:
        if self.token_reward is not None:
            TokenRewardOptions.read(self.token_reward)
        elif "reward_model" in self.rewards:
            raise ValueError("rewards: reward_model is the model of token_reward, which is not given")

    @property
    def needs_answers(self) -> bool:
        """Whether a reward may ask for gold answers."""
        return self.rewards != ["reward_model"]

    def options(self) -> dict[str, Any]:
        """The options of a reasoning-gym task."""
        assert not isinstance(self.task_options, str)
        return self.task_options or {}

    def reward_fallback(self) -> float | None:
        """The score for samples on which a user's reward function fails; None to raise an error."""
        if self.on_reward_error == "raise":
            return None
        try:
            score = float(self.on_reward_error)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"on_reward_error must be raise or a number, not {self.on_reward_error!r}")
        return score
