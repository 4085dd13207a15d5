import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.run_names import name_with_differences


@pytest.mark.parametrize(
    ("params", "first", "name"),
    [
        ({"seed": "1"}, None, "demo"),
        ({"seed": "1"}, {"seed": "1"}, "demo"),
        ({"seed": "1"}, {"seed": "0"}, "demo seed=1"),
        ({"optim.base_lr": "0.01"}, {"optim.base_lr": "0.1"}, "demo base_lr=0.01"),
        ({"new": "1"}, {}, "demo"),  # a field that the first run did not have
        ({"arms": '["knn", "finetune"]'}, {"arms": "[]"}, "demo arms=knn,finetune"),
        ({"train": "s3://data/bccd/train/"}, {"train": "x"}, "demo train=bccd/train"),
        ({"x": "a" * 24}, {"x": ""}, f"demo x={'a' * 24}"),
        ({"x": "a" * 25}, {"x": ""}, f"demo x={'a' * 23}…"),
        (dict.fromkeys("abcde", "1"), dict.fromkeys("abcde", "0"), "demo a=1 b=1 c=1 +2"),
    ],
)
def test_a_name_has_what_differs_from_the_first_run(
    params: dict[str, str], first: dict[str, str] | None, name: str
) -> None:
    assert name_with_differences("demo", params, first) == name


@given(
    params=st.dictionaries(st.text("abc.", min_size=1, max_size=9), st.text(max_size=60)),
    first=st.dictionaries(st.text("abc.", min_size=1, max_size=9), st.text(max_size=60)),
)
def test_a_name_stays_short(params: dict[str, str], first: dict[str, str]) -> None:
    name = name_with_differences("demo", params, first)
    assert name.startswith("demo")
    assert len(name) <= len("demo") + 3 * (1 + 9 + 1 + 24) + len(" +99")
