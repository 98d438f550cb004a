"""The documents of a job of language modelling: those that are trained on, validated on, and looked at before."""

from __future__ import annotations

from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.reading import TEXT, Documents, read_documents, reading_rows, split_documents

OF_TOKENIZER = 100_000  # documents of a stream that a tokenizer is trained on
CALIBRATED = 2000  # letters of a document that a conversion is fitted on


def read_both(job: LanguageOptions) -> tuple[Documents, Documents]:
    """Read the documents to train on, and those to validate on.

    Raises:
        DataError, OptionError: they can't be read, or there is only one.
    """
    documents = read_documents(job.data or [], column=job.text_column, stream=job.stream)
    if job.validation:
        return documents, read_documents([job.validation], column=job.text_column)
    return split_documents(documents, job.validation_share, job.split_seed)


def tokenizer_texts(job: LanguageOptions, documents: Documents) -> list[str]:
    """Return the texts that a tokenizer is trained on: of a stream the first ones."""
    with reading_rows():
        return [row[TEXT] for row in (documents.take(OF_TOKENIZER) if job.stream else documents)]


def calibration_documents(job: LanguageOptions, documents: Documents) -> list[str]:
    """Return the beginnings of the first documents, which a conversion is fitted on."""
    count = job.calibration
    rows = documents.take(count) if job.stream else documents.select(range(min(count, len(documents))))
    with reading_rows():
        return [row[TEXT][:CALIBRATED] for row in rows]
