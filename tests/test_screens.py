"A person at a terminal gets tables and progress by rich, a pipe or a file the plain text."
import os, re, subprocess, sys, threading
import pytest
import child

pty = pytest.importorskip("pty", reason="terminals of this kind are Unix's")
CODES = re.compile(r"\x1b\[[?\d;]*[A-Za-z]") # colours, the cursor

@pytest.fixture(scope="module", autouse=True)
def warm(): child.warm()

def at_a_terminal(argv, folder, fds=(1, 2), before=lambda: None, **env):
    "What a command left, and what stood on the terminal that was its output, its error stream, or both"
    ours, theirs = pty.openpty()
    seen = []
    def look():
        try:
            while part := os.read(ours, 4096): seen.append(part)
        except OSError: pass # the other end was closed
    def connect():
        for fd in fds: os.dup2(theirs, fd)
        before()
    eye = threading.Thread(target=look)
    eye.start()
    done = child.run(argv, folder, before=connect, env=dict(TERM="xterm", COLUMNS="80") | env)
    os.close(theirs)
    eye.join()
    os.close(ours)
    return done, b"".join(seen).decode()

def test_doctor_and_data_are_tables(tmp_path):
    for argv, heads in (("doctor", ["packages", "devices", "files"]), ("data", []), ("data voc", [])):
        (done, screen), plain = at_a_terminal(argv, tmp_path), child.run(argv, tmp_path)
        assert done.code == plain.code == 0
        shown = [line.rstrip() for line in CODES.sub("", screen).splitlines()]
        assert all(len(line) <= 80 for line in shown) and all(head in shown for head in heads)
        assert not set(heads) & set(plain.out.splitlines()) and not CODES.search(plain.out)
        assert re.sub(r"\s", "", plain.out) == re.sub(r"\s", "", "".join(s for s in shown if s not in heads)), argv
        assert ("\x1b[32mok" in screen) == (argv == "doctor")

def test_without_colours_for_those_who_ask(tmp_path):
    _, screen = at_a_terminal("doctor", tmp_path, NO_COLOR="1")
    assert "packages" in screen and not re.search(r"\x1b\[3\dm", screen)

EVALUATE = "evaluate scenes --model scenes_dino --limit 3 --layer 3 --scalar sum"

def test_an_evaluation_shows_how_far_it_is_and_ends_in_a_table(tmp_path):
    plain = child.run(f"{EVALUATE} --out plain", tmp_path)
    done, screen = at_a_terminal(f"{EVALUATE} --out both", tmp_path, COLUMNS="120")
    assert (plain.code, done.code) == (0, 0) and not CODES.search(plain.out + plain.err)
    shown = CODES.sub("", screen)
    assert re.search(r"images ━+ 3/3", shown) and "──" in shown
    numbers = lambda text: re.findall(r"-?\d+\.\d", text)
    assert numbers(plain.out) == numbers(shown.partition("U.mIoU")[2])
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l") # the cursor is there again

def test_each_stream_is_asked_by_itself(tmp_path):
    done, screen = at_a_terminal(f"{EVALUATE} --out half", tmp_path, fds=(2,))
    assert "3/3" in screen and "U.mIoU" not in screen
    assert done.out == child.run(f"{EVALUATE} --out whole", tmp_path).out

def test_an_interrupt_leaves_the_terminal_in_order(tmp_path):
    def interrupted(run, row): raise KeyboardInterrupt
    def before():
        from ultra_nb.records import Run
        Run.add = interrupted
    done, screen = at_a_terminal(f"{EVALUATE} --out run", tmp_path, before=before)
    assert done.code == 130 and CODES.sub("", screen).splitlines()[-1] == "ultra-nb: interrupted"
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")

def test_help_needs_neither_torch_nor_rich():
    code = "import sys\nfrom ultra_nb.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "assert not {'torch', 'rich', 'tqdm'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "doctor" in done.stdout, done.stderr
