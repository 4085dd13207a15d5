"""Let the training workers find each other through a store that listens on one address only.

torch's own store listens on all addresses of the machine and requires no key.
"""

import socket
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch._C._distributed_c10d import TCPStore

# Imported by name, because torch.distributed also has a function with this name, which hides the
# module.
RENDEZVOUS = import_module("torch.distributed.rendezvous")


class OneAddressTorchConfig(TorchConfig):
    """Ray's set-up of torch's process group, with the store bound to its node's address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OneAddressBackend


class _OneAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute_single(0, _listen_on_one_address)
        super().on_start(worker_group, backend_config)


def _listen_on_one_address() -> None:
    """Make torch's store in this process listen only on the address that the other workers get."""
    # Neither torch (2.14) nor Ray (2.60) has a setting for it.
    RENDEZVOUS.TCPStore = open_store  # type: ignore[attr-defined]


def open_store(host_name: str, port: int, *, is_master: bool, **options: Any) -> TCPStore:
    """Open torch's store; the master's listens on a socket that is bound to `host_name`."""
    if is_master:
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        server = socket.create_server((host_name, port), family=family)
        options["master_listen_fd"] = server.detach()
    return TCPStore(host_name=host_name, port=port, is_master=is_master, **options)
