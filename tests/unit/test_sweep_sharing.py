"""Is what several trials need made once, without trials that wait for each other in a circle?"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from itertools import takewhile

import pytest

from dpa_ray.recipe import load
from dpa_ray.stages.spec import ArtifactRef, Task
from dpa_ray.sweep import sharing
from dpa_ray.sweep.sharing import Claims, chain, choose, claim


def task(key: str) -> Task:
    return Task(ArtifactRef("instruct", key), {}, load("tiny"), "runs/x")


def test_the_leading_paths_that_nobody_has_are_claimed() -> None:
    claims = Claims()
    assert claims.take("a", ["1", "2"]) == 2
    assert claims.take("b", ["0", "2", "3"]) == 1, "2 is a's; 3 comes after it"
    assert claims.take("c", ["1"]) == 0
    claims.release("a")
    assert claims.take("c", ["1", "2"]) == 2


def test_a_claim_takes_the_place_of_the_trials_earlier_one() -> None:
    claims = Claims()
    claims.take("a", ["1"])
    assert claims.take("a", ["2"]) == 1
    assert claims.take("b", ["1"]) == 1


@pytest.mark.parametrize("left", [0, 1])
def test_what_was_finished_between_the_look_and_the_claim_is_not_made_again(left: int) -> None:
    """And where nothing is left, the claims go back."""
    claims, looks = Claims(), iter([2, left])
    tasks = [task("a"), task("b")]
    assert claim(tasks, lambda _: next(looks), take=lambda paths: claims.take("x", paths)) == left
    assert claims.take("y", [task.result.path for task in tasks]) == (0 if left else 2)


def test_trials_that_need_each_others_work_make_each_once_and_all_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve trials at once, whose lists of shared artifacts overlap in any order: the harshest case of a circle. Making
    takes a moment, and so does a claim: others finish meanwhile."""
    monkeypatch.setattr(sharing, "POLL_S", 0.001)
    claims, lock = Claims(), threading.Lock()
    made: list[str] = []
    rng, delays = random.Random(0), random.Random(1)
    tasks = {name: task(name) for name in "abcdefgh"}

    def take(trial: str, paths: list[str]) -> int:
        time.sleep(delays.random() * 0.01)
        with lock:
            return claims.take(trial, paths)

    def num_left(left: Sequence[Task]) -> int:
        return len(list(takewhile(lambda task: task.result.key not in made, left)))

    def run(trial: str, order: list[str]) -> None:
        left = [tasks[name] for name in order]
        while left:
            mine = claim(left, num_left, take=lambda paths: take(trial, paths))
            time.sleep(delays.random() * 0.005 * mine)
            made.extend(task.result.key for task in left[:mine])
            left = left[max(1, mine) :]
        with lock:
            claims.release(trial)

    orders = [rng.sample("abcdefgh", 5) for _ in range(12)]
    threads = [threading.Thread(target=run, args=(str(n), order), daemon=True) for n, order in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a circle"
    assert sorted(made) == sorted({name for order in orders for name in order}), "each once"


def chain_of(*overrides: str) -> tuple[str, ...]:
    return chain(load("tiny", overrides))


def test_chains_meet_where_the_recipes_share_stages() -> None:
    """As the content keys do: tests/unit/test_keys.py."""
    base = chain_of("cmo.upper=0.5")
    assert len(base) == 4, "proxy, q, connector, model"
    assert [a == b for a, b in zip(base, chain_of("cmo.upper=0.6"), strict=True)] == [True, True, False, False]
    assert [a == b for a, b in zip(base, chain_of("stages.instruct.lr=1"), strict=True)] == [True, True, True, False]
    assert [a == b for a, b in zip(base, chain_of("stages.proxy_llm.lora.rank=3"), strict=True)] == [False] * 4
    assert [a == b for a, b in zip(base, chain_of("cluster.workers=3"), strict=True)] == [True] * 4
    assert len(chain_of("method=vanilla")) == 2
    assert chain_of("method=pmo")[0] == base[0]
    assert not set(chain_of("data.pretrain.options.seed=5")) & set(base)


def test_the_trial_is_started_that_waits_for_no_other() -> None:
    """2 proxies x 2 bounds, two at once: the second to start has another proxy."""
    waiting = [chain_of(f"stages.proxy_llm.lora.rank={r}", f"cmo.upper={u}") for r in (4, 8) for u in (0.5, 0.6)]
    assert choose(waiting, [], ()) == 0
    assert choose(waiting[1:], waiting[:1], ()) == 1, "rank 8: its own proxy"
    assert choose(waiting[1:2], waiting[:1], ()) is None, "rank 4 would wait for the proxy that is being made"
    assert choose(waiting[1:2], waiting[:1], waiting[0][:2]) == 0, "and need not once proxy and q are there"


def test_what_is_shared_later_does_not_keep_a_trial_from_starting() -> None:
    """A frozen stage 3 has one cache of q for all ranks, made after stage 2: each may begin with its own proxy."""
    frozen = ("stages.instruct.llm=frozen",)
    waiting = [chain_of(f"stages.proxy_llm.lora.rank={rank}", *frozen) for rank in (4, 8)]
    assert len(set(waiting[0]) & set(waiting[1])) == 1
    assert choose(waiting[1:], waiting[:1], ()) == 0
