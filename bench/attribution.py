"""Attribution on the addition task: explainers at equal cost, the cost of a completion, and if blame is right.

    python -m bench.attribution --output bench/results/attribution.json [--page attribution.html]

The score is the bundled reward model. Explainers are measured on answers to held-out problems, against Shapley
values of 2^12 masks (two halves say how far these are themselves to be trusted); those of shap 0.51 take part
where it is installed, which brings 260 MiB of other packages. Blame is the token with the lowest attribution, and
the truth is the digit that differs from the right answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import binomtest

from hapo.assets import reward_model_path, tiny_model_path
from hapo.insight.attributions import AttributedAnswer, write_attributions
from hapo.tasks.addition import MAX_COMPLETION, draw_problems, parts_right, prompt, solution, wrong_places
from hapo.tasks.attribution import Attribution
from hapo.tasks.explainers import Explainer, captum_shapley, shapley_values
from hapo.tasks.reward_model import RewardModel

from .paired import machine

BUDGETS = (128, 256, 512)
TRUTH = 2**12
WEIGHTS = {"shap": 0.5, "lime": 0.3, "sparse": 0.2}

Problem = tuple[int, int, str]


def captum_plain(f: Any, players: int, samples: int, seed: int) -> Any:
    """captum's ShapleyValueSampling as it comes: each permutation by itself."""
    from captum.attr import ShapleyValueSampling

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        explainer = ShapleyValueSampling(lambda masks: torch.tensor(f(masks.bool().numpy())))
        count = max(1, (samples - 2) // (players - 1))
        found = explainer.attribute(
            torch.ones(1, players), torch.zeros(1, players), n_samples=count, perturbations_per_eval=players
        )
    return found[0].double().numpy()


def shap_explainers() -> dict[str, Explainer]:
    """Those of shap, on masks; nothing where it is not installed."""
    try:
        import shap
    except ImportError:
        return {}
    logging.getLogger("shap").setLevel(logging.ERROR)

    def on(f: Any) -> Any:
        return lambda z: f(np.atleast_2d(z) > 0.5)

    def permutations(f: Any, players: int, samples: int, seed: int) -> Any:
        masker = shap.maskers.Independent(np.zeros((1, players)))
        explainer = shap.PermutationExplainer(on(f), masker, seed=seed)
        turns = max(1, samples // (2 * players + 1))
        return explainer(np.ones((1, players)), max_evals=turns * (2 * players + 1), silent=True).values[0]

    def partition(f: Any, players: int, samples: int, seed: int) -> Any:
        """Owen values along a balanced tree of neighbours, as shap's text explainer takes them."""
        tree: list[list[float]] = []

        def join(low: int, high: int) -> tuple[int, int]:
            if high - low == 1:
                return low, 1
            middle = (low + high) // 2
            (a, n), (b, m) = join(low, middle), join(middle, high)
            tree.append([a, b, len(tree) + 1.0, n + m])
            return players + len(tree) - 1, n + m

        join(0, players)
        masker = shap.maskers.Partition(np.zeros((1, players)), clustering=np.array(tree))
        explainer = shap.PartitionExplainer(on(f), masker)
        return explainer(np.ones((1, players)), max_evals=samples, silent=True).values[0]

    def kernel(f: Any, players: int, samples: int, seed: int, **how: Any) -> Any:
        np.random.seed(seed)  # it draws from the generator that all share
        explainer = shap.KernelExplainer(on(f), np.zeros((1, players)), seed=seed)
        return explainer.shap_values(np.ones((1, players)), nsamples=samples, silent=True, **how)[0]

    return {
        "shap PermutationExplainer": permutations,
        "shap PartitionExplainer": partition,
        "shap KernelExplainer, l1_reg=False": lambda *args: kernel(*args, l1_reg=False),
        "shap KernelExplainer": kernel,
    }


def rows_of(model: RewardModel, problems: Sequence[Problem]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of completions with their end."""
    encode, end = model.tokenizer, model.tokenizer.eos_token_id
    questions = [encode(prompt(a, b)).input_ids for a, b, _ in problems]
    return questions, [[*encode(text).input_ids, end] for *_, text in problems]


def one_wrong_digit(count: int, seed: int) -> list[Problem]:
    rng = random.Random(seed)
    found = []
    for a, b in draw_problems(rng, count, evaluation=True):
        text = solution(a, b)
        place = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
        digit = rng.choice([d for d in "0123456789" if d != text[place]])
        found.append((a, b, text[:place] + digit + text[place + 1 :]))
    return found


def sampled_wrong(count: int, seed: int) -> list[Problem]:
    """Wrong answers of the tiny model, as long as the right ones, so that the wrong characters have names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), local_files_only=True).eval()
    problems = draw_problems(random.Random(seed), 6 * count, evaluation=True)
    inputs = tokenizer([prompt(a, b) for a, b in problems], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=MAX_COMPLETION, do_sample=True, top_k=0, top_p=1.0)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    found = [(a, b, text) for (a, b), text in zip(problems, texts, strict=True)]
    return [one for one in found if wrong_places(*one)][:count]


def explainers_at_equal_cost(model: RewardModel, count: int, seeds: int) -> dict[str, Any]:
    """Error of Shapley values by each explainer, relative to their size, at each budget; passes and seconds."""
    prompts, completions = rows_of(model, one_wrong_digit(count, seed=1))
    halves = [
        Attribution(model, ("shap",), samples=TRUTH, seed=seed, progress=False)(prompts, completions)
        for seed in (101, 102)
    ]
    truth = [np.mean([h[i].channels["shap"] for h in halves], 0) for i in range(count)]
    size = np.sqrt(np.mean([np.square(row).mean() for row in truth]))
    apart = [np.subtract(*(half[i].channels["shap"] for half in halves)) for i in range(count)]
    doubt = np.sqrt(np.mean(np.square(np.concatenate(apart)))) / 2
    contenders = {"hapo": shapley_values, "captum, with reversed permutations": captum_shapley}
    contenders |= {"captum": captum_plain, **shap_explainers()}
    table = []
    for samples in BUDGETS:
        for name, explainer in contenders.items():
            squares, passes = [], []
            start = time.process_time()
            for seed in range(seeds):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    how = {"samples": samples, "seed": seed, "explainers": {"shap": explainer}}
                    channels = Attribution(model, ("shap",), **how, progress=False)
                    found = channels(prompts, completions)
                errors = [one.channels["shap"] - t for one, t in zip(found, truth, strict=True)]
                squares += [np.square(error).mean() for error in errors]
                passes += [one.passes for one in found]
            line = {
                "samples": samples,
                "explainer": name,
                "relative error": round(float(np.sqrt(np.mean(squares)) / size), 4),
                "passes per completion": round(float(np.mean(passes)), 1),
                "cpu seconds per completion": round((time.process_time() - start) / seeds / count, 4),
            }
            table.append(line)
            print(line, flush=True)
    return {
        "completions": count,
        "seeds": seeds,
        "doubt of the truth": round(float(doubt / size), 4),
        "table": table,
        "passes at the error of hapo with 256": _at_equal_error(table),
    }


def _at_equal_error(table: list[dict[str, Any]]) -> dict[str, float | None]:
    """Passes that each explainer needs for the error of ours with 256 samples, from a line in log-log, or None."""
    goal = next(x["relative error"] for x in table if x["explainer"] == "hapo" and x["samples"] == 256)
    out: dict[str, float | None] = {}
    for name in dict.fromkeys(line["explainer"] for line in table):
        lines = [line for line in table if line["explainer"] == name]
        errors = np.log([line["relative error"] for line in lines])
        passes = np.log([line["passes per completion"] for line in lines])
        slope, at = np.polyfit(errors, passes, 1)
        reached = min(line["relative error"] for line in lines) <= 1.05 * goal
        out[name] = round(float(np.exp(at + slope * np.log(goal)))) if reached or slope < -1 else None
    return out


def cost(model: RewardModel, count: int) -> dict[str, Any]:
    """Both explainers on groups of eight answers to a prompt: ours, and a call of the model for each mask."""
    problems = sampled_wrong(count, seed=2)
    out: dict[str, Any] = {}
    for name, batch, channels in (
        ("a call per mask, an explainer at a time", 1, (("shap",), ("lime",))),
        ("hapo", 256, (("shap", "lime"),)),
    ):
        calls = [0]

        def counted(rows: list[list[int]], calls: list[int] = calls) -> list[float]:
            calls[0] += 1
            return model(rows)

        start, passes = time.process_time(), 0
        for some in channels:
            attribution = Attribution(
                counted,
                some,
                batch_size=batch,
                mask_id=model.mask_id,
                special_ids=model.special_ids,
                progress=False,
            )
            passes += sum(one.passes for one in attribution(*rows_of(model, problems)))
        out[name] = {
            "passes per completion": round(passes / count, 1),
            "calls per completion": round(calls[0] / count, 2),
            "cpu seconds per completion": round((time.process_time() - start) / count, 4),
        }
        print(name, out[name], flush=True)
    return out


def blame(model: RewardModel, count: int) -> dict[str, Any]:
    """How often the token with the lowest attribution, or with the most attention, is a wrong one."""
    out: dict[str, Any] = {}
    for name, problems in (("one digit changed", one_wrong_digit(count, 3)), ("sampled", sampled_wrong(count, 4))):
        channels = Attribution(model, ("shap", "lime", "attention", "sparse"), progress=False)
        found = channels(*rows_of(model, problems))
        spread = channels.between_seeds(*rows_of(model, problems[:10]), seeds=range(3))
        misjudged = [one.score - parts_right(*p) for one, p in zip(found, problems, strict=True)]
        out[name] = {
            "answers": len(problems),
            "chance": round(float(np.mean([len(wrong_places(*p)) / (len(p[2]) + 1) for p in problems])), 4),
            "largest additivity gap": max(abs(one.gap) for one in found),
            "root mean square error of the score": round(float(np.sqrt(np.mean(np.square(misjudged)))), 4),
            "deviation between seeds": {
                k: round(float(np.mean([one[k] for one in spread])), 5) for k in ("shap", "lime")
            },
        }
        for channel in ("shap", "lime", "attention", "mixture"):
            rows = [one.mixture(WEIGHTS) if channel == "mixture" else one.channels[channel] for one in found]
            pick = np.argmax if channel == "attention" else np.argmin
            hits = sum(int(pick(row)) in wrong_places(*p) for row, p in zip(rows, problems, strict=True))
            interval = binomtest(hits, len(problems)).proportion_ci(0.95, method="wilson")
            out[name][channel] = {
                "right": hits,
                "share": round(hits / len(problems), 4),
                "wilson 95 %": [round(float(interval.low), 4), round(float(interval.high), 4)],
            }
            print(name, channel, out[name][channel], flush=True)
    return out


def page(model: RewardModel, file: Path, prompts: int) -> None:
    """A right and a wrong answer each to some prompts, by each channel and mixed."""
    wrong = one_wrong_digit(prompts, seed=5)
    problems = [pair for a, b, text in wrong for pair in ((a, b, solution(a, b)), (a, b, text))]
    found = Attribution(model, ("shap", "lime", "attention", "sparse"))(*rows_of(model, problems))
    answers = [
        AttributedAnswer(
            prompt=prompt(a, b),
            tokens=[*text, "<eos>"],
            score=one.score,
            right=parts_right(a, b, text) == 1.0,
            channels={**one.channels, "mixture": one.mixture(WEIGHTS)},
        )
        for (a, b, text), one in zip(problems, found, strict=True)
    ]
    write_attributions(answers, file, replace=True)


PARTS: dict[str, Callable[[RewardModel, argparse.Namespace], dict[str, Any]]] = {
    "blame": lambda model, given: blame(model, given.answers),
    "cost": lambda model, given: cost(model, 16),
    "explainers": lambda model, given: explainers_at_equal_cost(model, given.completions, given.seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=4, help="for the explainers at equal cost")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--answers", type=int, default=200, help="for the blame")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to measure anew")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="write a page of pairs of answers here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = RewardModel.load(reward_model_path())
    if given.page:
        page(model, given.page, 3)
    if given.output:
        result = json.loads(given.output.read_text()) if given.output.is_file() else {}
        result |= {"machine": machine(), "model": model.identity}
        for name, part in PARTS.items():
            if name in given.parts:
                result[name] = part(model, given)
                given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
