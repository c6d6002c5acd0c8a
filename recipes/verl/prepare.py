"""Write the problems of a task as verl reads them: train.parquet and val.parquet.

    python recipes/verl/prepare.py data/addition eval_size=64
    python recipes/verl/prepare.py data/dapo_math --recipe recipes/hapo_qwen3_8b.yaml
    python recipes/verl/prepare.py data/gsm8k dataset=openai/gsm8k dataset_config=main test_split=test chat=true

The options are those of `hapo train` for its task: a recipe, and KEY=VALUE over it. `reward.py` scores the
answers.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hapo.tasks import TaskConfig, load_task


def rows_of(data: Any, source: str) -> list[dict[str, Any]]:
    """Rows with the columns that verl reads; a prompt that is text becomes one message."""
    return [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": row["prompt"]}]
            if isinstance(row["prompt"], str)
            else row["prompt"],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": index, "question": row["question"]},
        }
        for index, row in enumerate(data)
    ]


def options_of(recipe: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Options of the task: those of the recipe, and KEY=VALUE over them."""
    names = {field.name for field in fields(TaskConfig)}
    told = {} if recipe is None else yaml.safe_load(recipe.read_text())
    options = {name: value for name, value in told.items() if name in names}
    for override in overrides:
        name, _, value = override.partition("=")
        if name not in names:
            raise SystemExit(f"{name!r} is no option of a task: choose from {', '.join(sorted(names))}")
        options[name] = yaml.safe_load(value)
    return options


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--recipe", type=Path, help="a recipe of hapo train, for the options of its task")
    parser.add_argument("--seed", type=int, default=0, help="chooses the training problems of a generated task")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the task")
    given = parser.parse_intermixed_args()
    config = TaskConfig(**options_of(given.recipe, given.options))
    if config.rewards != ["auto"] or config.dataset.startswith("reasoning_gym:"):
        raise SystemExit(
            "reward.py knows addition and math-verify: for other rewards write a function with its signature, and "
            "name it in reward.custom_reward_function.path"
        )
    task = load_task(config, seed=given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("train", task.train), ("val", task.eval)):
        file = given.folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows_of(data, task.name)), file)
        print(f"{len(data)} problems in {file}")


if __name__ == "__main__":
    main()
