import pytest

from drafthead.head.model import Eagle3Head
from tests.heads import small_head


@pytest.fixture
def head() -> Eagle3Head:
    return small_head()
