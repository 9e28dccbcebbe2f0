"""A shared search whose study is in PostgreSQL, on a server started for it and thrown away."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from bowls import SPACE, Dying, bowl
from tiny import run_in

from deltaloom.core.run import Workers
from deltaloom.search._study import Study

psycopg = pytest.importorskip("psycopg")


def binaries():
    """The folder of initdb and postgres; None where there is no server."""
    asked = shutil.which("pg_config")
    found = [Path(subprocess.check_output([asked, "--bindir"], text=True).strip())] if asked else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((one for one in found if (one / "initdb").exists()), None)


@pytest.fixture(scope="module")
def url():
    where = binaries()
    if where is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    home = Path(tempfile.mkdtemp(prefix="deltaloom-pg-"))
    user = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        names = [entry.pw_name for entry in pwd.getpwall()]
        user = {"user": "postgres" if "postgres" in names else "nobody"}
        shutil.chown(home, user["user"])
    quiet = {"stdout": subprocess.DEVNULL, "cwd": home, **user}
    new = ["--auth=trust", "--username=me", "--no-sync", "-D", home / "data"]
    subprocess.run([where / "initdb", *new], check=True, **quiet)
    how = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", home]
    with open(home / "log", "w") as log:
        command = [where / "postgres", "-D", home / "data", *how]
        server = subprocess.Popen(command, stderr=log, **quiet)
    try:
        for _ in range(200):
            try:
                psycopg.connect(f"host={home} user=me dbname=postgres").close()
                break
            except psycopg.OperationalError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        yield f"postgresql+psycopg://me@/postgres?host={home}"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients to leave
        server.wait(20)
        shutil.rmtree(home)


def test_workers_share_a_search_and_one_is_killed(url, tmp_path, monkeypatch):
    import optuna

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)

    def explored(folder, attempt, workers):
        with run_in(folder, seed=1) as run:
            run.workers = Workers(workers)
            how = {"storage": url, "ahead": 2}
            return Study(run, SPACE, {"loss": "lower"}, 6, **how).explore(attempt)

    found = explored(tmp_path / "run", Dying(bowl, tmp_path, {"trial-4": 1}), 2)
    assert (tmp_path / "died-trial-4-0").exists()
    assert [trial.number for trial in found if trial.failed is None] == list(range(6))
    (name,) = optuna.get_all_study_names(url)
    kept = optuna.load_study(study_name=name, storage=url).trials
    assert {one.state.name for one in kept} == {"COMPLETE"}
    assert sorted(one.value for one in kept) == sorted(one.values["loss"] for one in found)

    def never(settings, run):
        raise AssertionError("done already")

    # Run and scratch are lost: the database has it all.
    assert explored(tmp_path / "elsewhere", never, 0) == found
