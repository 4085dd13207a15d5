"""The file of schedules, and the errors for mistakes in it."""

from pathlib import Path

import pytest

from pipelines.outcome import ConfigError
from pipelines.schedule.config import find_schedule, load_schedules

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.yaml").write_text("name: demo\n")
    monkeypatch.chdir(tmp_path)


def mistakes(text: str) -> str:
    Path("s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_schedules(Path("s.yaml"))
    return str(caught.value)


def one(*lines: str) -> str:
    entry = ["name: nightly", "chain: demo.yaml", *lines]
    return "schedules:\n  # one\n  - " + "\n    ".join(entry) + "\n"


def test_the_file_that_comes_with_the_project_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    schedules = load_schedules(Path("configs/schedules.yaml"))
    assert [schedule.name for schedule in schedules] == ["nightly", "new-images"]
    assert not any(schedule.enabled for schedule in schedules)


def test_defaults() -> None:
    Path("s.yaml").write_text(one('cron: "0 6 * * *"'))
    (schedule,) = load_schedules(Path("s.yaml"))
    assert (schedule.overlap, schedule.catch_up) == ("skip", "latest")
    assert (schedule.time_zone, schedule.jitter_s, schedule.enabled) == ("UTC", 0, True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['cron: "61 2 * * *"'], "cron: Bad minute; write minute hour day month weekday, such as"),
        (['cron: "0 0 30 2 *"'], "cron: Bad day-of-month; write"),
        (['cron: "30 2 * *"'], "cron: has 4 fields, not 5: minute hour day month weekday"),
        (['cron: "0 30 2 * * *"'], "cron: has 6 fields, not 5"),
        (
            ['cron: "0 6 * * *"', "time_zone: Europe/Berln"],
            "time_zone: no such time zone; did you mean Europe/Berlin?, not 'Europe/Berln'",
        ),
        (['cron: "0 6 * * *"', "overlaps: skip"], "overlaps: no such key; did you mean overlap?"),
        (['cron: "0 6 * * *"', "overlap: kill"], "overlap: Input should be 'skip', 'queue' or"),
        (["new_data: {path: in, settle: 3}"], "settle: no such key; did you mean settle_s?"),
        (["new_data: {path: gs://in}"], "only local paths and s3:// are supported"),
        ([], "give one of cron (minute hour day month weekday"),
        (['cron: "0 6 * * *"', "new_data: {path: in}"], "give one of cron (minute hour"),
        (["new_data: {path: in}", 'words: ["a={tick_date}"]'], "words: {tick} is a time"),
        (["new_data: {path: in}", "jitter_s: 5"], "jitter_s: needs cron"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_a_fix(lines: list[str], message: str) -> None:
    told = mistakes(one(*lines))
    assert told.startswith("s.yaml:3 schedule nightly: ")
    assert message in told


def test_a_missing_chain_is_told_with_the_nearest() -> None:
    told = mistakes(one('cron: "0 6 * * *"').replace("demo.yaml", "demos.yaml"))
    assert told == (
        "s.yaml:3 schedule nightly: chain: no such file demos.yaml; did you mean demo.yaml?"
    )


def test_all_mistakes_are_told_at_once() -> None:
    text = one('cron: "0 6 * * *"') + "  - {name: nightly, chain: demo.yaml, cron: x}\n"
    text += '  - {name: nightly, chain: demo.yaml, cron: "* * * * *"}\n  - 5\n'
    assert mistakes(text).splitlines() == [
        "s.yaml:6 schedule nightly: cron: has 1 fields, not 5: minute hour day month weekday, "
        "such as '30 2 * * *' or '*/15 8-18 * * MON-FRI', not 'x'",
        "s.yaml:8 schedule ?: Input should be a valid dictionary or instance of Schedule, not 5",
        "s.yaml: two schedules have the name nightly; rename one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs exactly one key, `schedules:`"),
        ("schedule: []\n", "needs exactly one key, `schedules:`"),
        ("schedules: {nightly: 1}\n", "is not a list; begin each with `- name: ...`"),
        ("schedules: [\n", "s.yaml:2 while parsing"),
    ],
)
def test_a_file_of_another_form_is_told(text: str, message: str) -> None:
    assert message in mistakes(text)


def test_no_file_is_told_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: no such file; write one like configs/sch"):
        load_schedules(Path("no.yaml"))


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    Path("s.yaml").write_text(one('cron: "0 6 * * *"'))
    schedules = load_schedules(Path("s.yaml"))
    assert find_schedule(schedules, "nightly") is schedules[0]
    with pytest.raises(ConfigError, match=r"no schedule 'nigthly'; did you mean nightly\?"):
        find_schedule(schedules, "nigthly")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            one('cron: "0 6 * * *"', "overlap: skip", "overlap: queue"),
            "s.yaml:7 overlap: is in line 6 already",
        ),
        ("schedules: []\nschedules: []\n", "s.yaml:2 schedules: is in line 1 already"),
        ("schedules: &s [*s]\n", "s.yaml:1 has an alias of itself within"),
        (one("cron: 0 6 * * * #daily"), "s.yaml:5 '0 6 * * *' is followed by '#daily'"),
    ],
)
def test_a_file_is_read_strictly(text: str, told: str) -> None:
    assert told in mistakes(text)


def test_names_and_words_are_text_whatever_yaml_takes_them_for() -> None:
    Path("s.yaml").write_text(
        one("cron: 0 6 * * *", "words: [a=1, 2024, on]").replace("nightly", "on")
    )
    (schedule,) = load_schedules(Path("s.yaml"))
    assert (schedule.name, schedule.words) == ("on", ("a=1", "2024", "on"))


def test_no_name_is_proposed_that_is_not_near() -> None:
    Path("s.yaml").write_text(one('cron: "0 6 * * *"'))
    with pytest.raises(ConfigError) as caught:
        find_schedule(load_schedules(Path("s.yaml")), "training")
    assert str(caught.value) == "there is no schedule 'training'; there are nightly"
