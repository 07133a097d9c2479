from internlm3.tests.tokenization.conftest import plain  # noqa: F401 - a fixture
