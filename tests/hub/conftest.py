"""A loopback hub for the tests of this folder, and clients of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_client import Client, client_environment
from hub_server import HubServer


@pytest.fixture(scope="session")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def new_client(hub, tmp_path_factory) -> Callable[..., Client]:
    """Starts clients: `new_client(token=…, HF_HUB_OFFLINE="1", home=…)`."""
    started = []

    def start(token: str | None = "hf_owner", home: Path | None = None, **changes: str) -> Client:
        folder = tmp_path_factory.mktemp("client")
        started.append(Client(client_environment(hub, home or folder / "home", token, **changes), folder))
        return started[-1]

    yield start
    for client in started:
        client.close()


@pytest.fixture(scope="module")
def client(new_client) -> Client:
    """The client of `owner`."""
    return new_client()


@pytest.fixture
def pushed(client, request, tiny_run_folder) -> str:
    """Id of a repository that holds the tiny model and its processor; one per test."""
    repo_id = f"owner/{request.node.name.removeprefix('test_').replace('[', '.').strip(']')[:80]}"
    client(f"""
        from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
        SynerNetForWeaklySupervisedSegmentation.from_pretrained({str(tiny_run_folder)!r}).push_to_hub({repo_id!r})
        SynerNetImageProcessor.from_pretrained({str(tiny_run_folder)!r}).push_to_hub({repo_id!r})
    """)
    return repo_id
