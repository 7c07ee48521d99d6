import pytest


@pytest.fixture
def no_metadata_server(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
