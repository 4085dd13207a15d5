"""Every field of every stage's config: part of the result, of its measurement, or neither."""

from collections import Counter
from typing import Any

import pytest

from pipelines.chain.kinds import KINDS
from pipelines.config.fields import describe
from pipelines.config.roles import Role, identity_digest, roles

FIELDS = [(kind, key) for kind, stage in KINDS.items() for key, *_ in describe(stage.config_type)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_has_one_role_and_each_role_a_field(kind: str) -> None:
    listed = Counter(key for key, _ in roles(kind))
    fields = {key for other, key in FIELDS if other == kind}
    assert fields - set(listed) == set(), "say in pipelines/config/roles.py what these change"
    assert set(listed) - fields == set(), "these are no fields any more"
    assert [key for key, count in listed.items() if count > 1] == []


def nested(kind: str, changed: str = "") -> dict[str, Any]:
    """Build a config as nested dicts in which each field is 1, and one of them 2."""
    config: dict[str, Any] = {}
    for other, key in FIELDS:
        if other == kind:
            *sections, name = key.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = 2 if key == changed else 1
    return config


@pytest.mark.parametrize(("kind", "key"), FIELDS)
def test_another_value_is_another_run_only_of_a_field_of_the_result(kind: str, key: str) -> None:
    is_same = identity_digest(kind, nested(kind, key)) == identity_digest(kind, nested(kind))
    assert is_same == (dict(roles(kind))[key] is not Role.IDENTITY)


@pytest.mark.parametrize(("kind", "key"), FIELDS)
def test_a_pipeline_counts_all_that_changes_a_result_or_its_measure(kind: str, key: str) -> None:
    counts = key not in KINDS[kind].unkeyed
    assert counts == (dict(roles(kind))[key] is not Role.NO_EFFECT)


def test_a_field_that_is_not_listed_counts() -> None:
    assert identity_digest("embed", {"new": 1}) != identity_digest("embed", {"new": 2})


def test_runs_from_before_a_field_keep_their_name_at_its_default() -> None:
    old = {"segment": {"head": "fpn"}}
    new = {"segment": {"head": "fpn", "values": None, "ignore_value": 255}}
    assert identity_digest("segment", new) == identity_digest("segment", old)
    new["segment"]["values"] = [0, 255]
    assert identity_digest("segment", new) != identity_digest("segment", old)


def test_only_pretraining_measures_what_it_trained_apart() -> None:
    measured = {
        (kind, key) for kind in KINDS for key, role in roles(kind) if role is Role.EVALUATION
    }
    assert measured == {
        ("pretrain", "data.val"),
        ("pretrain", "health.every_epochs"),
        ("pretrain", "health.max_images"),
        ("pretrain", "knn.k"),
        ("pretrain", "knn.max_train"),
        ("pretrain", "knn.max_val"),
        ("pretrain", "knn.max_linear"),
    }
