"""Storage, services and run records: everything that depends on where the code runs.

MLflow settings are here because MLflow reads some of them while it is imported, and this module
runs before any other module of the package.
"""

import os

# The first two are read while MLflow is imported. The other two limit how long a call to a dead
# server takes: with MLflow's defaults (7 retries of 120 s) it takes 246 s.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# stdout is reserved for a command's result.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
