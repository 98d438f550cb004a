"""The names of the files and folders that a checkpoint, a run, a suite or a comparison has, each written here only.

Every other module imports them from here, so that a name is changed, or looked up, in one place.
"""

from __future__ import annotations

# A checkpoint, as Transformers and the Hub name its files.
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_SHARDS = "model-*-of-*.safetensors"  # a pattern
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)
TOKENIZER_PATTERNS = ("tokenizer*", "vocab.*", "*.model")
CARD_FILE = "README.md"
SENTENCE_TRANSFORMERS_FILE = "modules.json"  # only models of that library have it

# What hf_glu writes beside it: how it was converted, what it was made of, what was pushed.
REPORT_FILE = "hf_glu_report.json"
RECORD_FILE = "made_of.json"
MANIFEST_FILE = "hf_glu_push.json"
EXPORT_FILE = "hf_glu_export.json"

# A modulation of a model's gates: its numbers, and what it is.
MODULATION_WEIGHTS_FILE = "modulation.safetensors"
MODULATION_FILE = "modulation.json"

# A fine-tuning run: what it is, what happened, what came of it; its page with figures; predictions for a leaderboard.
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"
FIGURES_FOLDER = "figures"
PREDICTIONS_FOLDER = "predictions"
ADAPTER_FOLDER = "adapter"

# The state from which a run is resumed: a folder named by its step, with these beside Accelerate's own files.
CHECKPOINT_PREFIX = "checkpoint-"
PROGRESS_FILE = "progress.json"
BEST_WEIGHTS_FILE = "best.safetensors"

# A suite and a comparison: their tables, in the folder above those of the runs.
SUITE_FILE = "suite.json"
SUITE_CSV_FILE = "results.csv"
SUITE_MARKDOWN_FILE = "results.md"
COMPARISON_FILE = "compare.json"
CONVERTED_FOLDER = "converted"  # fitted conversions that a comparison's seeds share
TOKENIZER_FOLDER = "tokenizer"  # the one that all of its models have
