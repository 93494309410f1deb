"""Secrets planted in addresses and texts: none of them may be shown, and nothing else may be lost."""

from __future__ import annotations

import json
import pickle

import pytest

from featherweight.errors import DivergenceError, ServiceError, one_line, told
from featherweight.masking import masked, masked_tree

SECRET = "hunter2"
ADDRESSES = {
    "postgresql://ada:hunter2@db:5432/mlflow": "postgresql://***@db:5432/mlflow",
    "postgresql+psycopg2://ada:hunter2@db/mlflow?sslmode=require": "postgresql+psycopg2://***@db/mlflow?sslmode=require",
    "postgresql://ada:p@hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:p:hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:12/hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:a@b/hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:a'hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:a?hunter2#@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://ada:%2Fhunter2%40@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://hunter2@db/mlflow": "postgresql://***@db/mlflow",
    "postgresql://db/mlflow?user=ada&password=hunter2": "postgresql://db/mlflow?user=ada&password=***",
    "https://hunter2:@tracking.example/": "https://***@tracking.example/",
    "https://ada:hunter2@tracking.example:443/mlflow": "https://***@tracking.example:443/mlflow",
    "https://ada:pass/hunter2@tracking.example": "https://***@tracking.example",
    "HTTPS://ada:hunter2@tracking.example": "HTTPS://***@tracking.example",
    "http://[::1]:4200/api?token=hunter2&page=2": "http://[::1]:4200/api?token=***&page=2",
    "http://host:4200/api?api_key=hunter2": "http://host:4200/api?api_key=***",
    "https://s3.example/b/k?X-Amz-Signature=hunter2&X-Amz-Date=1": "https://s3.example/b/k?X-Amz-Signature=***&X-Amz-Date=1",
    "s3://key:hunter2@bucket/prefix": "s3://***@bucket/prefix",
    "https:/ada:hunter2@tracking.example": "https:/***@tracking.example",
    "/recipes/s3:/key:hunter2@bucket/recipe.yaml": "/recipes/s3:/***@bucket/recipe.yaml",
}
TEXTS = [
    "cannot reach 'postgresql://ada:hunter2@db/mlflow', see \"https://ada:hunter2@host/x\"",
    "connection failed: host=db user=ada password=hunter2 dbname=mlflow",
    "connection failed: host=db password='hunter2 hunter2'",
    "AWS_SECRET_ACCESS_KEY=hunter2 HF_TOKEN=hunter2 MLFLOW_TRACKING_PASSWORD=hunter2",
    "DefaultEndpointsProtocol=https;AccountName=ada;AccountKey=hunter2==;EndpointSuffix=x",
]
HARMLESS = [
    "sqlite:////home of ada/a@b/mlflow.db",
    "file:///data/a@b/c",
    "file:/data/a@b/c and C:/users/a@b",
    "s3://bucket/a@b/prefix",
    "hf:org/name@revision and models:/stories@champion",
    "http://127.0.0.1:5000/#/models/stories@champion",
    "http://[::1]:5000/x@y",
    "max_new_tokens=64, pad_token=0, keys: a, b",
    "ratio 1:2 @ 3, see https://docs.example/page?x=1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_secret(address: str) -> None:
    assert masked(address) == ADDRESSES[address]


@pytest.mark.parametrize("text", [*TEXTS, *ADDRESSES, *(f"'{one}' is (not {one})" for one in ADDRESSES)])
def test_no_text_keeps_a_secret(text: str) -> None:
    assert SECRET in text
    assert SECRET not in masked(text)
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


def test_every_error_of_ours_masks_its_message() -> None:
    for error in (ServiceError(TEXTS[0]), DivergenceError(TEXTS[0], (1.0,))):
        again = pickle.loads(pickle.dumps(error))
        assert SECRET not in f"{error} {error!r} {told(error)} {again}"
    assert SECRET not in one_line(ValueError(TEXTS[0])) + told(ValueError(TEXTS[0]))


def test_a_tree_is_masked_down_to_its_leaves() -> None:
    tree = {"a": [{"source": "s3://ada:hunter2@bucket"}, 3, None], "b": ("x", "http://hunter2@host")}
    assert SECRET not in json.dumps(masked_tree(tree))
    assert masked_tree({"a": [1, "x"]}) == {"a": [1, "x"]}


def test_a_scheme_of_any_length_hides_its_secret_and_a_long_word_costs_no_more_than_its_letters() -> None:
    """The arrival that found it named a base of 100,000 letters, and took a minute each time that it was told."""
    assert masked(f"{'a' * 100}://user:hunter2@host") == f"{'a' * 100}://***@host"
    assert masked("a" * 1_000_000) == "a" * 1_000_000  # hours, were it looked at from each letter to its end
