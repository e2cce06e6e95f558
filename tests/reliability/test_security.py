"""No code from files, no tokens in files, and no answers without a token."""

import ast
import io
import logging
import pickle
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from conftest import letters

from es_trainer.agents.openai_api import make_app
from es_trainer.run.checkpoint import write_checksums


PACKAGE = Path(__file__).parents[2] / "es_trainer"
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


# ---- pickles ----

UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load"}
# Functions that are sent to the workers of this run through pipes
FROM_OWN_PROCESSES = {"rewards/pool.py", "rewards/pool_server.py", "rewards/workers.py"}


def calls(file: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """The functions that a file calls by a dotted name, with their keyword arguments."""
    nodes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}) for node in nodes]


def test_nothing_from_files_is_unpickled():
    loads = 0
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        for function, arguments in calls(file):
            if function == "torch.load":
                loads += 1
                assert ast.unparse(arguments["weights_only"]) == "True", name
            assert function not in UNPICKLING or name in FROM_OWN_PROCESSES, name
            assert "allow_pickle" not in arguments, name
    assert loads >= 2


class Malicious:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def torch_file(thing: Malicious) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "write", "refused"),
    [
        ("optimizer/.metadata", pickle.dumps, True),
        ("optimizer/__0_0.distcp", torch_file, True),
        ("scheduler.pt", torch_file, True),
        ("rng_state.pth", torch_file, True),
        ("pytorch_model.bin", torch_file, True),  # in place of model.safetensors
        ("optimizer.pt", torch_file, True),  # of an earlier version, in place of the folder
        ("training_args.bin", torch_file, False),  # which nobody reads
    ],
)
def test_a_malicious_pickle_in_a_checkpoint_is_not_run(trainer, tmp_path, name, write, refused):
    trainer(**SAVED).train()
    checkpoint, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "mark"
    pickle.loads(write(Malicious(mark))) if write is pickle.dumps else torch.load(
        io.BytesIO(write(Malicious(mark))), weights_only=False
    )
    assert mark.exists()  # it is malicious
    mark.unlink()
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    if name == "optimizer.pt":
        for file in (checkpoint / "optimizer").iterdir():
            file.unlink()
        (checkpoint / "optimizer").rmdir()
    (checkpoint / name).write_bytes(write(Malicious(mark)))
    write_checksums(checkpoint)  # whoever writes the one writes the other
    resumed = trainer(**SAVED)
    if refused:
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            resumed.train(resume_from_checkpoint=str(checkpoint))
    else:
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()


# ---- tokens ----

TOKENS = {
    "HF_TOKEN": "hf_TokenOfTheEnvironment",
    "VLLM_API_KEY": "vllm-token-of-the-servers",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-token-of-the-judge",
}
GIVEN = {"hub_token": "hf_TokenOfTheConfig", "model_init_kwargs": {"token": "hf_TokenOfTheModel"}}


def contents(file: Path) -> bytes:
    data = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            data += b"".join(map(archive.read, archive.namelist()))
    return data


def assert_nowhere(tokens: list[str], folder: Path, *texts: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    for token in tokens:
        assert [str(file) for file in files if token.encode() in contents(file)] == []
        assert all(token not in text for text in texts)


def test_tokens_are_in_no_file_and_no_log(trainer, tmp_path, monkeypatch, caplog, capsys):
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    caplog.set_level(logging.INFO)
    options = {**SAVED, **GIVEN, "log_completions": True, "report_to": ["tensorboard", "wandb"]}
    run = trainer(**options)
    run.train()
    run.save_model()
    run.save_state()
    run.create_model_card()
    import wandb

    wandb.finish()
    assert (tmp_path / "run" / "README.md").is_file() and list(tmp_path.rglob("*.parquet"))
    tokens = [*TOKENS.values(), GIVEN["hub_token"], GIVEN["model_init_kwargs"]["token"]]
    printed = capsys.readouterr()
    shown = repr(run.args), str(run.args), run.args.to_json_string(), str(run.args.to_sanitized_dict())
    assert_nowhere(tokens, tmp_path, caplog.text, printed.out, printed.err, *shown)
    assert run.args.hub_token == GIVEN["hub_token"]  # as it was given, for those who use it


def test_the_keys_of_programs_are_in_no_file_and_no_log(trainer, tmp_path, caplog, capsys):
    keys = []
    caplog.set_level(logging.DEBUG)

    def program(example, endpoint):
        keys.append(endpoint.api_key)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        body = {"model": endpoint.model, "prompt": example["prompt"]}
        reply = httpx.post(f"{endpoint.base_url}/completions", json=body, headers=headers, timeout=60)
        return {"reward": letters([reply.json()["choices"][0]["text"]])[0], "note": "done"}

    run = trainer(reward_funcs=None, agent_func=program, log_completions=True, **SAVED)
    run.train()
    run.save_model()
    run.backend.answers._server.stop()
    printed = capsys.readouterr()
    assert len(set(keys)) == len(keys) > 0
    assert_nowhere(keys, tmp_path, caplog.text, printed.out, printed.err)


# ---- servers ----


def requests_of(app) -> list[tuple[str, str]]:
    """Every method and path of an app."""
    return [(method, route.path) for route in app.routes if hasattr(route, "methods") for method in route.methods]


def test_every_route_of_the_model_server_needs_the_key_of_a_program(trainer):
    found = []

    def program(example, endpoint):
        if not found:
            app = make_app(run.backend.answers._server)
            for method, path in requests_of(app):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": endpoint.api_key}):
                    url = endpoint.base_url.removesuffix("/v1") + path
                    reply = httpx.request(method, url, json={"model": "policy"}, headers=headers, timeout=60)
                    found.append((method, path, reply.status_code))
        return 1.0

    # The program asks for nothing that is answered
    run = trainer(reward_funcs=None, agent_func=program, agent_errors="none", max_steps=1)
    run.train()
    run.backend.answers._server.stop()
    assert len(found) >= 9
    assert {status for _, _, status in found} == {401}, found


def test_every_route_of_a_vllm_server_needs_its_token(monkeypatch):
    """The routes of vLLM itself are asked in tests/with_vllm."""
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from es_trainer.cli.vllm_serve import require_token

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    app = FastAPI()
    for path in ("/health", "/collective_rpc", "/v1/models", "/reset_prefix_cache", "/anything/new"):
        app.add_api_route(path, lambda: "answer", methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])
    app.middleware("http")(require_token)
    with TestClient(app) as client:
        for method, path in requests_of(app):
            expected = 200 if path == "/health" else 401
            for headers in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": "secret"}):
                assert client.request(method, path, headers=headers).status_code == expected or method == "HEAD"
            allowed = client.request(method, path, headers={"Authorization": "Bearer secret"})
            assert allowed.status_code == 200
