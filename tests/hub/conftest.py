"""A hub on this machine, in the place of the one that huggingface_hub asks."""

import huggingface_hub
import pytest
from hub_server import TOKEN, serve, use_endpoint


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """A cache and a token of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(autouse=True)
def own_connections():
    """huggingface_hub keeps a client, with the proxies that other tests set when it was made."""
    renew = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils._http.reset_sessions
    renew()
    yield
    renew()


@pytest.fixture
def hub(monkeypatch):
    with serve() as (address, served):
        use_endpoint(monkeypatch, address)
        yield served
