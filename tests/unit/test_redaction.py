"""What is shown of an address: the place, never the credentials."""

from __future__ import annotations

import pytest

from layerplan.redaction import find_credentials, find_hidden, redact_text, redact_uri, redact_values


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("http://anna:hunter2@host:5000/mlflow", "http://***@host:5000/mlflow"),
        ("https://ghp_0a1b2c@host/x", "https://***@host/x"),
        ("postgresql://anna:p/w?d@x#y@db/mlflow?sslmode=require", "postgresql://***@db/mlflow?sslmode=require"),
        ("postgresql://anna:123/4@db/mlflow", "postgresql://***@db/mlflow"),
        ("http://host/?token=geheim&page=2", "http://host/?token=***&page=2"),
        ("http://host/?x=a1b2c3", "http://host/?x=***"),
        ("s3://bucket/a@b?region=us-east-1&endpoint_override=localhost:9000",) * 2,
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
        ("runs/a:b@c", "runs/a:b@c"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(given: str, shown: str):
    assert redact_uri(given) == shown
    assert redact_text(f"cannot reach '{given}' now") == f"cannot reach '{shown}' now"


def test_a_credential_is_taken_out_of_words_where_it_stands_alone():
    uri = "http://anna:p%40ss-word@host?api_key=a1b2"
    words = "401 for anna:p@ss-word; url: /api?api_key=a1b2 (Basic p%40ss-word)"
    assert redact_text(words, uri, None) == "401 for ***; url: /api?api_key=*** (Basic ***)"
    assert find_credentials("http://host:5000/x?page=2") == set()


def test_what_was_hidden_is_found_again_by_its_field():
    values = {"tracking": {"uri": "http://a:b@host"}, "sources": [{"path": "https://host/x?token=1"}], "seed": 3}
    hidden = redact_values(values)
    assert hidden["seed"] == 3
    assert dict(find_hidden(hidden)) == {
        "tracking.uri": "http://***@host",
        "sources.0.path": "https://host/x?token=***",
    }
    assert not list(find_hidden(values))
