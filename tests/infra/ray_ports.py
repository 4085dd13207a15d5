"""List the ports of a running Ray, and what each answers to a caller without its token."""

import http.client
from collections.abc import Iterable, Iterator
from contextlib import closing

import grpc
import psutil
import ray

# A call to each of Ray's services, none of which may succeed without the token.
CALLS = (
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
)
# What may be answered without the token: nothing at all, or read-only numbers.
REFUSALS = {"UNAUTHENTICATED", "UNIMPLEMENTED", "401", "metrics only", "no answer"}


def family(root: psutil.Process) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    return [root, *root.children(recursive=True)]


def of_local_ray() -> list[psutil.Process]:
    """Return this driver and its Ray's processes, but not the session's other processes."""
    infos = ray._private.worker._global_node.all_processes.values()
    roots = [info.process.pid for group in infos for info in group]
    return [psutil.Process(), *(p for pid in roots for p in family(psutil.Process(pid)))]


def listening(processes: Iterable[psutil.Process]) -> Iterator[tuple[psutil.Process, str, int]]:
    """Return every TCP port on which the processes listen."""
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr.ip.removeprefix("::ffff:")
                yield process, address, connection.laddr.port


def ask(port: int) -> set[str]:
    """Return what a port answers to each of Ray's services, and to HTTP, without the token."""
    told = set()
    wrong = [("authorization", "Bearer " + "0" * 64)]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in CALLS:
            for metadata in (None, wrong):
                try:
                    channel.unary_unary(call)(b"", timeout=10, metadata=metadata)
                    told.add(f"DONE {call}")
                except grpc.RpcError as error:
                    told.add(error.code().name)
    if told != {"UNAVAILABLE"}:
        return told
    for path in ("/get_or_create_runtime_env", "/api/job_agent/jobs/"):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            try:
                connection.request("POST", path, b"{}")
                response = connection.getresponse()
                text = response.read()
            except (ConnectionError, http.client.HTTPException):
                told.add("no answer")
                continue
        only_metrics = response.status == 405 and b"use OPTIONS or GET" in text
        told.add("metrics only" if only_metrics else str(response.status))
    return told - {"UNAVAILABLE"}
