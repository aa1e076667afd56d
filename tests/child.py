"Commands of `ultra-nb` in children forked from a process that has imported everything: tenths of a second each."
import os, re, resource, signal, subprocess, sys, tempfile, time, traceback, warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

@dataclass
class Done:
    "What a command left"
    code: int # exit code; negative: the signal that ended it
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> list[str]: # lines of stderr that are no progress bar, no usage and not the model's description
        lines = [line.rpartition("\r")[2].rstrip() for line in self.err.split("\n")]
        return [line for line in lines if line and not re.match(r"Backbone\(|usage: | {6}|.*\d+%\|", line)]

WARM = """accelerate datasets jinja2 open_clip scipy.io seaborn sklearn.cluster timm tokenizers transformers
    matplotlib.backends.backend_pdf matplotlib.backends.backend_svg torchvision.datasets torchvision.transforms.v2
    ultra_nb.cli ultra_nb.reproduction""".split()

def warm():
    "Imports what any command may import"
    from PIL import Image
    for name in WARM: import_module(name)
    Image.init()

def run(argv:list|str, # of `ultra-nb`; a string is split at white space
        folder:Path, # where it runs
        before:Callable=lambda: None, # called in the child first
        **options # of `call`
       ) -> Done:
    "`ultra-nb argv` in a child process"
    from ultra_nb.cli import main
    argv = argv.split() if isinstance(argv, str) else [*map(str, argv)]
    def work():
        sys.argv = ["ultra-nb", *argv]
        before()
        return main(argv)
    return call(work, folder, **options)

TOO_LONG = -signal.SIGPROF, -signal.SIGALRM

def call(work:Callable, # gives the exit code
         folder:Path=Path("."), # where it runs
         stdin:bytes=b"", env:dict|None=None,
         seconds:int=60 # of computing, four times as many of waiting; then a signal of `TOO_LONG` ends it
        ) -> Done:
    "A function in a child process"
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin), given.seek(0)
        sys.stdout.flush(), sys.stderr.flush()
        start, pid = time.monotonic(), os.fork()
        if pid == 0:
            try: _child(work, folder, seconds, (given, out, err), env or {})
            finally: os._exit(70)
        status = os.waitpid(pid, 0)[1]
        texts = [(f.seek(0), f.read().decode("utf-8", "backslashreplace"))[1] for f in (out, err)]
    return Done(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - start)

def _child(work, folder, seconds, files, env):
    "Never returns"
    import torch
    for fd, f in enumerate(files): os.dup2(f.fileno(), fd)
    modes = ("r", "surrogateescape"), ("w", "strict"), ("w", "backslashreplace")
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, encoding="utf-8", errors=errors, closefd=False)
                                         for fd, (mode, errors) in enumerate(modes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_PROF, seconds), signal.alarm(4 * seconds) # other work makes nothing here slow
    _warnings()
    torch.set_num_threads(1)
    os.chdir(folder), os.environ.update(env)
    code = _code(work)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

def _warnings():
    "Python's own rules for warnings, whatever a test runner made of them"
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))

def _code(work):
    "Exit code of a function, as Python would give it"
    try: return work() or 0
    except SystemExit as stop: return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1

def limited():
    "Two gigabytes more than now, so that too much is an error and not a machine without memory"
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31,) * 2)

def killed(argv:list, # a program
           path:Path, n:int, # SIGKILL as soon as this file is there and has n lines
           env:dict):
    "Starts a program and kills it in the middle of its work"
    going = subprocess.Popen([*map(str, argv)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while going.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= n): time.sleep(.01)
    going.kill()
    going.wait()

TWO_PROCESSES = """-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no
    --dynamo_backend no""".split() # for Python, before `-m` and a module

def pictures(root:Path, n:int=2, values=(0, 1), classes=(), size=(40, 32), ending=".png") -> Path:
    "A data set 'folder': n pictures of noise, masks of some values, perhaps names of classes"
    import numpy as np
    from PIL import Image
    dice = np.random.default_rng(0)
    for part in ("images", "masks"): (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(dice.integers(0, 256, (*size, 3), np.uint8)).save(root / f"images/{i}{ending}")
        Image.fromarray(dice.choice(values, size).astype(np.uint8)).save(root / f"masks/{i}.png")
    if classes: (root / "classes.txt").write_text("\n".join(classes))
    return root

def vit(**options):
    "A tiny ViT of timm, of random numbers: pictures of 32 x 32, 17 tokens"
    import timm, torch
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **sizes | options).eval()

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)

def causal(name:str, # "Llama", as transformers calls its configuration
           attention:str|None=None, # "sdpa" or "eager"; the library's choice by default
           **sizes):
    "A tiny language model of transformers, of random numbers"
    import torch, transformers
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

def llama(**sizes): return causal("Llama", **SIZES | dict(vocab_size=50) | sizes)

def language_model(folder:Path, **options) -> Path: # of save_pretrained
    "A folder with a tiny Llama and the tokenizer of the embedded one, as transformers saves them"
    import transformers
    from ultra_nb.weights import asset
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    llama(**sizes, vocab_size=1000, max_position_embeddings=512).save_pretrained(folder, **options)
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer = str(asset("tldr_tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, **special).save_pretrained(folder)
    return folder
