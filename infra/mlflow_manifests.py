"""Kubernetes manifests of MLflow: a server for metrics and artifacts, and its PostgreSQL."""

from infra.cluster import ClusterConfig
from infra.pods import Manifest, container, object_of, pod_spec, secret_env, values_env

MLFLOW_PORT = 5000
POSTGRES_PORT = 5432
# Id of the user `postgres` in its official image.
POSTGRES_USER_ID = 999
POSTGRES_DATA = "/var/lib/postgresql/data"


def mlflow_uri(config: ClusterConfig) -> str:
    """Return the server's address for stages inside the cluster."""
    return f"http://{_server_name(config)}.{config.namespace}.svc:{MLFLOW_PORT}"


def render_mlflow(config: ClusterConfig) -> list[Manifest]:
    database, server = _database_name(config), _server_name(config)
    return [
        _service(config, database, POSTGRES_PORT),
        object_of(config, "apps/v1", "StatefulSet", database, _database_spec(config)),
        _service(config, server, MLFLOW_PORT),
        object_of(config, "apps/v1", "Deployment", server, _server_spec(config)),
    ]


def _database_name(config: ClusterConfig) -> str:
    return f"{config.name}-postgres"


def _server_name(config: ClusterConfig) -> str:
    return f"{config.name}-mlflow"


def _service(config: ClusterConfig, name: str, port: int) -> Manifest:
    spec = {"selector": {"app.kubernetes.io/name": name}, "ports": [{"port": port}]}
    return object_of(config, "v1", "Service", name, spec)


def _database_spec(config: ClusterConfig) -> Manifest:
    name, mlflow = _database_name(config), config.mlflow
    ready = {"exec": {"command": ["pg_isready", "--username=mlflow", "--host=127.0.0.1"]}}
    postgres = container("postgres", mlflow.postgres_image, mlflow.cpus, f"{mlflow.memory_gib}Gi")
    postgres |= {
        "ports": [{"containerPort": POSTGRES_PORT}],
        "env": [
            # A subfolder: a new disk contains lost+found, which initdb refuses.
            *values_env({"POSTGRES_USER": "mlflow", "PGDATA": f"{POSTGRES_DATA}/pgdata"}),
            secret_env("POSTGRES_PASSWORD", mlflow.postgres_secret, "password"),
        ],
        "readinessProbe": ready,
        "livenessProbe": ready | {"initialDelaySeconds": 60, "failureThreshold": 6},
        "volumeMounts": [{"name": "data", "mountPath": POSTGRES_DATA}],
    }
    disk = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{mlflow.postgres_disk_gib}Gi"}},
    }
    return {
        "serviceName": name,
        "replicas": 1,
        **_selected_pod(name, pod_spec(config, postgres, POSTGRES_USER_ID)),
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": disk}],
    }


def _server_spec(config: ClusterConfig) -> Manifest:
    name, mlflow = _server_name(config), config.mlflow
    # A new version changes the tables when it starts, so two must never run at once.
    strategy = {"type": "Recreate"}
    health = {"httpGet": {"path": "/health", "port": MLFLOW_PORT}}
    server = container("mlflow", config.image, mlflow.cpus, f"{mlflow.memory_gib}Gi")
    server |= {
        "command": _server_command(config),
        "ports": [{"containerPort": MLFLOW_PORT}],
        "env": [
            *values_env(_server_env(config)),
            # Read by PostgreSQL's client library, so the address needs no password.
            secret_env("PGPASSWORD", mlflow.postgres_secret, "password"),
        ],
        "envFrom": [{"secretRef": {"name": config.storage.secret}}],
        # Ten minutes: the first start creates 60 tables, and may have to wait for the database.
        "startupProbe": health | {"periodSeconds": 5, "failureThreshold": 120},
        "readinessProbe": health,
        "livenessProbe": health | {"timeoutSeconds": 10, "failureThreshold": 6},
    }
    pod = pod_spec(config, server)
    return {"replicas": 1, "strategy": strategy, **_selected_pod(name, pod)}


def _server_command(config: ClusterConfig) -> list[str]:
    service = _server_name(config)
    names = [service, f"{service}.{config.namespace}", f"{service}.{config.namespace}.svc"]
    # It refuses requests for a host that is not listed. localhost is for kubectl port-forward.
    hosts = [f"{name}:{MLFLOW_PORT}" for name in names] + ["localhost:*", "127.0.0.1:*"]
    database = f"mlflow@{_database_name(config)}:{POSTGRES_PORT}/mlflow"
    return [
        "mlflow",
        "server",
        "--host=0.0.0.0",
        f"--port={MLFLOW_PORT}",
        "--workers=2",
        f"--backend-store-uri=postgresql+psycopg2://{database}",
        "--serve-artifacts",
        f"--artifacts-destination={config.mlflow.artifacts}",
        f"--allowed-hosts={','.join(hosts)}",
    ]


def _server_env(config: ClusterConfig) -> dict[str, str]:
    endpoint = config.storage.endpoint_url
    return {
        **({"MLFLOW_S3_ENDPOINT_URL": endpoint} if endpoint else {}),
        "AWS_DEFAULT_REGION": config.storage.region,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _selected_pod(name: str, pod: Manifest) -> Manifest:
    labels = {"app.kubernetes.io/name": name}
    return {
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"automountServiceAccountToken": False, **pod},
        },
    }
