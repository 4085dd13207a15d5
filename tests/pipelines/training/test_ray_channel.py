"""Driver and workers hear of each other through Ray's store."""

import pytest

from pipelines.training import ray_channel
from pipelines.training.ray_channel import RayChannel
from pipelines.training.stopping import Phase, Told


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """In the place of Ray's store."""
    values: dict[str, bytes] = {}

    def put(key: str, value: bytes, *, namespace: str) -> None:
        values[f"{namespace}/{key}"] = value

    monkeypatch.setattr(ray_channel.internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(
        ray_channel.internal_kv,
        "_internal_kv_get",
        lambda key, *, namespace: values.get(f"{namespace}/{key}"),
    )
    return values


def test_another_start_of_the_run_is_not_asked() -> None:
    RayChannel("first").ask()
    assert RayChannel("first").is_asked()
    assert not RayChannel("second").is_asked()


def test_the_driver_hears_how_far_the_workers_are() -> None:
    channel = RayChannel("c")
    assert channel.told() == Told(Phase.STARTING, 0)
    channel.tell(Told(Phase.TRAINING, 20, 500, "training", "eta=1m00s"))
    assert channel.told() == Told(Phase.TRAINING, 20, 500, "training", "eta=1m00s")
    channel.tell(Told(Phase.STOPPED, 213))
    assert channel.told() == Told(Phase.STOPPED, 213)
