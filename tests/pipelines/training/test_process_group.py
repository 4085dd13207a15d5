"""Training workers find each other on one address, and nobody else does."""

from datetime import timedelta

import psutil
import pytest

from infra.processes import find_free_ports
from pipelines.training import process_group
from pipelines.training.process_group import RENDEZVOUS, OneAddressTorchConfig


def test_the_store_listens_on_its_own_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_ports(1, also_free_at=0)
    monkeypatch.setattr(RENDEZVOUS, "TCPStore", None)
    process_group._listen_on_one_address()
    # As torch.distributed.init_process_group("env://") makes it.
    store = RENDEZVOUS._create_c10d_store("127.0.0.1", port, 0, 1, timedelta(seconds=30))
    store.set("key", "value")
    other = RENDEZVOUS._create_c10d_store("127.0.0.1", port, 1, 1, timedelta(seconds=30))
    assert other.get("key") == b"value"
    bound = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert bound == {"127.0.0.1"}


def test_training_uses_that_store() -> None:
    config = OneAddressTorchConfig(timeout_s=7)
    assert config.timeout_s == 7
    calls: list[object] = []

    class Group:
        def execute_single(self, rank: int, function: object, *_: object) -> object:
            calls.append((rank, function))
            raise TimeoutError

    with pytest.raises(TimeoutError):
        config.backend_cls().on_start(Group(), config)
    assert calls == [(0, process_group._listen_on_one_address)]
