"""The stage graph without processes: keys, reasons, order, retries, time limits, stopping."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.own_files import parse_own
from pipelines.chain.execute import (
    ENDED_WELL,
    Capacity,
    Failure,
    KeyParts,
    Node,
    Running,
    StageRun,
    State,
    differences,
    execute,
    in_order,
)
from pipelines.outcome import ConfigError, StageResult

PARTS = KeyParts(
    kind="pretrain",
    version=1,
    code={"mae_core.masking": "aa"},
    config={"optim.base_lr": 1e-3, "init_from": "{0123456789abcdef}"},
    inputs={"data.train": "f0"},
    needs={"prepare": "0123456789abcdef"},
)
FAILS = Failure("broke", 4, can_pass=False)
PASSES = Failure("store is down", 5, can_pass=True)


class Clock:
    """A clock on which time passes only during sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.5)


class Try:
    """Ends in the given way after `seconds`."""

    def __init__(self, clock: Clock, end: StageResult | Failure, seconds: float = 1.0) -> None:
        self._clock, self._end, self._at_s = clock, end, clock() + seconds
        self.calls: list[str] = []

    def poll(self) -> StageResult | Failure | None:
        return self._end if self._clock() >= self._at_s else None

    def ask_to_stop(self) -> None:
        self.calls.append("ask")

    def wait_until_stopped(self) -> None:
        self.calls.append("wait")


def result(name: str, status: Any = "done") -> StageResult:
    return StageResult(name, status, None, f"/out/{name}", {})


def run(nodes: list[Node], ends: Mapping[str, list[Failure]], **kwargs: Any) -> dict[str, StageRun]:
    """Execute with `ends` as the failures of each stage's first attempts."""
    clock = Clock()
    left = {name: list(failures) for name, failures in ends.items()}

    def start(node: Node, _results: Mapping[str, StageResult]) -> Running:
        failures = left.get(node.name, [])
        return Try(clock, failures.pop(0) if failures else result(node.name))

    settings = {"capacity": Capacity(2), **kwargs}
    return execute(nodes, start, clock=clock, sleep=clock.sleep, **settings)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": 2}, "version 1 -> 2"),
        (
            {"config": {**PARTS.config, "optim.base_lr": 2e-3}},
            "config optim.base_lr 0.001 -> 0.002",
        ),
        ({"config": {**PARTS.config, "new": [1]}}, "config new nothing -> [1]"),
        ({"inputs": {"data.train": "f1"}}, "data data.train changed"),
        ({"code": {"mae_core.masking": "bb"}}, "code mae_core.masking changed"),
        ({"needs": {"prepare": "ff"}}, "prepare changed"),
    ],
)
def test_each_part_changes_the_key_and_is_named(change: dict[str, Any], line: str) -> None:
    changed = replace(PARTS, **change)
    assert changed.key != PARTS.key
    assert differences(PARTS, changed) == [line]


def test_a_key_does_not_depend_on_order_or_on_the_names_of_stages_before() -> None:
    same = replace(
        PARTS,
        config=dict(reversed(PARTS.config.items())),
        needs={"other-name": "0123456789abcdef"},
    )
    assert same.key == PARTS.key
    assert differences(PARTS, same) == []


def test_a_key_stays_what_it_is() -> None:
    """Test this because another hash would invalidate all existing results."""
    assert PARTS.key == "5289f00c605779bf"


def test_only_the_stage_that_changed_is_named_and_not_the_values_it_is_in() -> None:
    changed = replace(
        PARTS,
        config={**PARTS.config, "init_from": "{fedcba9876543210}"},
        needs={"prepare": "fedcba9876543210"},
    )
    assert differences(PARTS, changed) == ["prepare changed"]


def test_parts_survive_their_json() -> None:
    again = parse_own(PARTS.to_json().encode(), "key.json", KeyParts, "")
    assert again == PARTS
    assert again.key == PARTS.key
    assert json.loads(PARTS.to_json())["inputs"] == {"data.train": "f0"}


def test_stages_come_after_those_they_need() -> None:
    nodes = [Node("c", ("b",)), Node("b", ("a",)), Node("a"), Node("d")]
    assert [node.name for node in in_order(nodes)] == ["a", "d", "b", "c"]


def test_a_circle_and_a_missing_stage_are_named() -> None:
    with pytest.raises(ConfigError, match=r"circle: .*a.*b"):
        in_order([Node("a", ("b",)), Node("b", ("a",))])
    with pytest.raises(ConfigError, match=r"stages\.a: needs 'x'; the stages are a"):
        in_order([Node("a", ("x",))])


def test_a_failed_stage_blocks_those_after_it_and_no_others() -> None:
    nodes = [Node("a"), Node("b", ("a",)), Node("c", ("b",)), Node("d", ("a",))]
    runs = run(nodes, {"b": [FAILS]})
    states = {name: x.state for name, x in runs.items()}
    assert states == {
        "a": State.DONE,
        "b": State.FAILED,
        "c": State.BLOCKED,
        "d": State.DONE,
    }
    assert runs["c"].failure is not None
    assert runs["c"].failure.message == "needs b"


def test_what_may_pass_is_tried_again_so_often_and_what_may_not_never() -> None:
    node = Node("a", retries=2)
    assert run([node], {"a": [PASSES, PASSES]})["a"].state is State.DONE
    lost = run([node], {"a": [PASSES] * 3})["a"]
    assert (lost.state, lost.tries) == (State.FAILED, 3)
    wrong = run([node], {"a": [FAILS]})["a"]
    assert (wrong.state, wrong.tries) == (State.FAILED, 1)


def test_pauses_between_tries_double_and_end_at_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.chain.execute.random.uniform", lambda _low, high: high)
    clock = Clock()
    started: list[float] = []

    def start(node: Node, _results: Mapping[str, StageResult]) -> Running:
        started.append(clock())
        return Try(clock, PASSES if len(started) < 8 else result(node.name), seconds=0.0)

    execute([Node("a", retries=10)], start, capacity=Capacity(1), clock=clock, sleep=clock.sleep)
    pauses = [round(b - a) for a, b in pairwise(started)]
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


def test_as_many_run_at_a_time_as_there_is_room_for() -> None:
    clock = Clock()
    running: Counter[str] = Counter()
    most = 0.0

    def notify(stage: StageRun) -> None:
        nonlocal most
        running[stage.node.name] = stage.state is State.RUNNING
        most = max(most, sum(running.values()))

    def start(node: Node, _results: Mapping[str, StageResult]) -> Running:
        return Try(clock, result(node.name), seconds=5.0)

    nodes = [Node(name, cpus=2) for name in "abcde"]
    kwargs: Any = {"notify": notify, "clock": clock, "sleep": clock.sleep}
    execute(nodes, start, capacity=Capacity(4), **kwargs)
    assert most == 2
    most = 0
    # A stage that asks for more than there is runs alone, but does not wait for ever.
    runs = execute([Node("a", cpus=9), Node("b")], start, capacity=Capacity(4), **kwargs)
    assert most == 1
    assert all(x.state is State.DONE for x in runs.values())
    most = 0
    execute([Node(n, gpus=1) for n in "ab"], start, capacity=Capacity(8, 1), **kwargs)
    assert most == 1


def test_a_try_that_takes_too_long_is_stopped_and_not_tried_again() -> None:
    clock = Clock()
    tries: list[Try] = []

    def start(node: Node, _results: Mapping[str, StageResult]) -> Running:
        tries.append(Try(clock, result(node.name), seconds=1e6))
        return tries[-1]

    nodes = [Node("a", timeout_s=10)]
    runs = execute(nodes, start, capacity=Capacity(1), clock=clock, sleep=clock.sleep)
    assert runs["a"].state is State.FAILED
    assert runs["a"].failure is not None
    assert "timeout_s=10" in runs["a"].failure.message
    assert [x.calls for x in tries] == [["ask", "wait"]]
    assert 10 <= clock() < 20


def test_when_interrupted_all_are_asked_before_one_is_waited_for() -> None:
    clock = Clock()
    calls: list[str] = []

    class Slow(Try):
        def ask_to_stop(self) -> None:
            calls.append("ask")

        def wait_until_stopped(self) -> None:
            calls.append("wait")

    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt

    states: list[State] = []
    with pytest.raises(KeyboardInterrupt):
        execute(
            [Node("a"), Node("b"), Node("c", ("a",))],
            lambda node, _: Slow(clock, result(node.name), 100),
            capacity=Capacity(2),
            notify=lambda stage: states.append(stage.state),
            clock=clock,
            sleep=sleep,
        )
    assert calls == ["ask", "ask", "wait", "wait"]
    assert states[-2:] == [State.CANCELLED, State.CANCELLED]


def test_a_stage_that_is_cancelled_is_not_said_to_have_failed_as_its_attempt_before() -> None:
    clock = Clock()
    tries = [
        Try(clock, Failure("the store is down", 5, can_pass=True), 1),
        Try(clock, result("a"), 100),
    ]

    def sleep(seconds: float) -> None:
        if not tries:
            raise KeyboardInterrupt
        clock.sleep(seconds)

    seen: list[tuple[State, str | None]] = []
    with pytest.raises(KeyboardInterrupt):
        execute(
            [Node("a", retries=1)],
            lambda *_: tries.pop(0),
            capacity=Capacity(1),
            notify=lambda x: seen.append((x.state, x.failure and x.failure.message)),
            clock=clock,
            sleep=sleep,
        )
    assert seen == [
        (State.RUNNING, None),
        (State.WAITING, "the store is down"),
        (State.RUNNING, None),
        (State.CANCELLED, None),
    ]


def test_a_stage_is_told_the_results_of_those_it_needs() -> None:
    told: dict[str, Mapping[str, StageResult]] = {}

    def start(node: Node, results: Mapping[str, StageResult]) -> StageResult:
        told[node.name] = results
        return result(node.name, "reused")

    nodes = [Node("a"), Node("b"), Node("c", ("a", "b"))]
    runs = execute(nodes, start, capacity=Capacity(1))
    assert {name: x.output for name, x in told["c"].items()} == {"a": "/out/a", "b": "/out/b"}
    assert told["a"] == {}
    assert {x.state for x in runs.values()} == {State.REUSED}


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Draw up to eight shuffled stages, each of which needs some of the earlier ones."""
    count = draw(st.integers(1, 8))
    nodes = []
    for i in range(count):
        needs = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        cpus = draw(st.sampled_from([0.5, 1.0, 2.0, 5.0]))
        nodes.append(Node(f"s{i}", tuple(f"s{n}" for n in sorted(needs)), cpus=cpus))
    return draw(st.permutations(nodes))


@settings(max_examples=200)
@given(graphs(), st.data())
def test_over_reruns_every_stage_succeeds_once_and_in_order(
    nodes: list[Node], data: st.DataObject
) -> None:
    """Run random graphs with failing stages until all are done: nothing is made twice."""
    names = [node.name for node in nodes]
    failing = data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, 3), max_size=3))
    made: list[str] = []
    clock = Clock()

    def start(node: Node, results: Mapping[str, StageResult]) -> Running | StageResult:
        assert set(results) == set(node.needs)
        assert set(node.needs) <= set(made)
        if node.name in made:
            return result(node.name, "reused")
        if failing.get(node.name, 0):
            failing[node.name] -= 1
            return Try(clock, data.draw(st.sampled_from([FAILS, PASSES])))
        made.append(node.name)
        return Try(clock, result(node.name))

    for _ in range(20):
        runs = execute(in_order(nodes), start, capacity=Capacity(2), clock=clock, sleep=clock.sleep)
        if all(x.state in ENDED_WELL for x in runs.values()):
            break
    else:
        pytest.fail("never got done")
    assert sorted(made) == sorted(names)
