"""Storage, services and records: all that knows where something runs.

Settings of MLflow stand here because MLflow reads some of them while it is imported, and this
module is run before any other of the package.
"""

import os

# The first two are read while MLflow is imported. Two others bound a call to a server that is
# down: its own defaults (7 retries of 120 s) take 246 s.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# stdout is for a command's result.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
