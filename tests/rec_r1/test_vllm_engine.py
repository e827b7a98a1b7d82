"""What can be tested of vLLM where it is not installed: lengths, the importance ratio, checks of a server, and errors.

test_vllm.py runs vLLM itself.
"""

import http.server
import logging
import re
import threading
from types import SimpleNamespace

import pytest

from rec_r1 import config
from rec_r1.config import UserError
from rec_r1.generation import generation_config, importance_ratio, sampling_of
from rec_r1.generation.vllm_engine import blaming_vllm, check_server, greedy_options, serve_command, server_url
from rec_r1.pages import figures, plots, run_report
from rec_r1.trl_options import fill_in_vllm_length, refusals

TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0, bos_token_id=None)

pytestmark = pytest.mark.curves


def settings(**more):
    """The options of `trl.GRPOConfig` that these functions read, with TRL's defaults."""
    given = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": None, "max_completion_length": 16,
        "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000,
        "device": SimpleNamespace(type="cuda"), "vllm_importance_sampling_correction": True,
    }  # fmt: skip
    return SimpleNamespace(**given | more)


def test_these_are_options_of_trl():
    from trl import GRPOConfig

    fields = GRPOConfig.__dataclass_fields__
    for name, value in vars(settings()).items():
        if name not in ("device", "use_vllm", "max_completion_length"):
            assert fields[name].default == value, name


def test_the_longest_prompt_sets_the_context_of_vllm():
    args = settings()
    assert fill_in_vllm_length(args, 84) == 100 and args.vllm_max_model_length == 100
    enough = settings(vllm_max_model_length=4096)
    assert fill_in_vllm_length(enough, 84) == 100 and enough.vllm_max_model_length == 4096
    with pytest.raises(UserError, match=r"grpo\.vllm_max_model_length: 99: .* 84 tokens .* up to 16: set .*=100"):
        fill_in_vllm_length(settings(vllm_max_model_length=99), 84)


@pytest.mark.parametrize("more", [{"use_vllm": False}, {"vllm_mode": "server"}])
def test_only_a_colocated_vllm_has_a_context_of_ours(more):
    args = settings(vllm_max_model_length=9, **more)
    assert fill_in_vllm_length(args, 84) == 100 and args.vllm_max_model_length == 9


@pytest.mark.parametrize("means", [[0.105], [0.85] * 30, [1.2], [1.0] * 30 + [0.5] * 10])
def test_a_ratio_far_from_one_is_told(means):
    problem = importance_ratio.far_from_one(means)
    last = means[-10:]
    assert problem is not None and f"is {sum(last) / len(last):.2g} on average" in problem
    assert "grpo.top_p=1" in problem and "near 1" in problem


@pytest.mark.parametrize("means", [[], [1.0], [0.9, 1.1], [0.2] + [1.0] * 30])
def test_a_ratio_near_one_is_not(means):
    assert importance_ratio.far_from_one(means) is None


def test_the_warning_comes_once_and_early(caplog):
    from rec_r1.training.callbacks import ImportanceRatio

    far, short, near = ImportanceRatio(), ImportanceRatio(), ImportanceRatio()
    with caplog.at_level(logging.WARNING):
        for step in range(25):
            far.on_log(None, None, None, {importance_ratio.MEAN: 0.3})
            assert len(caplog.records) == (step >= 9)
            near.on_log(None, None, None, {importance_ratio.MEAN: 1.02})
        short.on_log(None, None, None, {importance_ratio.MEAN: 0.3})
        short.on_log(None, None, None, {"eval/ndcg@10": 0.3})
        assert len(caplog.records) == 1
        for callback in (far, short, near):
            callback.on_train_end(None, None, None)
    assert len(caplog.records) == 2 and "is 0.3 on average over the last 1 logged" in caplog.records[1].getMessage()


def test_the_keys_are_those_that_trl_logs():
    import inspect

    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    for key in (importance_ratio.MEAN, importance_ratio.LEAST, importance_ratio.MOST):
        assert f'"{key}"' in source


def rows(**more):
    return [{"step": step, "reward": 0.1, "completions/mean_length": 7.0} | more for step in range(1, 13)]


def test_the_ratio_is_a_curve_of_runs_with_vllm(tmp_path):
    ratio = {importance_ratio.MEAN: 0.98, importance_ratio.LEAST: 0.5, importance_ratio.MOST: 1.6}
    with_vllm = dict(figures.curves({"run": rows(**ratio)}))
    assert {"mean", "smallest", "largest"} <= set(re.findall(r">(mean|smallest|largest)<", with_vllm[plots.RATIO]))
    assert plots.RATIO not in dict(figures.curves({"run": rows()}))


def test_the_report_says_what_the_ratio_should_be():
    assert importance_ratio.described([0.98, 1.04]) == (
        "1.010 on average, as it should be; from 0.980 to 1.040 in single steps"
    )
    assert "0.105 on average, but should be near 1 (0.9 to 1.1)" in importance_ratio.described([0.1, 0.11])
    recipe = config.load("quickstart")
    for logged, expected in ((rows(**{importance_ratio.MEAN: 0.5}), ["0.500 on average"]), (rows(), [])):
        told = [text for label, text in run_report._facts(recipe, {}, logged, None) if label == "importance ratio"]
        assert [text.partition(",")[0] for text in told] == expected


@pytest.mark.slow
def test_the_picture_of_a_run_has_the_curve_in_a_row_of_its_own(tmp_path):
    import json

    from matplotlib.image import imread

    heights = []
    for name, more in (("without", {}), ("with", {importance_ratio.MEAN: 0.98})):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps(row) for row in rows(**more)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        plots.draw([folder], folder / "reward_curve.png")
        heights.append(imread(folder / "reward_curve.png").shape[0])
    assert heights == [1200, 1600]


def test_greedy_options_say_what_the_closing_evaluation_does():
    more = ["grpo.use_vllm=true", "format.answer=json", "grpo.temperature=0.6", "grpo.top_p=0.9"]
    recipe = config.load("quickstart", [*more, "evaluation.repetition_penalty=1.3", "grpo.generation_kwargs={stop: x}"])
    sampling = sampling_of(recipe)
    options = greedy_options(generation_config(sampling, TOKENIZER, [5]), sampling.end)
    assert options["temperature"] == 0 and options["repetition_penalty"] == 1.3 and options["max_tokens"] == 16
    assert options["stop_token_ids"] == [2, 5]  # the tokenizer's own, and the one that the model's files declare
    assert options["stop"] == ["x", "</answer>"] and options["include_stop_str_in_output"]
    line = sampling_of(config.load("quickstart", ["grpo.use_vllm=true"]))  # No string describes its end.
    assert "stop" not in greedy_options(generation_config(line, TOKENIZER, None), line.end)


def test_the_command_for_a_server_is_the_one_that_trl_names():
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    asked = build_command(ScriptArguments(model="m", max_model_len=700))
    ours = serve_command("m", 700)
    assert ours.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve m --max-model-len 700 ")
    for flag in ("--weight-transfer-config", "--logprobs-mode", "--max-model-len"):
        assert f"{flag} {asked[asked.index(flag) + 1]}" in ours.replace("'", "")


@pytest.fixture
def foreign_server():
    """The address of a web server that is no vLLM server."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_not_there_and_one_that_is_not_vllm(foreign_server):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    args = settings(vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=port)
    with pytest.raises(UserError, match=rf":{port} cannot be reached .* vllm serve org/m --max-model-len 90 "):
        check_server(args, "org/m", 90)
    args = settings(vllm_mode="server", vllm_server_base_url=f"{foreign_server}/")
    assert server_url(args) == foreign_server
    with pytest.raises(UserError, match=f"{foreign_server} answers 404 .* no vLLM server"):
        check_server(args, "org/m", 90)
    args.device.type = "cpu"  # Both problems are told at once.
    with pytest.raises(UserError) as told:
        check_server(args, "org/m", 90)
    first, second = config.problems_of(str(told.value))
    assert "no vLLM server" in first and "needs a CUDA device" in second and "grpo.vllm_mode=colocate" in second


def test_no_server_is_asked_where_none_is_used():
    check_server(settings(), "org/m", 90)
    check_server(settings(use_vllm=False, vllm_mode="server"), "org/m", 90)


def raising(module: str, error: str):
    """A function of a module with this name that raises ``error``."""
    names = {"__name__": module}
    exec(f"def fail():\n    raise {error}", names)
    return names["fail"]


@pytest.mark.parametrize("module", ["vllm", "vllm.v1.engine", "trl.generation.vllm_client"])
@pytest.mark.parametrize("error", ["RuntimeError('no\\nmemory')", "Exception('no memory')", "NotImplementedError"])
def test_every_error_of_vllm_is_a_message(module, error):
    for mode, fix in (("colocate", "grpo.vllm_gpu_memory_utilization"), ("server", "http://0.0.0.0:8000")):
        with pytest.raises(UserError) as told, blaming_vllm(settings(vllm_mode=mode)):
            raising(module, error)()
        assert re.search(rf"grpo\.vllm_mode: {mode}: \w+: (no memory|NotImplementedError): .*{fix}", str(told.value))


def test_no_other_error_is_blamed_on_vllm():
    for module in ("rec_r1.scoring", "vllm_other", "trl.trainer.grpo_trainer"):
        with pytest.raises(RuntimeError, match=r"^no memory$"), blaming_vllm(settings()):
            raising(module, "RuntimeError('no memory')")()
    with pytest.raises(RuntimeError), blaming_vllm(settings(use_vllm=False)):
        raising("vllm", "RuntimeError")()
    with pytest.raises(UserError, match=r"^as it was$"), blaming_vllm(settings()):
        raise UserError("as it was")


def test_a_process_that_has_ended_is_the_error_neither_of_vllm_nor_of_an_option(monkeypatch):
    lost, in_use = "RuntimeError('[gloo/x.cc:1] Connection closed by peer')", "RuntimeError('EADDRINUSE: gloo')"
    for blame in (blaming_vllm, refusals):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match="closed by peer"), blame(settings()):
            raising("trl.generation.vllm_generation", lost)()
        with pytest.raises(UserError, match=r"set MASTER_PORT to a free one"), blame(settings()):
            raising("trl.generation.vllm_generation", in_use)()
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(UserError, match="closed by peer"), blame(settings()):
            raising("trl.generation.vllm_generation", lost)()


@pytest.mark.parametrize("error", ["NotImplementedError", "RuntimeError", "ValueError", "ImportError"])
def test_what_trl_refuses_while_the_trainer_is_built_is_a_message(error):
    with pytest.raises(UserError, match=r"^grpo or lora: not so$"), refusals(settings(use_vllm=False)):
        raising("trl.trainer.grpo_trainer", f"{error}('not so')")()
    with pytest.raises(KeyError), refusals(settings(use_vllm=False)):  # a bug keeps its traceback
        raising("rec_r1.training.trainer", "KeyError('x')")()
