"""Crash safety: each command dies before, after and in the middle of each of its file operations, and the disk fills at each of them.

`python tests/crash.py [--only REGEX] [--jobs 2]` runs every command once, with a layer around the system's file
operations that counts them. Then, for each operation, the same command in a fresh folder: killed before it, killed after
it, killed when half of the bytes of a write have arrived, and with no room left on the disk from there on. After each, no
file may stand half under its own name; and the same command once more must end with the bytes of the run that nothing
happened to, and nothing beside them. The clock stands still, so that not even `seconds` in a record may differ.
"""
import argparse, builtins, errno, io, json, multiprocessing, os, re, shutil, sys, tempfile, time, _pyio
from collections import Counter
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
COMMANDS = {
    "evaluate": Command(f"evaluate scenes {RUN}"),
    "evaluate a folder": Command(f"evaluate folder --root own --protocol dataset-majority --clusters 3 {RUN}"),
    "perturb": Command(f"perturb scenes --tokens 1 {RUN}"),
    "itiou": Command(f"itiou scenes {RUN}"),
    "fit-w": Command("fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --out W.safetensors --force", ("W.safetensors",)),
    "explain": Command("explain --layer 2 --token 5 --mode diagonal --out new/figure.png --force"),
    "explain, pdf": Command("explain --layer 2 --token 5 --mode diagonal --out figure.pdf --force", ("figure.pdf",)),
    "explain, svg": Command("explain --layer 2 --token 5 --mode diagonal --out figure.svg --force", ("figure.svg",)),
    "segment": Command("segment --layer 2 --clusters 2 --out mask.png --overlay over.png --force", ("mask.png",)),
    "segment, jpg": Command("segment own/images/0.png --layer 2 --clusters 2 --overlay over.jpg --force", ("over.jpg",)),
    "segment, webp": Command("segment --layer 2 --clusters 2 --overlay over.webp --force"),
    "reproduce": Command("reproduce fig3 --out report", changing="index.html|problems.json"),
}

# --- the layer around the system's file operations -----------------------------------------------------------------------

PATHS = "open mkdir unlink remove rmdir rename replace link symlink truncate utime chmod".split()
FILES = "write writev pwrite sendfile copy_file_range ftruncate fsync fdatasync fchmod posix_fallocate".split()
NEED_ROOM = "open mkdir rename replace link symlink truncate write writev pwrite sendfile copy_file_range ftruncate fsync fdatasync posix_fallocate".split()
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEAD = 9 # exit code

class Disk:
    "Counts the operations on files below the working folder; at the n-th it does what it is told"
    def __init__(self, at:int=-1, event:str=""): self.at, self.event, self.log, self.fds = at, event, [], {}

    def install(self):
        for name in PATHS + FILES: setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.close = self._close(os.close)
        builtins.open = io.open = self._opened(open)
        from PIL import ImageFile
        encode = ImageFile._encode_tile # would write to the file's number, past this layer
        ImageFile._encode_tile = lambda im, fp, tile, size, fd, e=None: encode(im, fp, tile, size, None, e or io.UnsupportedOperation())

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
        path = os.path.relpath(os.fsdecode(args[1 if name in ("rename", "replace", "link", "symlink") else 0]))
        return None if path.startswith("..") else path

    def _wrapped(self, name, real):
        def operation(*args, **kwargs):
            where = self._where(name, args)
            if where is None: return real(*args, **kwargs)
            self.log.append((name, where, os.path.relpath(os.fsdecode(args[0])) if name in ("rename", "replace", "link") else None))
            now, full = len(self.log) - 1 == self.at, self.event == "full" and len(self.log) > self.at >= 0
            if full and name in NEED_ROOM and not (name in ("open", "mkdir") and os.path.lexists(args[0])):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([args[0]] if name in PATHS else []))
            if now and self.event == "before": os._exit(DEAD)
            if now and self.event == "torn": real(args[0], bytes(args[1])[:len(args[1]) // 2]), os._exit(DEAD)
            done = real(*args, **kwargs)
            if name == "open": self.fds[done] = where
            if now and self.event == "after": os._exit(DEAD)
            return done
        return operation

# --- one command, with something happening to it --------------------------------------------------------------------------

@cache
def quiet():
    "Once, in the process that forks: models are loaded, the clock stands still, nobody asks git; eight images make two steps of fit-w"
    child.warm()
    import ultra_nb.models, ultra_nb.records, ultra_nb.reproduction, ultra_nb.self_consistency
    loaded = {name: ultra_nb.models.load(name) for name in ("scenes_clip", "scenes_dino")}
    load = lambda name, **_: loaded[name]
    ultra_nb.models.load = ultra_nb.reproduction.load = load
    ultra_nb.records.time = ultra_nb.reproduction.time = SimpleNamespace(monotonic=lambda: 0., perf_counter=time.perf_counter)
    ultra_nb.records.commit = lambda: None
    ultra_nb.self_consistency.fit_projection = partial(ultra_nb.self_consistency.fit_projection, batch=4)

def contents(folder):
    "Every file with its bytes, every folder with none"
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}

def fresh(command):
    "A folder as the command finds it"
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    child.pictures(folder / "own")
    for name in command.old: (folder / name).write_bytes(OLD)
    return folder

def run(command, folder, disk):
    "The command in a child on this disk; its log is the last line that it prints"
    from ultra_nb.cli import main
    def work():
        sys.argv = ["ultra-nb", *command.argv.split()]
        disk.install()
        code = main(sys.argv[1:])
        print(json.dumps(disk.log))
        return code
    return child.call(work, folder, seconds=40)

@dataclass
class Whole:
    "A run that nothing happened to"
    log: list # operations
    files: dict
    passing: set # names that come and go
    differing: list # files that a second such run has otherwise

@cache
def whole(name:str) -> Whole:
    "The run to compare with, made twice"
    quiet()
    (log, files), (_, again) = (_undisturbed(COMMANDS[name]) for _ in range(2))
    passing = {where for _, where, _ in log} - {source for _, _, source in log}
    return Whole(log, files, passing, [n for n in files | again if files.get(n) != again.get(n)])

def _undisturbed(command):
    "Operations and files of a run"
    folder = fresh(command)
    done = run(command, folder, Disk())
    assert done.code == 0, f"{command.argv}: {done.err}"
    files = contents(folder)
    shutil.rmtree(folder)
    return json.loads(done.out.splitlines()[-1]), files

def half(command, now, good):
    "Files that stand under their own names and are neither what they were nor what they will be"
    kept = {n: OLD for n in command.old}
    return [n for n, b in now.items() if n in good.files and b not in (good.files[n], kept.get(n)) and not re.search(command.changing, n)]

def trial(point) -> list: # what is wrong
    "One point: what happens, and the same command again"
    name, at, event = point
    command, good = COMMANDS[name], whole(name)
    folder, wrong = fresh(command), []
    try:
        done = run(command, folder, Disk(at, event))
        if event != "full" and done.code != DEAD: return [f"did not die: {done.code} {done.said[-1:]}"]
        now = contents(folder)
        wrong += [f"half a file: {n}" for n in half(command, now, good)]
        if event == "full":
            if done.code != 1 or len(done.said) > 2 or "Traceback" in done.err: wrong.append(f"no room: code {done.code}, {len(done.said)} lines, {done.said[-1:]}")
            wrong += [f"left behind: {n}" for n in now if n not in good.files and n not in good.passing]
        again = run(command, folder, Disk())
        if again.code or again.said: wrong.append(f"again: code {again.code}, {again.said[-1:]}")
        after = contents(folder)
        wrong += [f"in the end {'another' if n in after and n in good.files else 'left' if n in after else 'missing'}: {n}" for n in sorted(after | good.files) if after.get(n, 0) != good.files.get(n, 0)]
    finally: shutil.rmtree(folder)
    return wrong

def points(only:str="") -> list: # (command, operation, event) each
    "Everything that can happen to the commands whose name matches"
    found = []
    for name in filter(lambda n: re.search(only, n), COMMANDS):
        for at, (kind, *_) in enumerate(whole(name).log):
            events = ["before", "after"] + ["torn"] * (kind == "write") + ["full"] * (kind in NEED_ROOM)
            found += [(name, at, event) for event in events]
    return found

def sweep(chosen:list, jobs:int=1):
    "(point, what is wrong), as they come"
    with multiprocessing.get_context("fork").Pool(jobs) as pool: yield from zip(chosen, pool.imap(trial, chosen))

def told(point, wrong):
    "A line"
    name, at, event = point
    kind, where, _ = whole(name).log[at]
    return f"{name} | {event} operation {at + 1}, {kind} {where} | {'; '.join(wrong)}"

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression for the command")
    parser.add_argument("--jobs", type=int, default=2)
    args, start, bad = parser.parse_args(), time.perf_counter(), 0
    chosen = points(args.only)
    for name, n in Counter(name for name, *_ in chosen).items():
        bad += bool(differing := whole(name).differing)
        print(f"{name}: {len(whole(name).log)} operations, {n} points", *[f"two whole runs differ in {n}" for n in differing], flush=True)
    for point, wrong in sweep(chosen, args.jobs):
        if wrong: bad, _ = bad + 1, print(told(point, wrong), flush=True)
    print(f"{len(chosen)} points, {bad} bad, in {(time.perf_counter() - start) / 60:.1f} minutes")
    return bool(bad)

if __name__ == "__main__": sys.exit(main())
