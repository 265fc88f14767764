"""What the command line understands before anyone is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from udf.cli import asking, commands, show
from udf.errors import UserError

from .conftest import Command


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["ro"], {"ro": ""}),
        (["a=1,b=2", "c"], {"a": "1", "b": "2", "c": ""}),
        ([r"name=a\,b,x=\\"], {"name": "a,b", "x": "\\"}),
        ([r"path=C\d"], {"path": r"C\d"}),
        (["cmd=a=b"], {"cmd": "a=b"}),
        ([",,ro,"], {"ro": ""}),
        ([], {}),
    ],
)
def test_options_are_split_at_commas(given: list[str], options: dict[str, str]) -> None:
    assert asking.options_of(given) == options


def test_option_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="needs a name"):
        asking.options_of(["=3"])


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("none", None),
        ("/srv/x", "/srv/x"),
        ("data", "/base/data"),
        ("../data/", "/data"),
        ("host:dir/file", "host:dir/file"),
        ("https://example.org/x", "https://example.org/x"),
        ("./a:b.img", "/base/a:b.img"),
    ],
)
def test_source_is_absolute_unless_it_is_no_path(
    source: str, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/base")
    assert commands._absolute_source(source) == meant


def test_mountpoint_is_resolved_through_links_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    (real / "mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("link/mnt")
    monkeypatch.chdir(real)
    for given in ("mnt", "mnt/", "./mnt/.", "../link/mnt", f"{tmp_path}/direct", "mnt/../mnt"):
        assert asking.absolute_mountpoint(given) == str(real / "mnt"), given
    monkeypatch.chdir(real / "mnt")
    assert asking.absolute_mountpoint(".") == str(real / "mnt")
    assert asking.absolute_mountpoint("/") == "/"


def test_mountpoint_that_is_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="too many symbolic links"):
        asking.absolute_mountpoint(str(tmp_path / "a"))


def test_duration_has_two_units() -> None:
    assert [show.duration(s) for s in (0, 59.9, 61, 3600 * 5 + 120, 86400 * 3 + 7200)] == [
        "0s",
        "59s",
        "1m 1s",
        "5h 2m",
        "3d 2h",
    ]


def test_nothing_that_a_terminal_obeys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show.line("name\x1b[2J\n\udcff")
    show.table(("A",), [("\x07bell",)])
    assert capsys.readouterr().out == "name\\x1b[2J\\n\\udcff\nA\n\\x07bell\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("mount",),
        ("mount", "-o"),
        ("umount",),
        ("umount", "a", "b"),
        ("status", "--nonsense"),
        ("trace",),
    ],
)
def test_usage_is_one_sentence_and_exit_code_2(udf: Command, arguments: tuple[str, ...]) -> None:
    assert "--help" in udf.refused(*arguments, code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("mount", "a", "b", "c"),
        ("mount", "-t", "x", "--exec", "y {mountpoint}", "m"),
        ("mount", "m"),
        ("mount", "-t", "x", "m", "-o", "=1"),
        ("mount", "-f", "-t", "x", "m", "--socket", "/nowhere"),
    ],
)
def test_contradictory_mount_is_refused(udf: Command, arguments: tuple[str, ...], tmp_path: Path) -> None:
    udf.refused(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("events",),
        ("events", "-f"),
        ("drivers",),
        ("trace", "m"),
        ("umount", "m"),
        ("mount", "-t", "x", "m"),
    ],
)
def test_no_daemon_on_the_socket_is_exit_code_3(runtime_dir: Path, arguments: tuple[str, ...]) -> None:
    sentence = Command(runtime_dir / "nobody").refused(*arguments, code=3)
    assert "udf daemon" in sentence


def test_status_imports_neither_trio_nor_pyfuse3(runtime_dir: Path) -> None:
    code = (
        "import sys; from udf.cli import main; main(['status', '--socket', '/nowhere']);"
        "print([m for m in ('trio', 'pyfuse3', 'msgspec', 'asyncio') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_reader_that_goes_away_is_no_traceback(udf: Command) -> None:
    """`udf doctor | true` used to be the classic way to a BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(udf.argv("doctor"), stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


def test_relative_path_in_a_directory_that_is_gone(udf: Command, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {' '.join(udf.argv('umount', 'mnt'))}"
    result = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result
    assert result.stderr.startswith("udf: mnt is relative"), result
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [("umount",), ("trace",), ("mount", "-t", "hello")])
def test_name_that_is_not_utf8_is_refused_in_a_sentence(udf: Command, words: tuple[str, ...]) -> None:
    """`udf mount` with such a mountpoint used to end with a line of a traceback."""
    assert "UTF-8" in udf.refused(*words, "/tmp/udf-\udcff")
