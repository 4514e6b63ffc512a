"""What the tests of accidents share: the process that starts their runs."""

import pytest

from tests.accidents.hurting import Hospital, compiler


@pytest.fixture(scope="session")
def hospital(tmp_path_factory):
    """Starts runs, and hurts them if asked."""
    if compiler() is None:
        pytest.skip("there is no C compiler, which builds what does the harm")
    made = Hospital(tmp_path_factory.mktemp("hospital"))
    yield made
    made.close()
