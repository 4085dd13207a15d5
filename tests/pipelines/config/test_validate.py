"""What names a check of shards."""

from pipelines.config.validate import ValidateConfig


def name_of(data: str | tuple[str, ...], **values: object) -> str:
    return ValidateConfig.model_validate({"data": data, **values}).run_name


def test_other_data_is_another_check() -> None:
    assert name_of("/a") != name_of("/b")
    assert name_of(("/a", "/b")) != name_of(("/b", "/a"))


def test_other_limits_are_the_same_check() -> None:
    assert name_of("/a", max_drift=0.5, name="x") == f"x{name_of('/a').removeprefix('validate')}"
