"""lm-eval's model ``hf-glu``: its model ``hf``, in a process that knows hf_glu.

``lm_eval --model hf-glu --model_args pretrained=FOLDER`` finds it by the entry point ``lm_eval.models``; nothing else
of hf_glu imports this module.
"""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

import hf_glu  # noqa: F401  (registers the plugin)


class GatedLM(HFLM):
    """A model of Transformers with gated FFNs, with all options of ``hf``."""
