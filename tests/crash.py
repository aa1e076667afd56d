"""Crash safety: each command dies before, after and in the middle of each of its file operations, and the disk is full.

`python tests/crash.py [--only REGEX] [--jobs 2]` runs every command once, with a layer around the system's file
operations that counts them. Then, for each operation, the same command in a fresh folder: killed before it, killed
after it, killed when half of the bytes of a write have arrived, and with no room left on the disk from there on. After
each, no file may stand half under its own name; and the same command once more must end with the bytes of the run that
nothing happened to, and nothing beside them. The clock stands still, so that not even `seconds` in a record may differ.
"""
import argparse, builtins, errno, io, json, multiprocessing, os, re, shutil, sys, tempfile, time, _pyio
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
import child

OLD = b"what was there before"

@dataclass
class Command:
    argv: str
    old: tuple = () # files that are there before, to be replaced
    changing: str = "never" # names under which a run may stand half way

RUN = "--limit 2 --layer 2 --scalar sum --out out"
MAP = "explain --layer 2 --token 5 --mode diagonal --force --out"
CUT = "--layer 2 --clusters 2 --force --overlay"
COMMANDS = {
    "evaluate": Command(f"evaluate scenes {RUN}"),
    "evaluate a folder": Command(f"evaluate folder --root own --protocol dataset-majority --clusters 3 {RUN}"),
    "perturb": Command(f"perturb scenes --tokens 1 {RUN}"),
    "itiou": Command(f"itiou scenes {RUN}"),
    "dashboard": Command("dashboard scenes --limit 2 --layer 2 --out out"),
    "fit-w": Command("fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --force", ("W.safetensors",)),
    "explain": Command(f"{MAP} new/figure.png"),
    "explain, pdf": Command(f"{MAP} figure.pdf", ("figure.pdf",)),
    "explain, svg": Command(f"{MAP} figure.svg", ("figure.svg",)),
    "segment": Command(f"segment {CUT} over.png --out mask.png", ("mask.png",)),
    "segment, jpg": Command(f"segment own/images/0.png {CUT} over.jpg", ("over.jpg",)),
    "segment, webp": Command(f"segment {CUT} over.webp"),
    "reproduce": Command("reproduce fig3 --out report", changing="index.html|problems.json"),
}

# --- the layer around the system's file operations --------------------------------------------------------------------

MOVES = "rename replace link symlink".split()
PATHS = MOVES + "open mkdir unlink remove rmdir truncate utime chmod".split()
GROWING = "write writev pwrite sendfile copy_file_range ftruncate fsync fdatasync posix_fallocate".split()
FILES = GROWING + ["fchmod"]
NEED_ROOM = GROWING + MOVES + "open mkdir truncate".split()
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEAD = 9 # exit code

class Disk:
    "Counts the operations on files below the working folder; at the one numbered `at` it does what `event` says"
    def __init__(self, at:int=-1, event:str=""): self.at, self.event, self.log, self.fds = at, event, [], {}

    def install(self):
        for name in PATHS + FILES: setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.close = self._close(os.close)
        builtins.open = io.open = self._opened(open)
        from PIL import ImageFile
        encode = ImageFile._encode_tile # would write to the file's number, past this layer
        refusal = io.UnsupportedOperation()
        ImageFile._encode_tile = lambda im, fp, tile, size, fd, e=None: encode(im, fp, tile, size, None, e or refusal)

    def _opened(self, real):
        "`open`, by way of os.open and os.write where it is for writing"
        def opened(file, mode="r", *args, **kwargs):
            return (_pyio.open if set(mode) & set("wax+") else real)(file, mode, *args, **kwargs)
        return opened

    def _close(self, real):
        def close(fd):
            self.fds.pop(fd, None)
            real(fd)
        return close

    def _where(self, name, args):
        "The file that an operation is about, from the working folder; None for one elsewhere, or opened to be read"
        if name in FILES: return self.fds.get(args[0])
        if name == "open" and not args[1] & WRITING: return None
        path = os.path.relpath(os.fsdecode(args[name in MOVES]))
        return None if path.startswith("..") else path

    def _no_room(self, name, args):
        "Whether the disk is full by now, and that matters to an operation"
        there = name in ("open", "mkdir") and os.path.lexists(args[0])
        return self.event == "full" and len(self.log) > self.at and name in NEED_ROOM and not there

    def _wrapped(self, name, real):
        def operation(*args, **kwargs):
            where = self._where(name, args)
            if where is None: return real(*args, **kwargs)
            self.log.append((name, where, os.path.relpath(os.fsdecode(args[0])) if name in MOVES else None))
            event = self.event if len(self.log) == self.at + 1 else None
            if self._no_room(name, args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([args[0]] if name in PATHS else []))
            if event == "before": os._exit(DEAD)
            if event == "torn": real(args[0], bytes(args[1])[:len(args[1]) // 2]), os._exit(DEAD)
            try: done = real(*args, **kwargs)
            finally:
                if event == "after": os._exit(DEAD)
            if name == "open": self.fds[done] = where
            return done
        return operation

# --- one command, with something happening to it ----------------------------------------------------------------------

@cache
def loaded():
    "The models, loaded once, in the process that forks"
    child.warm()
    from ultra_nb.models import load
    return {name: load(name) for name in ("photo_vit", "scenes_clip", "scenes_dino")}

def quiet(models):
    "In a child: models are there, the clock stands still, nobody asks git; eight images make two steps of fit-w"
    import ultra_nb.entries, ultra_nb.models, ultra_nb.records, ultra_nb.reproduction, ultra_nb.self_consistency
    ultra_nb.models.load = ultra_nb.entries.load = lambda name, *_, **__: models[name]
    still = SimpleNamespace(monotonic=lambda: 0., perf_counter=time.perf_counter)
    ultra_nb.records.time = ultra_nb.reproduction.time = still
    ultra_nb.records.commit = lambda: None
    ultra_nb.self_consistency.fit_projection = partial(ultra_nb.self_consistency.fit_projection, batch=4)

def contents(folder):
    "Every file with its bytes; folders and links in circles with none"
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}

def fresh(command):
    "A folder as the command finds it"
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    child.pictures(folder / "own")
    for name in command.old: (folder / name).write_bytes(OLD)
    return folder

def run(command, folder, disk):
    "The command in a child on this disk; its log is the last line that it prints"
    models = loaded()
    def work():
        from ultra_nb.cli import main
        sys.argv = ["ultra-nb", *command.argv.split()]
        quiet(models)
        disk.install()
        code = main(sys.argv[1:])
        print(json.dumps(disk.log))
        return code
    return child.call(work, folder, seconds=60)

@dataclass
class Whole:
    "A run that nothing happened to"
    log: list # operations
    files: dict
    passing: set # names that come and go
    said: list # lines of stderr

@cache
def whole(name:str) -> Whole:
    "The run to compare with"
    loaded()
    folder = fresh(COMMANDS[name])
    try:
        done = run(COMMANDS[name], folder, Disk())
        assert done.code == 0, f"{name}: {done.err}"
        log = json.loads(done.out.splitlines()[-1])
        passing = {where for _, where, _ in log} - {source for _, _, source in log}
        return Whole(log, contents(folder), passing, done.said)
    finally: shutil.rmtree(folder)

def half(command, now, good):
    "Files that stand under their own names and are neither what they were nor what they will be"
    kept = {n: OLD for n in command.old}
    standing = {n: b for n, b in now.items() if n in good.files and not re.search(command.changing, n)}
    return [f"half a file: {n}" for n, b in standing.items() if b not in (good.files[n], kept.get(n))]

def ended(files, good):
    "What the files are beside those of the whole run"
    what = lambda n: "missing" if n not in files else "another" if n in good.files else "left"
    return [f"in the end {what(n)}: {n}" for n in sorted(files | good.files) if files.get(n, 0) != good.files.get(n, 0)]

def refusal(done, now, good):
    "What is wrong with the way in which a command gave up on a full disk"
    left = [f"left behind: {n}" for n in now if n not in good.files and n not in good.passing]
    if done.code == 1 and len(done.said) <= 2 and "Traceback" not in done.err: return left
    return [f"no room: code {done.code}, {len(done.said)} lines, {done.said[-1:]}", *left]

def trial(point) -> list: # what is wrong
    "One point: what happens, and the same command again"
    name, at, event = point
    command, good = COMMANDS[name], whole(name)
    folder = fresh(command)
    try:
        done = run(command, folder, Disk(at, event))
        if event != "full" and done.code != DEAD: return [f"did not die: {done.code} {done.said[-1:]}"]
        now = contents(folder)
        wrong = half(command, now, good) + (refusal(done, now, good) if event == "full" else [])
        again = run(command, folder, Disk())
        if again.code or again.said != good.said: wrong.append(f"again: code {again.code}, {again.said[-1:]}")
        return wrong + ended(contents(folder), good)
    finally: shutil.rmtree(folder)

def points(only:str="") -> list: # (command, operation, event) each
    "Everything that can happen to the commands whose name matches"
    found = []
    for name in filter(lambda n: re.search(only, n), COMMANDS):
        for at, (kind, *_) in enumerate(whole(name).log):
            events = ["before", "after"] + ["torn"] * (kind == "write") + ["full"] * (kind in NEED_ROOM)
            found += [(name, at, event) for event in events]
    return found

def sweep(chosen:list, jobs:int=1):
    "Lines about the points at which something is wrong, as they come"
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for (name, at, event), wrong in zip(chosen, pool.map(trial, chosen), strict=True):
            kind, where, _ = whole(name).log[at]
            if wrong: yield f"{name} | {event} operation {at + 1}, {kind} {where} | {'; '.join(wrong)}"

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression for the command")
    parser.add_argument("--jobs", type=int, default=2)
    args, start, bad = parser.parse_args(), time.perf_counter(), 0
    chosen = points(args.only)
    for name, n in Counter(name for name, *_ in chosen).items():
        print(f"{name}: {len(whole(name).log)} operations, {n} points", flush=True)
    for line in sweep(chosen, args.jobs): bad, _ = bad + 1, print(line, flush=True)
    print(f"{len(chosen)} points, {bad} bad, in {(time.perf_counter() - start) / 60:.1f} minutes")
    return bool(bad)

if __name__ == "__main__": sys.exit(main())
