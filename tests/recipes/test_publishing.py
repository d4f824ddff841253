"""A recipe's last step: its checkpoint on the Hub, a loopback one here."""

from huggingface_hub import ModelCard

from moefy_hf.hub import push as hub

REPO = "user/movies-moe"
ONE_STEP = {"max_steps": 1, "splitter": "random", "router": "random", "allocation": "uniform"}


def test_a_finished_run_is_pushed_when_asked(recipe, server, tmp_path, monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(hub, "verify", lambda folder, *others: checked.append(folder.name))
    recipe(tmp_path / "run", **ONE_STEP)
    assert not server.requests
    recipe(tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", REPO, "--recovery_epochs", "1", **ONE_STEP)
    assert "sweep.json: done before, skipped" in capsys.readouterr().out and checked == ["recovered"]
    files = server.repos[REPO].revisions["main"]
    assert len(server.repos[REPO].commits) == 1
    assert {"config.json", "model.safetensors", "tokenizer.json", "moefication_facts.json"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "movies-moe" and f'from_pretrained("{REPO}"' in card.text
    assert str(tmp_path) not in card.content + files["moefication_facts.json"].decode()


def test_what_would_stop_the_push_is_found_before_training(recipe, refused, server, tmp_path, monkeypatch):
    with refused("hub_model_id, 'owner/name' of the repository; got 'movies'"):
        recipe(tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", "movies", **ONE_STEP)
    monkeypatch.delenv("HF_TOKEN")
    with refused("there is no token"):
        recipe(tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", REPO, **ONE_STEP)
    assert not (tmp_path / "run").exists()
