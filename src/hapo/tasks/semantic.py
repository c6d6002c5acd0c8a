"""Semantic entropy: how much the answers to one prompt differ in what they say (arXiv 2512.04359, 2302.09664).

Pure functions. Everything is in nats and in log space, for the probability of a long answer is no number that a
float can hold. None of them depends on the order of the answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

Weight = Literal["likelihood", "count"]
"""What a cluster weighs: the probabilities of its answers added up, or their number."""


def answer_clusters(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """The cluster of each answer, numbered from 0 in the order in which they first occur.

    Whatever `same` is, what comes out is an equivalence: two answers are in one cluster if they are the same text,
    or if a chain of answers leads from one to the other, each link found the same in one direction or the other
    (connected components of the symmetric closure). `same` must depend on its two arguments alone; then the
    clusters do not depend on the order of the answers. It is asked of distinct texts only, in alphabetical order,
    and not where a chain is known already.

    Args:
        answers: what the samples answered, in canonical form; None for no answer, which is a cluster of its own.
        same: whether the second answer would be right where the first is.
    """
    texts = sorted({answer for answer in answers if answer is not None})
    root = {text: text for text in texts}

    def find(text: str) -> str:
        while root[text] != text:
            text = root[text]
        return text

    for i, one in enumerate(texts):
        for other in texts[:i]:
            a, b = find(one), find(other)
            if a != b and (same(one, other) or same(other, one)):
                root[a] = b
    numbers: dict[str | int, int] = {}
    keys = [place if answer is None else find(answer) for place, answer in enumerate(answers)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def semantic_entropy(logps: Sequence[float], clusters: Sequence[int], by: Weight = "likelihood") -> float:
    """-sum_k p_k log p_k, nats, of the clusters of one prompt's answers; in [0, ln K], exactly 0 for one cluster.

    p_k = sum_{m in k} exp(l_m) / sum_m exp(l_m), l_m the log-probability of a whole answer, not divided by its
    length; or the share of the answers that are in k. Equal answers count as often as they were drawn.

    Args:
        logps: l_m of each sample, nats. -inf is probability 0.
        clusters: of each sample, any numbers.
        by: which of the two.

    Raises:
        ValueError: no sample, lengths that differ, or log-probabilities that are NaN, inf, or all -inf.
    """
    if by not in ("likelihood", "count"):
        raise ValueError(f"by must be 'likelihood' or 'count', got {by!r}")
    if not clusters or len(logps) != len(clusters):
        raise ValueError(f"{len(logps)} log-probabilities and {len(clusters)} clusters: give one each to a sample")
    scores = [0.0] * len(logps) if by == "count" else [float(logp) for logp in logps]
    top = max(scores)
    if any(math.isnan(score) for score in scores) or math.isinf(top):
        raise ValueError(f"log-probabilities must be numbers, and not all -inf, got {list(logps)!r:.200}")
    members: dict[int, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        members.setdefault(cluster, []).append(score - top)
    if len(members) == 1:
        return 0.0
    # fsum is exact up to its last rounding, so that neither sum knows the order of the samples
    masses = [math.fsum(math.exp(score) for score in cluster) for cluster in members.values()]
    total = math.fsum(masses)
    entropy = -math.fsum(mass / total * math.log(mass / total) for mass in masses if mass > 0)
    return min(max(entropy, 0.0), math.log(len(members)))


def stages(entropies: Sequence[float], count: int) -> list[list[int]]:
    """Places of the prompts in so many stages: ascending entropy, equal ones in their order, all stages as long.

    Of n prompts the first n mod count stages have one more.

    Raises:
        ValueError: there are fewer prompts than stages, no stage, or an entropy that is NaN.
    """
    if not 1 <= count <= len(entropies):
        raise ValueError(
            f"{len(entropies)} prompts cannot make {count} stages: ask for 1 to as many as the prompts"
        )
    if any(math.isnan(entropy) for entropy in entropies):
        raise ValueError("an entropy is NaN")
    order = sorted(range(len(entropies)), key=lambda place: entropies[place])
    least, more = divmod(len(order), count)
    cuts = [stage * least + min(stage, more) for stage in range(count + 1)]
    return [order[start:end] for start, end in itertools.pairwise(cuts)]
