"""What the runs of a comparison share, made once: conversions that are fitted, and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_glu.checkpoint.files import CONVERTED_FOLDER, RECORD_FILE, REPORT_FILE
from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model, load_skeleton, load_tokenizer
from hf_glu.conversion import convert, plan
from hf_glu.errors import CheckpointError
from hf_glu.training.comparing.variants import Variant
from hf_glu.training.data.models import SiteChoice
from hf_glu.training.options import ModelOptions
from hf_glu.training.record import MADE_OF, check_same, fingerprint
from hf_glu.training.results import Record


def known_folder(target: Path, made_of: Record) -> bool:
    """Return whether a folder is there, whole and made of the same.

    Raises:
        CheckpointError: it is made of something else, or was changed.
    """
    if not target.is_dir():
        return False
    if check_same(target, made_of, file=RECORD_FILE)["files"] != fingerprint(target):
        raise CheckpointError(f"{target} was changed after it was written: remove it")
    return True


def make_folder(target: Path, made_of: Record, write: Callable[[Path], object]) -> None:
    """Make a folder, which ``write`` fills, and note what it is made of.

    Raises:
        CheckpointError: it can't be written, or another process has made it of something else meanwhile.
    """
    try:
        with staged_folder(target) as stage:
            write(stage)
            write_json(stage / RECORD_FILE, {MADE_OF: made_of, "files": fingerprint(stage)})
    except CheckpointError:
        if not known_folder(target, made_of):  # else another process has made the same
            raise


def fitted_base(
    variant: Variant, job: ModelOptions, made_of: Record, folder: Path, texts: Callable[[], list[str]]
) -> Path | None:
    """Convert a variant that needs a fit, once for all seeds, since a fit takes minutes; None: it needs none.

    Args:
        variant: the variant.
        job: a run of it.
        made_of: what its conversion depends on.
        folder: the comparison's.
        texts: what it is fitted on.

    Raises:
        CheckpointError: the one that is there is made of something else, or was changed.
    """
    if variant.to is None or variant.random:
        return None
    target = folder / CONVERTED_FOLDER / variant.folder
    if known_folder(target, made_of):
        return target
    choice: SiteChoice = {"width": job.units, "layers": job.layers, "exclude": job.exclude}
    if not plan(load_skeleton(job.model), variant.to, fitted=True, **choice).needs_calibration:
        return None
    model, tokenizer, target_name = load_model(job.model), load_tokenizer(job.model), variant.to

    def write(stage: Path) -> None:
        report = convert(model, target_name, calibration=texts(), tokenizer=tokenizer, **choice)
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        write_json(stage / REPORT_FILE, report.to_dict())

    make_folder(target, made_of, write)
    return target
