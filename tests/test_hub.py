"""Pushing a MoEfied model with the real client, over HTTP, to a Hub on this machine; and pulling it again."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import convert, tiny_inputs, tiny_model

from moefy_hf import evaluate, push_to_hub
from moefy_hf.cli.main import main
from moefy_hf.hub import PushError, VerificationError, add_facts
from moefy_hf.hub import push as hub

HEAD, REPO = "AutoModelForSequenceClassification", "user/bert-moe"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint's folder with all its facts."""
    model = tiny_model("bert", HEAD)
    report = convert(model, k=2)
    folder = tmp_path_factory.mktemp("hub") / "moe"
    model.save_pretrained(folder)
    batch = {**tiny_inputs("bert", HEAD), "labels": torch.tensor([0, 1])}
    sweep = evaluate(model, [batch], (0.5,), progress=False)
    add_facts(folder, conversion=report, sweep=sweep, evaluation={"data": "user/data"}, base_model="user/dense")
    return model, folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of that folder, whose verification, tested elsewhere, is taken as done: it starts a Python process."""
    monkeypatch.setattr(hub, "verify", lambda *args: 0.0)
    return shutil.copytree(saved[1], tmp_path / "moe")


def sent(server, part: str) -> int:
    return sum(part in path for _, path in server.requests)


def test_push_and_pull(saved, server, tmp_path, monkeypatch):
    """The whole way, verification included, and what others get, where this package is not installed."""
    model, _ = saved
    commit = push_to_hub(model, REPO, folder=tmp_path / "out", facts={"license": "mit"}, message="First")
    repo = server.repos[REPO]
    assert [c.message for c in repo.commits] == ["First"] and commit.oid == repo.commits[0].oid
    files = repo.revisions["main"]
    assert {"config.json", "model.safetensors", "README.md", "modeling_moefied_bert.py"} <= set(files)
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    for name in [name for name in sys.modules if name.partition(".")[0] == "moefy_hf"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    pulled = getattr(transformers, HEAD).from_pretrained(REPO, trust_remote_code=True, revision=commit.oid).eval()
    assert type(pulled).__module__.partition(".")[0] == "transformers_modules"
    with torch.no_grad():
        expected = model.eval()(**tiny_inputs("bert", HEAD)).logits
        assert torch.equal(pulled(**tiny_inputs("bert", HEAD)).logits, expected)


def test_what_a_trainer_goes_on_from_stays_here(server, folder):
    kept = ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "runs/events.1", ".secret")
    kept = (*kept, "checkpoint-5/model.safetensors", "global_step5/zero.pt", ".tool/state", ".eval_results/.part")
    for name in (*kept, ".eval_results/task.yaml"):  # which is hidden, and for the Hub
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0")
    push_to_hub(folder, REPO)
    paths = set(server.repos[REPO].commits[0].paths)
    assert {"config.json", ".eval_results/task.yaml"} <= paths and not paths & set(kept)


def test_old_weights_do_not_stay(server, folder):
    """What is loaded first, a single file, would be the old model."""
    push_to_hub(folder, REPO)
    weights = dict.fromkeys(load_file(folder / "model.safetensors"), "model-1.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    push_to_hub(folder, REPO)
    files = server.repos[REPO].revisions["main"]
    assert "model-1.safetensors" in files and "model.safetensors" not in files


def test_a_card_is_renewed_until_somebody_writes_in_it(server, folder):
    main(["card", str(folder)])
    push_to_hub(folder, REPO, facts={"license": "mit"})
    card = server.repos[REPO].revisions["main"]["README.md"].decode()
    assert "Licence: mit" in card and f'from_pretrained("{REPO}"' in card
    api = HfApi(token=server.token)
    api.upload_file(path_or_fileobj=(card + "More.").encode(), path_in_repo="README.md", repo_id=REPO)
    (folder / "README.md").unlink()
    push_to_hub(folder, REPO, facts={"license": "apache-2.0"})
    assert server.repos[REPO].revisions["main"]["README.md"].decode() == card + "More."
    assert (folder / "README.md").read_text() == card + "More."


def test_a_second_push_sends_what_changed(server, folder):
    push_to_hub(folder, REPO)
    files, sending = server.repos[REPO].revisions["main"], sent(server, "/lfs-storage/")
    assert sending == 2 and "quality_against_compute.png" in files  # weights and plot
    push_to_hub(folder, REPO)
    assert len(server.repos[REPO].commits) == 1 and sent(server, "/lfs-storage/") == sending
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")  # is kept
    push_to_hub(folder, REPO)
    assert [c.paths for c in server.repos[REPO].commits[1:]] == [["README.md"]]
    assert b"Mine." in server.repos[REPO].revisions["main"]["README.md"]


@pytest.mark.parametrize(("written", "found"), [("apache-2.0", "apache-2.0"), ("[mit, apache-2.0]", None)])
def test_the_licence_is_that_of_the_base_model(server, folder, tmp_path, written, found):
    """Where it has one; several are not one."""
    api, card = HfApi(token=server.token), tmp_path / "card.md"
    card.write_text(f"---\nlicense: {written}\n---\n")
    api.create_repo("user/dense")
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="user/dense")
    push_to_hub(folder, REPO)
    data = ModelCard(server.repos[REPO].revisions["main"]["README.md"].decode()).data
    assert data.license == found and data.base_model == "user/dense"


def test_private_branch_and_pull_request(server, folder):
    push_to_hub(folder, REPO, private=True, branch="k2")
    repo = server.repos[REPO]
    assert repo.private and "config.json" in repo.revisions["k2"] and "config.json" not in repo.revisions["main"]
    assert 'revision="k2"' in (folder / "README.md").read_text()
    commit = push_to_hub(folder, REPO, create_pr=True)
    assert commit.pr_url and "config.json" in repo.revisions["refs/pr/1"]
    assert "config.json" not in repo.revisions["main"]
    with pytest.raises(ValueError, match="not both"):
        push_to_hub(folder, REPO, create_pr=True, branch="k2")


def test_refuses_what_is_not_moefied(server, folder, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    HfApi(token=server.token).create_repo(REPO)
    HfApi(token=server.token).upload_folder(repo_id=REPO, folder_path=tmp_path / "dense")
    for settings in ({}, {"branch": "new"}):
        with pytest.raises(PushError, match="not a MoEfied model .*config.json.*overwrite"):
            push_to_hub(folder, REPO, **settings)
    assert len(server.repos[REPO].commits) == 1 and not (folder / "README.md").exists()
    push_to_hub(folder, REPO, overwrite=True)
    assert "model.safetensors" in server.repos[REPO].revisions["main"]


def test_refuses_without_a_token(server, folder, monkeypatch):
    with pytest.raises(PushError, match=f"cannot push to {REPO}: .*401|cannot push to {REPO}: .*token"):
        push_to_hub(folder, REPO, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="there is no token"):
        push_to_hub(folder, REPO)
    assert not server.repos and not (folder / "README.md").exists()


def test_refuses_what_fails_verification(server, folder, monkeypatch):
    def fails(*args):
        raise VerificationError("outputs differ")

    monkeypatch.setattr(hub, "verify", fails)
    with pytest.raises(PushError, match="moe was not pushed: outputs differ"):
        push_to_hub(folder, REPO)
    assert not server.repos


def test_bad_input_is_found_first(server, folder, saved, tmp_path):
    with pytest.raises(ValueError, match="'bert-moe' is no repository"):
        push_to_hub(folder, "bert-moe")
    with pytest.raises(ValueError, match="is not MoEfied"):
        push_to_hub(tiny_model("bert"), REPO)
    with pytest.raises(ValueError, match="unknown part 'licence'"):
        push_to_hub(folder, REPO, facts={"licence": "mit"})
    with pytest.raises(ValueError, match="sweep must be a Sweep"):
        push_to_hub(folder, REPO, facts={"sweep": {"rows": []}})
    with pytest.raises(ValueError, match="merge_and_unload"):
        push_to_hub(get_peft_model(tiny_model("bert", HEAD), LoraConfig(target_modules=["query"])), REPO)
    with pytest.raises(FileExistsError, match="moe exists"):
        push_to_hub(saved[0], REPO, folder=folder)
    assert not server.requests


BREAKS = {
    "create-401": ("fail", ("POST", "/repos/create", 401), "401"),
    "upload-503": ("fail", ("PUT", "/lfs-storage/", 503, 12), "uploading .*503"),
    "upload-dropped": ("drop", ("PUT", "/lfs-storage/", 12), "uploading"),
    "commit-409": ("fail", ("POST", "/commit/main", 409), "409"),
    "commit-500": ("fail", ("POST", "/commit/main", 500), "500"),
    "commit-dropped": ("drop", ("POST", "/commit/main"), "disconnected"),
}


@pytest.mark.parametrize(("how", "where", "message"), BREAKS.values(), ids=BREAKS)
def test_a_push_that_was_cut_off_is_repeated(server, folder, how, where, message):
    getattr(server, how)(*where)
    with pytest.raises(PushError, match=rf"(?s){message}.*moe is complete .*moefy push .*moe {REPO}"):
        push_to_hub(folder, REPO)
    assert REPO not in server.repos or not server.repos[REPO].commits
    assert (folder / "README.md").exists() and (folder / "model.safetensors").exists()
    push_to_hub(folder, REPO)
    assert len(server.repos[REPO].commits) == 1 and "model.safetensors" in server.repos[REPO].revisions["main"]


def test_the_way_to_repeat_a_push_is_complete(server, folder):
    server.fail("POST", "/commit/k2", 500)
    with pytest.raises(
        PushError, match=r"moefy push \S*moe user/bert-moe --private --branch k2 --message 'Two words'$"
    ):
        push_to_hub(folder, REPO, private=True, branch="k2", message="Two words")


def test_what_the_client_repeats_itself_goes_through(server, folder):
    server.fail("PUT", "/lfs-storage/", 503, 2)
    push_to_hub(folder, REPO)
    assert len(server.repos[REPO].commits) == 1


def test_the_command(server, folder, capsys):
    main(["push", str(folder), REPO, "--private", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["commit"] == server.repos[REPO].commits[0].oid and REPO in found["url"]
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(folder), "bert-moe"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("moefy push: 'bert-moe' is no repository")
