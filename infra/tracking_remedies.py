"""Suggest what to do if MLflow can't be used."""


def remedy(uri: str, error: Exception) -> str:
    """Return a suggestion: check the login, start the server, or check the path."""
    if not uri.startswith("http"):
        return "Check the path"
    # The server answers but refuses: MLflow has a status for some of these, text for others.
    refused = ("UNAUTHENTICATED", "PERMISSION_DENIED", "401", "403")
    if any(word in f"{getattr(error, 'error_code', '')} {error}" for word in refused):
        return (
            "It refuses: check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )
    return "Start it (make up)"
