"""The command line as a user meets it: exit codes, JSON, sentences, speed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from deltaloom.cli.arguments import parse_value

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "deltaloom", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENV,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl", 48)
    return home


@pytest.mark.parametrize(
    "words", [["--help"], ["ls"], ["show", "less"], ["show", "ties"], ["schema"]]
)
def test_looking_imports_no_model_library(words):
    code = (
        "import sys; sys.argv = ['deltaloom', *sys.argv[1:]]\n"
        "from deltaloom.cli.main import main\n"
        "code = 0\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'scipy'} & set(sys.modules)\n"
        "print(heavy or '', file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(5):
        before = os.times()
        assert call("--help").returncode == 0
        after = os.times()
        # CPU time of the child: the machine may be busy with the other tests
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 0.5


def test_ls_and_show_speak_json():
    rows = json.loads(call("ls", "--json").stdout)
    verbs = {"select", "tune", "merge", "transfer", "search", "measure"}
    assert verbs == {row["verb"] for row in rows}
    facts = json.loads(call("show", "less", "--json").stdout)
    assert facts["paper"].startswith("Xia et al. 2024")
    assert {row["name"] for row in facts["settings"]} >= {"fraction", "warmup"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tune", "lroa", "data=x"], "no tune method 'lroa'; did you mean 'lora'?"),
        (["tune", "lora", "data"], "'data': settings are written key=value"),
        (["tune", "lora", "data=x", "data=y"], "data: given twice"),
        (["select", "random", "pool=absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["select", "random", "poool=a.jsonl"], "unknown key 'poool'; did you mean 'pool'?"),
        (["select", "random", "pool=a.jsonl", "seed=-1"], "seed = -1: Input should be greater"),
        (["quickstart", "seed=-1"], "seed = -1: must be a whole number from 0"),
        (["run", "absent.yaml"], "absent.yaml: no such file"),
        (["show", "lesss"], "no method 'lesss'; did you mean 'less'?"),
        (["show", "tune.loar"], "no method 'tune.loar'; did you mean 'tune.lora'?"),
        (["show", "measure"], "'measure' is a verb; `deltaloom ls measure` lists its methods"),
        (["check", "absent"], "absent: no such file or folder"),
        (["compare", "absent", "absent"], "holds no run"),
        (["report", "absent"], "absent is no run folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(words, sentence, tmp_path):
    out = call(*words, cwd=tmp_path)
    assert out.returncode == 2
    assert sentence in out.stderr
    assert "Traceback" not in out.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (" [IND]", " [IND]"),
        (" IND", " IND"),
        ("my rows #2.jsonl", "my rows #2.jsonl"),
        ("#2", "#2"),
        ("'a #2'", "a #2"),
        ("[a b, c]", ["a b", "c"]),
        ("3", 3),
        ("", None),
    ],
)
def test_a_text_in_the_shell_is_taken_to_the_letter(word, value):
    assert parse_value(word) == value


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("2", "2")])
def test_merging_starts_no_blas_threads_unless_asked(given, wanted, monkeypatch):
    from deltaloom.cli import main
    from deltaloom.core.errors import InputError

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "restored at the end")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    if given:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    with pytest.raises(InputError):
        main.merge("average", ["base=nothing"])
    assert os.environ["OPENBLAS_NUM_THREADS"] == wanted


def test_usage_errors_exit_with_two():
    assert call("tuen").returncode == 2
    assert call("tune").returncode == 2


def test_json_is_the_only_thing_on_stdout(home, tmp_path):
    out = call(
        "select",
        "random",
        f"pool={home / 'rows.jsonl'}",
        "count=5",
        f"out={tmp_path / 'o'}",
        "--json",
    )
    document = json.loads(out.stdout)
    assert document["status"] == "done"
    assert document["rows"] == 5
    assert document["cost"]["wall_seconds"] > 0


def test_a_nan_loss_exits_with_one_and_names_the_step(home, tmp_path):
    out = call(
        "tune", "full", f"base={home / 'base'}", f"data={home / 'rows.jsonl'}", "lr=1e30",
        "clip=0", f"out={tmp_path / 'o'}",
    )  # fmt: skip
    assert out.returncode == 1
    assert "the loss is nan at step" in out.stderr
    assert "Traceback" not in out.stderr


def start(home, out, *more):
    words = ["tune", "lora", f"base={home / 'base'}", f"data={home / 'rows.jsonl'}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "deltaloom", *words, f"out={out}"],
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def wait_for(path, seconds=60):
    for _ in range(int(seconds * 50)):
        if list(path.parent.glob(path.name)):
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def test_interrupted_and_killed_runs_resume_to_the_same_bytes(home, tmp_path):
    more = ["epochs=60", "save_steps=20", "batch_size=4"]
    whole = start(home, tmp_path / "whole", *more)
    broken = start(home, tmp_path / "broken", *more)
    wait_for(tmp_path / "broken/.work/checkpoints/checkpoint-*")
    second = call(
        "tune", "lora", f"base={home / 'base'}", f"data={home / 'rows.jsonl'}", *more,
        f"out={tmp_path / 'broken'}",
    )  # fmt: skip
    assert second.returncode == 2
    assert "is in use by another run" in second.stderr
    broken.send_signal(signal.SIGTERM)
    assert broken.wait(60) == 130
    assert "takes it up again" in broken.stderr.read()
    again = start(home, tmp_path / "broken", *more)
    time.sleep(4)
    again.kill()
    again.wait(60)
    assert start(home, tmp_path / "broken", *more).wait(120) == 0
    assert whole.wait(120) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "README.md"):
        ours, theirs = ((tmp_path / one / name).read_bytes() for one in ("whole", "broken"))
        assert ours == theirs, name


def test_check_says_what_a_folder_is(home, tmp_path):
    facts = json.loads(call("check", home / "base", "--json").stdout)
    assert facts["kind"] == "model"
    weights = home / "base" / "model.safetensors"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(weights.read_bytes()[:-10])
    out = call("check", broken)
    assert out.returncode == 2
    assert "is cut short" in out.stderr
