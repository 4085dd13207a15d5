"""Nothing here depends on what MLflow keeps for a whole process, or on the working folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# These take their store as an argument, or touch none.
WITHOUT_STORE = {"mlflow.pytorch.save_model", "mlflow.pytorch.load_model"}


def calls(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_clients_of_mlflow_are_made_in_one_place_and_its_functions_without_a_client_unused() -> (
    None
):
    found = {
        f"{file.relative_to(ROOT)}: {call}"
        for folder in ("infra", "pipelines", "mae_core")
        for file in (ROOT / folder).rglob("*.py")
        for call in calls(file)
        if call == "MlflowClient" or (call.startswith("mlflow.") and call not in WITHOUT_STORE)
    }
    assert found == {"infra/mlflow_client.py: MlflowClient"}
