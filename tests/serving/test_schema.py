"""Requests made up from the OpenAPI document: no crash, and every answer is one that the document names."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from anytoken.serving.app import create_app
from anytoken.serving.settings import ServerSettings

CHECKS = (not_a_server_error, status_code_conformance)


@pytest.fixture(scope="module")
def schema(mini):
    app = create_app(mini, "mini", ServerSettings(max_new_tokens=300, max_choices=1))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def fuzz(schema, examples):
    # schemathesis' own pytest plugin does not work with pytest 9, so its strategies are run by hypothesis directly
    quiet = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    count = 0
    for found in schema.get_all_operations():

        @quiet
        @given(case=found.ok().as_strategy())
        def check(case):
            nonlocal count
            count += 1
            case.call_and_validate(checks=CHECKS)

        check()
    return count


def test_requests_from_the_document(schema):
    assert fuzz(schema, 12) >= 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_from_the_document(schema):
    assert fuzz(schema, 2500) >= 10_000
