"""Kill conversions and trainings at random moments: what is left must be whole, and going on must give the same.

usage: python recipes/fuzz/kills.py [--count 300] [--seed 0]

Each command runs in a fork of this process, which has imported everything, and gets SIGKILL, SIGTERM or SIGINT after a
random time. A converted checkpoint is then there bit by bit, with its card, or not at all; a training is killed some
times, resumed each time, and its end compared bit by bit with that of one that nobody killed. The one thing that forks
don't do is to load the saved model in a fresh process. The exit code is 1 where anything isn't as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGTERM: (0, 143, 130), signal.SIGINT: (0, 130)}  # 0: it was through before
CHAIN = 4  # how often a training is killed before it may end
LIMIT = 300.0
OPTIONS = (
    "--max-steps 10 --batch-size 4 --max-length 16 --checkpoint-every 2 --evaluate-every 3 --patience 50 --log-every 1 "
    "--precision no"
).split()


class Killer:
    """Tiny commands, how long they take, and what they leave where nobody kills them.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.source, self.data = make_base(folder), make_data(folder)
        self.commands = {
            "convert": ["convert", str(self.source), "OUT", "--to", "geglu", "--json"],
            "stream": ["convert", str(self.source), "OUT", "--to", "geglu", "--stream", "--json"],
            "finetune": [
                *("finetune", "--model", str(self.source), "--dataset", str(self.data), "--to", "geglu", *OPTIONS),
                *("--output", "OUT", "--json"),
            ],
        }
        self.seconds: dict[str, float] = {}
        for name in self.commands:
            for _ in range(2):  # the first time imports what later forks have
                out = self.folder / f"whole-{name}"
                shutil.rmtree(out, ignore_errors=True)
                start = time.perf_counter()
                code = self.run(name, out, modules=self.folder / "modules")
                self.seconds[name] = time.perf_counter() - start
                if code:
                    raise RuntimeError(f"{name} ends with {code}: {self.log.read_text()[-2000:]}")
                for module in (self.folder / "modules").read_text().split():
                    with contextlib.suppress(Exception):
                        importlib.import_module(module)

    def run(
        self, name: str, out: Path, *more: str, kill: int | None = None, after: float = 0.0, modules: Path | None = None
    ) -> int:
        """Run a command in a fork, perhaps kill it; return its exit code, minus the signal where one ended it."""
        arguments = [str(out) if word == "OUT" else word for word in (*self.commands[name], *more)]
        # what comes before the command begins ends the interpreter, as everywhere, and is not of the command
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            _be_the_command(arguments, self.log, modules)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        start = time.perf_counter()
        while time.perf_counter() - start < LIMIT:
            if kill is not None and time.perf_counter() - start >= after:
                os.kill(child, kill)
                kill = None
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError(f"{name} goes on for more than {LIMIT:.0f} seconds")

    def check_end(self, code: int, kill: int) -> None:
        """Check that a command that could say how it ended did so in one line."""
        said = self.log.read_text()
        assert kill == signal.SIGKILL or code in ENDS[signal.Signals(kill)], f"exit code {code}: {said[-1000:]}"
        assert "Traceback" not in said, said[-2000:]

    def convert(self, name: str, draw: random.Random) -> None:
        """Kill a conversion, and look at its destination."""
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        kill, after = draw.choice(SIGNALS), draw.uniform(0, 1.1 * self.seconds[name])
        code = self.run(name, place / "out", kill=kill, after=after)
        self.check_end(code, kill)
        if (place / "out").exists():
            assert same_files(place / "out", self.folder / f"whole-{name}", ("README.md",)), "not what is written whole"
        else:
            assert code, "it says that all is well, and nothing is there"
        left = {path.name for path in place.iterdir()} - {"out"}
        assert kill == signal.SIGKILL or not left, f"left beside it: {left}"
        shutil.rmtree(place / "out", ignore_errors=True)
        if draw.random() < 0.1:  # what a kill left is in nobody's way
            assert self.run(name, place / "out") == 0, self.log.read_text()[-1000:]

    def finetune(self, draw: random.Random, kills: int) -> None:
        """Kill a training some times, resume it each time, and compare its end."""
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(kills):
            more = ["--resume"] if (out / "run.json").is_file() else []
            kill, after = draw.choice(SIGNALS), draw.uniform(0, 1.1 * self.seconds["finetune"])
            code = self.run("finetune", out, *more, kill=kill, after=after)
            self.check_end(code, kill)
            check_run(out)
        more = ["--resume"] if (out / "run.json").is_file() else []
        assert self.run("finetune", out, *more) == 0, self.log.read_text()[-2000:]
        check_run(out)
        whole = self.folder / "whole-finetune"
        names = {path.name for path in out.iterdir()}
        assert names == {path.name for path in whole.iterdir()}, f"other files: {sorted(names)}"
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), "other weights"
        assert curve(out) == curve(whole), "another log"

    def __call__(self, count: int, seed: int) -> tuple[Counter[str], list[str]]:
        """Kill ``count`` times; return how often what, and what was bad."""
        found: Counter[str] = Counter()
        bad: list[str] = []
        number = 0
        while number < count:
            draw = random.Random(f"{seed}-{number}")
            name = draw.choice(list(self.commands))
            kills = min(draw.randint(1, CHAIN), count - number) if name == "finetune" else 1
            try:
                self.finetune(draw, kills) if name == "finetune" else self.convert(name, draw)
            except AssertionError as error:
                bad.append(f"kill {number} of seed {seed}, {name}: {error}")
                print(bad[-1], flush=True)
            found[name] += kills
            number += kills
        return found, bad


def _be_the_command(arguments: Sequence[str], log: Path, modules: Path | None) -> None:
    """Run ``hf-glu`` in this fork, and end."""
    code: Any = 99
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        from hf_glu import cli
        from hf_glu.checkpoint import stopping
        from hf_glu.training import job

        job.reloads_equal = lambda *_: True
        stopping.end_at_once()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        cli.main(arguments)
    except SystemExit as ended:
        code = ended.code or 0
        if modules is not None:
            names = (name for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None))
            modules.write_text("\n".join(name for name in names if name != "__main__"))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def check_run(folder: Path) -> None:
    """Check that all that a later run reads in a run's folder is whole."""
    from hf_glu.checkpoint.jsonio import read_lines, read_object
    from hf_glu.training.loop.checkpoints import is_whole

    if not folder.exists():
        return
    for path in folder.glob("*.json"):
        read_object(path)
    if (folder / "log.jsonl").is_file():
        read_lines(folder / "log.jsonl")
    halves = [path.name for path in folder.glob("checkpoint-*") if not is_whole(path)]
    assert not halves, f"half checkpoints: {halves}"


def same_files(folder: Path, whole: Path, but: Sequence[str]) -> bool:
    """Tell whether two folders have the same files with the same bytes, those ``but`` which need only be there."""
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (folder, whole)]
    files = [name for name in names[0] if (folder / name).is_file() and name not in but]
    return names[0] == names[1] and all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files)


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return a run's log without what time has to do with."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def make_base(folder: Path) -> Path:
    """Save a tiny BERT with a tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "fine", "dull", "film", "a", "the", "was"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)
    transformers.BertModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def make_data(folder: Path) -> Path:
    """Write labelled sentences."""
    rows = [f"the film was {('dull', 'fine')[number % 2]} {'a ' * (number % 5)}" for number in range(40)]
    text = "\n".join(f'{{"text": "{row}", "label": {number % 2}}}' for number, row in enumerate(rows))
    (folder / "data.jsonl").write_text(text + "\n")
    return folder / "data.jsonl"


def main() -> int:
    """Kill, print the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf_glu-kills-") as scratch:
        os.environ.update(HF_DATASETS_CACHE=f"{scratch}/cache", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        killer = Killer(Path(scratch))
        found, bad = killer(given.count, given.seed)
    for name, count in sorted(found.items()):
        print(f"{count:5,} {name}, which takes {killer.seconds[name]:.1f} s")
    print(f"{sum(found.values()):,} kills, {len(bad)} bad, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
