import logging

import pytest

from infra.redaction import RedactionFilter, redact, redact_value

SECRET = "Pl4nted/s3cret+key="


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://user:pw@host:5000/x", "http://***@host:5000/x"),
        ("http://token@host/x", "http://***@host/x"),
        ("postgresql+psycopg2://me:p%40ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("http://user:p@ss@host/x", "http://***@host/x"),
        ("s3://AKIA:hidden@bucket/k", "s3://***@bucket/k"),
        ("{'uri': 'http://a:b@h'}, http://c:d@i", "{'uri': 'http://***@h'}, http://***@i"),
        (
            "https://b.s3/k?X-Amz-Credential=AKIA%2F2026&X-Amz-Signature=0af1&partNumber=2",
            "https://b.s3/k?X-Amz-Credential=***&X-Amz-Signature=***&partNumber=2",
        ),
        (
            "https://h/k?AWSAccessKeyId=A&Signature=b%3D",
            "https://h/k?AWSAccessKeyId=***&Signature=***",
        ),
        ("https://h/k?sv=1&sig=abc", "https://h/k?sv=1&sig=***"),
        ("https://h/k?access_token=abc#x", "https://h/k?access_token=***#x"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
    ],
)
def test_a_secret_in_an_address_or_a_header_is_masked(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1",
        "sqlite:////tmp/a@b/mlflow.db",
        "s3://bucket/run@2/x",
        "image 30x32 is not a multiple of patch_size=16",
        "someone@example.org wrote: token=5, see https://h/a?b=c",
        "basic training of bearer bonds",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "variable",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "RAY_AUTH_TOKEN",
        "PGPASSWORD",
        "POSTGRES_PASSWORD",
    ],
)
def test_a_known_secret_is_masked_however_it_is_spelled(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, SECRET)
    for spelled in (SECRET, "Pl4nted%2Fs3cret%2Bkey%3D", "UGw0bnRlZC9zM2NyZXQra2V5PQ=="):
        assert redact(f"a {spelled} b") == "a *** b"


def test_the_password_of_an_address_in_the_environment_is_masked_where_it_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAE__TRACKING__URI", "http://user:pl4nted-pw@host")
    assert redact("user=user password is pl4nted-pw") == "user=user password is ***"


def test_a_word_that_happens_to_be_a_short_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert redact("the test set") == "the test set"


def test_each_text_in_a_structure_is_redacted() -> None:
    value = {"a": ["http://u:p@h", 1, None], "b": {"http://u:p@h": True}, "c": 0.5}
    assert redact_value(value) == {
        "a": ["http://***@h", 1, None],
        "b": {"http://***@h": True},
        "c": 0.5,
    }


def test_a_log_line_is_redacted_with_its_arguments_and_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.addFilter(RedactionFilter())
    try:
        raise ValueError("http://u:pw@h")
    except ValueError:
        logging.getLogger("infra.x").exception("failed at %s, %d times", "http://u:pw@h", 3)
    assert "failed at http://***@h, 3 times" in caplog.text
    assert "ValueError: http://***@h" in caplog.text
    assert "pw" not in caplog.text
