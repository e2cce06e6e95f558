"""An adapter of PEFT's is trained in the trainer's process, and vLLM servers have the base model."""

import pytest
import tiny
from conftest import assert_same, letters, logs
from datasets import Dataset
from safetensors.torch import load_file
from test_adapter import adapter, quantize, saved
from test_servers import Process, count, running
from watched import Watched, as_text

from es_trainer import replay
from es_trainer.engines.vllm_client import ServerError, ServerLost
from es_trainer.engines.vllm_weights import LoadError


SLOTS = 5  # of which one is the unperturbed adapter's
LORA = ("--enable-lora", "--max-loras", str(SLOTS), "--max-lora-rank", "8")
WATCHED = ("--worker-extension-cls", f"{Watched.__module__}.{Watched.__name__}")

# More than the 128 tokens whose keys and values vLLM caches together
PROMPTS = Dataset.from_list([{"prompt": f"Say {word} " * 20} for word in ("one", "two", "three")])


@pytest.fixture(scope="module")
def servers():
    with running(Process(*LORA), Process(*LORA)) as started:
        yield started


@pytest.fixture
def start(trainer, tmp_path):
    """Make an ESTrainer for a tiny run of an adapter: on servers, or elsewhere if there are none."""

    def make(*servers, **options):
        given = {"model": tiny.tiny_folder(), "peft_config": adapter(), "sigma": 0.1}
        if servers:
            urls = [server.url for server in servers]
            given |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": urls}
            given |= {"output_dir": str(tmp_path / "on servers")}
        made = trainer(**{**given, **options})
        made.delay = 0.0
        made.answered = {server.url: [] for server in servers}
        for server in made.engine.replicas.servers if servers else ():
            count(server, made)
        return made

    return make


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"perturbation": "gaussian", "evaluate_center": True, "es_optimizer": "adam"}, {}),
        (
            {"perturbation": "low_rank", "population_batch_size": 2, "num_generations": 2},
            {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}},
        ),
    ],
)
def test_three_steps_are_those_of_the_trainers_process(servers, start, tmp_path, options, lora):
    options |= {"train_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 1, "population_size": 6}
    mine = start(*servers, peft_config=adapter(**lora), **options)
    theirs = start(peft_config=adapter(**lora), use_vllm=True, **options)
    assert all(parameter.is_meta for name, parameter in mine.model.named_parameters() if "lora_" not in name)
    mine.train()
    theirs.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "reward/center", "update_norm", "distance_from_start", "num_tokens"):
            assert one.get(key) == other.get(key), key
    assert len({log["reward_std"] for log in logs(mine)} - {0.0}) == 3
    evaluations = [[log["eval_reward"] for log in t.state.log_history if "eval_reward" in log] for t in (mine, theirs)]
    assert evaluations[0] == evaluations[1] and len(set(evaluations[0])) > 1
    after = saved(mine, tmp_path / "saved")
    assert_same(after, saved(theirs, tmp_path / "theirs"))
    replayed = replay(tiny.tiny_folder(), mine.args.output_dir)
    replayed.save_pretrained(tmp_path / "replayed")
    assert_same(load_file(tmp_path / "replayed" / "adapter_model.safetensors"), after)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A server with a quantized model in float16, whose slots can be looked into."""
    quantized, _ = quantize(tmp_path_factory.mktemp("models"))
    server = Process(*LORA, *WATCHED, "--dtype", "float16", model=quantized)
    with running(server):
        yield server


@pytest.mark.parametrize(
    "options",
    [{}, {"perturbation": "low_rank", "antithetic": True, "master_weights": "host"}, {"master_weights": "none"}],
)
def test_slots_are_those_of_the_trainers_process(watched, start, tmp_path, options):
    def run(*mode):
        def reward(completions, **kwargs):
            # In float16, the batches of two engines may differ in a token
            rewarded.append(len(rewarded) % 3)
            return [float(rewarded[-1])] * len(completions)

        rewarded = []
        given = {"model": watched.model, "fp16": True, "use_vllm": True, "population_batch_size": 4}
        made = start(*mode, reward_funcs=reward, **given, **options)
        made.train()
        made.evaluate()
        return made

    mine, theirs = run(watched), run()
    (server,) = mine.engine.replicas.servers
    (on_server,) = server.call("slots_as_text")
    here = as_text(theirs.backend.slots)
    # The unperturbed adapter is in the first slot there, and in the last one here
    assert on_server == {name: [slots[-1], *slots[:-1]] for name, slots in here.items()}
    assert all(len(set(slots)) == SLOTS for slots in here.values())
    assert_same(saved(mine, tmp_path / "saved"), saved(theirs, tmp_path / "theirs"))


def test_a_rollout_func_generates_as_the_member(servers, start):
    def rollout_func(prompts, trainer):
        made = trainer.generate(prompts)
        return {key: [each[key] for each in made] for key in ("prompt_ids", "completion_ids")}

    mine, theirs = start(*servers, rollout_func=rollout_func), start()
    mine.train()
    theirs.train()
    for key in ("reward", "reward_std"):
        assert [log[key] for log in logs(mine)] == [log[key] for log in logs(theirs)], key


def test_a_run_goes_on_anywhere(servers, start, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "learning_rate": 1.0}
    whole, theirs = start(servers[0], **options), start(**options)
    whole.train()
    theirs.train()
    assert whole.state.best_global_step == theirs.state.best_global_step < 4
    assert whole.evaluate()["eval_reward"] == theirs.evaluate()["eval_reward"]
    expected = saved(theirs, tmp_path / "theirs")
    assert_same(saved(whole, tmp_path / "whole"), expected)
    for number, (mode, of) in enumerate([(servers, theirs), (servers[:1], whole), ((), whole)]):
        resumed = start(*mode, **options, output_dir=str(tmp_path / f"resumed {number}"))
        resumed.train(resume_from_checkpoint=f"{of.args.output_dir}/checkpoint-2")
        assert_same(saved(resumed, tmp_path / "saved" / str(number)), expected)


def test_a_server_that_is_killed_and_started_anew(servers, start, tmp_path):
    first, second = servers
    seen: dict[int, int] = {}

    def reward(completions, trainer_state, **kwargs):
        step = trainer_state.global_step + 1
        seen[step] = seen.get(step, 0) + 1
        if seen[step] == 1 and step == 2:
            second.kill()
        if seen[step] == 1 and step == 4:
            second.start()
            second.wait()
            mine.delay = 0.5  # or the other would have done everything before this one has the adapter
        return letters(completions)

    reward.__name__ = "letters"
    options = {"population_size": 8, "population_batch_size": 2, "max_steps": 6}
    mine, theirs = start(*servers, reward_funcs=reward, **options), start(**options | {"population_batch_size": 1})
    mine.train()
    theirs.train()
    assert set(seen.values()) == {8}
    steps = mine.answered[second.url]
    assert {1, 6} <= set(steps) and 3 not in steps
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        assert one["reward"] == other["reward"]
    assert_same(saved(mine, tmp_path / "saved"), saved(theirs, tmp_path / "theirs"))


def test_two_trainers_do_not_share_a_server(servers, start, tmp_path):
    mine = start(servers[0])
    before = mine.evaluate()["eval_reward"]
    other = start(servers[0], seed=7, output_dir=str(tmp_path / "other"))
    other.evaluate()
    with pytest.raises(ServerError, match="It has another adapter than this run: another trainer uses it"):
        mine.evaluate()
    # What a server has that was lost is not known
    mine.engine.replicas.servers[0].lose(ServerLost("It does not answer"))
    assert mine.evaluate()["eval_reward"] == before


def test_servers_that_do_not_fit_the_run(servers, watched, start):
    with pytest.raises(ServerError, match="rank of at most 8, but `peft_config` has a rank of 9: .* --max-lora-rank"):
        start(servers[0], peft_config=adapter(rank_pattern={"v_proj": 9}))
    with pytest.raises(ServerError, match="`population_batch_size=5`, but .* for 4 members: .* --max-loras 6 or more"):
        start(servers[0], population_batch_size=5)
    with pytest.raises(LoadError, match="no adapters for 1 of the 3 modules of `peft_config`: lm_head[.]"):
        start(servers[0], peft_config=adapter(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ServerError, match="torch.float32, but the run in bfloat16. Start the server with --dtype"):
        start(servers[0], bf16=True)
    with pytest.raises(ServerError, match=f"{watched.url} has another base model than {servers[0].url}"):
        start(servers[0], watched)
