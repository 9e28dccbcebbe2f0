"""Run folders: resumed, locked, refused, and never left half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.run import Run

RECIPE = {"steps": [{"tune": {"method": "lora", "lr": 0.1}}]}
INPUTS = {"base": "aaaa", "data d.jsonl": "bbbb"}


def opened(folder, recipe=RECIPE, inputs=INPUTS, seed=0, **options):
    return Run.open(folder, recipe, inputs, seed, **options)


def ends(folder, error, doing=lambda run: None, **options):
    """A run in `folder` that does something and then ends with `error`."""

    def work():
        with opened(folder, **options) as run:
            doing(run)
            raise error

    with pytest.raises(type(error)):
        work()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The record.


def test_the_folder_tells_the_run(tmp_path):
    with opened(tmp_path / "r", seed=3) as run:
        run.note(truncated_rows=2)
        run.finish(loss=0.5)
    record = Run.read(tmp_path / "r")
    assert record["status"] == "done"
    assert (record["recipe"], record["inputs"], record["seed"]) == (RECIPE, INPUTS, 3)
    assert (record["notes"], record["results"]) == ({"truncated_rows": 2}, {"loss": 0.5})
    assert record["versions"]["torch"]
    assert record["cost"]["wall_seconds"] > 0
    assert record["cost"]["peak_rss_bytes"] > 1e6
    assert yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text()) == RECIPE


def test_a_replay_may_say_more_than_the_recipe(tmp_path):
    replay = {"steps": [{"tune": {"data": "/elsewhere"}}]}
    with opened(tmp_path / "r", replay=replay):
        pass
    assert yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text()) == replay
    assert Run.read(tmp_path / "r")["recipe"] == RECIPE


def test_scratch_goes_when_the_run_is_done_and_only_then(tmp_path):
    ends(
        tmp_path / "r",
        WorkError("the loss is nan"),
        lambda run: (run.work / "checkpoint").write_text("x"),
    )
    assert (tmp_path / "r" / ".work" / "checkpoint").exists()
    with opened(tmp_path / "r") as run:
        assert (run.work / "checkpoint").read_text() == "x"
        run.finish()
    assert not (tmp_path / "r" / ".work").exists()


def test_publishing_replaces_what_was_there(tmp_path):
    with opened(tmp_path / "r") as run:
        (run.folder / "model").mkdir()
        (run.folder / "model" / "old").write_text("")
        result = run.work / "result"
        (result / "model").mkdir(parents=True)
        (result / "model" / "new").write_text("")
        (result / "a.json").write_text("{}")
        run.publish(result)
        assert names(run.folder / "model") == ["new"]
        assert (run.folder / "a.json").exists()


# Taken up again.


def test_a_done_run_is_found_done_and_not_written_again(tmp_path):
    with opened(tmp_path / "r") as run:
        run.finish(loss=1.0)
    before = (tmp_path / "r" / "run.json").read_bytes()
    with opened(tmp_path / "r") as run:
        assert run.done
        assert run.record["results"] == {"loss": 1.0}
    assert (tmp_path / "r" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "status"),
    [(WorkError("the loss is nan"), "failed"), (KeyboardInterrupt("stop"), "interrupted")],
)
def test_how_it_ended_is_recorded_and_the_run_goes_on(tmp_path, error, status):
    ends(tmp_path / "r", error)
    record = Run.read(tmp_path / "r")
    assert (record["status"], record["error"]) == (status, str(error))
    with opened(tmp_path / "r") as run:
        assert Run.read(tmp_path / "r")["status"] == "running"
        assert "error" not in run.record
        run.finish()
    assert "error" not in Run.read(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"recipe": {"steps": [{"tune": {"method": "lora", "lr": 0.2}}]}},
            r"recipe\.steps\.0\.tune\.lr: 0\.1 there, 0\.2 here\)",
        ),
        ({"recipe": {**RECIPE, "base": "b"}}, "recipe.base: None there, 'b' here"),
        ({"inputs": {**INPUTS, "base": "cccc"}}, "inputs.base: 'aaaa' there, 'cccc' here"),
        ({"inputs": {"base": "aaaa"}}, "inputs.data d.jsonl: 'bbbb' there, None here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, change, said):
    with opened(tmp_path / "r") as run:
        run.finish()
    before = {name: (tmp_path / "r" / name).read_bytes() for name in names(tmp_path / "r")}
    with pytest.raises(InputError, match=f"holds another run .*{said}") as caught:
        opened(tmp_path / "r", **change)
    assert str(tmp_path / "r") in str(caught.value)
    assert "choose another out= or remove that folder" in str(caught.value)
    assert {name: (tmp_path / "r" / name).read_bytes() for name in before} == before
    opened(tmp_path / "r").__exit__(None, None, None)  # the lock was let go


def test_an_editable_run_takes_another_recipe_but_forgets_no_cost(tmp_path):
    with opened(tmp_path / "r", editable=True) as run:
        run.spend(flops=5.0)
        run.finish()
    other = {"steps": [*RECIPE["steps"], {"measure": {"method": "loss"}}]}
    with opened(tmp_path / "r", recipe=other, editable=True) as run:
        assert not run.done
        assert run.record["cost"]["flops"] == 5.0
        run.finish()
    assert Run.read(tmp_path / "r")["recipe"] == other
    with pytest.raises(InputError, match=r"different inputs.base"):
        opened(tmp_path / "r", recipe=other, inputs={"base": "x"}, editable=True)


def test_costs_add_up_and_peaks_stay_the_largest(tmp_path):

    def work(run):
        run.spend(flops=2.0, peak_device_bytes=9.0)
        time.sleep(0.05)

    ends(tmp_path / "r", WorkError("stop"), work)
    first = Run.read(tmp_path / "r")["cost"]
    with opened(tmp_path / "r") as run:
        run.spend(flops=3.0, peak_device_bytes=4.0)
        time.sleep(0.05)
        run.finish()
    second = Run.read(tmp_path / "r")["cost"]
    assert (second["flops"], second["peak_device_bytes"]) == (5.0, 9.0)
    assert first["wall_seconds"] >= 0.05
    assert 0.1 <= second["wall_seconds"] < 5
    assert second["cpu_seconds"] >= first["cpu_seconds"] > 0


# Parts.


def test_a_part_writes_inside_and_shares_ledger_log_and_scratch(tmp_path):
    with opened(tmp_path / "r") as run:
        part = run.part("base--d")
        part.spend(flops=1.0)
        part.log(step=1)
        part.note(rows=3)
        assert part.folder == tmp_path / "r" / "base--d"
        assert part.folder.is_dir()
        assert (part.work, part.seed) == (run.work, run.seed)
        assert run.part(".work/evaluation").folder == run.work / "evaluation"
        run.finish()
    record = Run.read(tmp_path / "r")
    assert (record["cost"]["flops"], record["notes"]) == (1.0, {"rows": 3})
    assert lines(tmp_path / "r") == [{"step": 1}]


def test_time_is_counted_once_whoever_saves(tmp_path):
    start = time.perf_counter()
    with opened(tmp_path / "r") as run:
        part = run.part("a")
        time.sleep(0.2)
        part.save()
        run.save()
        part.save()
        run.finish()
    elapsed = time.perf_counter() - start
    assert Run.read(tmp_path / "r")["cost"]["wall_seconds"] <= elapsed


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../b", "..", ""])
def test_no_part_escapes_its_folder(tmp_path, name):
    with opened(tmp_path / "r") as run:
        with pytest.raises(InputError, match="cannot name a folder inside"):
            run.part(name)
        run.finish()


# Metrics.


def test_rewinding_forgets_what_will_be_logged_again(tmp_path):
    with opened(tmp_path / "r") as run:
        run.rewind(0)
        run.log(text="no\u2028step")
        for step in (1, 2, 3):
            run.log(step=step, loss=1 / step)
        run.rewind(2)
        run.log(step=3, loss=9.0)
    kept = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open(newline="\n")]
    assert [line.get("step") for line in kept] == [None, 1, 2, 3]
    assert kept[-1]["loss"] == 9.0


def test_a_line_cut_short_does_not_stop_the_resumption(tmp_path):
    with opened(tmp_path / "r") as run:
        run.log(step=1, loss=0.5)
        with open(tmp_path / "r" / "metrics.jsonl", "ab") as file:
            file.write(b'{"step":2,"text":"\xc3')
        run.rewind(5)
        run.log(step=2, loss=0.25)
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2]


# Bad input leaves nothing, and touches nothing of the user's.


def test_bad_input_leaves_no_folder(tmp_path):
    ends(tmp_path / "deep" / "r", InputError("d.jsonl line 2: not JSON"))
    assert not (tmp_path / "deep" / "r").exists()


def test_bad_input_leaves_no_empty_folders_inside_either(tmp_path):
    def work(run):
        run.part("base--d")
        (run.work / "checkpoints").mkdir()
        run.log(step=1)

    ends(tmp_path / "r", InputError("bad"), work)
    assert not (tmp_path / "r").exists()


def test_bad_input_leaves_a_folder_that_was_there(tmp_path):
    ends(tmp_path, InputError("bad"))
    assert names(tmp_path) == []


def test_bad_input_after_work_was_done_keeps_the_work(tmp_path):
    ends(
        tmp_path / "r",
        InputError("row 900: has no answer"),
        lambda run: (run.work / "shard").write_text("x"),
    )
    assert Run.read(tmp_path / "r")["status"] == "failed"
    with opened(tmp_path / "r") as run:
        assert (run.work / "shard").exists()


def test_bad_input_in_a_later_step_keeps_the_recipe_resumable(tmp_path):
    folder = tmp_path / "r"

    def first_step(run):
        with opened(folder / "first") as step:
            step.finish()

    ends(folder, InputError("second: no such file"), first_step, inputs={}, editable=True)
    assert Run.read(folder)["status"] == "failed"
    with opened(folder, inputs={}, editable=True) as run:
        with opened(folder / "first") as step:
            assert step.done
        run.finish()


def test_bad_input_on_resumption_keeps_the_earlier_record(tmp_path):
    ends(tmp_path / "r", KeyboardInterrupt())
    ends(tmp_path / "r", InputError("the pool is gone"))
    assert Run.read(tmp_path / "r")["error"] == "the pool is gone"


def test_bad_input_never_removes_a_users_file(tmp_path):
    ends(
        tmp_path / "r",
        InputError("bad"),
        lambda run: (run.folder / "mine.txt").write_text("mine"),
    )
    assert (tmp_path / "r" / "mine.txt").read_text() == "mine"


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run; choose another out="):
        opened(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "r").write_text("mine")
    for folder in (tmp_path / "r", tmp_path / "r" / "inside"):
        with pytest.raises(InputError, match=r"cannot be made a run folder.*choose another out="):
            opened(folder)
    assert (tmp_path / "r").read_text() == "mine"


# Records that cannot be read.


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} holds no run"):
        Run.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 1,\n"status": }', "run.json line 2: not JSON"),
        ("[]", "run.json: schema None, this version reads 1"),
        ('{"schema": 7}', "run.json: schema 7, this version reads 1"),
        ('{"schema": 1, "status": "done"}', "run.json: 'recipe' is missing"),
    ],
)
def test_a_broken_record_is_named_and_not_overwritten(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    for _ in range(2):  # the second time shows that the lock was let go
        with pytest.raises(InputError, match=said):
            opened(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


# Other processes.

WORKER = """
import sys, time
from deltaloom.core.run import Run
with Run.open(sys.argv[1], {"steps": []}, {}) as run:
    (run.work / "shard-0").write_text("whole")
    run.log(step=1)
    run.spend(flops=7.0)
    run.save()
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path):
    """A process that works in tmp_path / "r" until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "working\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_while_the_first_works(tmp_path, worker):
    before = (tmp_path / "r" / "run.json").read_bytes()
    with pytest.raises(InputError, match="r is in use by another run; wait for it or choose"):
        Run.open(tmp_path / "r", {"steps": []}, {})
    assert (tmp_path / "r" / "run.json").read_bytes() == before
    assert worker.poll() is None


def test_kill_9_leaves_a_resumable_folder(tmp_path, worker):
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    with Run.open(tmp_path / "r", {"steps": []}, {}) as run:
        assert (run.work / "shard-0").read_text() == "whole"
        assert run.record["cost"]["flops"] == 7.0
        run.finish()
    assert Run.read(tmp_path / "r")["status"] == "done"


def test_a_second_opening_in_one_process_is_refused_too(tmp_path):
    with opened(tmp_path / "r"), pytest.raises(InputError, match="in use by another run"):
        opened(tmp_path / "r")


def test_a_kill_before_the_first_record_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.part").write_text('{"sch')
    with opened(tmp_path) as run:
        run.finish()
    assert Run.read(tmp_path)["status"] == "done"


def test_importing_run_imports_no_model_library():
    code = (
        "import sys, deltaloom.core.run, deltaloom.core.spec, deltaloom.core.estimate;"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
