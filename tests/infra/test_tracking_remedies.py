"""For a server that refuses, the advice is not to start it."""

import pytest

from infra.tracking_remedies import remedy

LOGIN = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


@pytest.mark.parametrize(
    ("uri", "error", "told"),
    [
        ("http://m", "API request failed with error code 401 != 200", LOGIN),
        ("http://m", "PERMISSION_DENIED: Permission denied", LOGIN),
        ("http://m", "403 Forbidden", LOGIN),
        ("http://m", "Connection refused", "Start it (make up)"),
        ("sqlite:////m.db", "403", "Check the path"),
    ],
)
def test_the_remedy_fits_what_mlflow_said(uri: str, error: str, told: str) -> None:
    assert told in remedy(uri, RuntimeError(error))
