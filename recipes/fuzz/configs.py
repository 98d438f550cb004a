"""Mutate configs, options and result files at random: each must be taken or refused by one clear error, in no time.

usage: python recipes/fuzz/configs.py [--count 20000] [--seed 0] [--only NUMBER]

Nothing may run for long, take much memory, or end in an error that isn't hf_glu's. The exit code is 1 where one does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS, GIGABYTES = 20, 6  # what one mutant may take, and the whole process
DEEP: list[Any] = []
for _ in range(800):
    DEEP = [DEEP]
NUMBERS = [0, 1, -1, 3, 7, 2**31, 10**9, 10**18, 10**30, 10**400, 0.5, -2.5, 1e308, float("inf"), float("nan")]
WORDS = ["", "a", "geglu", "swiglu", "gelu", "stateful_learnable_geglu", "moa_swiglu", "nope", "iso", "all", "\0"]
WORDS += ["encoder 0-3", "every 0", "every 2", "0-999999999", "9" * 5000, "relu*999999999", "8", "*", "a:b*c"]
WORDS += ["relu*2,swiglu:99999999999*3", "x" * 100_000, "0," * 50_000, "\ud800", "BertModel"]
LISTS = [[], [[]], [[1, [2]], "a"], [1, "a"], [None], [10**30], [0, 1, 2], ["geglu"] * 3, ["gelu"] * 500, DEEP]
LISTS += [["BertConfig"], ["AutoModel"], ["GPT2LMHeadModel"], ["PreTrainedModel"], ["pipeline"], [["BertModel"]]]
OBJECTS: list[Any] = [{}, {"a": {}}, {"encoder": {"encoder": 1}}, {"0": "geglu"}]
VALUES: list[Any] = [None, True, False, *NUMBERS, *WORDS, *LISTS, *OBJECTS]


def mutate(data: Any, draw: random.Random) -> Any:
    """Return plain data with one to three changes: other kinds of values, keys gone or made up, strings cut or long."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places or (isinstance(data, dict) and draw.random() < 0.05):
            key = draw.choice(("hf_glu", "layers", "nope", "", "experts"))
            data = {**(data if isinstance(data, dict) else {}), key: _value(draw)}
            continue
        owner, key = draw.choice(places)
        _change(owner, key, draw)
    return data


def _value(draw: random.Random) -> Any:
    value = draw.choice(VALUES)
    return value if value is DEEP else copy.deepcopy(value)  # a later change must not reach the table


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)) and not _is_deep(value):
            yield from _places(value)


def _is_deep(value: Any) -> bool:
    depth = 0
    while isinstance(value, list) and len(value) == 1 and depth < 50:
        value, depth = value[0], depth + 1
    return depth >= 50


def _change(owner: Any, key: Any, draw: random.Random) -> None:
    old, how = owner[key], draw.random()
    if how < 0.1 and isinstance(owner, dict):
        del owner[key]
    elif how < 0.2:
        owner[key] = draw.choice(([old], {"a": old}, [old, old], str(old)[:1000]))
    elif how < 0.35 and isinstance(old, str) and old:
        cut = draw.randrange(len(old) + 1)
        owner[key] = draw.choice(
            (old[:cut], old[cut:], old * 40, old[:cut] + draw.choice("-_*:, 9x\u00b2") + old[cut:])
        )
    elif how < 0.45 and isinstance(old, (int, float)) and not isinstance(old, bool):
        owner[key] = draw.choice(
            (-old, old * 10**6, old + 1, old // 3, old * 0.5 if abs(old) < 1e300 else 0, old * 10**12)
        )
    else:
        owner[key] = _value(draw)


ENTRIES: list[dict[str, Any]] = [
    {"version": 1, "bias": True, "dense_act": "gelu", "layers": [0, 1], "width": 27},
    {"version": 1, "by_layer": {"0": "geglu", "1": "swiglu"}, "layers": "0-1"},
    {"version": 1, "mix": {"functions": ["gelu", "relu"], "per": "channel", "gate": "linear", "rank": 2}},
    {"version": 1, "state": {"decay": [0.5, 0.99], "alpha": 0.1, "beta": 0.2, "learnable": True, "direction": "both"}},
    {"version": 1, "context": {"size": 4, "layer": 1, "pool": "mean", "decay": [0.9, 0.99]}},
    {
        "version": 1,
        "experts": {
            "groups": "geglu*2,relu:8*2",
            "top_k": 2,
            "shared": "gelu",
            "router": "sigmoid",
            "weights": "ones",
            "balance": 0.1,
            "z": 0.1,
            "bias_rate": 0.1,
            "jitter": 0.1,
            "backend": "loop",
        },
    },
    {"version": 1, "activation": "geglu", "layers": {"encoder": "0", "decoder": [1]}, "width": "iso"},
]
GROUPS = ["relu*2,gelu:1024*2,swiglu*4", "8", "stateful_swiglu*2", "geglu:7", "a*1,b:2*3,4"]
LAYERS = ["0-5,8", "every 2", "encoder", "decoder 0-3", [0, 2], {"encoder": "0-3", "decoder": [1]}]


class Fuzzer:
    """Tiny checkpoints in a folder, and what is done with their mutants.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = make_models(folder)
        self.run = make_run(folder)
        # how to try a mutant -> how often
        self.ways: dict[Callable[[random.Random], None], int] = {
            self.entry: 30,
            self.groups: 10,
            self.layers: 10,
            self.options: 15,
            self.config_file: 20,
            self.loaded: 5,
            self.constructed: 5,
            self.results: 5,
        }

    def entry(self, draw: random.Random) -> None:
        """Read an entry, and read what was made of it again."""
        from hf_glu import GluConfig

        made = GluConfig.from_dict(mutate(draw.choice(ENTRIES), draw))
        again = json.loads(json.dumps(made.to_dict()))
        assert GluConfig.from_dict(again).to_dict() == made.to_dict(), "an entry that isn't the same when read again"

    def groups(self, draw: random.Random) -> None:
        """Read a list of experts."""
        from hf_glu.config.experts import read_groups, write_groups

        (text,) = mutate([draw.choice(GROUPS)], draw) or ["8"]
        if isinstance(text, str):
            made = read_groups(text, draw.choice((None, "gelu")))
            assert read_groups(write_groups(made)) == made, "groups that aren't the same when read again"

    def layers(self, draw: random.Random) -> None:
        """Read a selection of layers, and select by it."""
        from hf_glu.config.layers import check_layers, highest, selected

        (spec,) = mutate([draw.choice(LAYERS)], draw) or [None]
        made = check_layers(spec)
        highest(made)
        [selected(made, layer, draw.choice((None, "encoder", "decoder"))) for layer in range(3)]

    def options(self, draw: random.Random) -> None:
        """Read the options of a job."""
        from hf_glu.training.filling import split_options
        from hf_glu.training.options import JobOptions, TrainingOptions

        given = {
            **JobOptions(model="m", task="sst2", to="geglu", output="out").to_dict(),
            **TrainingOptions().to_dict(),
        }
        given.pop("mixed_precision")
        job, _ = split_options(mutate(given, draw), JobOptions, TrainingOptions)
        _ = job.units, job.folder

    def config_file(self, draw: random.Random) -> None:
        """Build, load or convert a checkpoint with a mutated ``config.json``."""
        import hf_glu
        from hf_glu.checkpoint.loading import load_model, load_skeleton

        source, out = self.mutant(draw, hf_glu_only=False), self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        to = draw.choice(("geglu", "swiglu", "moa_geglu"))
        ways: list[Callable[[], Any]] = [
            lambda: load_skeleton(source),
            lambda: load_skeleton(source),
            lambda: load_model(source),
            lambda: hf_glu.convert_checkpoint(source, out, to),
            lambda: hf_glu.convert_stream(source, out, to),
        ]
        before = set(self.folder.iterdir())
        try:
            draw.choice(ways)()
        finally:
            whole = not out.exists() or (out / "config.json").is_file()
            assert whole, "a destination without a config"
            assert set(self.folder.iterdir()) <= before | {out}, "something is left beside the destination"

    def loaded(self, draw: random.Random) -> None:
        """Load a checkpoint whose entry was mutated with Transformers' own method."""
        import transformers

        source = self.mutant(draw, hf_glu_only=True)
        with contextlib.suppress(RecursionError):  # Transformers' own, of lists in lists, before it looks at them
            transformers.AutoModel.from_pretrained(source)

    def constructed(self, draw: random.Random) -> None:
        """Build a model from a config with a mutated entry, and run it."""
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(draw.choice(self.models))
        config.hf_glu = mutate(config.hf_glu or draw.choice(ENTRIES), draw)
        try:
            model = transformers.AutoModel.from_config(config).eval()
        except RecursionError:  # Transformers' own, which copies lists in lists before it looks at them
            return
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))

    def results(self, draw: random.Random) -> None:
        """Read a run's folder of which a file was mutated or cut."""
        from hf_glu.publishing.card.card import describe
        from hf_glu.publishing.report.collect import collect
        from hf_glu.training.options import JobOptions, TrainingOptions
        from hf_glu.training.saving import check_run_folder, run_entry

        place = self.folder / "mutated-run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.run, place)
        path = draw.choice(sorted(place.glob("*.json")))
        text = json.dumps(mutate(json.loads(path.read_text()), draw))
        path.write_text(text[: draw.randrange(len(text))] if draw.random() < 0.2 else text)
        entry = run_entry(JobOptions(model="m", task="sst2", to="geglu"), TrainingOptions(), MADE_OF, "sst2")
        draw.choice(
            (
                lambda: collect(place),
                lambda: describe(place),
                lambda: check_run_folder(place, entry, resume=True),
            )
        )()

    def mutant(self, draw: random.Random, *, hf_glu_only: bool) -> Path:
        """Return the folder of a checkpoint whose config was mutated."""
        base = draw.choice(self.models)
        config = json.loads((base / "config.json").read_text())
        if hf_glu_only or draw.random() < 0.4:
            config["hf_glu"] = mutate(config.get("hf_glu") or draw.choice(ENTRIES), draw)
        else:
            config = mutate(config, draw)
        place = self.folder / "mutant"
        place.mkdir(exist_ok=True)
        shutil.copyfile(base / "model.safetensors", place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config))
        return place


def make_models(folder: Path) -> list[Path]:
    """Save tiny checkpoints: dense, gated, stateful, learnable, modulated and with experts."""
    import torch
    import transformers

    import hf_glu

    bert = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1}
    t5 = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}
    made = {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=30, **bert)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=30, eos_token_id=2, **gpt2)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=30, **t5)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, **bert)),
    }
    conversions: list[tuple[str, str | None, dict[str, Any]]] = [
        *((name, None, {}) for name in made),
        ("bert", "geglu", {}),
        ("gpt2", "stateful_geglu_new", {}),
        ("llama", "learnable_swiglu", {}),
        ("bert", "modulated_geglu", {}),
        ("t5", "moa_reglu", {}),
        ("gpt2", "geglu_new", {"experts": "geglu_new*2"}),
        ("bert", "geglu", {"layers": "1"}),
    ]
    places = []
    for number, (name, to, more) in enumerate(conversions):
        made[name].save_pretrained(folder / "dense")
        model = type(made[name]).from_pretrained(folder / "dense")
        if to is not None:
            hf_glu.convert(model, to, check=False, **more)
        places.append(folder / f"{number}-{name}")
        with torch.no_grad():
            model.save_pretrained(places[-1])
    shutil.rmtree(folder / "dense")
    return places


# as hf_glu.training.record makes it
MADE_OF = {"model": {}, "data": {}, "options": {"activation": "geglu"}, "versions": {}}


def make_run(folder: Path) -> Path:
    """Write what a fine-tuning run leaves, but for its weights."""
    from hf_glu.training.options import JobOptions, TrainingOptions
    from hf_glu.training.saving import run_entry

    place = folder / "run"
    place.mkdir()
    entry = run_entry(JobOptions(model="m", task="sst2", to="geglu"), TrainingOptions(), MADE_OF, "sst2")
    results = {
        "task": "sst2",
        "main": ["accuracy"],
        "score": 0.5,
        "metrics": {"accuracy": 0.5},
        "before": {"accuracy": 0.4},
        "examples": {"train": 4, "validation": 4},
        "parameters": 9,
        "active_parameters": 9,
        "trainable": 9,
        "training": {"steps": 3, "seconds": 1.0, "loss": 0.5, "tokens_per_second": 3.0},
        "conversion": None,
        "activations": [],
        "reloaded_equal": True,
    }
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_act": "geglu"}
    for name, data in {"run": entry, "results": results, "config": config}.items():
        (place / f"{name}.json").write_text(json.dumps(data))
    (place / "log.jsonl").write_text('{"step": 1, "epoch": 0.1, "loss": 0.5, "lr": 0.1}\n{"step": 2, "ep')
    return place


class Late(BaseException):
    """A mutant took longer than `SECONDS`; no handler of exceptions may think that it was its own."""


def _late(*_: Any) -> None:
    raise Late


def outcome_of(way: Callable[[random.Random], None], draw: random.Random) -> str:
    """Try a mutant; return ``taken``, ``refused``, or what is bad about it."""
    from hf_glu.errors import HfGluError

    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            way(draw)
    except HfGluError as error:
        text = str(error)
        clear = 0 < len(text) <= 2000 and "allocate" not in text and "MemoryError" not in text
        return "refused" if clear else f"bad: unclear: {text[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace else ""
        return f"bad: {type(error).__name__} at {where}: {str(error)[:200]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "taken"


def fuzz(count: int, seed: int, *, only: int | None = None) -> dict[str, Any]:
    """Try ``count`` mutants; return how many were taken, refused and bad, and what was bad."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    found: Counter[str] = Counter()
    bad: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf_glu-fuzz-") as scratch:
        fuzzer = Fuzzer(Path(scratch))
        for number in range(count) if only is None else (only,):
            draw = random.Random(f"{seed}-{number}")
            way = draw.choices(list(fuzzer.ways), list(fuzzer.ways.values()))[0]
            outcome = outcome_of(way, draw)
            kind = "bad" if outcome.startswith("bad") else outcome
            found[f"{way.__name__} {kind}"] += 1
            if kind == "bad":
                bad.append(f"--seed {seed} --only {number}: {way.__name__}: {outcome}")
                print(bad[-1], flush=True)
    return {
        "mutants": sum(found.values()),
        "found": dict(sorted(found.items())),
        "bad": bad,
        "seconds": time.perf_counter() - start,
    }


def main() -> int:
    """Fuzz, print the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="try this one again")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, GIGABYTES * 2**30))
    result = fuzz(given.count, given.seed, only=given.only)
    for name, count in result["found"].items():
        print(f"{count:7,} {name}")
    print(f"{result['mutants']:,} mutants, {len(result['bad'])} bad, {result['seconds']:.0f} s")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
