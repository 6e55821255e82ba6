"""`tunesmith web` as a command: where it listens, what it prints, whom it lets in."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time

import httpx
import pytest
from browser_of_tests import OURS

from tunesmith.cli import app


def test_others_are_let_in_with_accounts_only(tmp_path, capsys):
    for arguments in (["--host", "0.0.0.0"], ["--host", "192.168.1.5"], ["--host", "::"]):
        with pytest.raises(SystemExit) as ended:
            app(["web", "--workspace", str(tmp_path / "w"), *arguments])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert "--users" in said
        assert "Traceback" not in said
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--users", "missing.json"], "There is no file of accounts"),
        (["--add-user", "ann"], "--users FILE"),
        (["--token-env", "NO_SUCH_VARIABLE"], "holds no token"),
        (["--share"], "share"),
        (["--key-env", "JUDGE_KEY"], "JUDGE_KEY=judge.example"),
        (["--key-env", "L=..."], "JUDGE_KEY=judge.example"),
        (["--key-env", "K=judge.example:99999"], "JUDGE_KEY=judge.example"),
        (["--key-env", "K=127.0.0.1"], "K=127.0.0.1:8000"),
        (["--key-env", "K=[::1]"], "K=[::1]:8000"),
    ],
)
def test_a_wrong_start_is_one_clear_error(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app(["web", "--workspace", "w", "--port", "0", *arguments])
    assert ended.value.code in (1, 2)
    assert said in " ".join(capsys.readouterr().err.split())


def test_accounts_may_not_lie_where_users_read(tmp_path, capsys, monkeypatch):
    from tunesmith.ui import accounts

    (tmp_path / "w").mkdir()
    accounts.add(tmp_path / "w" / "users.json", "ann", "password of ann")
    with pytest.raises(SystemExit):
        app(["web", "--workspace", str(tmp_path / "w"), "--users", str(tmp_path / "w" / "users.json")])
    assert "lies in the workspace" in " ".join(capsys.readouterr().err.split())


def test_an_account_is_added_at_a_prompt(tmp_path):
    import typer.testing

    file = tmp_path / "users.json"
    asked = ["web", "--users", str(file), "--add-user", "ann"]
    runner = typer.testing.CliRunner()
    done = runner.invoke(app, asked, input="password of ann\npassword of ann\n")
    assert done.exit_code == 0, done.output
    assert "password of ann" not in done.output
    from tunesmith.ui import accounts

    assert accounts.read(file).is_right("ann", "password of ann")
    assert runner.invoke(app, asked, input="short\nshort\n").exit_code == 1


def test_the_command_listens_here_only_and_ends_at_ctrl_c(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "web", "--port", "0", "--workspace", str(tmp_path / "w")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=OURS,
    )
    try:
        line = next(line for line in started.stderr if "http" in line)
        found = re.search(r"(http://127\.0\.0\.1:(\d+)/)\?token=([\w-]{43})", line)
        assert found, line
        url, port, token = found.groups()
        listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=False)
        if listening.returncode == 0:
            at = [
                row.split()[3] for row in listening.stdout.splitlines() if row.split()[3].endswith(f":{port}")
            ]
            assert at == [f"127.0.0.1:{port}"]
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/").status_code == 401
            began = time.perf_counter()
            assert client.get("/", params={"token": token}, follow_redirects=True).status_code == 200
            assert time.perf_counter() - began < 2
        assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o700
        assert token not in "".join(str(p) for p in (tmp_path / "w").rglob("*"))
        with open(f"/proc/{started.pid}/cmdline", encoding="utf-8") as command:
            assert token not in command.read()
        os.kill(started.pid, signal.SIGINT)
        assert started.wait(20) in (0, 130)
        assert "Traceback" not in started.stderr.read()
    finally:
        started.kill()
        started.wait()
