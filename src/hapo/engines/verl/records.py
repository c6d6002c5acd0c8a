"""Run records of verl's trainer: its configuration and metrics under the names that every engine uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ...outputs import write_whole
from ..estimate import Estimate
from ..records import RunRecords, append_line, check_writable, manifest
from .config import NAME, Settings, select

NAMES = {
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/entropy": "entropy",
    "critic/score/mean": "reward",
    "response_length/mean": "completions/mean_length",
    "response_length/max": "completions/max_length",
    "response_length/min": "completions/min_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "timing_s/gen": "time/generate",
    "timing_s/reward": "time/reward",
    "timing_s/old_log_prob": "time/score",
    "timing_s/update_actor": "time/update",
}
"""verl's metric -> its name in the records of every engine; the others keep theirs."""


class Records:
    """Feeds the folder of a run, `trainer.default_local_dir`."""

    def __init__(self, folder: Path, settings: Settings, config: dict[str, Any]) -> None:
        self.folder, self.settings, self.config = folder, settings, config
        self._records: RunRecords | None = None
        self.tokens = 0
        """Of prompts and responses, so far."""
        self.seconds = 0.0
        """Of training, without validation."""
        self._measured: set[int] = set()

    @classmethod
    def open(
        cls, config: Mapping[str, Any], settings: Settings, recipe: dict[str, Any], checkpoint: Path | None
    ) -> Records | None:
        """Check the folder, before any work; None where no records are wanted.

        Raises:
            FileExistsError: it holds another run than the one that is resumed.
            OSError: it cannot be written to.
        """
        if not settings.run_records:
            return None
        folder = Path(select(config, "trainer.default_local_dir")).resolve()
        if (folder / "manifest.json").exists() and (checkpoint is None or checkpoint.parent != folder):
            raise FileExistsError(
                f"the run folder {folder} holds another run, and none of its checkpoints is resumed: choose "
                "another trainer.default_local_dir, or remove it"
            )
        check_writable(folder)
        return cls(folder, settings, recipe)

    def begin(self, step: int) -> None:
        """Open the records after optimiser step `step`; those of later steps are taken back."""
        if (self.folder / "manifest.json").exists():
            self._records = RunRecords.resume(self.folder, step)
            self._measured = {line["step"] for line in self._lines("evaluations.jsonl")}
            return
        verl = self.config["verl"]
        nodes = [select(verl, f"trainer.{name}", 1) for name in ("nnodes", "n_gpus_per_node")]
        self._records = RunRecords.create(
            self.folder,
            config=self.config,
            manifest=manifest(
                seed=select(verl, "actor_rollout_ref.rollout.seed"),
                command=["python", "-m", "verl.trainer.main_ppo"],  # config.yaml has the whole configuration
                model=str(self.config.get("model_name_or_path")),
                processes=nodes[0] * nodes[1],
                **({"resumed_at": step} if step else {}),
            ),
        )

    def tokens_of(self, global_step: int) -> str | None:
        """The folder, if this rollout batch is one whose tokens are recorded."""
        every = self.settings.record_tokens_every
        return str(self.folder) if every and (global_step == 1 or global_step % every == 0) else None

    def add_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line a rollout batch, at its last optimiser step."""
        assert self._records is not None
        scalars = {k: float(v) for k, v in metrics.items() if isinstance(v, Real)}
        line = {NAMES.get(k, k.removeprefix(f"{NAME}/")): v for k, v in scalars.items()}
        self._records.add_metrics({"step": step, **line, "num_tokens": self.tokens, "seconds": self.seconds})

    def add_evaluation(self, step: int, uids: Sequence[str], infos: Mapping[str, Sequence[Any]]) -> None:
        """One line a validation: accuracy where the reward function returns `acc`, else its reward."""
        if step in self._measured:  # verl validates again before it goes on with a run
            return
        self._measured.add(step)
        by_problem: dict[str, list[float]] = {}
        correct = infos.get("acc") or [None]
        chosen = infos["reward"] if None in correct else correct  # not every data source may have a verdict
        for uid, score in zip(uids, chosen, strict=True):
            by_problem.setdefault(uid, []).append(float(score))
        scores = list(by_problem.values())
        greedy = not select(self.config["verl"], "actor_rollout_ref.rollout.val_kwargs.temperature")
        line = {
            "step": step,
            "num_tokens": self.tokens,
            "seconds": self.seconds,
            "how": "greedy" if greedy else "sampled",
            **Estimate.from_scores(scores).to_dict(),
            "scores": [sum(of) / len(of) for of in scores],
        }
        append_line(self.folder / "evaluations.jsonl", line)

    def finish(self, step: int, why: str) -> None:
        """Write finished.json: the run is complete."""
        end = {"steps": step, "num_tokens": self.tokens, "seconds": self.seconds, "why": why}
        write_whole(self.folder / "finished.json", json.dumps(end, indent=2) + "\n")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
