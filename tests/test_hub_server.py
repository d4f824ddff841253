"""The loopback Hub as the real client sees it: other tests are worth what this server is."""

import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hub_server import HubServer, use_in_process
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from tiny import convert, tiny_inputs, tiny_model

REPO = "user/model"
PUT = ("PUT", "/lfs-storage/")
COMMIT = ("POST", "/commit/main")


@pytest.fixture
def hub(server):
    return server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    files = {
        "README.md": b"---\ntags: [moe]\n---\n",
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 4000,
        "figures/a b.png": b"\x89PNG",
        "empty.txt": b"",
    }
    for name, data in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def count(hub: HubServer, method: str, part: str) -> int:
    return sum(method == sent and part in path for sent, path in hub.requests)


def push(api: HfApi, folder, **settings):
    return api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Add the model", **settings)


def content(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_token(hub, api):
    assert api.whoami()["name"] == "user"
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    for call in (wrong.whoami, lambda: wrong.create_repo(REPO), lambda: HfApi(hub.url, token=False).create_repo(REPO)):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == 401
    assert not hub.repos


def test_create_repo(hub, api):
    assert api.create_repo("model").repo_id == REPO  # the namespace of the token
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    with pytest.raises(HfHubHTTPError, match="rights") as error:
        api.create_repo("stranger/model")
    assert error.value.response.status_code == 403
    api.create_repo("org/secret", private=True)
    assert {name: repo.private for name, repo in hub.repos.items()} == {REPO: False, "org/secret": True}
    assert api.list_repo_files(REPO) == [".gitattributes"] and not hub.repos[REPO].commits


def test_upload_folder_is_one_commit_and_the_second_time_none(hub, api, folder):
    api.create_repo(REPO)
    pushed = push(api, folder)
    (commit,) = hub.repos[REPO].commits
    assert (commit.oid, commit.revision, commit.message) == (pushed.oid, "main", "Add the model")
    assert sorted(commit.paths) == sorted(content(folder))
    assert {".gitattributes", *commit.paths} == set(hub.repos[REPO].revisions["main"])
    assert content(folder).items() <= hub.repos[REPO].revisions["main"].items()
    assert count(hub, *PUT) == count(hub, "POST", "/verify") == 2

    assert push(api, folder).oid == pushed.oid
    assert len(hub.repos[REPO].commits) == 1 and count(hub, *PUT) == 2 and count(hub, *COMMIT) == 1

    (folder / "config.json").write_text("{ }")
    (folder / "figures/a b.png").unlink()
    push(api, folder, delete_patterns="*")
    assert hub.repos[REPO].commits[1].paths == ["figures/a b.png", "config.json"]
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *content(folder)} and count(hub, *PUT) == 2
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        (folder / "config.json").write_text("{}")
        push(api, folder, parent_commit=pushed.oid)


def test_branch_and_pull_request(hub, api, folder):
    api.create_repo(REPO)
    with pytest.raises(RevisionNotFoundError):
        push(api, folder, revision="k/4")
    api.create_branch(REPO, branch="k/4")
    api.create_branch(REPO, branch="k/4", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="k/4")
    push(api, folder, revision="k/4")
    request = push(api, folder, create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    (folder / "config.json").write_text("{ }")
    push(api, folder, revision="refs/pr/1")
    repo = hub.repos[REPO]
    assert [commit.revision for commit in repo.commits] == ["k/4", "refs/pr/1", "refs/pr/1"]
    assert set(repo.revisions["main"]) == {".gitattributes"}
    assert repo.revisions["k/4"]["config.json"] == b"{}" and repo.revisions["refs/pr/1"]["config.json"] == b"{ }"
    assert api.model_info(REPO, revision="k/4").sha == repo.commits[0].oid


def test_download(hub, api, folder, tmp_path):
    api.create_repo(REPO, private=True)
    oid = push(api, folder).oid
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == oid and info.private and info.id == REPO
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["model.safetensors"] == (1024000, True) and sizes["config.json"] == (2, False)
    assert [entry.path for entry in api.list_repo_tree(REPO, "figures")] == ["figures/a b.png"]
    assert "figures" in [entry.path for entry in api.list_repo_tree(REPO)]

    snapshot = tmp_path / "snapshot"
    api.snapshot_download(REPO, revision="main", local_dir=snapshot, ignore_patterns=".gitattributes")
    assert {name: data for name, data in content(snapshot).items() if ".cache" not in name} == content(folder)
    path = api.hf_hub_download(REPO, "figures/a b.png", revision=oid)
    assert open(path, "rb").read() == b"\x89PNG" and oid in path
    address = huggingface_hub.hf_hub_url(REPO, "model.safetensors")
    headers = {"Authorization": f"Bearer {hub.token}", "Range": "bytes=3-5"}
    part = get_session().get(address, headers=headers)
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"\3\4\5", "bytes 3-5/1024000")

    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "pytorch_model.bin")
    for error, arguments in {
        RemoteEntryNotFoundError: {"filename": "none.json"},
        RevisionNotFoundError: {"filename": "config.json", "revision": "none"},
        RepositoryNotFoundError: {"filename": "config.json", "token": False},
    }.items():
        with pytest.raises(error):
            api.hf_hub_download(REPO, **arguments)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/none")


@pytest.mark.parametrize("status", [400, 401, 403, 503, None])  # None: the connection is lost
@pytest.mark.parametrize(
    ("method", "path", "tries"),
    [
        ("POST", "/api/repos/create", 1),
        ("POST", "/preupload/", 6),
        ("POST", "/objects/batch", 6),
        ("PUT", "/lfs-storage/", 6),
        ("POST", "/commit/", 1),  # it may have been carried out
    ],
)
def test_failures(hub, api, folder, method, path, tries, status):
    """What the client raises, and how often it tries. Not all is an OSError: lost connections, and failed uploads."""
    (folder / "figures/a b.png").unlink()  # with several LFS files, each is tried
    api.create_repo(REPO)
    if status:
        hub.fail(method, path, status, times=99)
    else:
        hub.drop(method, path, times=99)
    before = count(hub, method, path)
    with pytest.raises(Exception) as raised:
        api.create_repo("user/other")  # `exist_ok` would forgive 401 and 403 where the repository can be read
        push(api, folder)
    error = raised.value
    if method == "PUT":
        assert type(error) is RuntimeError and str(error) == "Error while uploading 'model.safetensors' to the Hub."
        error = error.__cause__
    if status:
        assert type(error) is (BadRequestError if status == 400 else HfHubHTTPError)
        assert error.response.status_code == status and isinstance(error, OSError)
    else:
        assert type(error).__name__ in ("RemoteProtocolError", "ReadError") and not isinstance(error, OSError)
    assert count(hub, method, path) - before == (tries if status in (503, None) else 1)
    assert not hub.repos[REPO].commits


def test_one_failure_is_tried_again(hub, api, folder):
    api.create_repo(REPO)
    hub.fail("POST", "/preupload/", 503)
    hub.drop("PUT", "/lfs-storage/")
    hub.fail("PUT", "/lfs-storage/", 500)
    push(api, folder)
    assert content(folder).items() <= hub.repos[REPO].revisions["main"].items()
    assert count(hub, "POST", "/preupload/") == 2 and count(hub, *PUT) == 4


def test_files_uploaded_before_a_failed_commit_are_kept(hub, api, folder):
    api.create_repo(REPO)
    hub.fail(*COMMIT, 500)
    with pytest.raises(HfHubHTTPError):
        push(api, folder)
    push(api, folder)
    assert count(hub, *PUT) == 2 and len(hub.repos[REPO].commits) == 1


def test_lost_answer_of_a_commit(hub, api, folder):
    api.create_repo(REPO)
    hub.drop(*COMMIT, after=True)
    with pytest.raises(Exception, match="disconnected"):
        push(api, folder)
    assert len(hub.repos[REPO].commits) == 1
    assert push(api, folder).oid == hub.repos[REPO].commits[0].oid and count(hub, *COMMIT) == 1


def test_closed_server_is_gone(folder, monkeypatch, tmp_path):
    with HubServer() as hub:
        use_in_process(monkeypatch, hub, tmp_path)
        huggingface_hub.create_repo(REPO)  # the module's functions follow too
    with pytest.raises(Exception) as raised:  # though the client keeps its connection open
        huggingface_hub.model_info(REPO)
    assert "Connect" in type(raised.value).__name__


PULL = """
import sys, huggingface_hub, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("user/model", trust_remote_code=True, revision="k4").eval()
model.save_pretrained(sys.argv[1] + "/again")
huggingface_hub.create_repo("org/again", private=True)
huggingface_hub.upload_folder(repo_id="org/again", folder_path=sys.argv[1] + "/again")
inputs = torch.load(sys.argv[1] + "/inputs.pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[1] + "/logits.pt")
"""


def test_moefied_model_in_another_process(hub, api, tmp_path):
    """Pulled from a branch with its code and pushed again by a process that knows only its environment."""
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, 2)
    model.save_pretrained(tmp_path / "model")
    api.create_repo(REPO)
    api.create_branch(REPO, branch="k4")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model", revision="k4")
    inputs = tiny_inputs("bert")
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    command = [sys.executable, "-c", PULL, str(tmp_path)]
    done = subprocess.run(command, env=hub.environ(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    again, first = hub.repos["org/again"], hub.repos[REPO].revisions["k4"]
    assert again.private and len(again.commits) == 1
    assert again.revisions["main"]["model.safetensors"] == first["model.safetensors"]
    assert "trust_remote_code" not in done.stderr and count(hub, "GET", f"/{REPO}/resolve/") > 3
